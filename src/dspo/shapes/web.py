"""Pictures as a base model meets them: they show what the caption says, often more than that, and nearly all of them
have faults of pictures in the wild.

A large base learns from whatever the web holds, the washed-out, the crooked and the cluttered with the good, and
samples all of it; preference tuning is what moves it to the good part. So the small base learns from such pictures too.
"""

from dataclasses import dataclass, replace

import numpy as np

from dspo.shapes.defects import Picture, spoil
from dspo.shapes.grammar import COLOURS, PATTERNS, SHAPES, Request
from dspo.shapes.render import MARGIN, RADII, SIDE, Object, Scene, extent, random_scene, render_float


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
CLUTTER = 0.3  # share of pictures with a further object, of which captions never speak, if there is room for it
PLACES_TRIED = 30
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
    """A picture of the request: right in every attribute, but often with more on it, and not always well made."""
    scene = random_scene(request, rng)
    if rng.random() < CLUTTER:
        scene = cluttered(scene, rng)
    pixels = render_float(scene)
    strengths = []
    for fault in FAULTS:
        strength = float(rng.uniform(fault.least, fault.greatest)) if rng.random() < fault.share else 0.0
        strengths.append(strength)
        if strength:
            pixels = spoil(pixels, fault.kind, strength, rng)
    return WebPicture(pixels, scene, tuple(strengths))


def cluttered(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with a further small object apart from the others; the scene itself if no place for it is found."""
    radius = float(rng.uniform(*RADII["small"]))
    shape, pattern = str(rng.choice(SHAPES)), str(rng.choice(PATTERNS))
    colour = str(rng.choice([name for name in COLOURS if name != scene.background]))
    left, right, up, down = (MARGIN + reach for reach in extent(shape, radius))
    for _ in range(PLACES_TRIED):
        x, y = float(rng.uniform(left, SIDE - right)), float(rng.uniform(up, SIDE - down))
        apart = [max(extent(o.shape, o.radius)) + max(left, right, up, down) for o in scene.objects]
        if all(np.hypot(o.x - x, o.y - y) > least for o, least in zip(scene.objects, apart, strict=True)):
            return replace(scene, objects=(*scene.objects, Object(shape, colour, pattern, x, y, radius)))
    return scene


def web_pixels(request: Request, rng: np.random.Generator) -> np.ndarray:
    """The picture's pixels, uint8 [64, 64, 3]."""
    return np.round(web_picture(request, rng).pixels * 255).astype(np.uint8)
