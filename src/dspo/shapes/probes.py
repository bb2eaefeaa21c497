"""What each patch of a picture shows, and a linear reading of it: a help in training the small models.

From captions alone, or from "is it so?", a small network finds out only slowly that pictures hold objects.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dspo.shapes.analysis import Analysis, oklab
from dspo.shapes.grammar import COLOURS, PATTERNS, SHAPES
from dspo.shapes.render import PALETTE, SIDE, Scene, coverage, render_float

PATCH = 8  # pixels
PATCHES = SIDE // PATCH
_CLASSES = (len(SHAPES) + 1, len(COLOURS), len(PATTERNS))
_ORIENTATIONS = 8
TEXTURES = 6 + _ORIENTATIONS
MEASURES = len(SHAPES) + len(PATTERNS) + 5


def patch_contents(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What the 64 patches, row by row, show.

    Classes int64 [64, 3]: shape (the last is "none"), colour, pattern. Places float32 [64, 3]: offset x, y from the
    patch's middle to its object's centre and the object's radius, over 16 pixels; 0 without an object.
    """
    owner, covered = _owners(_covers(scene))
    ground = (len(SHAPES), COLOURS.index(scene.background), 0)
    of_object = [(SHAPES.index(o.shape), COLOURS.index(o.colour), PATTERNS.index(o.pattern)) for o in scene.objects]
    classes = np.where(covered, np.array(of_object)[owner], np.array(ground))
    row, column = np.divmod(np.arange(PATCHES**2), PATCHES)
    middle = np.stack([column, row], axis=1) * PATCH + PATCH / 2
    objects = np.array([(o.x, o.y, o.radius) for o in scene.objects])[owner]
    places = np.concatenate([objects[:, :2] - middle, objects[:, 2:]], axis=1) / 16
    return classes.astype(np.int64), np.where(covered, places, 0).astype(np.float32)


def patch_colours(picture: np.ndarray, scene: Scene) -> np.ndarray:
    """The colour of the object, or else the ground, that each patch shows, float32 [64, 3]: OKLab, times 10.

    It is the mean over all of it that is neither edge nor shade in a clean render of the scene; NaN if nothing is.
    """
    lab, clean = 10 * oklab(picture), render_float(scene)
    covers = _covers(scene)
    parts = [*(covers > 0.99), (covers < 0.01).all(axis=0)]
    colours = [PALETTE[name] for name in (*(o.colour for o in scene.objects), scene.background)]
    plain = [part & (np.abs(clean - colour).max(axis=-1) < 0.01) for part, colour in zip(parts, colours, strict=True)]
    means = np.array([lab[where].mean(axis=0) if where.any() else np.full(3, np.nan) for where in plain])
    owner, covered = _owners(covers)
    return np.asarray(np.where(covered, means[owner], means[-1]), dtype=np.float32)


def patch_measures(seen: Analysis, scene: Scene) -> np.ndarray:
    """What the analysis measures on the object that each patch shows, and on the ground, float32 [64, MEASURES].

    Of an object: overlap with the outline of each shape, likeness of each pattern, width of the edge, unevenness; NaN
    on the ground. Of the picture, on all patches: noise of the ground, halo, what is unexplained. Scaled to order 1.
    """
    owner, covered = _owners(_covers(scene))
    of_object = np.array(
        [
            [
                *(10 * (o.overlap[shape] - 0.8) for shape in SHAPES),
                *(4 * o.pattern[pattern] for pattern in PATTERNS),
                4 * np.log(max(o.edge_width, 0.1)),
                10 * o.unevenness,
            ]
            for o in seen.objects
        ]
    )
    of_picture = np.array([20 * seen.ground_noise, 20 * seen.halo, 50 * seen.unexplained])
    rows = np.where(covered, of_object[owner], np.nan)
    rows = np.concatenate([rows, np.broadcast_to(of_picture, (len(rows), len(of_picture)))], axis=1)
    return np.asarray(rows.clip(-4, 4), dtype=np.float32)


def _covers(scene: Scene) -> np.ndarray:
    """What share of each pixel each object covers, [n_objects, 64, 64]."""
    return np.stack([coverage(o.shape, o.x, o.y, o.radius) for o in scene.objects])


def _owners(covers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which object covers most of each patch [64], and whether it covers more than a tenth [64, 1]."""
    shares = covers.reshape(-1, PATCHES, PATCH, PATCHES, PATCH).mean(axis=(2, 4)).reshape(-1, PATCHES**2)
    return shares.argmax(axis=0), (shares.max(axis=0) > 0.1)[:, None]


class PatchProbe(nn.Linear):
    """Reads :func:`patch_contents` off patch features [B, 64, width]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, sum(_CLASSES) + 3)

    def loss(self, patches: Tensor, classes: Tensor, places: Tensor) -> Tensor:
        """Cross-entropies of the classes [B, 64, 3] and absolute errors of the places [B, 64, 3], summed."""
        *logits, where = self(patches).float().split((*_CLASSES, 3), dim=-1)
        named = [F.cross_entropy(part.flatten(0, 1), classes[..., i].flatten()) for i, part in enumerate(logits)]
        covered = (classes[..., :1] < len(SHAPES)).float()
        place = ((where - places).abs() * covered).sum() / covered.sum().clamp(min=1)
        return torch.stack([*named, place]).sum()


def patch_damage(picture: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """How far each patch is from the clean picture, float32 [64]: mean absolute difference, times 10."""
    difference = np.abs(picture - clean).mean(axis=-1).reshape(PATCHES, PATCH, PATCHES, PATCH)
    return np.asarray(10 * difference.mean(axis=(1, 3)).reshape(-1), dtype=np.float32)


def patch_texture(pixels: Tensor) -> Tensor:
    """Colours and edges of each patch, [B, 3, 64, 64] in [0, 1] -> [B, 64, TEXTURES], of order 1.

    Mean and 4 x standard deviation of each channel, and a histogram of oriented gradients, which Wei et al. (2022,
    arXiv 2112.09133) found to be the best of simple targets to learn vision from.
    """
    patches = F.unfold(pixels, PATCH, stride=PATCH).unflatten(1, (3, PATCH**2))  # [B, 3, PATCH ** 2, 64]
    grey = F.pad(pixels.mean(dim=1), (1, 1, 1, 1), mode="replicate")
    x, y = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2], grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    orientation = (torch.atan2(y, x) / torch.pi % 1 * _ORIENTATIONS).long().clamp(max=_ORIENTATIONS - 1)
    edges = F.one_hot(orientation, _ORIENTATIONS).movedim(-1, 1) * torch.hypot(x, y)[:, None]
    histogram = F.avg_pool2d(edges, PATCH).flatten(2).sqrt()  # the root lets weak edges count
    return torch.cat([patches.mean(dim=2), 4 * patches.std(dim=2), 4 * histogram], dim=1).transpose(1, 2)
