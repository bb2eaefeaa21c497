"""Win rates, shares, Holm's correction and their intervals against hand-computed values and simulations."""

import numpy as np
import pytest
from scipy import stats

from dspo.evaluation.statistics import head_to_head, holm, mean, ratio_of_means, share_given, win_rate


def test_win_rate_by_hand() -> None:
    delta = [0.5, 0.03, -0.2, 0.02, -0.02, 0.0]  # two wins, one loss, three ties at tau 0.02: the band is closed
    result = win_rate(delta, ["a", "a", "b", "b", "c", "c"], tau=0.02, resamples=200, seed=0)
    assert result.win_rate == pytest.approx(2 / 3)
    assert (result.n_decided, result.n_images, result.n_prompts) == (3, 6, 3)
    assert result.tie_share == pytest.approx(0.5)
    assert result.win_rate_ties_half == pytest.approx((2 + 1.5) / 6)


def test_a_win_rate_without_decided_images_is_none() -> None:
    result = win_rate([0.0, 0.01], ["a", "b"], tau=0.02, resamples=50, seed=0)
    assert (result.win_rate, result.low, result.high) == (None, None, None)
    assert (result.tie_share, result.win_rate_ties_half) == (1.0, 0.5)


def test_no_images_at_all() -> None:
    result = win_rate([], [], tau=0.0, resamples=10, seed=0)
    assert (result.win_rate, result.tie_share, result.n_images) == (None, None, 0)
    assert mean([], [], 10, 0).value is None


def test_swapping_the_sides_mirrors_rate_and_interval() -> None:
    delta = np.random.default_rng(1).normal(0.1, 1, 300)
    ids = [str(i // 3) for i in range(300)]
    there, back = win_rate(delta, ids, 0.2, 500, 7), win_rate(-delta, ids, 0.2, 500, 7)
    assert there.win_rate is not None and back.win_rate == pytest.approx(1 - there.win_rate)
    assert back.low == pytest.approx(1 - there.high) and back.high == pytest.approx(1 - there.low)


def test_the_interval_agrees_with_wilson_when_images_are_independent() -> None:
    delta = np.where(np.random.default_rng(2).random(1500) < 0.7, 1.0, -1.0)
    result = win_rate(delta, [str(i) for i in range(1500)], 0.0, 2000, 0)
    wilson = stats.binomtest(int((delta > 0).sum()), 1500).proportion_ci(method="wilson")
    assert (result.low, result.high) == (pytest.approx(wilson.low, abs=0.006), pytest.approx(wilson.high, abs=0.006))


def test_the_interval_covers_the_truth_when_images_of_a_prompt_hang_together() -> None:
    rng = np.random.default_rng(3)
    ids = [str(i // 4) for i in range(240)]
    covered = naive = 0
    for trial in range(200):
        delta = np.repeat(rng.normal(0, 1, 60), 4) + rng.normal(0, 0.3, 240)  # true win rate 1/2
        result = win_rate(delta, ids, 0.0, 300, trial)
        assert result.low is not None and result.high is not None and result.win_rate is not None
        covered += result.low <= 0.5 <= result.high
        naive += abs(result.win_rate - 0.5) < 1.96 * np.sqrt(0.25 / 240)
    assert 0.90 <= covered / 200 <= 0.99
    assert naive / 200 < 0.80  # what clustering is for


def test_mean_and_share_by_hand() -> None:
    result = mean([True, False, True, True], ["a", "a", "b", "b"], 100, 0)
    assert (result.value, result.n, result.n_prompts) == (0.75, 4, 2)
    fixed = share_given([True, False, True, True], [True, True, False, True], ["a", "a", "b", "c"], 100, 0)
    assert fixed.value == pytest.approx(2 / 3)
    assert (fixed.n, fixed.n_prompts) == (3, 2)


def test_a_paired_difference_of_shares_is_the_mean_of_differences() -> None:
    rng = np.random.default_rng(4)
    base, tuned = rng.random(200) < 0.5, rng.random(200) < 0.6
    result = mean(tuned.astype(int) - base.astype(int), [str(i) for i in range(200)], 2000, 0)
    assert result.value == pytest.approx(tuned.mean() - base.mean())
    b, c = (tuned & ~base).sum(), (base & ~tuned).sum()  # the discordant pairs give the standard error
    half = 1.96 * np.sqrt((b + c) / 200 - ((b - c) / 200) ** 2) / np.sqrt(200)
    assert result.high - result.low == pytest.approx(2 * half, rel=0.08)


def test_ratio_of_means_by_hand() -> None:
    assert ratio_of_means([1.0, 2.0], [2.0, 2.0], ["a", "b"], 50, 0).value == pytest.approx(0.75)
    assert ratio_of_means([1.0], [0.0], ["a"], 50, 0).value is None


def test_holm_by_hand() -> None:
    # sorted 0.005, 0.01, 0.03, 0.04 -> times 4, 3, 2, 1 -> 0.02, 0.03, 0.06, 0.04 -> running maximum
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_head_to_head_finds_an_effect_and_no_effect() -> None:
    rng = np.random.default_rng(5)
    strong = head_to_head(rng.normal(0.8, 1, (5, 100, 2)), 0.1, 1000, 0)
    none = head_to_head(rng.normal(0.0, 1, (5, 100, 2)), 0.1, 1000, 0)
    assert strong.low is not None and strong.low > 0.5 and strong.p_value < 0.01
    assert none.low is not None and none.high is not None and none.low < 0.5 < none.high and none.p_value > 0.05


def test_head_to_head_is_wider_when_training_seeds_disagree() -> None:
    rng = np.random.default_rng(6)
    noise = rng.normal(0, 1, (5, 100, 1))
    agree = head_to_head(noise, 0.0, 1000, 0)
    disagree = head_to_head(noise + np.array([-1.5, -0.7, 0.0, 0.7, 1.5])[:, None, None], 0.0, 1000, 0)
    width = [r.high - r.low for r in (agree, disagree)]
    assert width[1] > 2 * width[0]


def test_head_to_head_of_ties_alone() -> None:
    result = head_to_head(np.zeros((2, 3, 1)), 0.0, 50, 0)
    assert (result.win_rate, result.low, result.tie_share, result.p_value) == (None, None, 1.0, 1.0)
