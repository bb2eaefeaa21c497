"""How different the images of one prompt are, base against tuned.

Only images that are fully right count for the gated figure: wrong images are diverse for free.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from dspo.evaluation.statistics import Estimate, ratio_of_means

Array = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]


def pixel_distance(images: Sequence[Image]) -> float:
    """Mean over pairs of the RMS difference of pixels in [0, 1]; two or more uint8 images of one size."""
    pixels = [image / 255 for image in images]
    return float(np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in combinations(pixels, 2)]))


def value_distance(values: Array) -> float:
    """Mean Euclidean distance over pairs of rows; ``values`` [n, d], n at least 2."""
    return float(np.mean([np.linalg.norm(a - b) for a, b in combinations(values, 2)]))


def spread_ratios(
    prompt_ids: Sequence[str],
    kept: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]],
    images: tuple[Sequence[Image], Sequence[Image]],
    attributes: tuple[dict[str, Array], dict[str, Array]],
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Spread of the tuned images of a prompt over that of the base images: ``pixels``, each attribute, and their mean.

    Every pair is (base, tuned), rows in the same order; ``attributes`` are named measurements [n, d] of each image.
    ``kept`` says which images count; a prompt takes part where at least two of its images count on both sides, and
    each prompt weighs the same. ``attributes`` in the answer is the mean of the attributes' ratios; its interval takes
    the base's spread of each attribute as given.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, pid in enumerate(prompt_ids):
        rows[pid].append(row)
    counted = {pid: [[r for r in of_prompt if kept[side][r]] for side in (0, 1)] for pid, of_prompt in rows.items()}
    taking_part = [pid for pid, sides in counted.items() if min(map(len, sides)) >= 2]
    spreads: dict[str, list[Array]] = {}
    spreads["pixels"] = [
        np.array([pixel_distance([images[side][r] for r in counted[pid][side]]) for pid in taking_part])
        for side in (0, 1)
    ]
    for name in attributes[0]:
        spreads[name] = [
            np.array([value_distance(attributes[side][name][counted[pid][side]]) for pid in taking_part])
            for side in (0, 1)
        ]
    if attributes[0] and taking_part:
        with np.errstate(divide="ignore", invalid="ignore"):  # an attribute that never varies in base has no ratio
            spreads["attributes"] = [
                np.sum([spreads[name][side] / spreads[name][0].mean() for name in attributes[0]], axis=0)
                for side in (0, 1)
            ]
    return {name: ratio_of_means(tuned, base, taking_part, resamples, seed) for name, (base, tuned) in spreads.items()}
