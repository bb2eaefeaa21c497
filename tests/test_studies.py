"""The studies: their plans, their tables, and trials on a tiny pipeline."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from tiny import TEXT_WIDTH, TOKENS, save_tiny_pipeline

from dspo.data.images import write_table
from dspo.data.prompts import Prompt
from dspo.data.records import HEADS
from dspo.diffusion.base import load_pipeline
from dspo.errors import UserError
from dspo.params import Params, load_params
from dspo.preference.dataset import Pairs
from dspo.preference.dora import add_dora, add_lora
from dspo.reporting.studies import study_tables
from dspo.reporting.tables import markdown
from dspo.shapes import raters
from dspo.shapes.defects import spoil
from dspo.shapes.gold import GoldScore, judge
from dspo.shapes.grammar import parse, wrong_request
from dspo.shapes.render import random_scene, render_float
from dspo.studies import base_sampler, beside
from dspo.studies import trials as trials_module
from dspo.studies.arms import ARMS, best, grid
from dspo.studies.audit import used_prompts
from dspo.studies.common import fresh_prompts
from dspo.studies.losses_table import fared, flat, matched_drift, table
from dspo.studies.overopt import some_rows
from dspo.studies.pair_sets import GoldScorer, NoScorer, both_ways
from dspo.studies.trials import PromptSet, Recipe, Result, Trials, first_pairs

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Params:
    folder = tmp_path_factory.mktemp("studies")
    save_tiny_pipeline(folder / "base")
    raw = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    world = raw["worlds"]["shapes"]
    world["base"] |= {"model": str(folder / "base"), "resolution": 32}
    world["evaluate"] |= {
        "sampler": {"scheduler": "ddim", "steps": 1, "guidance_scale": 2.0},
        "bootstrap_resamples": 50,
    }
    world["train"] |= {"rank": 2, "alpha": 2, "epochs": 1, "batch_size": 2, "loss": "dspo"}
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    return load_params(folder / "params.yaml")


def made_up_pairs(count: int) -> Pairs:
    draw = torch.Generator().manual_seed(0)
    return Pairs(
        ids=[f"pair {i}" for i in range(count)],
        latents_w=torch.randn(count, 4, 4, 4, generator=draw).half(),
        latents_l=torch.randn(count, 4, 4, 4, generator=draw).half(),
        weight=torch.ones(count),
        delta=torch.linspace(0.1, 0.9, count),
        size=torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(count, 1),
        text_row=torch.arange(count) % 2,
        embeds=torch.randn(3, TOKENS, 2 * TEXT_WIDTH, generator=draw),
        pooled=torch.randn(3, TEXT_WIDTH, generator=draw),
    )


class Brightness:
    """Stands in for all judges."""

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"gold_overall": np.array([image.mean() for image in images])}


def result(gold: float, drift: float = 0.1, count: int = 8) -> Result:
    columns = ("gold_overall", "reward_overall", "gold_fully_right")
    noise = np.random.default_rng(int(gold * 100)).normal(0, 0.01, count)
    return Result(dict.fromkeys(columns, gold + noise), drift, 1.0)


def test_fresh_prompts_are_new_distinct_and_keyed() -> None:
    prompts = fresh_prompts(20, [], 0, "a")
    assert len({prompt.text for prompt in prompts}) == 20
    known = [prompt.text for prompt in prompts[:10]]
    assert not {prompt.text for prompt in fresh_prompts(20, known, 0, "a")} & set(known)
    assert fresh_prompts(20, [], 0, "a") == prompts != fresh_prompts(20, [], 0, "b")


def test_every_arm_that_is_tuned_has_eight_settings(params: Params) -> None:
    for arm in ARMS:
        if arm.like is None:
            settings = grid(arm, params.active.train, 10, 10)
            assert len(settings) == len({s.model_dump_json() for s in settings}) == 8
            assert {s.loss for s in settings} == {arm.loss}
    assert {arm.like for arm in ARMS} - {None} <= {arm.name for arm in ARMS if arm.like is None}


def test_arms_with_more_pairs_take_about_as_many_steps(params: Params) -> None:
    train = params.active.train.model_copy(update={"epochs": 10})
    assert {s.epochs for s in grid(ARMS[0], train, 100, 400)} == {2}  # round(2.5), to the even number


def test_the_audit_knows_the_prompts_of_list_and_raters(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("prompt\na red circle\n")
    for split, caption in (("train", "a blue ring"), ("validation", "a green star"), ("test", "a red circle")):
        write_table(pa.table({"caption": [caption] * 2}), tmp_path / f"{split}.parquet")
    used = used_prompts(tmp_path / "prompts.csv", tmp_path, 100)
    assert used == {"a red circle", "a blue ring", "a green star"}


def test_both_ways_makes_every_image_a_winner() -> None:
    pairs = made_up_pairs(3)
    doubled = both_ways(pairs)
    assert len(doubled) == 6 and len(set(doubled.ids)) == 6
    assert torch.equal(doubled.latents_w, torch.cat([pairs.latents_w, pairs.latents_l]))
    assert torch.equal(doubled.delta[3:], -pairs.delta)


def test_no_score_differs_by_image_and_is_keyed() -> None:
    images = [np.full((4, 4, 3), value, dtype=np.uint8) for value in (1, 2, 1)]
    scores = NoScorer(0).score(images, ["a"] * 3, 8)
    assert scores[0] == scores[2] != scores[1]


def test_the_oracles_scores_are_log_odds_of_the_raters() -> None:
    """So that ``score.margin``, set on the reward model's scale, means the same for the oracle's pairs."""
    rng = np.random.default_rng(0)
    request = parse("a red circle")
    images = [np.round(render_float(random_scene(wrong_request(request, rng), rng)) * 255).astype(np.uint8)]
    images.append(np.round(spoil(render_float(random_scene(request, rng)), "blur", 0.3, rng) * 255).astype(np.uint8))
    scorer = GoldScorer(raters_temperature=0.034, processes=1)
    first, second = scorer.score(images, ["a red circle"] * 2, 8)
    for place, head in enumerate(HEADS):
        gold = (np.array(getattr(judge(image, "a red circle"), head)) for image in images)
        lead = raters.advantage(*gold, np.array(0.0), np.array(0.0), 0.0, 0.034, delta=0.0)
        chance = 1 / (1 + np.exp(-(first - second)[place] / scorer.temperature))
        assert chance == pytest.approx(float(raters.p_first(lead)), abs=1e-9)


def test_some_rows_are_as_many_as_wanted_and_grow() -> None:
    rows = pa.table({"pair_id": [str(i) for i in range(10)]})
    few, more = (set(some_rows(rows, count, 0)["pair_id"].to_pylist()) for count in (3, 6))
    assert len(few) == 3 and len(more) == 6 and few < more
    assert some_rows(rows, 0, 0).equals(rows)


def test_the_best_setting_is_never_one_that_ran_away(params: Params) -> None:
    train = params.active.train
    outcomes = [(train, None), (train, result(0.2)), (train, result(0.6)), (train, result(0.4))]
    assert best(outcomes) is outcomes[2]
    assert fared(outcomes[0])["ran_away"] is True


def test_the_table_compares_and_corrects(params: Params) -> None:
    finals = {
        "sft": [result(0.50), result(0.52)],
        "dpo": [result(0.30), result(0.32)],
        "dspo": [result(0.60), result(0.62)],
        "dspo, beta = 0": [result(0.60), result(0.62)],
        "ipo": [result(0.5), None],
        "dspo, two-sided": [result(0.70), result(0.72)],
        "capo": [result(0.50), result(0.52)],
    }
    figures = table(finals, result(0.4), 4, params)
    contests = {(row["first"], row["second"]): row for row in figures["head_to_head"]}
    assert set(contests) == {
        ("dpo", "sft"), ("dspo", "sft"), ("dspo, beta = 0", "sft"), ("dspo", "dpo"), ("dspo, beta = 0", "dpo"),
        ("dspo", "dspo, beta = 0"), ("dspo, two-sided", "sft"), ("dspo, two-sided", "dpo"), ("capo", "sft"),
        ("capo", "dpo"), ("dspo, two-sided", "dspo"), ("dspo, two-sided", "capo"),
    }  # fmt: skip
    assert contests["dspo", "sft"]["win_rate"] == 1 and contests["dpo", "sft"]["win_rate"] == 0
    assert contests["dspo", "dspo, beta = 0"]["win_rate"] is None  # all ties
    assert not contests["dspo", "dspo, beta = 0"]["separable"]
    assert all(row["p_holm"] >= row["p_value"] for row in contests.values())
    assert figures["arms"]["ipo"] == dict.fromkeys(
        ("against_base", "gold", "proxy", "fully_right", "drift", "training_seconds")
    ) | {"ran_away": 1}
    assert flat(figures["arms"]["dpo"])["win_rate_over_base"] == 0
    tuning = {name: [(params.active.train, result) for result in results] for name, results in finals.items()}
    figures["at_the_drift_of_sft"] = matched_drift(tuning, [str(i) for i in range(8)], params)
    settings = {"trials": 1, "seeds": 2, "epochs": 8, "prompts": 4, "images_per_prompt": 2}
    (shown,) = study_tables({"losses": figures | {"settings": settings}})
    text = markdown(shown)
    assert "| dspo | 1.00 (1.00 to 1.00) | 1.00* (1.00 to 1.00) |" in text and "| ran away |" in text
    assert "1 trial on validation prompts and 2 seeds" in text and "over seeds and prompts" in text
    assert "dspo, two-sided over capo: 1.00* (" in text
    matched = {row[0]: row[shown.columns.index("at sft's drift")] for row in shown.rows}
    assert matched["dpo"].startswith("-0.2") and matched["dpo"].endswith(" at 1.0e-01")
    (shown,) = study_tables({"losses": figures | {"settings": settings | {"seeds": 1}}})
    assert "1 seed for each row" in shown.note and "over prompts, of one seed alone" in shown.note


def test_the_correction_for_all_rows_of_the_table_leaves_a_clear_winner(params: Params) -> None:
    losing, winning = ([result(gold, count=100)] * 2 for gold in (0.1, 0.9))
    finals = {arm.name: losing for arm in ARMS} | {"dspo": winning}
    figures = table(finals, result(0.4, count=100), 100, params)
    assert {row["second"] for row in figures["head_to_head"] if row["first"] == "dspo" and row["separable"]} >= {
        "sft", "dpo"
    }  # fmt: skip


def test_the_base_is_judged_at_every_setting_with_intervals(params: Params) -> None:
    judged = ((0.2, False), (0.4, True), (0.6, True), (0.8, True))
    scores = [GoldScore(overall, 0, 0, 0, 0, right, 0, 0, {}, ()) for overall, right in judged]
    row = base_sampler.figures(scores, ["a", "a", "b", "b"], params)
    assert row["gold"] == pytest.approx(0.5) and row["fully_right"] == 0.75 and row["n_images"] == 4
    assert row["gold_ci95"] == pytest.approx([0.3, 0.7]) and row["fully_right_ci95"] == [0.5, 1.0]


def test_matched_drift_takes_the_nearest_trial(params: Params) -> None:
    train = params.active.train
    tuning = {
        "sft": [(train, result(0.5, drift=0.10))],
        "dpo": [(train, result(0.9, drift=0.9)), (train, result(0.4, drift=0.12)), (train, None)],
        "ipo": [(train, None)],
    }
    rows = matched_drift(tuning, [str(i) for i in range(8)], params)
    assert rows["dpo"]["drift"] == 0.12 and rows["dpo"]["gold_less_sft"]["value"] == pytest.approx(-0.1, abs=0.02)
    assert "ipo" not in rows


def test_a_trial_is_made_once(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPO_DEVICE", "cpu")
    pairs = made_up_pairs(4)
    trials = Trials(params, Brightness(), {"reward": (pairs, first_pairs(pairs, 1))}, tmp_path)
    on = PromptSet("two", [Prompt("a", "a red circle"), Prompt("b", "a small star")], 2, 7)
    recipe = Recipe("reward", params.active.train, seed=3)
    base, tuned = trials.base(on), trials.run(recipe, on)
    assert tuned is not None and base.scores["gold_overall"].shape == (4,)
    assert tuned.drift > 0 and not np.array_equal(base.scores["gold_overall"], tuned.scores["gold_overall"])
    monkeypatch.setattr(trials_module, "train", None)
    again = trials.run(recipe, on)
    assert again is not None and np.array_equal(again.scores["gold_overall"], tuned.scores["gold_overall"])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json"]

    def full(*_: object, **__: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(trials_module, "train", full)
    with pytest.raises(UserError, match="full"):  # what a user mends is no result
        trials.run(Recipe("reward", params.active.train, seed=4), on)
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert np.array_equal(Trials(params, Brightness(), trials.pairs, tmp_path / "new").base(on).scores["gold_overall"],
                          base.scores["gold_overall"])  # fmt: skip


class EveryOtherIsRight(Brightness):
    """Bright images are good to both judges, and every other one is fully right."""

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        bright = super().score(images, prompts)["gold_overall"]
        return {"gold_overall": bright, "reward_overall": bright, "gold_fully_right": np.arange(len(images)) % 2.0}


def test_what_stands_beside_the_adapter(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPO_DEVICE", "cpu")
    pairs = made_up_pairs(6)
    sets = {"2": (first_pairs(pairs, 2), pairs), "reward": (pairs, pairs)}
    trials = Trials(params, EveryOtherIsRight(), sets, tmp_path)
    fresh = PromptSet("fresh", [Prompt("a", "a red circle"), Prompt("b", "a small star")], 2, 7)
    figures = beside.compared(trials, fresh, params)
    best, few, everything, lora = figures["rows"]
    assert best["name"].startswith("best of 4") and best["against_base"]["win_rate"] == 1.0
    assert best["training_seconds"] == 0
    assert [row["name"] for row in (few, everything, lora)] == ["2 pairs", "6 pairs", "6 pairs, LoRA"]
    plans = beside.recipes(params, {"2": 2, "reward": 6})
    assert plans["2 pairs"].train.epochs == 3 * plans["6 pairs"].train.epochs  # as many steps
    (shown,) = study_tables({"beside": figures | {"settings": {"prompts": 2, "images_per_prompt": 2}}})
    assert "0.500 fully right" in shown.note and shown.rows[1][:1] == ["2 pairs"]


def test_lora_has_about_as_many_parameters(params: Params) -> None:
    plans = beside.recipes(params, {"reward": 6})

    def parameters(recipe: Recipe) -> int:
        unet = load_pipeline(params.active.base, torch.device("cpu")).unet
        adapter = (add_lora if recipe.lora else add_dora)(unet, recipe.train, 0)
        return sum(parameter.numel() for parameter in adapter.parameters.values())

    dora, lora = parameters(plans["6 pairs"]), parameters(plans["6 pairs, LoRA"])
    assert dora <= lora < 1.35 * dora  # at rank 2; at 16 a rank more or less is a sixteenth


def test_a_training_that_runs_away_is_remembered(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSPO_DEVICE", "cpu")
    pairs = made_up_pairs(4)
    trials = Trials(params, Brightness(), {"reward": (pairs, pairs)}, tmp_path)
    train = params.active.train.model_copy(update={"lr": 1e30, "epochs": 2})
    on = PromptSet("one", [Prompt("a", "a red circle")], 1, 7)
    assert trials.run(Recipe("reward", train, 0), on) is None
    assert trials.run(Recipe("reward", train, 0), on) is None
