"""Scored candidates -> pairs of a winner and a loser. Pure functions: the order of the candidates never matters."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspo.data.keys import keyed_uniform
from dspo.params import Head, SamplerKey, SamplerParams, ScoreParams


@dataclass(frozen=True)
class Candidate:
    """One scored image; ``sample_index`` names it among the images of its prompt."""

    prompt_id: str
    sample_index: int
    sampler: SamplerParams
    scores: Mapping[str, float]  # by head
    reward: float  # what pairs are formed by: see weighted_reward


@dataclass(frozen=True)
class Pair:
    winner: Candidate
    loser: Candidate

    @property
    def id(self) -> str:
        return f"{self.winner.prompt_id}-{self.winner.sample_index}-{self.loser.sample_index}"

    @property
    def gap(self) -> float:
        """Difference of the rewards, above 0."""
        return self.winner.reward - self.loser.reward


def weighted_reward(scores: Mapping[str, float], weights: Mapping[Head, float]) -> float:
    """Weighted mean of an image's scores; ``weights`` by head."""
    return sum(weight * scores[head] for head, weight in weights.items()) / sum(weights.values())


def select_pairs(candidates: Iterable[Candidate], params: ScoreParams, trained_heads: Sequence[str]) -> list[Pair]:
    """Choose at most ``max_pairs_per_prompt`` pairs of every prompt, sorted by prompt, largest gap first.

    Winner and loser are equal in the ``match`` keys, and the winner's reward is higher by at least ``margin``.
    With ``select="pareto"`` the winner is besides no worse on any of ``trained_heads`` (the scores of a head that had
    no labels mean nothing). Pairs that share no image are taken before pairs that do, so that the first are best
    against worst, and one lucky image does not make up a prompt's whole share.
    """
    by_prompt: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_prompt[candidate.prompt_id].append(candidate)
    heads = trained_heads if params.select == "pareto" else ()
    return [
        pair
        for prompt in sorted(by_prompt)
        for pair in _largest_gaps(
            _possible_pairs(by_prompt[prompt], params.match, params.margin, heads), params.max_pairs_per_prompt
        )
    ]


def calibrated_rewards(rewards: Sequence[float], temperature: float) -> NDArray[np.float64]:
    """CaPO's calibrated rewards [n] of one prompt's candidates (Lee et al., CVPR 2025): win rates.

    Rca(x_i) = mean over j != i of sigmoid((R_i - R_j) / T). ``temperature``: T of the reward model's `overall`,
    fitted on validation. ``rewards``: at least two.
    """
    reward = np.asarray(rewards, dtype=np.float64)
    wins = 0.5 * (1 + np.tanh((reward[:, None] - reward[None, :]) / (2 * temperature)))  # sigmoid without overflow
    np.fill_diagonal(wins, 0)
    calibrated: NDArray[np.float64] = wins.sum(axis=1) / (len(reward) - 1)
    return calibrated


def held_out_prompts(prompt_ids: Iterable[str], share: float, seed: int) -> set[str]:
    """The ``share`` of the prompts, rounded up, whose keyed draws are least; at least one prompt stays for training."""
    draws = sorted((keyed_uniform(seed, "held-out pairs", prompt_id), prompt_id) for prompt_id in set(prompt_ids))
    count = min(math.ceil(share * len(draws)), len(draws) - 1)
    return {prompt_id for _, prompt_id in draws[: max(count, 0)]}


def _possible_pairs(
    candidates: Sequence[Candidate], match: Sequence[SamplerKey], margin: float, heads: Sequence[str]
) -> list[Pair]:
    """Every pair of one prompt that may be formed; the winner is no worse on any of ``heads``."""
    groups: dict[tuple[object, ...], list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        groups[tuple(getattr(candidate.sampler, key) for key in match)].append(candidate)
    pairs = [Pair(w, loser) for group in groups.values() for w in group for loser in group if w.reward > loser.reward]
    return [
        pair
        for pair in pairs
        if pair.gap >= margin and all(pair.winner.scores[head] >= pair.loser.scores[head] for head in heads)
    ]


def _largest_gaps(pairs: Sequence[Pair], most: int) -> list[Pair]:
    used: set[int] = set()
    disjoint, sharing = [], []
    for pair in sorted(pairs, key=_rank):
        images = {pair.winner.sample_index, pair.loser.sample_index}
        if used & images:
            sharing.append(pair)
        else:
            disjoint.append(pair)
            used |= images
    return sorted((disjoint + sharing)[:most], key=_rank)


def _rank(pair: Pair) -> tuple[float, int, int]:
    """Largest gap first; equal gaps by the images' indices."""
    return -pair.gap, pair.winner.sample_index, pair.loser.sample_index
