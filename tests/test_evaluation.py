"""Drift, diversity, trivial hacks, and the figures that are made from judged images."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from dspo.data.images import encode_png
from dspo.data.keys import prompt_id
from dspo.data.prompts import Prompt
from dspo.evaluation import compare, tables
from dspo.evaluation.compare import Comparison
from dspo.evaluation.diversity import pixel_distance, spread_ratios, value_distance
from dspo.evaluation.drift import contrast, saturation, sharpness
from dspo.evaluation.hacks import HACKS, apply_hack
from dspo.evaluation.paired import IMAGES, Images, evaluation_requests
from dspo.evaluation.statistics import WinRate

HOW = Comparison(tie_band=0.02, resamples=200, seed=0)


def flat(*rgb: int) -> np.ndarray:
    return np.full((8, 8, 3), rgb, dtype=np.uint8)


def noisy(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 190, (16, 16, 3)).astype(np.uint8)


def judged(scores: dict[str, list[float]], seeds: int = 2) -> Images:
    """Images of prompts p0, p1, … with `seeds` images each."""
    n = len(next(iter(scores.values())))
    images = [noisy(i) for i in range(n)]
    rows = [
        {
            **dict.fromkeys(IMAGES.names, 0),
            "prompt_id": prompt_id(f"p{i // seeds}"),
            "caption": f"p{i // seeds}",
            "sample_index": i % seeds,
            "scheduler": "ddim",
            "image": encode_png(image),
        }
        for i, image in enumerate(images)
    ]
    table = pa.Table.from_pylist(rows, schema=IMAGES)
    return Images(table, images, {name: np.array(column, dtype=np.float64) for name, column in scores.items()})


def test_rows_of_more_images_than_one_arrow_array_holds() -> None:
    """Arrow joins a column to take rows of it, and its arrays of bytes end at 2 GiB."""
    half = pa.array([bytes(2**30)])
    column = pa.chunked_array([half, half, half])
    table = pa.table({"prompt_id": ["a", "a", "b"], "caption": ["a", "a", "b"], "image": column})
    pixels = [np.full((2, 2, 3), value, np.uint8) for value in range(3)]
    images = Images(table, pixels, {"gold": np.arange(3.0)})
    some = images.where(np.array([False, True, True]))
    assert (some.prompt_ids, [one[0, 0, 0] for one in some.images], list(some.scores["gold"])) == (
        ["a", "b"],
        [1, 2],
        [1.0, 2.0],
    )
    assert some.with_images(pixels[:2]).captions == ["a", "b"]
    assert images.take(np.array([2, 2])).prompt_ids == ["b", "b"]


def test_drift_statistics_by_hand() -> None:
    assert saturation(flat(100, 100, 100)) == 0
    assert saturation(flat(200, 100, 50)) == pytest.approx(0.75)
    assert saturation(flat(0, 0, 0)) == 0
    halves = np.concatenate([flat(0, 0, 0), flat(255, 255, 255)])
    assert contrast(halves) == pytest.approx(0.5)
    assert contrast(flat(9, 9, 9)) == pytest.approx(0)
    dot = np.zeros((5, 5, 3), dtype=np.uint8)
    dot[2, 2] = 255  # the Laplacian is -4 there and 1 at its four neighbours, over 3 x 3 inner pixels
    assert sharpness(dot) == pytest.approx(8 / 9)


def test_each_hack_moves_its_statistic() -> None:
    image = noisy(0)
    moved = {name: apply_hack(name, image) for name in HACKS}
    assert saturation(moved["saturation"]) > saturation(image)
    assert contrast(moved["contrast"]) > contrast(image)
    assert sharpness(moved["sharpening"]) > sharpness(image) > sharpness(moved["blur"])
    assert all(m.shape == image.shape and m.dtype == np.uint8 for m in moved.values())


def test_distances_by_hand() -> None:
    assert pixel_distance([flat(0, 0, 0), flat(255, 255, 255)]) == pytest.approx(1)
    assert pixel_distance([flat(0, 0, 0), flat(0, 0, 0), flat(255, 255, 255)]) == pytest.approx(2 / 3)
    assert value_distance(np.array([[0.0, 0.0], [3.0, 4.0]])) == pytest.approx(5)


def test_spread_is_that_of_prompts_with_two_images_that_count_on_both_sides() -> None:
    ids = ["a", "a", "a", "b", "b"]
    base = [flat(0, 0, 0), flat(100, 100, 100), flat(200, 200, 200), flat(0, 0, 0), flat(50, 50, 50)]
    tuned = [flat(0, 0, 0), flat(50, 50, 50), flat(255, 255, 255), flat(0, 0, 0), flat(50, 50, 50)]
    kept = (np.array([1, 1, 0, 1, 1], bool), np.array([1, 1, 0, 1, 0], bool))  # of b only one tuned image counts
    values = (np.arange(5.0)[:, None], np.arange(5.0)[:, None] * 2)
    result = spread_ratios(ids, kept, (base, tuned), ({"x": values[0]}, {"x": values[1]}), 100, 0)
    assert result["pixels"].value == pytest.approx(0.5) and result["pixels"].n_prompts == 1
    assert result["x"].value == pytest.approx(2) and result["attributes"].value == pytest.approx(2)


def test_spread_of_no_prompts_and_of_an_attribute_that_never_varies() -> None:
    nobody = (np.zeros(2, bool), np.ones(2, bool))
    images = [flat(0, 0, 0), flat(9, 9, 9)]
    same = {"x": np.zeros((2, 1))}
    assert spread_ratios(["a", "a"], nobody, (images, images), (same, same), 10, 0)["pixels"].value is None
    everybody = (np.ones(2, bool), np.ones(2, bool))
    result = spread_ratios(["a", "a"], everybody, (images, images), (same, same), 10, 0)
    assert result["pixels"].value == pytest.approx(1) and result["x"].value is None


def test_requests_give_more_seeds_to_the_first_prompts() -> None:
    prompts = [Prompt(str(i), str(i)) for i in range(3)]
    requests = evaluation_requests(prompts, 2, 1, 4)
    assert [(r.prompt.id, r.sample_index, r.noise_index) for r in requests] == [
        *(("0", i, i) for i in range(4)),
        *((p, i, i) for p in "12" for i in range(2)),
    ]


def test_the_band_is_for_gold_alone() -> None:
    base = judged({"reward_overall": [0.0] * 4, "gold_overall": [0.5] * 4, "second": [0.0] * 4})
    tuned = judged({"reward_overall": [0.01] * 4, "gold_overall": [0.51] * 4, "second": [0.01] * 4})
    rates = HOW.win_rates(tuned, base)
    assert (rates["reward_overall"].n_decided, rates["gold_overall"].n_decided, rates["second"].n_decided) == (4, 0, 4)


def test_right_images_that_were_fixed_and_broken() -> None:
    columns = {"reward_overall": [0.0] * 4} | {f"drift_{d}": [0.0] * 4 for d in ("saturation", "contrast", "sharpness")}
    free = {f"free_{name}": [1.0, 2.0, 1.0, 2.0] for name in ("x", "y", "radius", "ground_l", "ground_a", "ground_b")}
    base = judged(columns | free | {"gold_fully_right": [1, 0, 0, 1]})
    tuned = judged(columns | free | {"gold_fully_right": [0, 1, 0, 1]})
    figures = compare.tuned_against_base(base, tuned, HOW)["fully_right"]
    assert (figures["fixed"]["value"], figures["broken"]["value"]) == (0.5, 0.5)
    assert figures["difference"]["value"] == 0


def test_a_world_without_gold_says_so() -> None:
    columns = {"reward_overall": [0.0, 1.0]} | {
        f"drift_{d}": [0.0, 0.1] for d in ("saturation", "contrast", "sharpness")
    }
    images = judged(columns)
    figures = compare.tuned_against_base(images, images, HOW)
    assert figures["fully_right"] is None and figures["diversity"]["among_fully_right"] is None
    assert figures["diversity"]["among_all"]["pixels"]["value"] == 1
    assert compare.over_optimised(HOW.win_rates(images, images)) is None


def test_the_null_compares_seeds_of_the_same_prompts() -> None:
    base = judged({"reward_overall": [0.0, 1.0, 0.0, 1.0]})
    rate = compare.base_against_base(base, HOW)["reward_overall"]
    assert rate["win_rate"] == 1 and rate["n_images"] == 2


def test_agreement_is_of_pairs_that_gold_tells_apart() -> None:
    """Second less first image of three prompts, by gold +0.5, -0.5 and nothing: the last says nothing."""
    gold, second = [0.0, 0.5, 0.5, 0.0, 0.3, 0.31], [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    base = judged({"reward_overall": gold, "gold_overall": gold, "gold_detail": gold, "second": second})
    agreement = compare.agreement_with_gold(base, HOW)
    assert agreement is not None and set(agreement) == {"reward_overall", "second"}
    assert {name: (row["value"], row["n"]) for name, row in agreement.items()} == {
        "reward_overall": (1.0, 2),
        "second": (0.5, 2),
    }
    assert compare.agreement_with_gold(judged({"reward_overall": gold}), HOW) is None


def test_best_of_n_is_chosen_by_the_training_reward() -> None:
    base = judged({"reward_overall": [0, 3, 1, 2, 9, 8, 7, 6], "gold_overall": [0, 0.5, 1, 0, 1, 0, 0, 0]}, seeds=4)
    figures = compare.best_of_n(base, base, 4, HOW)
    # chosen: image 1 and image 4; by gold the first beats 0 and 3, loses to 2, ties with itself; the second beats 3
    gold = figures["best_against_base"]["gold_overall"]
    assert (gold["win_rate"], gold["n_decided"]) == (pytest.approx(5 / 6), 6)
    assert figures["best_against_base"]["reward_overall"]["win_rate"] == 1


def test_seen_and_unseen_combinations() -> None:
    base = judged({"reward_overall": [0.0] * 4})
    tuned = judged({"reward_overall": [1.0, 1.0, -1.0, -1.0]})
    figures = compare.combinations(base, tuned, lambda prompt: prompt[-1], ["x0"], HOW)
    assert figures["seen"]["reward_overall"]["win_rate"] == 1
    assert figures["unseen"]["reward_overall"]["win_rate"] == 0


def rate(low: float, high: float, n: int = 100) -> WinRate:
    return WinRate((low + high) / 2, low, high, 0.5, 0.0, n, n, n, 0.0)


def test_a_handful_of_images_improves_nothing() -> None:
    assert compare.improved(rate(0.6, 0.8)) and not compare.improved(rate(1.0, 1.0, n=5))
    assert compare.worse(rate(0.2, 0.4)) and not compare.worse(rate(0.0, 0.0, n=5))


@pytest.mark.parametrize(
    ("proxy", "gold", "flagged"),
    [
        ((0.6, 0.8), (0.2, 0.4), True),
        ((0.7, 0.8), (0.4, 0.6), True),  # gold has not fallen, but gained nothing of what the proxy did
        ((0.6, 0.8), (0.4, 0.6), False),  # the two may be the same
        ((0.8, 0.9), (0.6, 0.7), False),  # both rose
        ((0.4, 0.6), (0.2, 0.4), False),
    ],
)
def test_over_optimisation_is_proxy_up_and_gold_not(
    proxy: tuple[float, float], gold: tuple[float, float], flagged: bool
) -> None:
    verdict = compare.verdict({"reward_overall": rate(*proxy), "gold_overall": rate(*gold)})
    assert verdict["over_optimised"] is flagged
    assert verdict["improved"]["reward_overall"] is (proxy[0] > 0.5)


def test_few_decided_images_show_no_over_optimisation() -> None:
    assert not compare.over_optimised({"reward_overall": rate(0.7, 0.8), "gold_overall": rate(0.2, 0.4, n=5)})


def test_judged_images_are_read_by_pandas_and_pil(tmp_path: Path) -> None:
    images = judged({"reward_overall": [0.1, 0.2], "gold_overall": [0.3, 0.4]})
    images.write(tmp_path / "a.parquet")
    rows = pd.read_parquet(tmp_path / "a.parquet")
    assert list(rows["prompt_id"]) == list(images.prompt_ids) and list(rows["sample_index"]) == [0, 1]
    assert list(rows["reward_overall"]) == [0.1, 0.2] and list(rows["gold_overall"]) == [0.3, 0.4]
    for data, image in zip(rows["image"], images.images, strict=True):
        assert (np.asarray(Image.open(io.BytesIO(data))) == image).all()


def test_tables(tmp_path: Path) -> None:
    base, tuned = judged({"reward_overall": [0.0, 0.5]}), judged({"reward_overall": [0.25, 0.5]})
    tables.write_deltas(base, tuned, tmp_path / "deltas.csv")
    pid = prompt_id("p0")
    expected = f"prompt_id,sample_index,reward_overall\n{pid},0,0.25\n{pid},1,0.0\n"
    assert (tmp_path / "deltas.csv").read_bytes() == expected.encode()
    tables.write_win_rates({"null": HOW.win_rate_figures(base, base)}, tmp_path / "rates.csv")
    assert (tmp_path / "rates.csv").read_text().splitlines()[1].startswith("null,reward_overall,,,,1.0,0.5,0,2,1,")
