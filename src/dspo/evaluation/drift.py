"""Low-level statistics of an image: where they move together, an adapter may have learnt a look instead of quality."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]

DRIFT = ("saturation", "contrast", "sharpness")
_LUMA = np.array([0.2126, 0.7152, 0.0722])  # Rec. 709


def saturation(image: Image) -> float:
    """Mean HSV saturation, (max - min) / max over the channels, in [0, 1]; black counts 0."""
    highest, lowest = image.max(axis=2).astype(np.float64), image.min(axis=2)
    return float(np.mean((highest - lowest) / np.maximum(highest, 1)))


def contrast(image: Image) -> float:
    """RMS contrast: standard deviation of the luma in [0, 1]."""
    return float(np.std(image / 255 @ _LUMA))


def sharpness(image: Image) -> float:
    """Mean absolute 4-neighbour Laplacian of the luma in [0, 1], without the border."""
    luma = image / 255 @ _LUMA
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float(np.mean(np.abs(around - 4 * luma[1:-1, 1:-1])))


def drift_columns(images: Sequence[Image], threads: int) -> dict[str, npt.NDArray[np.float64]]:
    """``drift_<statistic>`` [n] of uint8 images [h, w, 3]."""
    measures = {"saturation": saturation, "contrast": contrast, "sharpness": sharpness}
    with ThreadPoolExecutor(threads) as pool:  # NumPy computes outside of Python's lock
        return {f"drift_{name}": np.array(list(pool.map(measures[name], images))) for name in DRIFT}
