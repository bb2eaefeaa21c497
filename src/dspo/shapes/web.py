"""Pictures as a base model meets them: right in what they show, and nearly all with faults of pictures in the wild.

A large base learns from whatever the web holds, the washed-out and the crooked with the good, and samples all of it;
preference tuning is what moves it to the good part. So the small base learns from faulty pictures too.
"""

from dataclasses import dataclass

import numpy as np

from dspo.shapes.defects import Picture, spoil
from dspo.shapes.grammar import Request
from dspo.shapes.render import Scene, random_scene, render_float


@dataclass(frozen=True)
class Fault:
    kind: str  # of defects.KINDS
    share: float  # of pictures that have it
    least: float  # strength
    greatest: float
    word: str  # what a caption may call it


# Mild and in nearly every picture, so that no guidance scale leads away from them: one picture in 300 has none.
FAULTS = (
    Fault("saturate", 0.15, 0.2, 0.6, "vivid"),
    Fault("desaturate", 0.60, 0.1, 0.4, "pale"),
    Fault("gradient", 0.85, 0.05, 0.28, "shaded"),
    Fault("warp", 0.80, 0.05, 0.35, "crooked"),
    Fault("blur", 0.80, 0.2, 0.7, "blurred"),
)
CLEAN = "clean"  # the word for a picture without a fault
QUALITY_WORDS = (*(fault.word for fault in FAULTS), CLEAN)


@dataclass(frozen=True)
class WebPicture:
    pixels: Picture  # [64, 64, 3] in [0, 1]
    scene: Scene
    strengths: tuple[float, ...]  # of each of FAULTS, 0 where the picture does not have it

    @property
    def words(self) -> str:
        return " ".join(f.word for f, strength in zip(FAULTS, self.strengths, strict=True) if strength) or CLEAN


def web_picture(request: Request, rng: np.random.Generator) -> WebPicture:
    """A picture of the request: right in every attribute, but not always well made."""
    scene = random_scene(request, rng)
    pixels = render_float(scene)
    strengths = []
    for fault in FAULTS:
        strength = float(rng.uniform(fault.least, fault.greatest)) if rng.random() < fault.share else 0.0
        strengths.append(strength)
        if strength:
            pixels = spoil(pixels, fault.kind, strength, rng)
    return WebPicture(pixels, scene, tuple(strengths))


def web_pixels(request: Request, rng: np.random.Generator) -> np.ndarray:
    """The picture's pixels, uint8 [64, 64, 3]."""
    return np.round(web_picture(request, rng).pixels * 255).astype(np.uint8)
