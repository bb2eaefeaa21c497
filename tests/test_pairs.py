"""Pair selection: what must hold for every table of scores."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspo.data.records import HEADS
from dspo.params import SamplerParams, ScoreParams
from dspo.preference.pairs import Candidate, Pair, calibrated_rewards, held_out_prompts, select_pairs, weighted_reward

SAMPLERS = [
    SamplerParams(scheduler="ddim", steps=12, guidance_scale=3.0),
    SamplerParams(scheduler="ddim", steps=12, guidance_scale=2.0),
    SamplerParams(scheduler="euler", steps=12, guidance_scale=3.0),
]


def score_params(**changes: object) -> ScoreParams:
    fields: dict[str, object] = {
        "select": "overall",
        "weights": {"overall": 1.0},
        "match": ["guidance_scale", "steps", "scheduler"],
        "margin": 0.0,
        "max_pairs_per_prompt": 2,
        "validation_share": 0.1,
        "batch_size": 8,
    }
    return ScoreParams.model_validate(fields | changes)


def one_prompt(*overall: float) -> list[Candidate]:
    return [Candidate("p", index, SAMPLERS[0], {"overall": score}, score) for index, score in enumerate(overall)]


def indices(pairs: list[Pair]) -> list[tuple[int, int]]:
    return [(pair.winner.sample_index, pair.loser.sample_index) for pair in pairs]


# Few distinct scores, so that ties are common.
scores = st.sampled_from([-1.0, -0.25, 0.0, 0.5, 0.75, 2.0])
candidate = st.builds(
    Candidate,
    prompt_id=st.sampled_from("abc"),
    sample_index=st.integers(0, 9),
    sampler=st.sampled_from(SAMPLERS),
    scores=st.fixed_dictionaries(dict.fromkeys(HEADS, scores)),
    reward=scores,
)
tables = st.lists(candidate, max_size=20, unique_by=lambda c: (c.prompt_id, c.sample_index))
params = st.builds(
    score_params,
    select=st.sampled_from(["overall", "pareto"]),
    match=st.lists(st.sampled_from(["guidance_scale", "steps", "scheduler"]), unique=True),
    margin=st.sampled_from([0.0, 0.5, 1.0]),
    max_pairs_per_prompt=st.integers(1, 4),
)


@settings(deadline=None)
@given(tables, params)
def test_what_every_pair_keeps(table: list[Candidate], chosen: ScoreParams) -> None:
    pairs = select_pairs(table, chosen, HEADS)
    for pair in pairs:
        assert pair.winner.prompt_id == pair.loser.prompt_id
        assert pair.gap > 0
        assert pair.gap >= chosen.margin
        for key in chosen.match:
            assert getattr(pair.winner.sampler, key) == getattr(pair.loser.sampler, key)
        if chosen.select == "pareto":
            assert all(pair.winner.scores[head] >= pair.loser.scores[head] for head in HEADS)
    assert len({pair.id for pair in pairs}) == len(pairs)
    assert all(n <= chosen.max_pairs_per_prompt for n in Counter(p.winner.prompt_id for p in pairs).values())


@settings(deadline=None)
@given(tables, params, st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(table: list[Candidate], chosen: ScoreParams, random: object) -> None:
    shuffled = list(table)
    random.shuffle(shuffled)
    assert select_pairs(table, chosen, HEADS) == select_pairs(shuffled, chosen, HEADS)


@settings(deadline=None)
@given(tables, params)
def test_a_prompt_with_a_possible_pair_gets_its_largest(table: list[Candidate], chosen: ScoreParams) -> None:
    everything = select_pairs(table, chosen.model_copy(update={"max_pairs_per_prompt": 1000}), HEADS)
    largest: dict[str, float] = {}
    for pair in everything:
        largest[pair.winner.prompt_id] = max(pair.gap, largest.get(pair.winner.prompt_id, 0.0))
    found: dict[str, float] = {}
    for pair in select_pairs(table, chosen, HEADS):
        found.setdefault(pair.winner.prompt_id, pair.gap)
    assert found == largest


def test_best_against_worst_then_images_that_are_new() -> None:
    table = one_prompt(0.1, 0.9, 0.4, 0.5)
    assert indices(select_pairs(table, score_params(), HEADS)) == [(1, 0), (3, 2)]
    assert indices(select_pairs(table, score_params(max_pairs_per_prompt=3), HEADS)) == [(1, 0), (1, 2), (3, 2)]


def test_equal_gaps_are_ordered_by_index() -> None:
    table = one_prompt(1.0, 0.0, 1.0, 0.0)
    assert indices(select_pairs(table, score_params(), HEADS)) == [(0, 1), (2, 3)]


def test_equal_scores_make_no_pair() -> None:
    assert select_pairs(one_prompt(0.5, 0.5, 0.5), score_params(), HEADS) == []


def test_margin_is_the_least_gap() -> None:
    assert indices(select_pairs(one_prompt(0.5, 0.0), score_params(margin=0.5), HEADS)) == [(0, 1)]
    assert select_pairs(one_prompt(0.5, 0.0), score_params(margin=0.51), HEADS) == []


def test_pairs_across_settings_only_where_match_allows() -> None:
    table = [Candidate("p", i, sampler, {"overall": float(i)}, float(i)) for i, sampler in enumerate(SAMPLERS)]
    assert select_pairs(table, score_params(), HEADS) == []
    assert indices(select_pairs(table, score_params(match=["scheduler"]), HEADS)) == [(1, 0)]
    assert indices(select_pairs(table, score_params(match=[], max_pairs_per_prompt=1), HEADS)) == [(2, 0)]


def test_pareto_ignores_heads_without_labels() -> None:
    table = [
        Candidate("p", 0, SAMPLERS[0], {"overall": 1.0, "detail": 0.0}, 1.0),
        Candidate("p", 1, SAMPLERS[0], {"overall": 0.0, "detail": 1.0}, 0.0),
    ]
    assert select_pairs(table, score_params(select="pareto"), ["overall", "detail"]) == []
    assert indices(select_pairs(table, score_params(select="pareto"), ["overall"])) == [(0, 1)]


def test_the_reward_is_the_weighted_mean_of_the_named_heads() -> None:
    scores = {"overall": 1.0, "alignment": 4.0, "detail": 100.0}
    assert weighted_reward(scores, {"overall": 1.0, "alignment": 2.0}) == pytest.approx(3.0)


def test_calibrated_rewards_follow_the_formula() -> None:
    rewards, temperature = [0.3, -1.0, 2.0], 0.7
    expected = [
        sum(1 / (1 + math.exp(-(a - b) / temperature)) for j, b in enumerate(rewards) if j != i) / 2
        for i, a in enumerate(rewards)
    ]
    np.testing.assert_allclose(calibrated_rewards(rewards, temperature), expected, rtol=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=12), st.floats(0.01, 10))
def test_calibrated_rewards_are_win_rates(rewards: list[float], temperature: float) -> None:
    calibrated = calibrated_rewards(rewards, temperature)
    assert ((calibrated >= 0) & (calibrated <= 1)).all()
    assert calibrated.mean() == pytest.approx(0.5)
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(calibrated[order]) >= -1e-9).all()


@settings(deadline=None)
@given(st.sets(st.text("0123456789abcdef", min_size=16, max_size=16), max_size=40), st.floats(0, 0.99))
def test_held_out_share(prompt_ids: set[str], share: float) -> None:
    held_out = held_out_prompts(prompt_ids, share, seed=0)
    assert held_out <= prompt_ids
    assert len(held_out) == min(math.ceil(share * len(prompt_ids)), max(len(prompt_ids) - 1, 0))
    assert held_out == held_out_prompts(sorted(prompt_ids, reverse=True), share, seed=0)
