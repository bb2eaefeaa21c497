"""The examples of docs/your_own.md, as they stand there, on a small run of the pipeline."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from tiny_run import ROOT, shell, tiny_run

from dspo.data.images import decode_image, read_table

__all__ = ["tiny_run"]  # a fixture
PAGE = (ROOT / "docs/your_own.md").read_text(encoding="utf-8")
EXAMPLES = ("Prompts", "Ratings", "Pairs", "Reward", "Judge", "Loss")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)

Example = Callable[[str], tuple[Path, str]]


def blocks(heading: str) -> list[tuple[str, str]]:
    """Kind and contents of the blocks below a heading."""
    _, _, section = PAGE.partition(f"\n## {heading}\n")
    return BLOCK.findall(section.partition("\n## ")[0])


@pytest.fixture
def example(tiny_run: Path, tmp_path: Path) -> Example:
    """Do what a section says in a copy of the small run; returns the copy, and what the commands printed."""

    def example(heading: str) -> tuple[Path, str]:
        root = Path(shutil.copytree(tiny_run, tmp_path / "root"))
        printed = ""
        for kind, text in blocks(heading):
            if kind == "python":  # its first line names the file
                (root / text.splitlines()[0].removeprefix("# ")).write_text(text)
            elif kind == "diff":
                (tmp_path / "change.diff").write_text(text)
                shell(root, "git", "apply", str(tmp_path / "change.diff"))
            else:
                printed += shell(root, "bash", "-euc", text, env={"PYTHONPATH": str(root / "src")}).stdout
        return root, printed

    return example


def pairs(root: Path) -> pd.DataFrame:
    parts = [read_table(root / f"data/pairs/{split}.parquet") for split in ("train", "validation")]
    return pd.concat([pd.DataFrame(part.to_pydict()) for part in parts])


def trained(root: Path) -> pd.DataFrame:
    """Rows of the training's epochs; DVC knows the adapter and its pairs, and would not make them again."""
    assert (root / "models/adapter/adapter_model.safetensors").is_file()
    assert json.loads(shell(root, "dvc", "status", "--json", "train").stdout) == {}
    return pd.read_csv(root / "models/training/epochs.csv")


def in_dvc_alone(root: Path, data: str) -> bool:
    """Git has the hash and none of the files, and DVC brings them back."""
    before = sorted((root / data).rglob("*"))
    shutil.rmtree(root / data)
    shell(root, "dvc", "checkout", f"{data}.dvc")
    assert shell(root, "git", "ls-files", data, f"{data}.dvc").stdout.split() == [f"{data}.dvc"]
    return bool(before) and sorted((root / data).rglob("*")) == before


def test_every_section_has_an_example_that_is_run() -> None:
    assert tuple(re.findall(r"^## (.*)$", PAGE, re.M)) == EXAMPLES
    assert all(any(kind == "bash" for kind, _ in blocks(name)) for name in EXAMPLES)
    assert sum(len(blocks(name)) for name in EXAMPLES) == len(re.findall(r"^```\w", PAGE, re.M))


def test_prompts(example: Example) -> None:
    root, _ = example("Prompts")
    wanted = set(pd.read_csv(root / "my-prompts.csv")["prompt"])
    seen = {caption for split in ("train", "validation") for caption in captions(root, split)}
    assert seen and seen <= wanted
    assert (root / "outputs/mine/dora_weights/adapter_model.safetensors").is_file()
    assert len(list((root / "outputs/my-images/images").glob("*.png"))) == len(wanted)


def captions(root: Path, split: str) -> list[str]:
    table = read_table(root / f"outputs/mine/preference_pairs/{split}.parquet", ["caption"])
    return list(table["caption"].to_pylist())


def test_ratings(example: Example) -> None:
    root, _ = example("Ratings")
    summary = json.loads((root / "data/ratings/summary.json").read_text())
    assert summary["pairs_read"] == 60
    assert set(json.loads((root / "models/reward/config.json").read_text())["untrained"]) == {
        "alignment", "fidelity", "detail"
    }  # fmt: skip
    assert in_dvc_alone(root, "data/raw/shapes-rated.parquet")
    report = json.loads((root / "models/reward/report.json").read_text())
    assert report["n_pairs"] == summary["test"]["pairs"]


def test_pairs(example: Example) -> None:
    root, _ = example("Pairs")
    rows = pairs(root)
    assert len(rows) == 10 and all(caption.startswith("a meadow") for caption in rows["caption"])
    assert len(trained(root)) == 2
    assert in_dvc_alone(root, "my-pairs")


def test_reward(example: Example) -> None:
    root, _ = example("Reward")
    rows = pairs(root)
    spread = {
        side: [decode_image(data, "pair").std() for data in rows[f"jpg_{side}"]] for side in (0, 1)
    }  # winners stand first
    assert len(rows) and all(winner < loser for winner, loser in zip(spread[0], spread[1], strict=True))
    assert len(trained(root)) == 2


def test_judge(example: Example) -> None:
    root, printed = example("Judge")
    settings = yaml.safe_load((root / "params.yaml").read_text())["worlds"]["shapes"]["evaluate"]
    images = len(read_table(root / "data/evaluation/base.parquet", ["prompt_id"]))
    assert f"n_images={images}, n_prompts={settings['num_prompts']}, tau=0.0" in printed


def test_loss(example: Example) -> None:
    root, _ = example("Loss")
    untrained, after = pd.read_csv(root / "models/training/epochs.csv")["loss"]
    assert untrained == 1.0
    assert after != 1.0
