"""The model card and the data statement: figures equal their inputs, the front matter is a hub's, the example runs."""

import hashlib
import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from test_report import BACKBONE, DATA, GOOD, REWARD, ROOT, TRAINING, project, report
from tiny import RESOLUTION, save_tiny_pipeline, tiny_unet

from dspo.params import Params, load_params
from dspo.preference.dora import add_dora
from dspo.reporting.card import SCHEDULERS, Run, data_statement, model_card
from dspo.reporting.summary import summarise

__all__ = ["project"]  # a fixture
SHIPPED = load_params(ROOT / "params.yaml")
IMPORTED = {"pairs": 10, "pairs_train": 9, "pairs_validation": 1, "left_out": {"ties": 0, "repeated": 0}}


def changed(world: str = "shapes", **sections: dict[str, object]) -> Params:
    """The shipped parameters with some keys of a world's sections replaced, and the world switched on."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"world": world}
    for name, values in sections.items():
        raw["worlds"][world][name] |= values
    return Params.model_validate(raw)


def run(params: Params = SHIPPED, **more: object) -> Run:
    made = Run(
        params=params,
        results=GOOD,
        summary=summarise(GOOD, REWARD, BACKBONE, TRAINING, None),
        reward=REWARD,
        training=TRAINING,
        **DATA,
        adapter="models/adapter",
        adapter_sha256="0" * 64,
        hashes={"data/pairs": "1" * 32},
    )
    return replace(made, **more)


def sdxl(**sections: dict[str, object]) -> Run:
    """A run without gold judge, on ratings and pairs of people."""
    results = deepcopy(GOOD)
    del results["tuned_against_base"]["win_rates"]["gold_overall"], results["tuned_against_base"]["win_rates"]["second"]
    results["tuned_against_base"]["fully_right"] = None
    results["tuned_against_base"]["diversity"]["among_fully_right"] = None
    results["verdict"]["over_optimised"] = None
    unknown = {**REWARD, "base": REWARD["base"] | {"ceiling_macro_f1": None}, "ceiling_macro_f1": None}
    ratings = DATA["ratings"] | {"left_out": {"repeated": 3, "leaking": 4}}
    summary = summarise(results, unknown, BACKBONE, TRAINING, None)
    return run(changed("sdxl", **sections), results=results, summary=summary, reward=unknown, ratings=ratings)


def test_the_stage_writes_both_pages(project: Path, tmp_path: Path) -> None:
    output = report(project, tmp_path / "reports")
    card, statement = (output / name for name in ("model_card.md", "data_statement.md"))
    assert hashlib.sha256(b"weights").hexdigest() in card.read_text()
    assert "[data statement](data_statement.md)" in card.read_text()
    listed = re.findall(r"^\| (\S+) \| [0-9a-f]{32} \|$", statement.read_text(), re.M)
    names = ("evaluation", "reward", "training", "adapter", "pairs", "ratings", "prompts")
    assert listed == [str(project / name) for name in names]


@pytest.mark.parametrize(("of", "licence"), [(run(), "apache-2.0"), (sdxl(), "openrail++")])
def test_the_front_matter_is_one_that_the_hub_reads(of: Run, licence: str) -> None:
    data = ModelCard(model_card(of)).data
    base = of.params.active.base.model
    assert (data.license, data.base_model, data.library_name) == (licence, base, "peft")
    assert data.pipeline_tag == "text-to-image" and {"dora", "dspo"} <= set(data.tags)


def test_the_card_says_what_the_run_did() -> None:
    train = run().params.active.train
    card = model_card(run())
    assert "Improved by the gold judge: tuned beats base on 75.0%" in card
    assert "| gold overall | 0.750 | 0.700 to 0.800 | 400 |" in card
    assert f"| loss | `{train.loss}`, beta {train.beta:g}, lam {train.lam:g} |" in card
    assert "| steps | 200 of 16 pairs |" in card and "| pairs | 300, and 30 held out |" in card
    assert f"| learning rate | {train.lr:g} after {train.warmup_steps} steps of warm-up |" in card
    assert "| reward model, macro-F1 | 0.850 (0.840 to 0.860) on 2500 held-out pairs |" in card
    assert "800 images of 400 held-out prompts" in card
    assert "No rating labelled detail" in card
    assert "By the training reward, base images win after a trivial change: sharpening 0.90 (0.80 to 0.95)." in card
    assert "Short of its bound" not in card and "control" not in card


def test_the_card_owns_up() -> None:
    results = deepcopy(GOOD)
    results["verdict"]["over_optimised"] = True
    results["tuned_against_base"]["fully_right"]["difference"]["low"] = -0.01
    params = changed(train={"random_labels": True})
    card = model_card(run(params, results=results, summary=summarise(results, REWARD, BACKBONE, TRAINING, None)))
    assert "Short of its bound: fully right, lower end of its interval is -0.010, > 0 was aimed at." in card
    assert "**Over-optimised**" in card
    assert "| control | random labels" in card


def test_without_a_gold_judge_and_with_pairs_of_people() -> None:
    of = replace(sdxl(), pairs=IMPORTED)
    card, statement = model_card(of), data_statement(of)
    base = of.params.active.base
    assert f"`{base.model}` at commit `{base.revision}`" in card
    assert "Attachment A" in card and "MIT licence" in card
    assert "| the most that the ratings' noise allows | not known |" in card
    assert "Every judge is a model" in card and "Short of its bound" not in card and "Fully right" not in card
    assert "Brought by `dspo import-pairs`" in statement and "made of no training prompts" in statement
    assert "layout `pickapic`" in statement and "4 that share an image" in statement
    assert "may hold data of people" in statement and "Simulated" not in statement


def test_an_unknown_base_has_an_unknown_licence() -> None:
    card = model_card(run(changed(base={"model": "/models/mine.safetensors"})))
    assert ModelCard(card).data.license == "other" and "look it up" in card
    assert 'from_single_file("/models/mine.safetensors", ' in card


def test_the_data_statement_counts_what_is_there() -> None:
    statement = data_statement(run(changed(ratings={"wrong_taste": 0.5})))
    assert "| train | 1000 |" in statement and "| test | 500 |" in statement
    assert "| train | 50 | 20 | 0.100 | 0.500 |" in statement
    assert "5 raters a pair" in statement and "temperature 0.034" in statement and "11% ties" in statement
    assert "wrong taste 0.5" in statement and "macro-F1 of 0.904" in statement
    assert "3000 images of `models/shapes-sdxl`" in statement and "| held out | 30 |" in statement
    assert "Candidates were made of 299 training prompts" in statement
    assert "ddim, 12 steps, guidance 3; dpmpp_2m, 12 steps, guidance 3" in statement
    assert "No data of people" in statement


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_example_makes_an_image(scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_pipeline(tmp_path / "base")
    sampler = {"scheduler": scheduler, "steps": 2, "guidance_scale": 2.0}
    params = changed(base={"model": "base", "vae": "base/vae", "resolution": RESOLUTION}, evaluate={"sampler": sampler})
    add_dora(tiny_unet(), params.active.train, seed=0).save(tmp_path / "adapter", "base")
    (code,) = re.findall(r"```python\n(.*?)```", model_card(run(params, adapter="adapter")), re.S)
    made: dict[str, object] = {}
    exec(code, made)
    assert made["image"].size == (RESOLUTION, RESOLUTION)
    assert type(made["pipe"].scheduler).__name__ == SCHEDULERS[scheduler].partition(".")[0]
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["use_dora"]
