import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspo.shapes.raters import (
    advantage,
    bayes_macro_f1,
    draw_votes,
    p_first,
    side_offset,
    tie_weight,
    vote_probabilities,
    wrong_taste,
)

finite = st.floats(-30, 30)
shares = st.floats(0.01, 0.99)


def votes_at(lead, tie_rate=0.11, side_bias=0.55):
    return vote_probabilities(np.asarray(lead), tie_weight(tie_rate, side_offset(side_bias)))


@given(finite, finite, st.floats(0.01, 10))
def test_davidson(a, b, nu):
    weights = np.array([np.exp(a), nu * np.exp((a + b) / 2), np.exp(b)])
    np.testing.assert_allclose(vote_probabilities(np.asarray(a - b), nu), weights / weights.sum(), rtol=1e-9)


@given(st.floats(0, 0.9), shares)
def test_rates_at_equal_quality(tie_rate, side_bias):
    first, tie, second = votes_at(side_offset(side_bias), tie_rate, side_bias)
    assert tie == pytest.approx(tie_rate, abs=1e-9)
    assert first / (first + second) == pytest.approx(side_bias)


@given(finite)
def test_a_rater_who_decides_is_bradley_terry(lead):
    first, _, second = votes_at(lead)
    assert p_first(np.asarray(lead)) == pytest.approx(first / (first + second))


def test_extreme_advantages_do_not_overflow():
    np.testing.assert_allclose(votes_at([1e6, -1e6]), [[1, 0, 0], [0, 0, 1]])


def test_advantage_and_wrong_taste():
    plain = advantage(np.array(0.7), np.array(0.6), np.array(0.0), np.array(1.0), 0.0, 0.05, 0.2)
    assert plain == pytest.approx(2.2)
    fooled = advantage(np.array(0.7), np.array(0.6), np.array(0.0), np.array(1.0), 0.1, 0.05, 0.2)
    assert fooled == pytest.approx(0.2)
    taste = wrong_taste(np.array([0.2, 0.9, 0.2]), np.array([0.02, 0.02, 0.1]))
    assert taste[1] > taste[0]
    assert taste[2] > taste[0]


def test_votes_follow_the_probabilities_and_the_keys():
    ids = [f"pair {i}" for i in range(800)]
    probabilities = np.tile(votes_at(0.8), (800, 1))
    votes = draw_votes(probabilities, ids, "overall", 4, seed=0)
    shares = [(votes == value).mean() for value in (1.0, 0.5, 0.0)]
    np.testing.assert_allclose(shares, probabilities[0], atol=0.03)
    np.testing.assert_array_equal(draw_votes(probabilities[:5], ids[:5], "overall", 2, seed=0), votes[:5, :2])
    assert (draw_votes(probabilities, ids, "detail", 4, seed=0) != votes).any()


def test_bayes_macro_f1():
    p = np.array([0.9, 0.8, 0.3, 0.4, 0.6])
    labels = np.array([1.0, 0.0, 0.0, 0.0, 0.5])  # the tie does not count
    assert bayes_macro_f1(p, labels) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert bayes_macro_f1(p, np.array([1.0, 1.0, 0.0, 0.0, 0.5])) == 1.0
    assert np.isnan(bayes_macro_f1(p[-1:], labels[-1:]))


def test_no_guess_beats_the_bayes_classifier():
    rng = np.random.default_rng(0)
    p = p_first(rng.normal(0, 2, 4000))
    labels = (rng.random(4000) < p).astype(float)
    best = bayes_macro_f1(p, labels)
    for noise in (0.5, 1.0, 3.0):
        blurred = p_first(np.log(p / (1 - p)) + rng.normal(0, noise, 4000))
        assert bayes_macro_f1(blurred, labels) < best
