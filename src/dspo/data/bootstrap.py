"""Bootstrap over clusters of rows, the interval behind every figure that is reported per prompt."""

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Totals = dict[str, Array]


def clustered_bootstrap(
    statistic: Callable[[Totals], Array],
    values: Mapping[str, npt.ArrayLike],
    clusters: npt.ArrayLike,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Percentile 95 % interval of a statistic when rows of one cluster (a prompt) are not independent.

    Whole clusters are drawn with replacement (Efron & Tibshirani 1993, section 8). The statistic is a function of
    column totals, which makes a resample one row of a matrix product:

    - ``values``: columns of ``n_rows`` numbers (booleans count 0/1).
    - ``clusters``: ``n_rows`` labels, numbers or strings.
    - ``statistic(totals)``: ``totals[name]`` has shape ``[resamples]``, the resamples' column sums; returns
      ``[resamples]``. Example, a win rate: ``lambda t: t["win"] / (t["win"] + t["loss"])``. A paired difference takes
      the columns of both sides.

    Resamples where the statistic is undefined (0/0) are left out; ``(nan, nan)`` if all are, or there are no rows.
    """
    labels, cluster_of_row = np.unique(np.asarray(clusters), return_inverse=True)
    n_clusters = len(labels)
    if n_clusters == 0:
        return float("nan"), float("nan")
    counts = _draws(n_clusters, resamples, seed)
    totals = {
        name: counts @ np.bincount(cluster_of_row, weights=np.asarray(column, dtype=np.float64), minlength=n_clusters)
        for name, column in values.items()
    }
    with np.errstate(divide="ignore", invalid="ignore"):
        outcomes = statistic(totals)
    defined = outcomes[np.isfinite(outcomes)]
    if len(defined) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


@lru_cache(maxsize=4)  # a report takes dozens of intervals over the same clusters
def _draws(n_clusters: int, resamples: int, seed: int) -> Array:
    """How often each resample holds each cluster [resamples, n_clusters]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=resamples).astype(np.float64)
