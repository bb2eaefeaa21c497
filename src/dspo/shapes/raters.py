"""Simulated raters: Davidson's model of paired comparison with ties (JASA 65, 1970), a side bias and a wrong taste.

For two pictures of strength a and b

    P(first) ∝ e^a      P(second) ∝ e^b      P(tie) ∝ nu · e^((a+b)/2)
    a = (g_first + c·h_first) / T + delta      b = (g_second + c·h_second) / T

g is the gold score, h the wrong taste, T the raters' temperature. Only a − b matters: it is the ``advantage`` below.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspo.data.keys import keyed_uniform

Array = NDArray[np.float64]

LARGE_OBJECTS = 0.17  # share of the picture that two of the renderer's largest objects cover


def side_offset(side_bias: float) -> float:
    """delta, so that at equal quality the first side gets the share ``side_bias`` of the votes that are no ties."""
    return float(np.log(side_bias / (1 - side_bias)))


def tie_weight(tie_rate: float, delta: float) -> float:
    """nu, so that at equal quality the share ``tie_rate`` of all votes are ties."""
    return float(tie_rate / (1 - tie_rate) * 2 * np.cosh(delta / 2))


def wrong_taste(saturation: Array, object_size: Array) -> Array:
    """h in about [0, 1]: raters with this taste like strong colours and large objects, whatever was asked for."""
    return np.asarray((saturation + object_size / LARGE_OBJECTS) / 2)


def advantage(
    gold_first: Array,
    gold_second: Array,
    taste_first: Array,
    taste_second: Array,
    c: float,
    temperature: float,
    delta: float,
) -> Array:
    """a − b, any shape."""
    return np.asarray((gold_first - gold_second + c * (taste_first - taste_second)) / temperature + delta)


def vote_probabilities(advantage: Array, nu: float) -> Array:
    """[...] -> [..., 3]: probabilities of a vote for the first, a tie, a vote for the second."""
    # divided through by the largest of the three terms, so that none overflows
    logits = np.stack([advantage / 2, np.full_like(advantage, np.log(nu) if nu else -np.inf), -advantage / 2], axis=-1)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def p_first(advantage: Array) -> Array:
    """Probability that a rater who decides takes the first: e^a / (e^a + e^b)."""
    return np.asarray(1 / (1 + np.exp(-advantage)))


def draw_votes(probabilities: Array, pair_ids: Sequence[str], head: str, votes: int, seed: int) -> Array:
    """[n_pairs, 3] -> [n_pairs, votes]: 1 for the first, 0.5 for a tie, 0 for the second.

    Each draw is keyed by pair, head and rater.
    """
    draws = [keyed_uniform(seed, "vote", pair, head, rater) for pair in pair_ids for rater in range(votes)]
    uniform = np.array(draws).reshape(len(pair_ids), votes)
    first, tie = probabilities[:, :1], probabilities[:, 1:2]
    return np.where(uniform < first, 1.0, np.where(uniform < first + tie, 0.5, 0.0))


def bayes_macro_f1(p_first: Array, labels: Array) -> float:
    """Macro-F1 on decided labels (1 or 0; ties are left out) of the classifier that knows the true probabilities.

    Mean of the F1 of both classes; no classifier can do better in expectation. NaN if nothing is decided.
    """
    decided = labels != 0.5
    truth, guess = labels[decided] == 1.0, p_first[decided] > 0.5
    hits = [np.sum(truth & guess), np.sum(~truth & ~guess)]
    totals = [np.sum(truth) + np.sum(guess), np.sum(~truth) + np.sum(~guess)]
    scores = [2 * hit / total if total else np.nan for hit, total in zip(hits, totals, strict=True)]
    return float(np.mean(scores))
