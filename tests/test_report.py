"""The report: figures equal their inputs, prompts are text, equal bytes, gates decide, the page fits a browser."""

import hashlib
import json
import re
import shutil
import tracemalloc
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from chromium import Browser, clean
from gallery import assert_page
from PIL import Image

from dspo.data.files import write_json
from dspo.data.images import encode_png, write_table
from dspo.data.records import HEADS
from dspo.errors import UserError
from dspo.reporting.gates import gates
from dspo.reporting.gates import main as gates_main
from dspo.reporting.page import verdict
from dspo.reporting.pictures import SHOWN, choose, data_uri, differences
from dspo.reporting.studies import STUDIES, study_tables
from dspo.reporting.summary import SAME_RATINGS, summarise
from dspo.reporting.tables import JUDGES, words
from dspo.stages.report import INPUTS, digest
from dspo.stages.report import main as report_main

ROOT = Path(__file__).parents[1]
TOLD = "[...document.querySelectorAll('#scores:not([hidden]) tr')].map(row => [...row.cells].map(c => c.innerText))"
ATTACK = "<script>alert(1)</script>"
Json = dict[str, Any]


def rate(win_rate: float | None, low: float | None, high: float | None, decided: int = 400) -> Json:
    counts = {"n_decided": decided, "n_images": 800, "n_prompts": 400, "tie_share": 0.5, "win_rate_ties_half": 0.6}
    return {"win_rate": win_rate, "low": low, "high": high, "tau": 0.1, **counts}


def estimate(value: float) -> Json:
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 800, "n_prompts": 400}


def change(base: float, tuned: float) -> Json:
    return {"base": estimate(base), "tuned": estimate(tuned), "difference": estimate(tuned - base)}


def results(gold: Json, over_optimised: bool = False) -> Json:
    rates = {"gold_overall": gold, "second": rate(0.6, 0.55, 0.65), "reward_overall": rate(0.8, 0.75, 0.85)}
    rates |= {"gold_detail": rate(0.7, 0.65, 0.75), "reward_alignment": rate(0.75, 0.7, 0.8)}
    return {
        "world": "shapes",
        "seed": 0,
        "n_images": 800,
        "n_prompts": 400,
        "settings": {"tie_band": 0.1},
        "untrained_heads": ["detail"],
        "tuned_against_base": {
            "win_rates": rates,
            "scores": {name: change(0.5, 0.6) for name in rates},
            "fully_right": change(0.5, 0.625) | {"fixed": estimate(0.3), "broken": estimate(0.1)},
            "diversity": {
                "among_fully_right": {"attributes": estimate(0.97), "pixels": estimate(0.95)},
                "among_all": {"pixels": estimate(0.9)},
            },
            "drift": {"saturation": change(0.5, 0.51)},
        },
        "best_of_n": {"n": 4, "best_against_base": rates, "tuned_against_best": rates},
        "base_against_base": rates,
        "best_sampler_against_default": rates,
        "hacks": {
            "blur": dict.fromkeys(rates, rate(0.2, 0.1, 0.3)),
            "sharpening": {**dict.fromkeys(rates, rate(0.4, 0.3, 0.52)), "reward_overall": rate(0.9, 0.8, 0.95)},
        },
        "agreement_with_gold": {"reward_overall": estimate(0.8), "second": estimate(0.77)},
        "combinations": {"seen": rates, "unseen": rates},
        "verdict": {
            "improved": {name: (row["low"] or 0) > 0.5 for name, row in rates.items()},
            "worse": {name: (row["high"] or 1) < 0.5 for name, row in rates.items()},
            "over_optimised": over_optimised,
        },
    }


PART = {
    "macro_f1": 0.85,
    "macro_f1_low": 0.84,
    "macro_f1_high": 0.86,
    "pair_accuracy": 0.851,
    "ceiling_macro_f1": 0.9,
    "share_of_ceiling": 0.85 / 0.9,
    "zero_shot_macro_f1": 0.7,
    "constant_f1": 0.67,
    "n_pairs": 2500,
    "n_prompts": 520,
    "nll": 0.4,
    "brier": 0.1,
    "ece": 0.02,
    "temperature": 1.2,
}
OTHER = PART | {"macro_f1": 0.88, "ceiling_macro_f1": 0.95}
REWARD: Json = {**OTHER, "base": PART, "other": OTHER, "heads": {"overall": PART, "detail": "untrained"}}
BACKBONE = "3bd9"  # its sha256
TRAINING = {"train_loss": 0.1, "steps": 200, "pairs": 300, "held_out_pairs": 30, "best_epoch": 1, "margin": None}
TRAINING |= {"held_out_loss": 0.1, "implicit_accuracy": None, "u_std": 1.0, "reward_base": 1.0, "reward": 1.2}
GOOD = results(rate(0.75, 0.7, 0.8))
RATED = {"pairs": 50, "prompts": 20, "tie_share": 0.1, "first_share": 0.5}
DATA: Json = {
    "prompts": {"train": 1000, "validation": 100, "test": 500},
    "ratings": dict.fromkeys(("train", "validation", "test"), RATED) | {"bayes_macro_f1": 0.904},
    "pairs": {"candidates": 3000, "prompts": 299, "pairs": 330, "pairs_train": 300, "pairs_validation": 30},
}
CONTEST = {"first": "dspo", "second": "sft", **rate(0.6, 0.5, 0.7), "separable": True}
FILES: Json = {
    "ablation": {
        "backbone_sha256": BACKBONE,
        "full_macro_f1": 0.85,
        "plain_head_macro_f1": 0.8,
        "ceiling_macro_f1": 0.9,
        "n_pairs": 2500,
        "n_prompts": 520,
        "rows": {"full model": PART | {"difference_to_full": 0.0, "difference_low": 0.0, "difference_high": 0.0}},
    },
    "losses": {
        "settings": {"trials": 8, "seeds": 5, "epochs": 8, "prompts": 200, "images_per_prompt": 2},
        "arms": {
            "dspo": {
                "ran_away": 0,
                "against_base": rate(0.7, 0.6, 0.8),
                "fully_right": 0.6,
                "drift": 1e-3,
                "training_seconds": 40.0,
            },
            "dpo": {
                "ran_away": 1,
                "against_base": None,
                "fully_right": None,
                "drift": None,
                "training_seconds": None,
            },
        },
        "at_the_drift_of_sft": {"dspo": {"drift": 2e-3, "gold_less_sft": estimate(0.01)}},
        "head_to_head": [CONTEST, CONTEST | {"second": "dspo, beta = 0", "separable": False}],
    },
    "loss_seeds": {
        "settings": {"losses": ["sft", "dpo"], "seeds": 2, "prompts": 200, "images_per_prompt": 2},
        "arms": {
            "dpo": {
                "ran_away": 1,
                "against_base": None,
                "against_base_second": None,
                "fully_right": None,
                "drift": None,
                "seed_sd": None,
                "seeds": {"0": {"win_rate": 0.55}, "1": {"win_rate": None}},
            },
            "sft": {
                "ran_away": 0,
                "against_base": rate(0.7, 0.6, 0.8),
                "against_base_second": rate(0.65, 0.6, 0.7),
                "fully_right": 0.6,
                "drift": 1e-3,
                "seed_sd": 0.02,
                "seeds": {"0": {"win_rate": 0.68}, "1": {"win_rate": 0.72}},
            },
        },
        "base": {"fully_right": 0.53},
        "head_to_head": [],
    },
    "beside": {
        "settings": {"prompts": 300, "images_per_prompt": 2},
        "base": {"fully_right": 0.55, "gold": 0.5},
        "rows": [
            {
                "name": "100 pairs",
                "against_base": CONTEST,
                "fully_right": 0.58,
                "fully_right_gain": {"value": 0.03, "low": 0.01, "high": 0.05},
                "training_seconds": 80.2,
            }
        ],
    },
    "overopt": {
        "settings": {"prompts": 100, "images_per_prompt": 2},
        "rows": [
            {
                "count": 100,
                "wrong_taste": 1.0,
                "loss": "dpo",
                "strength": 10,
                "ran_away": False,
                "drift": 1e-3,
                "over_optimised": True,
                "win_rates": GOOD["tuned_against_base"]["win_rates"],
            },
            {"count": 0, "wrong_taste": 0.0, "loss": "dpo", "strength": 1, "ran_away": True, "over_optimised": None},
        ],
        "detector_fires_on": ["a"],
        "gold_falls_on": ["a"],
    },
    "audit": {"num_prompts": 300, "seeds": 2, "seed": 7, "tuned_against_base": GOOD["tuned_against_base"]},
    "base": [
        {"scheduler": "ddim", "steps": 12, "guidance_scale": 2.0, "n_images": 228}
        | {"gold": 0.6, "gold_ci95": [0.55, 0.65], "fully_right": 0.5, "fully_right_ci95": [0.4, 0.6]}
    ],
}


def images(seed: int, size: int = 16) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    prompts = [ATTACK, *(f"prompt {i} " + "long" * 30 for i in range(40))]
    pixels = rng.integers(0, 255, (len(prompts), size, size, 3), dtype=np.uint8)
    table = {"prompt_id": prompts, "caption": prompts, "image": [encode_png(image) for image in pixels]}
    scores = {name: rng.random(len(prompts)) for name in GOOD["tuned_against_base"]["win_rates"]}
    return pd.DataFrame(table | scores)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage reads, all of it made up, with every study."""
    root = tmp_path_factory.mktemp("report")
    for name, seed in (("base", 0), ("tuned", 1)):
        write_table(pa.Table.from_pandas(images(seed)), root / "evaluation" / f"{name}.parquet")
    write_json(GOOD, root / "evaluation" / "results.json")
    (root / "evaluation" / "win_rates.csv").write_text("comparison,judge,win_rate\n")
    write_json(REWARD, root / "reward" / "report.json")
    write_json({"backbone_sha256": BACKBONE}, root / "reward" / "config.json")
    curve = {"epoch": [1, 2], "train_loss": [2.0, 1.0]}
    curve |= {f"validation_{name}_{kind}": [0.6, 0.5] for name in ("nll", "accuracy") for kind in ("raw", "ema")}
    pd.DataFrame(curve).to_csv(root / "reward" / "curve.csv", index=False)
    write_json(TRAINING, root / "training" / "metrics.json")
    pd.DataFrame({"step": range(1, 41), "loss": np.linspace(1, 0, 40)}).to_csv(root / "training" / "log.csv")
    epochs = {"step": [0, 20, 40], "loss": [1.0, 0.5, 0.4], "reward": [1.0, 1.2, 1.1], "u_std": [0.0, 1.0, 2.0]}
    unmeasured = {name: [None] * 3 for name in ("implicit_accuracy", "margin", "pull")}
    pd.DataFrame(epochs | unmeasured).to_csv(root / "training" / "epochs.csv")
    write_data(root)
    return root


def write_data(root: Path) -> None:
    """Of prompts, ratings, pairs and adapter, what the report reads."""
    for name, summary in DATA.items():
        write_json(summary, root / name / "summary.json")
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")


def report(project: Path, output: Path, studies: Json = FILES) -> Path:
    for name, study in studies.items():
        write_json(study, project / "studies" / f"{name}.json")
    paths = {name: project / name for name in (*INPUTS, "studies")} | {"output": output}
    options = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    report_main(["--params", str(ROOT / "params.yaml"), *options])
    return output


@pytest.fixture(scope="session")
def reports(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(project, tmp_path_factory.mktemp("reports"))


def shown(row: Json) -> Json:
    """A win rate as the summary holds it."""
    names = ("win_rate", "n_prompts", "n_images", "n_decided", "tie_share", "win_rate_ties_half")
    return {name: row[name] for name in names} | {"ci95": [row["low"], row["high"]]}


def test_a_folder_is_hashed_by_parts(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/large").write_bytes(bytes(2**26))
    (tmp_path / "a").write_bytes(b"first")
    tracemalloc.start()
    found = digest(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == hashlib.md5(b"a\0first" + b"b/large\0" + bytes(2**26)).hexdigest()
    assert peak < 2**23


def test_the_summary_holds_the_figures_of_its_inputs(reports: Path) -> None:
    summary = json.loads((reports / "summary.json").read_text())
    rates = GOOD["tuned_against_base"]["win_rates"]
    for judge in ("gold", "reward"):
        assert summary["evaluation"].pop(judge) == shown(rates[f"{judge}_overall"])
    right = GOOD["tuned_against_base"]["fully_right"]["difference"]
    assert summary == {
        "evaluation": {
            "fully_right": {"base": 0.5, "tuned": 0.625, "ci95": [right["low"], right["high"]]},
            "diversity_ratio": 0.95,
            "hacks": {
                "blur": {"gold": shown(rate(0.2, 0.1, 0.3)), "reward": shown(rate(0.2, 0.1, 0.3))},
                "sharpening": {"gold": shown(rate(0.4, 0.3, 0.52)), "reward": shown(rate(0.9, 0.8, 0.95))},
            },
        },
        "reward_model": {
            "macro_f1": 0.85,
            "ci95": [0.84, 0.86],
            "ceiling": 0.9,
            "constant_f1": 0.67,
            "n_pairs": 2500,
            "n_prompts": 520,
            "plain_head_macro_f1": 0.8,
        },
        "train": {"loss": 0.1, "steps": 200, "pairs": 300},
    }


def test_without_a_gold_judge_its_figures_are_null_and_nothing_is_gated() -> None:
    result = deepcopy(GOOD)
    tuned = result["tuned_against_base"]
    del tuned["win_rates"]["gold_overall"]
    tuned["fully_right"] = tuned["diversity"]["among_fully_right"] = None
    unknown = PART | {"ceiling_macro_f1": None}
    summary = summarise(result, OTHER | {"base": unknown}, BACKBONE, TRAINING, None)
    assert summary["evaluation"]["gold"] is summary["evaluation"]["fully_right"] is None
    assert summary["evaluation"]["diversity_ratio"] is summary["reward_model"]["plain_head_macro_f1"] is None
    assert summary["reward_model"]["macro_f1"] == OTHER["macro_f1"]
    assert gates(summary) == []
    assert "its own training reward, the only judge" in verdict(result)


GOOD_SUMMARY = summarise(GOOD, REWARD, BACKBONE, TRAINING, None)


@pytest.mark.parametrize(
    ("path", "value", "failing"),
    [
        ("evaluation.gold.win_rate", 0.69, "gold win rate of tuned over base"),
        ("evaluation.gold.n_decided", 299, "decided images"),
        ("evaluation.gold.ci95", [0.60, 0.8], "gold win rate, lower end"),
        ("evaluation.fully_right.tuned", 0.549, "fully right, tuned - base"),
        ("evaluation.fully_right.ci95", [0.0, 0.2], "fully right, lower end"),
        ("evaluation.fully_right.base", 0.76, "fully right, base at its best sampler"),
        ("evaluation.hacks.blur.gold.win_rate", 0.51, "gold win rate of a hack, the highest"),
        ("evaluation.hacks.blur.gold.win_rate", None, "gold win rate of a hack, the highest"),
        ("evaluation.hacks.sharpening.gold.ci95", [0.4, 0.55], "gold win rate of a hack, highest upper end"),
        ("evaluation.hacks", {}, "gold win rate of a hack, the highest"),
        ("evaluation.diversity_ratio", 0.89, "diversity"),
        ("evaluation.diversity_ratio", None, "diversity"),
        ("reward_model.macro_f1", 0.833, "reward model, macro-F1"),
        ("reward_model.ceiling", 0.92, "ceiling of the ratings"),
        ("reward_model.ceiling", None, "share of the ceiling"),
        ("reward_model.n_pairs", 1999, "reward model, decided test pairs"),
        ("reward_model.n_prompts", 499, "reward model, test prompts"),
    ],
)
def test_each_gate_fails_by_its_name(
    path: str, value: object, failing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = deepcopy(GOOD_SUMMARY)
    *parents, last = path.split(".")
    section = summary
    for name in parents:
        section = section[name]
    section[last] = value
    write_json(summary, tmp_path / "summary.json")
    assert gates_main([str(tmp_path / "summary.json")]) == 1
    said = capsys.readouterr()
    assert failing in said.err
    assert any(line.startswith("FAILS") and failing in line for line in said.out.splitlines())


def test_gates_hold_for_good_figures_and_bad_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(GOOD_SUMMARY, tmp_path / "summary.json")
    assert gates_main([str(tmp_path / "summary.json")]) == 0
    assert capsys.readouterr().out.count("holds") == 14
    write_json({"other": 1}, tmp_path / "other.json")
    for wrong in ("none.json", "other.json"):
        assert gates_main([str(tmp_path / wrong)]) == 2
        assert wrong in capsys.readouterr().err


def test_a_figure_may_miss_its_bound_down_to_its_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = deepcopy(GOOD_SUMMARY)
    summary["evaluation"]["diversity_ratio"] = 0.5
    path, name = tmp_path / "summary.json", "diversity among right images, tuned / base"
    write_json(summary, path)
    assert gates_main([str(path), "--floor", f"{name}=0.5"]) == 0
    assert gates_main([str(path), "--floor", f"{name}=0.51"]) == 1
    summary["evaluation"]["hacks"]["blur"]["gold"]["win_rate"] = 0.99
    write_json(summary, path)
    upper = "gold win rate of a hack, the highest"
    assert gates_main([str(path), "--floor", f"{name}=0.5", "--floor", f"{upper}=0.1"]) == 1
    assert gates_main([str(path), "--floor", "no such=0.5"]) == 2
    assert "no such figure: no such" in capsys.readouterr().err


def test_a_plain_head_of_other_ratings_or_another_backbone_is_no_figure_of_these() -> None:
    def shown(ablation: Json) -> float | None:
        return summarise(GOOD, REWARD, BACKBONE, TRAINING, ablation)["reward_model"]["plain_head_macro_f1"]

    ablation = {name: PART[name] for name in SAME_RATINGS} | {"backbone_sha256": BACKBONE, "plain_head_macro_f1": 0.7}
    assert shown(ablation) == 0.7
    assert shown(ablation | {"n_pairs": PART["n_pairs"] + 1}) is None
    assert shown(ablation | {"backbone_sha256": "another"}) is None


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (GOOD, "Improved by the gold judge: tuned beats base on 75.0% of 400 decided images"),
        (GOOD, "The best of 4 base images by the reward model beats base on 75.0%"),
        (results(rate(0.52, 0.47, 0.57)), "Not separable"),
        (results(rate(0.4, 0.35, 0.45)), "Worse"),
        (results(rate(0.4, 0.35, 0.45), True), "Over-optimised: the reward went up and the gold judge did not"),
        (results(rate(None, None, None, 0)), "Nothing can be said"),
    ],
)
def test_the_verdict_says_no_more_than_the_interval(result: Json, said: str) -> None:
    assert said in verdict(result)


def test_equal_inputs_give_equal_bytes(project: Path, reports: Path, tmp_path: Path) -> None:
    again = report(project, tmp_path / "reports")
    files = sorted(path.relative_to(reports) for path in reports.rglob("*") if path.is_file())
    expected = {"index.html", "summary.json", "model_card.md", "data_statement.md", "grid.png", "win_rates.csv"}
    assert expected <= {path.name for path in files}
    assert all((reports / path).read_bytes() == (again / path).read_bytes() for path in files)


def test_a_missing_input_is_named_and_nothing_is_written(project: Path, tmp_path: Path) -> None:
    broken = tmp_path / "project"
    shutil.copytree(project, broken)
    (broken / "evaluation" / "results.json").unlink()
    with pytest.raises(UserError, match=r"results\.json"):
        report(broken, tmp_path / "reports")
    assert not (tmp_path / "reports" / "index.html").exists()


def test_the_page_names_the_judge_that_a_hack_fools_and_no_other(reports: Path) -> None:
    page = (reports / "index.html").read_text()
    assert re.findall(r"By the ([\w ]+), base images win after a trivial change", page) == ["training reward"]


def test_prompts_are_text_and_nothing_comes_from_the_network(reports: Path) -> None:
    page = (reports / "index.html").read_text()
    assert ATTACK not in page and "&lt;script&gt;alert(1)" in page
    assert not re.search(r"""(src|href|action)\s*=\s*["']?(https?:)?//|@import|url\(["']?http""", page)
    assert len(page) < 5_000_000


def test_wins_losses_and_ties_are_what_they_say() -> None:
    base, tuned = images(0), images(1)
    delta = differences(base, tuned, "gold_overall")
    chosen = choose(base, tuned, ["gold_overall", "second"], tie_band=0.1)
    wins, losses, ties, more = ([one.tuned_scores[0] - one.base_scores[0] for one in of] for of in chosen.values())
    assert wins == list(delta[:8])
    assert losses == list(delta[::-1][:8])
    assert ties and all(abs(difference) <= 0.1 for difference in ties)
    assert more == sorted(more, reverse=True)
    assert sorted([*wins, *losses, *ties, *more]) == sorted(delta)
    assert [one.base_scores[1] for one in chosen["Biggest wins"]] == list(base["second"][delta.index[:8]])


def test_a_page_of_many_large_images_stays_light() -> None:
    base, tuned = images(0, 512), images(1, 512)
    chosen = choose(base, tuned, ["gold_overall"], tie_band=0.1)
    assert len(chosen["Biggest wins"]) == 8 and sum(map(len, chosen.values())) < len(base)
    assert sum(len(one.base) + len(one.tuned) for of_kind in chosen.values() for one in of_kind) < 3_000_000


def test_large_images_are_made_small_for_the_page() -> None:
    large = encode_png(np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), dtype=np.uint8))
    assert data_uri(large).startswith("data:image/jpeg;") and len(data_uri(large)) < 100_000
    small = encode_png(np.zeros((64, 64, 3), np.uint8))
    assert data_uri(small).startswith("data:image/png;")


def test_every_study_has_its_table() -> None:
    tables = study_tables(FILES)
    assert len(tables) == len(STUDIES) == len(FILES)
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    losses = next(table for table in tables if "Losses" in table.title)
    assert losses.rows[0][2] == "0.60* (0.50 to 0.70)" and losses.rows[1][5] == "ran away"
    beside = next(table for table in tables if table.title.startswith("What else"))
    assert beside.rows[0][2:] == ["0.580", "+3.0 (1.0 to 5.0)", "80"]
    overopt = next(table for table in tables if table.title.startswith("Where the proxy"))
    judges = [column for column in overopt.columns if column in JUDGES.values()]
    assert judges == ["gold", "second judge", "training reward"]  # those that judged
    audit = next(table for table in tables if table.title == "Audit")
    assert [row[0] for row in audit.rows[:3]] == ["gold overall", "second judge", "reward overall"]
    seeds = next(table for table in tables if "seeds" in table.title)
    assert [row[:3] for row in seeds.rows] == [["sft", "0.70 (0.60 to 0.80)", "0.65 (0.60 to 0.70)"], ["dpo", "–", "–"]]


def test_a_study_with_a_drawing_has_it_on_the_page_and_without_the_study_there_is_none(
    project: Path, reports: Path, tmp_path: Path
) -> None:
    assert (reports / "plots" / "loss_seeds.png").exists()
    assert 'aria-label="Losses over training seeds; the table below has the figures"' in page_of(reports)
    without = Path(shutil.copytree(project, tmp_path / "project"))
    shutil.rmtree(without / "studies")
    bare = report(without, tmp_path / "reports", studies={})
    assert not (bare / "plots" / "loss_seeds.png").exists() and "training seeds" not in page_of(bare)


def page_of(reports: Path) -> str:
    return (reports / "index.html").read_text()


def test_the_picture_for_the_readme_has_eight_columns(reports: Path) -> None:
    with Image.open(reports / "plots" / "grid.png") as picture:
        assert picture.width == 2 * 8 + 8 * 132 and "Software" not in picture.info


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("script", [True, False])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_a_wide_and_a_narrow_screen(browser: Browser, reports: Path, width: int, script: bool) -> None:
    """Without a script too it shows every pair; all but the extremes and ties after one click."""
    page = reports / "index.html"
    browser.open(page, width, script=script)
    browser.js("Promise.all([...document.images].map(image => { image.loading = 'eager'; return image.decode(); }))")
    assert browser.js("document.title") == "DSPO report"
    assert browser.js("document.documentElement.scrollWidth") <= width
    shown = "[...document.images].filter(image => image.naturalWidth === 16 && image.checkVisibility()).length"
    assert 2 * 2 * SHOWN < browser.js(shown) < 2 * len(images(0))
    browser.js("document.querySelector('details:not([open]) summary').click()")
    assert browser.js(shown) == page.read_text().count("<img ") == 2 * len(images(0))
    assert browser.js("document.querySelectorAll('svg').length") == 5
    assert browser.js("document.querySelector('.tools').checkVisibility()") == script
    assert clean(browser)


def test_a_slider_parts_base_and_tuned_by_the_keyboard(browser: Browser, reports: Path) -> None:
    browser.open(reports / "index.html")
    browser.js("document.querySelector('[name=beside]').focus()")
    for _ in ("the first heading, which folds its pairs", "its first pair"):
        browser.press("Tab")
    parted = "getComputedStyle(document.activeElement.closest('.two').querySelectorAll('img')[1]).clipPath"
    assert browser.js(parted) == "inset(0px 0px 0px 50%)"
    browser.press("ArrowRight")
    assert browser.js(parted) == "inset(0px 0px 0px 51%)"
    browser.press("Home")
    assert browser.js(parted) == "inset(0px 0px 0px 0%)"
    browser.js("document.querySelector('[name=all]').focus()")
    browser.press("End")
    every = "[...document.querySelectorAll('.pair figure:nth-child(2) img')].map(i => getComputedStyle(i).clipPath)"
    assert set(browser.js(every)) == {"inset(0px 0px 0px 100%)"}


def test_words_filter_and_any_judge_sorts(browser: Browser, reports: Path) -> None:
    browser.open(reports / "index.html")
    prompts = "[...document.querySelectorAll('.pair')].filter(one => one.checkVisibility()).map(one => one.innerText)"
    folded = browser.js("document.querySelector('details:not([open]) ul').textContent")
    (number, *_) = re.findall(r"prompt (\d\d) ", folded)
    browser.js("document.querySelector('[name=words]').focus()")
    browser.type(f"{number} PROMPT")
    assert [text.splitlines()[-1].startswith(f"prompt {number} ") for text in browser.js(prompts)] == [True]
    assert browser.js("document.querySelector('output').value").startswith("1 of 41 pairs.")
    choice = """tools.elements.words.value = ''; tools.elements.order.value = 'gain';
    tools.elements.judge.selectedIndex = judges.indexOf('second judge');
    tools.dispatchEvent(new Event('input', {bubbles: true}))"""
    browser.js(choice)
    order = differences(images(0), images(1), "second").index
    captions = list(images(0)["caption"][order])
    assert [text.splitlines()[-1] for text in browser.js(prompts)] == captions
    best = order[0]
    assert browser.js("document.querySelector('.pair b').closest('li').innerText").startswith(
        f"base {images(0)['second'][best]:.3f}\ntuned {images(1)['second'][best]:.3f}"
    )
    browser.js("tools.elements.order.value = 'chosen'; tools.dispatchEvent(new Event('input', {bubbles: true}))")
    assert browser.js("document.querySelector('.gallery ul').children.length") == SHOWN


def test_every_head_of_every_judge_comes_with_pointer_and_focus(browser: Browser, reports: Path) -> None:
    browser.open(reports / "index.html")
    row = int(differences(images(0), images(1), "gold_overall").index[0])
    first, second = images(0).loc[row], images(1).loc[row]
    browser.js("document.querySelector('.pair').scrollIntoView({behavior: 'instant', block: 'center'})")
    x, y = browser.js("(r => [r.x + 20, r.y + 20])(document.querySelector('.pair').getBoundingClientRect())")
    assert browser.js(TOLD) == []
    browser.point(x, y)
    told = browser.js(TOLD)
    names = ["gold_overall", "second", "reward_overall", "gold_detail", "reward_alignment"]
    assert [cells[0] for cells in told[1:]] == [words(name) for name in names]
    for name, cells in zip(names, told[1:], strict=True):
        before, after = first[name], second[name]
        assert [float(cell) for cell in cells[1:]] == pytest.approx([before, after, after - before], abs=2e-3)
    browser.press("Escape")
    assert browser.js(TOLD) == []
    browser.js("document.querySelector('.pair input').focus()")
    assert browser.js(TOLD) == told


def test_the_committed_page_is_light_fits_a_phone_and_tells_all_heads(browser: Browser) -> None:
    page = ROOT / "reports/index.html"
    assert page.stat().st_size < 5_000_000
    browser.open(page, 390)
    assert browser.js("document.documentElement.scrollWidth") <= 390
    browser.js("document.querySelector('.pair input').focus()")
    told = {cells[0] for cells in browser.js(TOLD)[1:]}
    assert told >= {f"{judge} {head}" for judge in ("gold", "reward") for head in HEADS}
    box = "(r => [r.left, document.documentElement.clientWidth - r.right])(document.querySelector('#scores')"
    assert min(browser.js(f"{box}.getBoundingClientRect())")) >= 0
    assert clean(browser)


def test_the_page_holds_what_every_page_of_pairs_does(browser: Browser, reports: Path) -> None:
    assert_page(browser, reports / "index.html")


def test_light_and_dark(browser: Browser, reports: Path) -> None:
    """By the system's setting, and by the button."""
    ink = "getComputedStyle(document.body).color"
    seen = []
    for dark in (False, True):
        browser.open(reports / "index.html", dark=dark)
        seen.append(browser.js(ink))
        browser.js("document.querySelector('.theme').click()")
        seen.append(browser.js(ink))
    light, dark = "rgb(27, 31, 36)", "rgb(230, 233, 237)"
    assert seen == [light, dark, dark, light]


def test_only_the_pages_own_script_runs(browser: Browser, reports: Path, tmp_path: Path) -> None:
    """Even if a prompt became markup."""
    text = (reports / "index.html").read_text()
    (tmp_path / "page.html").write_text(text.replace("</main>", "<script>document.title = 'taken'</script></main>"))
    browser.open(tmp_path / "page.html")
    assert browser.js("document.title") == "DSPO report"
