"""Trivial changes of an image that no judge should reward: what a judge pays for them shows how it can be gamed."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage
from PIL import ImageEnhance, ImageFilter

Image = npt.NDArray[np.uint8]

_CHANGES: dict[str, Callable[[PillowImage.Image], PillowImage.Image]] = {
    "saturation": lambda image: ImageEnhance.Color(image).enhance(1.5),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.3),
    "sharpening": lambda image: image.filter(ImageFilter.UnsharpMask(radius=1.5, percent=150, threshold=0)),
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(1.0)),
}
HACKS = tuple(_CHANGES)


def apply_hack(name: str, image: Image) -> Image:
    """The image, uint8 [h, w, 3], with one of :data:`HACKS` done to it."""
    return np.asarray(_CHANGES[name](PillowImage.fromarray(image)))
