"""tools/smoke_sdxl.py, but for the stages themselves: `--size tiny` runs those in minutes."""

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from dspo import estimate
from dspo.data.keys import prompt_id
from dspo.data.splits import SPLITS, split_of
from dspo.params import load_params

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smoke_sdxl", ROOT / "tools/smoke_sdxl.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_full_size_is_sdxls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of the published weights; in bfloat16 two bytes each, which the estimates of memory start from."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    builders = importlib.import_module("random_sdxl").builders
    with torch.device("meta"):
        parts = {name: build().to(torch.bfloat16) for name, build in builders("full").items()}
    counts = {name: estimate.parameter_count(part) for name, part in parts.items()}
    assert counts == {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    }
    encoders = [parts["text_encoder"], parts["text_encoder_2"]]
    assert estimate.Base(parts["unet"], parts["vae"], encoders, []).size == 2 * sum(counts.values())


@pytest.mark.parametrize("error", [None, "error: train_reward ended with exit code 1"])
def test_a_run_that_fails_leaves_the_last_transcript(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str | None
) -> None:
    def smoke(work: Path, params: Path, size: str, transcript: Any) -> None:
        work.mkdir()
        transcript.say("a new line")
        if error:
            sys.exit(error)

    work, transcript = tmp_path / "work", tmp_path / "smoke.txt"
    transcript.write_text("the last one\n")
    monkeypatch.setattr(tool, "smoke", smoke)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["smoke_sdxl.py", "--work", str(work), "--transcript", str(transcript)])
    if error:
        with pytest.raises(SystemExit, match=error):
            tool.main()
    else:
        tool.main()
    assert transcript.read_text() == ("the last one\n" if error else "a new line\n")
    assert not work.exists()


def test_the_least_work_gives_every_split_something(tool: ModuleType, tmp_path: Path) -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    models = {name: raw["worlds"]["sdxl"]["base"][name] for name in ("model", "vae", "dtype")}
    tool.with_little_work(raw, 64)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    params = load_params(tmp_path / "params.yaml")
    world = params.active
    assert {name: getattr(world.base, name) for name in models} == models
    tool.write_inputs(tmp_path, 8, params.seed)
    for file, section in (("prompts.csv", world.prompts), ("rated/ratings.csv", world.ratings)):
        with (tmp_path / file).open(newline="") as lines:
            prompts = [row["prompt"] for row in csv.DictReader(lines)]
        shares = section.validation_share, section.test_share
        assert {split_of(prompt_id(prompt), params.seed, *shares) for prompt in prompts} == set(SPLITS)
    assert len(prompts) == len(SPLITS)
