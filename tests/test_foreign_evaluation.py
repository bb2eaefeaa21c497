"""Published judges through evaluation and report: from params.yaml to the page."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import test_report
import torch
import yaml
from foreign_tiny import linear_head, prefixed, save_transformers_clip, save_weights
from test_stage_evaluate import project, run_stage, stand_ins  # noqa: F401  (fixtures)

from dspo.data.files import write_json
from dspo.data.images import decode_image
from dspo.errors import UserError
from dspo.evaluation.foreign.judge import ForeignJudge
from dspo.params import load_params
from dspo.reporting.page import verdict
from dspo.stages import evaluate
from dspo.stages.report import INPUTS
from dspo.stages.report import main as report_main

PUBLISHED = ("pickscore", "aesthetics")


@pytest.fixture
def params(project: Path) -> Path:  # noqa: F811
    """The parameters of the stage's own tests, judged by two published models that lie in local files."""
    save_transformers_clip(project / "clip")
    save_weights(prefixed("layers.", linear_head(16, seed=3)), project / "head.pth")
    local = {name: {"place": str(project / name), "revision": None} for name in ("clip", "head.pth")}
    raw = yaml.safe_load((project / "params.yaml").read_text())
    raw["worlds"]["shapes"]["evaluate"]["judges"] = [
        {"name": "pickscore", "model": local["clip"]},
        {"name": "aesthetics", "clip": local["clip"], "model": local["head.pth"]},
    ]
    path = project / "params-published.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_from_parameters_to_the_page(
    project: Path,  # noqa: F811
    params: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = run_stage(project, tmp_path, monkeypatch, params.name)

    tuned = pq.read_table(output / "tuned.parquet").to_pylist()
    pictures = [decode_image(row["image"], "row") for row in tuned]
    captions = [row["caption"] for row in tuned]
    for settings in load_params(params).active.evaluate.foreign_judges:
        alone = ForeignJudge(settings, torch.device("cpu")).score(pictures, captions, 4)
        np.testing.assert_allclose([row[settings.name] for row in tuned], alone, rtol=1e-5, atol=1e-5)

    results = json.loads((output / "results.json").read_text())
    rates = results["tuned_against_base"]["win_rates"]
    assert set(rates) == {"reward_overall", *PUBLISHED}
    assert all(rates[name]["tau"] == 0 for name in PUBLISHED)
    assert set(PUBLISHED) <= set(results["base_against_base"]) & set(results["hacks"]["blur"])
    with (output / "win_rates.csv").open() as stream:
        judged = {(row["comparison"], row["judge"]) for row in csv.DictReader(stream)}
    assert {("tuned against base", name) for name in PUBLISHED} <= judged
    assert set(PUBLISHED) <= set(pd.read_csv(output / "deltas.csv").columns)

    page = report(output, tmp_path, params)
    assert "Published models, which took no part in training: PickScore, LAION aesthetics." in page
    assert "No tie band is known for them" in page and "the only judge of this world" not in page
    assert page.count(">PickScore</th>") == 3  # win rates, mean scores, comparisons


def report(evaluation: Path, folder: Path, params: Path) -> str:
    """The page of an evaluation, with the other stages' outputs of the report's own tests."""
    write_json(test_report.REWARD, folder / "reward" / "report.json")
    write_json({"backbone_sha256": test_report.BACKBONE}, folder / "reward" / "config.json")
    columns = ("train_loss", *(f"validation_{n}_{k}" for n in ("nll", "accuracy") for k in ("raw", "ema")))
    pd.DataFrame({"epoch": [1, 2]} | {name: [2.0, 1.0] for name in columns}).to_csv(folder / "reward" / "curve.csv")
    write_json(test_report.TRAINING, folder / "training" / "metrics.json")
    pd.DataFrame({"step": [1, 2], "loss": [1.0, 0.5]}).to_csv(folder / "training" / "log.csv")
    pd.DataFrame({"step": [0, 1], "loss": [1.0, 0.5]}).to_csv(folder / "training" / "epochs.csv")
    test_report.write_data(folder)
    paths = {name: folder / name for name in (*INPUTS, "studies")} | {"evaluation": evaluation}
    argv = ["--params", str(params), "--output", str(folder / "reports")]
    argv += [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    report_main(argv)
    return (folder / "reports" / "index.html").read_text()


def test_the_verdict_names_what_each_published_judge_says() -> None:
    result = test_report.results(test_report.rate(0.75, 0.7, 0.8))
    rates, state = result["tuned_against_base"]["win_rates"], result["verdict"]
    del rates["gold_overall"], rates["second"]
    for name, low, high in (("pickscore", 0.6, 0.7), ("hpsv2.1", 0.3, 0.4), ("clip_score", 0.45, 0.55)):
        rates[name] = test_report.rate((low + high) / 2, low, high)
        state["improved"][name], state["worse"][name] = low > 0.5, high < 0.5
    said = verdict(result)
    assert said.startswith("Improved by its own training reward: ")
    assert "Judges that it never saw: improved by PickScore; worse by HPSv2.1; not separable by CLIP score." in said


def test_missing_weights_are_said_before_any_work(
    project: Path,  # noqa: F811
    params: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = yaml.safe_load(params.read_text())
    raw["worlds"]["shapes"]["evaluate"]["judges"][1]["model"]["place"] = "models/judges/head.pth"
    (project / "params-missing.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(evaluate, "_sample", lambda *args: pytest.fail("sampled"))
    with pytest.raises(UserError, match=r"(?s)aesthetics: models/judges/head\.pth: missing.*curl -L --create-dirs -o"):
        run_stage(project, tmp_path, monkeypatch, "params-missing.yaml")
    assert not (tmp_path / "evaluation").exists() and not (tmp_path / "scratch").exists()


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        ([{"name": "pickscore", "model": {"place": "x", "revision": None}}] * 2, "each judge once"),
        ([{"name": "pickscore", "clip": {"place": "x", "revision": None}}], "judges"),
        ([{"name": "hpsv2", "model": {"place": "x", "revision": None}}], "judges"),
        (["pickscore"], "judges"),
    ],
)
def test_judges_that_are_declared_wrongly(params: Path, tmp_path: Path, judges: list[object], message: str) -> None:
    raw = yaml.safe_load(params.read_text())
    raw["worlds"]["shapes"]["evaluate"]["judges"] = judges
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=rf"worlds\.shapes\.evaluate.*{message}"):
        load_params(tmp_path / "params.yaml")
