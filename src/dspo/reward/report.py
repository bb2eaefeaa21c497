"""How good a reward model is on held-out ratings, with what is needed to read the numbers.

Classification is on *decided* votes of one rater (ties left out). Sides are fixed by a hash of the pair, so that
macro-F1 is nearly pair accuracy; the constant classifier's F1 and the noise ceiling stand beside it. The ceiling is the
classifier that knows each pair's true probability (simulated raters only).
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from dspo.data.bootstrap import Totals, clustered_bootstrap
from dspo.reward.dataset import Floats, RatedPairs

RESAMPLES = 2000
ECE_BINS = 10

Metrics = dict[str, float | int | None]
Selection = NDArray[np.bool_]


def reward_report(
    pairs: RatedPairs,
    heads: tuple[str, ...],
    difference: Floats,
    zero_shot: Floats,
    temperatures: Mapping[str, float],
    untrained: list[str],
    seed: int,
) -> dict[str, object]:
    """The test report as JSON values.

    ``difference``: [n_pairs, n_heads] score of the first minus score of the second image; ``zero_shot``: [n_pairs] the
    same for the untrained backbone's cosine; ``temperatures``: per head. Top level: `overall` on all pairs; ``base``
    and ``other``: the same on pairs of the base model's own samples and the rest; ``heads``: every head against its own
    votes' majority, or "untrained".
    """
    overall = difference[:, heads.index("overall")]
    temperature = temperatures["overall"]
    everything = np.ones(len(pairs), dtype=bool)
    report: dict[str, object] = dict(_overall(pairs, overall, zero_shot, temperature, everything, seed))
    report["base"] = _overall(pairs, overall, zero_shot, temperature, pairs.base, seed)
    report["other"] = _overall(pairs, overall, zero_shot, temperature, ~pairs.base, seed)
    report["heads"] = {
        head: "untrained" if head in untrained else _head(pairs, head, difference[:, i], temperatures[head], seed)
        for i, head in enumerate(heads)
    }
    return report


def fit_temperatures(heads: tuple[str, ...], difference: Floats, pairs: RatedPairs) -> dict[str, float]:
    """Each head's temperature from its score differences [n_pairs, n_heads]."""
    shares = pairs.head_shares(heads)
    return {head: fit_temperature(difference[:, i], shares[:, i]) for i, head in enumerate(heads)}


def fit_temperature(difference: Floats, share: Floats) -> float:
    """T that minimises the cross-entropy of sigmoid(difference / T) with the vote shares; 1 without labels.

    Arrays of [n_pairs]; NaN shares are left out.
    """
    labelled = ~np.isnan(share)
    d, y = difference[labelled], share[labelled]
    if len(d) == 0 or not d.any():
        return 1.0
    fit = minimize_scalar(
        lambda log_t: np.mean(cross_entropy(d / np.exp(log_t), y)),
        bounds=(-7, 7),
        method="bounded",
    )
    return float(np.exp(fit.x))


def confusion(difference: Floats, first_won: Selection) -> dict[str, Floats]:
    """Columns tp, fp, tn, fn ("first won" is positive) of decided pairs; a difference of 0 counts half on each."""
    first = np.where(difference == 0, 0.5, (difference > 0).astype(np.float64))
    won = first_won.astype(np.float64)
    return {
        "tp": first * won,
        "fp": first * (1 - won),
        "tn": (1 - first) * (1 - won),
        "fn": (1 - first) * won,
    }


def macro_f1(totals: Totals) -> Floats:
    """Mean of the F1 of "first won" and the F1 of "second won"."""
    wrong = totals["fp"] + totals["fn"]
    return totals["tp"] / (2 * totals["tp"] + wrong) + totals["tn"] / (2 * totals["tn"] + wrong)


def accuracy(totals: Totals) -> Floats:
    right = totals["tp"] + totals["tn"]
    return right / (right + totals["fp"] + totals["fn"])


def macro_f1_difference(
    a: Floats, b: Floats, first_won: Selection, prompt_id: NDArray[np.str_], seed: int
) -> tuple[float, float, float]:
    """Macro-F1 of model a minus that of model b on the same decided pairs, with its paired 95 % interval."""
    columns = {f"a_{name}": values for name, values in confusion(a, first_won).items()}
    columns |= {f"b_{name}": values for name, values in confusion(b, first_won).items()}

    def statistic(totals: Totals) -> Floats:
        sides = [
            {name[2:]: values for name, values in totals.items() if name.startswith(side)} for side in ("a_", "b_")
        ]
        return macro_f1(sides[0]) - macro_f1(sides[1])

    point = statistic({name: values.sum(keepdims=True) for name, values in columns.items()})
    low, high = clustered_bootstrap(statistic, columns, prompt_id, RESAMPLES, seed)
    return float(point[0]), low, high


def _overall(
    pairs: RatedPairs,
    difference: Floats,
    zero_shot: Floats,
    temperature: float,
    chosen: Selection,
    seed: int,
) -> Metrics:
    decided = chosen & (pairs.vote != 0.5)
    metrics = _classification(difference[decided], pairs.vote[decided] > 0.5, pairs.prompt_id[decided], seed)
    zero = _classification(zero_shot[decided], pairs.vote[decided] > 0.5, pairs.prompt_id[decided], seed)
    known = decided & ~np.isnan(pairs.p_first)
    ceiling = None
    if known.any() and known.sum() == decided.sum():
        ceiling = _point(macro_f1, pairs.p_first[known] - 0.5, pairs.vote[known] > 0.5)
    score = metrics["macro_f1"]
    return {
        **metrics,
        **_calibration(difference[chosen], pairs.head_shares(("overall",))[chosen, 0], temperature),
        "n_ties": int(chosen.sum() - decided.sum()),
        "zero_shot_macro_f1": zero["macro_f1"],
        "zero_shot_pair_accuracy": zero["pair_accuracy"],
        "ceiling_macro_f1": ceiling,
        "share_of_ceiling": score / ceiling if score is not None and ceiling else None,
    }


def _head(pairs: RatedPairs, head: str, difference: Floats, temperature: float, seed: int) -> Metrics:
    share = pairs.head_shares((head,))[:, 0]
    decided = ~np.isnan(share) & (share != 0.5)
    return {
        **_classification(difference[decided], share[decided] > 0.5, pairs.prompt_id[decided], seed),
        **_calibration(difference, share, temperature),
    }


def _classification(difference: Floats, first_won: Selection, prompt_id: NDArray[np.str_], seed: int) -> Metrics:
    columns = confusion(difference, first_won)
    f1_low, f1_high = clustered_bootstrap(macro_f1, columns, prompt_id, RESAMPLES, seed)
    accuracy_low, accuracy_high = clustered_bootstrap(accuracy, columns, prompt_id, RESAMPLES, seed)
    prevalence = float(first_won.mean()) if len(first_won) else None
    return {
        "macro_f1": _point(macro_f1, difference, first_won),
        "macro_f1_low": _number(f1_low),
        "macro_f1_high": _number(f1_high),
        "pair_accuracy": _point(accuracy, difference, first_won),
        "pair_accuracy_low": _number(accuracy_low),
        "pair_accuracy_high": _number(accuracy_high),
        "n_pairs": len(first_won),
        "n_prompts": len(np.unique(prompt_id)),
        "n_equal_scores": int((difference == 0).sum()),
        "prevalence_first": prevalence,
        "constant_f1": None if prevalence is None else 2 * prevalence / (1 + prevalence),
    }


def _calibration(difference: Floats, share: Floats, temperature: float) -> Metrics:
    """Likelihood, Brier score and expected calibration error (equal-width bins) against the vote shares."""
    labelled = ~np.isnan(share)
    d, y = difference[labelled] / temperature, share[labelled]
    if len(d) == 0:
        return {"temperature": temperature, "nll": None, "brier": None, "ece": None}
    p = 1 / (1 + np.exp(-d))
    bins = np.minimum((p * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.abs(np.bincount(bins, weights=p - y, minlength=ECE_BINS))
    return {
        "temperature": temperature,
        "nll": float(np.mean(cross_entropy(d, y))),
        "brier": float(np.mean((p - y) ** 2)),
        "ece": float(gaps.sum() / len(d)),
    }


def cross_entropy(logit: Floats, share: Floats) -> Floats:
    loss: Floats = share * np.logaddexp(0, -logit) + (1 - share) * np.logaddexp(0, logit)
    return loss


def _point(statistic: Callable[[Totals], Floats], difference: Floats, first_won: Selection) -> float | None:
    totals = {name: values.sum(keepdims=True) for name, values in confusion(difference, first_won).items()}
    with np.errstate(invalid="ignore", divide="ignore"):
        return _number(float(statistic(totals)[0]))


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
