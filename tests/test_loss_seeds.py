"""The matrix of losses and seeds: its table against figures by hand, and the pipeline itself by the real `dvc`."""

import csv
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tiny_run import ROOT, shell, tiny_run

from dspo.data.files import write_json
from dspo.errors import UserError
from dspo.params import load_params
from dspo.reporting.studies import study_tables
from dspo.studies.loss_cell import changed, load_study
from dspo.studies.loss_cell import main as cell_main
from dspo.studies.loss_seeds import main as table_main

__all__ = ["tiny_run"]  # a fixture
FOLDER = Path("pipelines/losses")
PIPELINE = str(FOLDER / "dvc.yaml")
RESULTS = {f"loss_seeds.{kind}" for kind in ("json", "csv", "md", "png")}
PARAMS = load_params(ROOT / "params.yaml")
TIE = PARAMS.active.evaluate.tie_band
STUDY: dict[str, Any] = {
    "losses": ["sft", "dpo"],
    "seeds": [0, 1],
    "prompts": 2,
    "images": 2,
    "train": {"sft": {"loss": "sft", "lr": 0.03}, "dpo": {"loss": "dpo", "lr": 0.03, "beta": 10.0}},
}


def cell(gold: Iterable[float], second: float = 0.5, right: Iterable[float] = (1, 0, 0, 0), drift: float = 0.0) -> Any:
    scores = {"gold_overall": list(gold), "reward_overall": [1.0] * 4, "second": [second] * 4}
    return {"ran_away": False, "drift": drift, "scores": scores | {"gold_fully_right": list(right)}}


def made_up(folder: Path, cells: dict[str, Any]) -> Path:
    """The folder, after the table was made in it of these cells and a base that scores 0.5 throughout."""
    for name, value in ({"base": cell([0.5] * 4)} | cells).items():
        write_json(value, folder / "cells" / f"{name}.json")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    paths = {"params": ROOT / "params.yaml", "study": folder / "study.yaml", "cells": folder / "cells"}
    table_main([text for name, path in (paths | {"output": folder}).items() for text in (f"--{name}", str(path))])
    return folder


def test_the_table_says_what_one_counts_by_hand(tmp_path: Path) -> None:
    up, down, tie = 0.5 + 2 * TIE, 0.5 - 2 * TIE, 0.5 + TIE / 2
    cells = {
        "sft-0": cell([up, up, down, tie], second=0.6, right=(1, 1, 0, 0), drift=0.1),  # 2 of 3
        "sft-1": cell([up, tie, down, tie], second=0.6, right=(0, 0, 0, 1), drift=0.3),  # 1 of 2
        "dpo-0": cell([up, up, up, up], second=0.4, right=(1, 1, 1, 1), drift=0.2),  # 4 of 4
        "dpo-1": cell([tie, tie, tie, tie], second=0.4, right=(0, 0, 0, 0), drift=0.2),  # none decided
    }
    report = json.loads((made_up(tmp_path, cells) / "loss_seeds.json").read_text())
    sft, dpo = report["arms"]["sft"], report["arms"]["dpo"]
    assert sft["against_base"]["win_rate"] == pytest.approx(3 / 5)
    assert sft["against_base"]["tie_share"] == pytest.approx(3 / 8)
    assert (sft["against_base"]["n_seeds"], sft["against_base"]["n_prompts"]) == (2, 2)
    # Prompts drawn anew: the first alone has 3 wins of 3, the second alone 2 losses of 2.
    assert (sft["against_base"]["low"], sft["against_base"]["high"]) == (0, 1)
    assert {seed: row["win_rate"] for seed, row in sft["seeds"].items()} == {"0": pytest.approx(2 / 3), "1": 0.5}
    assert sft["seed_sd"] == pytest.approx((2 / 3 - 1 / 2) / 2**0.5)
    assert sft["fully_right"] == pytest.approx(3 / 8) and sft["drift"] == pytest.approx(0.2)
    assert sft["against_base_second"]["win_rate"] == 1 and dpo["against_base_second"]["win_rate"] == 0
    assert dpo["against_base"]["win_rate"] == 1 and dpo["fully_right"] == 0.5
    assert dpo["seeds"]["1"]["win_rate"] is None and dpo["seed_sd"] is None
    # dpo less sft, seed by seed: (0, 0, +, +) and (-, 0, +, 0).
    (contest,) = report["head_to_head"]
    assert (contest["first"], contest["second"], contest["win_rate"]) == ("dpo", "sft", pytest.approx(3 / 4))
    assert report["base"]["fully_right"] == 0.25
    assert report["settings"] == {"losses": ["sft", "dpo"], "seeds": 2, "prompts": 2, "images_per_prompt": 2}

    rows = list(csv.DictReader((tmp_path / "loss_seeds.csv").open()))
    assert [(row["loss"], row["seed"]) for row in rows] == [("sft", "0"), ("sft", "1"), ("dpo", "0"), ("dpo", "1")]
    assert [row["win_rate"] for row in rows[1:]] == ["0.5", "1.0", ""]
    assert [row["fully_right"] for row in rows] == ["0.5", "0.25", "1.0", "0.0"]
    assert "| sft | 0.60 (0.00 to 1.00) | 1.00 (1.00 to 1.00) |" in (tmp_path / "loss_seeds.md").read_text()
    with Image.open(tmp_path / "loss_seeds.png") as picture:
        assert picture.width > picture.height > 100


def test_a_loss_of_which_a_training_ran_away_has_its_other_seeds_only(tmp_path: Path) -> None:
    good = cell([0.9] * 4, drift=0.1)
    cells = {"sft-0": good, "sft-1": good, "dpo-0": good, "dpo-1": {"ran_away": True}}
    report = json.loads((made_up(tmp_path, cells) / "loss_seeds.json").read_text())
    dpo = report["arms"]["dpo"]
    assert dpo["ran_away"] == 1 and dpo["against_base"] is dpo["against_base_second"] is dpo["drift"] is None
    assert dpo["seeds"]["0"]["win_rate"] == 1 and dpo["seeds"]["1"]["drift"] is None
    assert report["head_to_head"] == []
    (shown,) = study_tables({"loss_seeds": report})
    assert [row[0] for row in shown.rows] == STUDY["losses"] and "ran away" in shown.rows[1]


def test_a_cell_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sft-1\.json: no such file"):
        made_up(tmp_path, {"sft-0": cell([0.5] * 4)})


def test_the_shipped_settings_are_settings_and_every_row_has_them() -> None:
    study = load_study(ROOT / FOLDER / "params.yaml")
    assert set(study.losses) == set(study.train)
    own = {name: changed(PARAMS.active.train, study, name) for name in study.losses}
    assert {name for name, train in own.items() if train.loss != name} == {"fixed_draw"}
    assert own["fixed_draw"] == own["dspo_hinge"].model_copy(update={"fixed_draws": 1})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"losses": []}, "params.yaml: losses: List should have at least 1 item"),
        ({"prompt": 3}, "params.yaml: prompt: Extra inputs"),
        ({"train": {"dpo": {"betta": 1.0}}}, "train.dpo: betta: Extra inputs"),
        ({"train": {"dpo": {"beta": "1"}}}, "train.dpo: beta: Input should be a valid number"),
        ({"train": {}}, "train.dpo: no settings of this name"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(STUDY | change))
    with pytest.raises(UserError, match=re.escape(said)):
        changed(PARAMS.active.train, load_study(tmp_path / "params.yaml"), "dpo")


def test_a_loss_without_a_seed_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("params", "study", "prompts", "reward", "second-judge", "output")
    paths = [text for name in names for text in (f"--{name}", "x")]
    with pytest.raises(SystemExit):
        cell_main([*paths, "--loss", "dpo"])
    assert "go together" in capsys.readouterr().err


def ran(printed: str) -> list[str]:
    """Stages of the matrix's pipeline that a run of DVC did."""
    return re.findall(rf"Running stage '{PIPELINE}:([\w@-]+)'", printed)


def test_dvc_runs_the_matrix_and_after_a_change_no_more_than_it_touches(tiny_run: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_run, tmp_path / "root"))
    (root / FOLDER).mkdir(parents=True)
    shutil.copy(ROOT / PIPELINE, root / PIPELINE)
    study = STUDY | {"seeds": [0]}
    (root / FOLDER / "params.yaml").write_text(yaml.safe_dump(study))

    first = shell(root, "dvc", "repro", PIPELINE).stdout
    assert sorted(ran(first)) == ["base", "cell@dpo-0", "cell@sft-0", "table"]
    assert "Running stage 'train'" not in first
    assert not list((root / "scratch/loss_cell").glob("*/*"))
    assert json.loads(shell(root, "dvc", "status", "--json").stdout) == {}  # the report does not wait for a cell either

    made = {path.stem: json.loads(path.read_text()) for path in (root / FOLDER / "cells").glob("*.json")}
    assert set(made) == {"base", "sft-0", "dpo-0"}
    gold = {name: value["scores"]["gold_overall"] for name, value in made.items()}
    assert all(len(scores) == 4 for scores in gold.values())
    assert len({json.dumps(scores) for scores in gold.values()}) == 3  # each an adapter of its own
    arms = json.loads((root / FOLDER / "loss_seeds.json").read_text())["arms"]
    for loss, arm in arms.items():
        deltas = [a - b for a, b in zip(gold[f"{loss}-0"], gold["base"], strict=True)]
        wins, losses = sum(d > TIE for d in deltas), sum(d < -TIE for d in deltas)
        assert arm["against_base"]["n_decided"] == wins + losses > 0
        assert arm["against_base"]["win_rate"] == pytest.approx(wins / (wins + losses))
        assert arm["drift"] == made[f"{loss}-0"]["drift"]

    kept = set(shell(root, "git", "status", "--porcelain", "--untracked-files=all").stdout.split())
    assert {str(FOLDER / name) for name in (*RESULTS, "dvc.lock", "cells/dpo-0.json")} <= kept
    metrics = json.loads(shell(root, "dvc", "metrics", "show", "--json").stdout)[""]["data"]
    assert metrics[str(FOLDER / "loss_seeds.json")]["data"]["arms"]["sft"]["drift"] == arms["sft"]["drift"]
    drawn = json.loads(shell(root, "dvc", "plots", "show", "--json", "--out", tmp_path / "plots").stdout)
    assert "errors" not in drawn
    assert {"win rate against drift", str(FOLDER / "loss_seeds.png")} <= set(drawn["data"])

    # Another beta of dpo and one seed more: what sft has at its first seed stays.
    study["train"] = study["train"] | {"dpo": study["train"]["dpo"] | {"beta": 20.0}}
    (root / FOLDER / "params.yaml").write_text(yaml.safe_dump(study | {"seeds": [0, 1]}))
    stale = {"cell@dpo-0", "cell@dpo-1", "cell@sft-1", "table"}
    assert set(json.loads(shell(root, "dvc", "status", "--json").stdout)) == {f"{PIPELINE}:{name}" for name in stale}
