"""The evaluate stage on a tiny pipeline: its outputs, its resumption, and images that others can make again."""

import json
import runpy
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tiny import save_tiny_pipeline, tiny_unet

from dspo.data.images import decode_image
from dspo.data.keys import prompt_id
from dspo.data.prompts import Prompt, write_split
from dspo.diffusion.sampling import Sample
from dspo.errors import UserError
from dspo.evaluation import judges, paired
from dspo.params import load_params
from dspo.stages import evaluate

REPOSITORY = Path(__file__).parents[1]
TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
TEST = ["a red circle on a blue background", "a small star", "a green ring above a pink cross", "a teal square"]
TRAIN = ["a red circle on a blue background", "a large dotted orange ring"]


class Brightness:
    """Stands in for the reward model: likes bright images."""

    heads = ("overall", "alignment")
    untrained = ("alignment",)

    def score(self, images: Sequence[np.ndarray], captions: Sequence[str], batch_size: int) -> np.ndarray:
        return np.array([[image.mean(), 0.0] for image in images], dtype=np.float32)


class RedJudge:
    @classmethod
    def load(cls, folder: Path) -> "RedJudge":
        return cls()

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        return np.array([image[..., 0].mean() for image in images])


def save_tiny_adapter(folder: Path) -> None:
    """A DoRA adapter in peft's own format whose every weight counts."""
    config = LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=TARGETS)
    model = get_peft_model(tiny_unet(), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    name_base(folder, "models/base")


def name_base(adapter: Path, base: str) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    save_tiny_pipeline(folder / "base")
    save_tiny_adapter(folder / "adapter")
    (folder / "reward").mkdir()
    (folder / "judge").mkdir()
    for name, texts in (("test", TEST), ("train", TRAIN)):
        write_split([Prompt(prompt_id(text), text) for text in texts], folder / f"{name}.csv")
    raw = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    world = raw["worlds"]["shapes"]
    world["base"] |= {"model": str(folder / "base"), "resolution": 64}
    world["evaluate"] |= {
        "sampler": {"scheduler": "ddim", "steps": 2, "guidance_scale": 3.0},
        "default_sampler": {"scheduler": "ddim", "steps": 1, "guidance_scale": 2.0},
        "num_prompts": 4,
        "seeds_per_prompt": 2,
        "diversity_prompts": 2,
        "diversity_seeds": 3,
        "bootstrap_resamples": 50,
        "batch_size": 4,
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    world["evaluate"]["judges"] = []
    (folder / "params-reward-only.yaml").write_text(yaml.safe_dump(raw))
    return folder


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "load_reward", lambda folder, device: Brightness())
    monkeypatch.setattr(judges, "SecondJudge", RedJudge)
    monkeypatch.setenv("DSPO_PROCESSES", "1")
    monkeypatch.setenv("DSPO_DEVICE", "cpu")


def run_stage(project: Path, where: Path, monkeypatch: pytest.MonkeyPatch, params: str = "params.yaml") -> Path:
    monkeypatch.setenv("DSPO_SCRATCH", str(where / "scratch"))
    names = {"prompts": "test.csv", "train-prompts": "train.csv", "adapter": "adapter", "reward": "reward"}
    argv = ["--params", str(project / params), "--second-judge", str(project / "judge")]
    argv += [part for name, file in names.items() for part in (f"--{name}", str(project / file))]
    evaluate.main([*argv, "--output", str(where / "evaluation")])
    return where / "evaluation"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def evaluation(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judges, "load_reward", lambda folder, device: Brightness())
        patch.setattr(judges, "SecondJudge", RedJudge)
        patch.setenv("DSPO_PROCESSES", "1")
        patch.setenv("DSPO_DEVICE", "cpu")
        return run_stage(project, tmp_path_factory.mktemp("run"), patch)


def test_outputs(evaluation: Path) -> None:
    assert sorted(contents(evaluation)) == [
        "base.parquet",
        "deltas.csv",
        "results.json",
        "tuned.parquet",
        "win_rates.csv",
    ]
    base, tuned = (pq.read_table(evaluation / f"{name}.parquet").to_pylist() for name in ("base", "tuned"))
    assert len(base) == len(tuned) == 2 * 3 + 2 * 2
    key = ("prompt_id", "sample_index", "noise_index", "guidance_scale")
    assert [[row[k] for k in key] for row in base] == [[row[k] for k in key] for row in tuned]
    assert all(a["image"] != b["image"] for a, b in zip(base, tuned, strict=True))
    assert "reward_alignment" not in base[0] and {"reward_overall", "gold_overall", "second"} <= set(base[0])


def test_results(evaluation: Path) -> None:
    results = json.loads((evaluation / "results.json").read_text())
    rates = results["tuned_against_base"]["win_rates"]
    assert {"reward_overall", "gold_overall", "gold_detail", "second"} <= set(rates)
    assert rates["reward_overall"]["n_images"] == 10
    assert results["base_against_base"]["gold_overall"]["n_images"] == 4
    assert results["best_of_n"]["best_against_base"]["reward_overall"]["win_rate"] == 1
    assert results["best_sampler_against_default"]["reward_overall"]["n_images"] == 2
    assert sorted(results["hacks"]) == ["blur", "contrast", "saturation", "sharpening"]
    seen, unseen = (results["combinations"][name]["reward_overall"]["n_prompts"] for name in ("seen", "unseen"))
    assert (seen, unseen) == (1, 3)
    assert results["untrained_heads"] == ["alignment"]


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    project: Path, evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = paired.sample
    drawn: list[Sample] = []

    def counted(*args: Any) -> Iterator[Sample]:
        for one in original(*args):
            if len(drawn) == dies_at:
                raise KeyboardInterrupt
            drawn.append(one)
            yield one

    dies_at = 4 + 4 + 1  # in the third batch of base, the second one's images not yet written
    monkeypatch.setattr(paired, "sample", counted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(project, tmp_path, monkeypatch)
    assert not (tmp_path / "evaluation").exists()
    drawn, dies_at = [], -1
    assert contents(run_stage(project, tmp_path, monkeypatch)) == contents(evaluation)
    assert len(drawn) == (4 + 2) + 2 + (4 + 4 + 2)  # base, default, tuned: the first batch is not sampled twice


def test_a_world_without_other_judges_reports_the_reward_alone(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = run_stage(project, tmp_path, monkeypatch, "params-reward-only.yaml")
    results = json.loads((output / "results.json").read_text())
    assert list(results["tuned_against_base"]["win_rates"]) == ["reward_overall"]
    assert results["combinations"] is None and results["tuned_against_base"]["fully_right"] is None
    assert results["verdict"]["over_optimised"] is None


def test_tuned_images_are_made_again_by_diffusers_and_peft_alone(project: Path, evaluation: Path) -> None:
    script = runpy.run_path(str(REPOSITORY / "docs" / "load_adapter.py"))
    names = {"base": project / "base", "adapter": project / "adapter", "evaluation": evaluation}
    different = script["main"]([part for name, path in names.items() for part in (f"--{name}", str(path))])
    assert different == 0


def test_the_script_uses_none_of_our_code() -> None:
    assert "dspo" not in (REPOSITORY / "docs" / "load_adapter.py").read_text().replace("dspo train", "")


def test_no_second_judge(project: Path, tmp_path: Path) -> None:
    argv = ["--params", str(project / "params.yaml"), "--prompts", "x", "--train-prompts", "x", "--adapter", "x"]
    with pytest.raises(UserError, match="--second-judge"):
        evaluate.main([*argv, "--reward", "x", "--output", str(tmp_path / "out")])


def test_an_adapter_of_another_base_of_equal_shapes(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(project, tmp_path / "project")
    name_base(other / "adapter", "someone/else")
    with pytest.raises(UserError, match="was trained on 'someone/else'"):
        run_stage(other, tmp_path, monkeypatch)
    assert not (tmp_path / "evaluation").exists()


def test_no_prompts(project: Path, tmp_path: Path) -> None:
    write_split([], tmp_path / "empty.csv")
    argv = ["--params", str(project / "params-reward-only.yaml"), "--prompts", str(tmp_path / "empty.csv")]
    with pytest.raises(UserError, match="no prompts to evaluate on"):
        evaluate.main([*argv, "--train-prompts", "x", "--adapter", "x", "--reward", "x", "--output", "x"])


def test_prompts_that_the_gold_judge_cannot_read_are_refused_before_any_work(project: Path, tmp_path: Path) -> None:
    write_split([Prompt("0", "a dog in a park")], tmp_path / "odd.csv")
    argv = ["--params", str(project / "params.yaml"), "--prompts", str(tmp_path / "odd.csv"), "--train-prompts", "x"]
    with pytest.raises(UserError, match=r"a dog in a park.*not of the shapes grammar.*evaluate\.judges"):
        evaluate.main([*argv, "--adapter", "x", "--reward", "x", "--second-judge", "x", "--output", "x"])


def test_images_are_what_the_parameters_say(project: Path, evaluation: Path) -> None:
    settings = load_params(project / "params.yaml").active
    row = pq.read_table(evaluation / "base.parquet").to_pylist()[0]
    assert decode_image(row["image"], "row 0").shape == (settings.base.resolution, settings.base.resolution, 3)
    assert (row["scheduler"], row["steps"], row["guidance_scale"]) == ("ddim", 2, 3.0)
