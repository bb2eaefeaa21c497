"""Win rates, shares and their intervals: every figure that the evaluation reports.

All intervals are 95 % percentile bootstraps that draw whole prompts (:func:`dspo.data.bootstrap.clustered_bootstrap`),
since images of one prompt are not independent. A figure that is undefined (no decided image, no rows) is ``None``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspo.data.bootstrap import Totals, clustered_bootstrap

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WinRate:
    """How often the first of two images is the better one, by one judge."""

    win_rate: float | None  # wins / (wins + losses) over decided images, |delta| > tau
    low: float | None  # of the 95 % interval
    high: float | None
    win_rate_ties_half: float | None  # over all images, a tie counts one half
    tie_share: float | None
    n_decided: int
    n_images: int
    n_prompts: int
    tau: float


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, with its 95 % interval."""

    value: float | None
    low: float | None
    high: float | None
    n: int  # rows
    n_prompts: int


def _defined(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _interval(bounds: tuple[float, float]) -> tuple[float | None, float | None]:
    return _defined(bounds[0]), _defined(bounds[1])


def _win_share(totals: Totals) -> Array:
    return totals["win"] / (totals["win"] + totals["loss"])


def _mean(totals: Totals) -> Array:
    return totals["value"] / totals["one"]


def win_rate(delta: npt.ArrayLike, prompt_ids: Sequence[str], tau: float, resamples: int, seed: int) -> WinRate:
    """Decided win rate of paired images.

    ``delta``: [n] score of the first image minus score of the second. |delta| <= tau is a tie: without the band a judge
    that sees a blur of 1e-6 everywhere turns a null effect into any rate at all.
    """
    difference = np.asarray(delta, dtype=np.float64)
    win, loss = difference > tau, difference < -tau
    wins, decided, n = int(win.sum()), int(win.sum() + loss.sum()), len(difference)
    bounds = clustered_bootstrap(_win_share, {"win": win, "loss": loss}, list(prompt_ids), resamples, seed)
    low, high = _interval(bounds)
    return WinRate(
        win_rate=wins / decided if decided else None,
        low=low,
        high=high,
        win_rate_ties_half=(wins + (n - decided) / 2) / n if n else None,
        tie_share=(n - decided) / n if n else None,
        n_decided=decided,
        n_images=n,
        n_prompts=len(set(prompt_ids)),
        tau=tau,
    )


def mean(values: npt.ArrayLike, prompt_ids: Sequence[str], resamples: int, seed: int) -> Estimate:
    """Mean of ``values`` [n]; of booleans a share, of paired differences a paired difference of means."""
    column = np.asarray(values, dtype=np.float64)
    totals = {"value": column, "one": np.ones(len(column))}
    low, high = _interval(clustered_bootstrap(_mean, totals, list(prompt_ids), resamples, seed))
    value = float(column.mean()) if len(column) else None
    return Estimate(value, low, high, len(column), len(set(prompt_ids)))


def share_given(
    event: npt.ArrayLike, given: npt.ArrayLike, prompt_ids: Sequence[str], resamples: int, seed: int
) -> Estimate:
    """Share of ``event`` among the rows where ``given`` holds, P(event | given); both boolean [n]."""
    condition = np.asarray(given, dtype=bool)
    kept = [pid for pid, keep in zip(prompt_ids, condition, strict=True) if keep]
    return mean(np.asarray(event, dtype=bool)[condition], kept, resamples, seed)


def ratio_of_means(
    numerator: npt.ArrayLike, denominator: npt.ArrayLike, prompt_ids: Sequence[str], resamples: int, seed: int
) -> Estimate:
    """mean(numerator) / mean(denominator) of paired columns [n]."""
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    totals = {"top": top, "bottom": bottom}
    bounds = clustered_bootstrap(lambda t: t["top"] / t["bottom"], totals, list(prompt_ids), resamples, seed)
    low, high = _interval(bounds)
    value = _defined(float(top.sum() / bottom.sum())) if bottom.sum() else None
    return Estimate(value, low, high, len(top), len(set(prompt_ids)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979): max over j <= i of (m-j) p_(j), at most 1."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


@dataclass(frozen=True)
class HeadToHead:
    """Win rate of one training method over another, over training seeds and prompts."""

    win_rate: float | None
    low: float | None
    high: float | None
    p_value: float  # two-sided, of win rate 1/2
    tie_share: float
    n_decided: int
    n_seeds: int
    n_prompts: int


def head_to_head(delta: npt.ArrayLike, tau: float, resamples: int, seed: int) -> HeadToHead:
    """Decided win rate where both training seeds and prompts are drawn anew.

    ``delta``: [n_seeds, n_prompts, n_images] paired score differences. Seeds and prompts are resampled independently
    and a cell counts the product of its draws (the pigeonhole bootstrap of Owen 2007), which errs on the wide side.
    The p-value is 2 min(P*(rate <= 1/2), P*(rate >= 1/2)), one resample added on each side so that it is never 0.
    """
    difference = np.asarray(delta, dtype=np.float64)
    win, loss = (difference > tau).sum(axis=2), (difference < -tau).sum(axis=2)  # [n_seeds, n_prompts]
    n_seeds, n_prompts = win.shape
    rng = np.random.default_rng(seed)
    seeds_drawn = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples)
    prompts_drawn = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=resamples)
    wins = ((seeds_drawn @ win) * prompts_drawn).sum(axis=1)
    losses = ((seeds_drawn @ loss) * prompts_drawn).sum(axis=1)
    decided = int(win.sum() + loss.sum())
    kept = wins + losses > 0
    rates = wins[kept] / (wins + losses)[kept]
    low, high = np.quantile(rates, [0.025, 0.975]) if len(rates) else (math.nan, math.nan)
    below, above = ((rates <= 0.5).sum() + 1) / (len(rates) + 1), ((rates >= 0.5).sum() + 1) / (len(rates) + 1)
    return HeadToHead(
        win_rate=float(win.sum()) / decided if decided else None,
        low=_defined(low),
        high=_defined(high),
        p_value=float(min(1.0, 2 * min(below, above))),
        tie_share=1 - decided / difference.size,
        n_decided=decided,
        n_seeds=n_seeds,
        n_prompts=n_prompts,
    )
