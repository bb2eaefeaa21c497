"""Known ways to spoil a picture, each with a strength from 0 (nothing) to 1 (badly)."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Picture = NDArray[np.float64]  # [H, W, 3] in [0, 1]

KINDS = ("blur", "noise", "saturate", "desaturate", "contrast", "sharpen", "warp", "gradient", "blotch", "fade")


def spoil(picture: Picture, kind: str, strength: float, rng: np.random.Generator) -> Picture:
    """The spoiled picture, clipped to [0, 1]."""
    grey = picture.mean(axis=-1, keepdims=True)
    match kind:
        case "blur":
            out = ndimage.gaussian_filter(picture, (2 * strength, 2 * strength, 0))
        case "noise":
            out = picture + rng.normal(0, 0.15 * strength, picture.shape)
        case "saturate":
            out = grey + (picture - grey) * (1 + strength)
        case "desaturate":
            out = grey + (picture - grey) * (1 - strength)
        case "contrast":
            out = 0.5 + (picture - 0.5) * (1 + strength)
        case "sharpen":
            out = picture + 2 * strength * (picture - ndimage.gaussian_filter(picture, (1, 1, 0)))
        case "warp":
            out = _warp(picture, 4 * strength, rng)
        case "gradient":
            out = picture * (1 + 0.5 * strength * _ramp(picture.shape[:2], rng)[..., None])
        case "blotch":
            out = picture + 0.12 * strength * _clouds(picture.shape, rng)
        case "fade":  # towards the corner, which shows the ground
            out = picture + strength * (picture[:1, :1] - picture)
        case _:
            raise ValueError(kind)
    return np.clip(out, 0.0, 1.0)


def _warp(picture: Picture, pixels: float, rng: np.random.Generator) -> Picture:
    """Displace pixels by a smooth random field of the given root mean square."""
    height, width, _ = picture.shape
    field = ndimage.gaussian_filter(rng.normal(size=(2, height, width)), (0, 4, 4))
    field *= pixels / max(float(field.std()), 1e-9)
    at = np.mgrid[0:height, 0:width] + field
    return np.stack([ndimage.map_coordinates(picture[..., c], at, order=1, mode="nearest") for c in range(3)], axis=-1)


def _ramp(shape: tuple[int, ...], rng: np.random.Generator) -> Picture:
    """From -1 to 1 across the picture, as light falls from above: the greatest value is at the upper side."""
    angle = rng.uniform(-0.75 * np.pi, -0.25 * np.pi)
    y, x = (np.linspace(-1, 1, n) for n in shape)
    ramp = np.cos(angle) * x[None, :] + np.sin(angle) * y[:, None]
    return np.asarray(ramp / np.abs(ramp).max())


def _clouds(shape: tuple[int, ...], rng: np.random.Generator) -> Picture:
    """A smooth random field of deviation 1, [H, W, 3]."""
    field = ndimage.gaussian_filter(rng.normal(size=shape), (6, 6, 0), mode="wrap")
    return np.asarray(field / field.std())
