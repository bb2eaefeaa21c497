"""The gold judge of `shapes`: five scores from pixels and geometry, written by hand, never trained.

Every measure is two-sided: it is best at the renderer's own output and falls with too much as with too little.

    alignment   mean over the requested attributes of a soft "is it so" in [0, 1]
    fidelity    overlap with the best-fitting outline of any shape x flat ground x flat interior x nothing unexplained
    aesthetics  colour difference of object and ground within a band x colours neither burnt nor grey x balance
    detail      edges as sharp as the renderer's x a clean pattern x no halo
    overall     alignment^1.5 * (0.3 + 0.35 fidelity + 0.15 aesthetics + 0.2 detail)
"""

import colorsys
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from dspo.shapes.analysis import Analysis, Array, SeenObject, analyse, bell, oklab
from dspo.shapes.grammar import POSITIONS, ObjectRequest, Request, parse
from dspo.shapes.render import PALETTE, SIDE, SIZE_BOUNDARY

_PALETTE_LAB = {name: oklab(rgb) for name, rgb in PALETTE.items()}
COLOUR_WIDTH = 0.05  # OKLab; half of the least distance of two palette colours is 0.07


@dataclass(frozen=True)
class GoldScore:
    """Scores in [0, 1]; `fully_right`: every requested attribute more right than wrong, and the right count."""

    overall: float
    alignment: float
    aesthetics: float
    fidelity: float
    detail: float
    fully_right: bool
    saturation: float  # mean HSV saturation of the picture: the wrong taste of some raters
    object_size: float  # share of the picture that objects cover: likewise
    attributes: dict[str, float]  # each requested attribute's score
    free: tuple[float, ...]  # position and size of the largest object, pixels, and ground colour: what diversity is of


def judge(image: NDArray[np.uint8], prompt: str) -> GoldScore:
    """Judge a picture, uint8 [64, 64, 3]. Raises :class:`~dspo.errors.UserError` for a foreign prompt."""
    request = parse(prompt)
    seen = analyse(image)
    attributes = alignment_attributes(seen, request)
    alignment = float(np.mean(list(attributes.values())))
    fidelity, aesthetics, detail = fidelity_score(seen), aesthetics_score(seen), detail_score(seen)
    spread = image.max(axis=-1).astype(np.float64) - image.min(axis=-1)
    first = seen.objects[0] if seen.objects else None
    return GoldScore(
        overall=alignment**1.5 * (0.3 + 0.35 * fidelity + 0.15 * aesthetics + 0.2 * detail),
        alignment=alignment,
        aesthetics=aesthetics,
        fidelity=fidelity,
        detail=detail,
        fully_right=all(score > 0.5 for score in attributes.values()),
        saturation=float(np.mean(spread / np.maximum(image.max(axis=-1), 1))),
        object_size=float(np.sum([o.outline.mean() for o in seen.objects])),
        attributes=attributes,
        free=(first.x, first.y, first.radius, *map(float, seen.ground)) if first else (0.0,) * 6,
    )


def alignment_attributes(seen: Analysis, request: Request) -> dict[str, float]:
    """Soft score of every requested attribute; objects are matched to the request so that the sum is largest."""
    wanted = request.objects
    scores = {"count": float(np.exp(-(abs(len(seen.objects) - len(wanted)) ** 2)))}
    if request.background:
        scores["background"] = colour_score(seen.ground, request.background)
    options = [_object_scores(order, request) for order in _assignments(seen.objects, len(wanted))]
    return scores | max(options, key=lambda option: sum(option.values()))


def _assignments(objects: tuple[SeenObject, ...], number: int) -> list[tuple[SeenObject | None, ...]]:
    padded: tuple[SeenObject | None, ...] = (*objects, *(None,) * max(0, number - len(objects)))
    return list(permutations(padded, number))


def _object_scores(objects: tuple[SeenObject | None, ...], request: Request) -> dict[str, float]:
    scores: dict[str, float] = {}
    for i, (seen, wanted) in enumerate(zip(objects, request.objects, strict=True)):
        scores |= {f"{name}_{i}": score for name, score in _attribute_scores(seen, wanted).items()}
    if request.position:
        scores["position"] = position_score(objects[0], request.position) if objects[0] else 0.0
    if request.relation:
        first, second = objects
        scores["relation"] = relation_score(first, second, request.relation) if first and second else 0.0
    return scores


def _attribute_scores(seen: SeenObject | None, wanted: ObjectRequest) -> dict[str, float]:
    names = ("colour", "size", "pattern")
    if seen is None:
        return {"shape": 0.0} | {name: 0.0 for name in names if getattr(wanted, name)}
    scores = {"shape": shape_score(seen, wanted.shape)}
    if wanted.colour:
        scores["colour"] = colour_score(seen.colour, wanted.colour)
    if wanted.size:
        margin = (seen.radius - SIZE_BOUNDARY) * (1 if wanted.size == "large" else -1)
        scores["size"] = sigmoid(margin / 0.35)
    if wanted.pattern:
        best_other = max(likeness for pattern, likeness in seen.pattern.items() if pattern != wanted.pattern)
        scores["pattern"] = sigmoid((seen.pattern[wanted.pattern] - best_other) / 0.15)
    return scores


def colour_score(lab: Array, name: str) -> float:
    """Bell around the palette colour, times how much nearer it is than the next palette colour; 1 at the renderer's."""
    distance = {other: float(np.linalg.norm(lab - value)) for other, value in _PALETTE_LAB.items()}
    nearest_other = min(value for other, value in distance.items() if other != name)
    near = np.exp(-0.5 * (distance[name] / (1.6 * COLOUR_WIDTH)) ** 2)
    return float(near * sigmoid((nearest_other - distance[name]) / 0.02))


def shape_score(seen: SeenObject, shape: str) -> float:
    best_other = max(overlap for other, overlap in seen.overlap.items() if other != shape)
    return sigmoid((seen.overlap[shape] - best_other) / 0.025)


def position_score(seen: SeenObject, position: str) -> float:
    """1 inside the third that is asked for, falling over 3 pixels outside it."""
    cell = POSITIONS.index(position)
    outside = 0.0
    for centre, third in ((seen.x, cell % 3), (seen.y, cell // 3)):
        low, high = ((0.0, 25.25), (25.25, 38.75), (38.75, float(SIDE)))[third]
        outside = max(outside, low - centre, centre - high)
    return float(np.exp(-np.log(2) * (outside / 1.0) ** 2)) if outside > 0 else 1.0


def relation_score(first: SeenObject, second: SeenObject, relation: str) -> float:
    dx, dy = second.x - first.x, second.y - first.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    along = along if relation in ("left of", "above") else -along
    return sigmoid((along - abs(across)) / 2.0)


def fidelity_score(seen: Analysis) -> float:
    if not seen.objects:
        return 0.0
    outline = np.mean([np.clip((max(o.overlap.values()) - 0.6) / 0.36, 0.0, 1.0) for o in seen.objects])
    interior = np.mean([bell(o.unevenness, 0.06) for o in seen.objects])
    return float(outline * bell(seen.ground_noise, 0.02) * interior * np.exp(-seen.unexplained / 0.01))


def aesthetics_score(seen: Analysis) -> float:
    """Prompt-free: contrast of colours within a band, colours within the palette's range, mass near the middle."""
    if not seen.objects:
        return 0.0
    contrast = np.mean([band(float(np.linalg.norm(o.colour - seen.ground)), 0.16, 0.5, 0.05) for o in seen.objects])
    colours = np.mean([_unburnt(rgb) for rgb in (seen.ground_rgb, *(o.rgb for o in seen.objects))])
    mass = np.array([[o.radius**2, o.x * o.radius**2, o.y * o.radius**2] for o in seen.objects]).sum(axis=0)
    off_centre = float(np.hypot(mass[1] / mass[0] - SIDE / 2, mass[2] / mass[0] - SIDE / 2))
    return float(contrast * colours * (0.75 + 0.25 * bell(off_centre, 16.0)))


def _unburnt(rgb: Array) -> float:
    _, saturation, value = colorsys.rgb_to_hsv(*np.clip(rgb, 0.0, 1.0))
    return band(saturation, 0.33, 0.83, 0.06) * band(value, 0.5, 0.88, 0.06)


def detail_score(seen: Analysis) -> float:
    if not seen.objects:
        return 0.0
    edges = np.mean([bell(float(np.log(max(o.edge_width, 1e-3))), 0.45) for o in seen.objects])
    pattern = np.mean([max(o.pattern.values()) for o in seen.objects])
    return float(edges * (0.3 + 0.7 * pattern) * bell(seen.halo, 0.035))


def sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(value, -60.0, 60.0))))


def band(value: float, low: float, high: float, width: float) -> float:
    """1 between low and high, a bell's flank outside."""
    return bell(max(low - value, value - high, 0.0), width)
