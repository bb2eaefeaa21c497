"""The test report against numbers worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
from reward_tiny import write_ratings

from dspo.data.records import HEADS
from dspo.errors import UserError
from dspo.reward.dataset import RatedPairs, read_ratings
from dspo.reward.report import (
    accuracy,
    confusion,
    fit_temperature,
    macro_f1,
    macro_f1_difference,
    reward_report,
)


def totals(difference: list[float], first_won: list[bool]) -> dict[str, np.ndarray]:
    columns = confusion(np.array(difference), np.array(first_won))
    return {name: values.sum(keepdims=True) for name, values in columns.items()}


def test_macro_f1_by_hand() -> None:
    # tp 2, fn 1, fp 1, tn 0: F1 of "first" = 4/6, of "second" = 0
    counted = totals([1, 2, -1, 3], [True, True, True, False])
    assert math.isclose(macro_f1(counted)[0], 1 / 3)
    assert accuracy(counted)[0] == 0.5


def test_on_pairs_shown_both_ways_macro_f1_is_accuracy() -> None:
    rng = np.random.default_rng(0)
    d, won = rng.normal(size=200), rng.random(200) < 0.7
    both = totals([*d, *-d], [*won, *~won])
    assert math.isclose(macro_f1(both)[0], accuracy(both)[0])


def test_equal_scores_count_half() -> None:
    assert accuracy(totals([0.0, 0.0], [True, False]))[0] == 0.5


def test_temperature_is_found_again() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(size=4000) * 2
    assert math.isclose(fit_temperature(logit * 3, 1 / (1 + np.exp(-logit))), 3.0, rel_tol=1e-3)
    assert fit_temperature(logit, np.full(4000, np.nan)) == 1.0


def test_paired_difference_of_a_model_to_itself_is_zero() -> None:
    d = np.random.default_rng(0).normal(size=100)
    prompts = np.arange(100).astype(np.str_)
    assert macro_f1_difference(d, d, d > 0.2, prompts, 0) == (0.0, 0.0, 0.0)


@pytest.fixture
def pairs(tmp_path: Path) -> RatedPairs:
    write_ratings(tmp_path / "test.parquet", 120, 5, unlabelled=("detail",))
    return read_ratings(tmp_path / "test.parquet")


def test_report_of_a_perfect_and_a_blind_model(pairs: RatedPairs) -> None:
    perfect = np.repeat(pairs.vote[:, None] - 0.5, 5, axis=1)
    temperatures = dict.fromkeys(HEADS, 1.0)
    report = reward_report(pairs, HEADS, perfect, -perfect[:, 0], temperatures, ["detail"], 0)
    assert report["macro_f1"] == report["pair_accuracy_low"] == report["ceiling_macro_f1"] == 1.0
    assert report["zero_shot_pair_accuracy"] == 0.0
    assert (report["n_pairs"], report["n_ties"]) == (120, 0)
    assert report["base"]["n_pairs"] == 90 and report["other"]["n_pairs"] == 30
    assert report["heads"]["detail"] == "untrained"
    assert report["heads"]["alignment"]["macro_f1"] == 1.0
    prevalence = float(np.mean(pairs.vote > 0.5))
    assert math.isclose(report["constant_f1"], 2 * prevalence / (1 + prevalence))

    blind = reward_report(pairs, HEADS, 0 * perfect, 0 * perfect[:, 0], temperatures, ["detail"], 0)
    assert blind["pair_accuracy"] == 0.5 and blind["n_equal_scores"] == 120
    assert math.isclose(blind["nll"], math.log(2)) and blind["brier"] == 0.25
    assert math.isclose(blind["ece"], abs(prevalence - 0.5))


def test_ratings_hold_every_image_once(tmp_path: Path) -> None:
    write_ratings(tmp_path / "test.parquet", 20, 5)
    pairs = read_ratings(tmp_path / "test.parquet")
    assert len(pairs.images) == len(set(pairs.images)) <= 40
    assert len(pairs.captions) == len(set(pairs.captions))


def test_ratings_that_cannot_be(tmp_path: Path) -> None:
    write_ratings(tmp_path / "empty.parquet", 0, 5)
    with pytest.raises(UserError, match="no rated pairs"):
        read_ratings(tmp_path / "empty.parquet")
