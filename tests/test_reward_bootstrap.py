"""The clustered bootstrap against cases whose answer is known."""

import numpy as np

from dspo.data.bootstrap import Totals, clustered_bootstrap


def mean(totals: Totals) -> np.ndarray:
    return totals["x"] / totals["n"]


def test_interval_matches_the_normal_approximation_when_rows_are_independent() -> None:
    x = np.random.default_rng(0).random(2000)
    low, high = clustered_bootstrap(mean, {"x": x, "n": np.ones(2000)}, np.arange(2000), 2000, seed=1)
    half_width = 1.96 * x.std() / np.sqrt(2000)
    assert abs((high - low) / 2 - half_width) < 0.05 * half_width
    assert low < x.mean() < high


def test_copies_of_a_row_in_one_cluster_do_not_narrow_the_interval() -> None:
    x = np.random.default_rng(0).random(200)
    single = clustered_bootstrap(mean, {"x": x, "n": np.ones(200)}, np.arange(200), 500, seed=1)
    tenfold = {"x": np.repeat(x, 10), "n": np.ones(2000)}
    assert np.allclose(
        clustered_bootstrap(mean, tenfold, np.repeat(np.arange(200), 10), 500, seed=1),
        single,
    )


def test_labels_may_be_strings_and_the_seed_decides() -> None:
    values = {"x": [1.0, 0.0, 1.0, 1.0], "n": [1, 1, 1, 1]}
    clusters = ["a", "a", "b", "c"]
    assert clustered_bootstrap(mean, values, clusters, 50, 3) == clustered_bootstrap(mean, values, clusters, 50, 3)


def test_no_rows_and_undefined_resamples_give_nan() -> None:
    assert np.isnan(clustered_bootstrap(mean, {"x": [], "n": []}, [], 10, 0)).all()
    assert np.isnan(clustered_bootstrap(mean, {"x": [0.0], "n": [0.0]}, ["a"], 10, 0)).all()
