"""Captions of pictures that nobody described: what the analysis sees on them, told in the grammar's words.

The base's own samples often show something else than their prompt asked for. A caption written from the picture
itself is true of it, as those of recaptioned training sets are (Betker et al. 2023, "Improving Image Generation with
Better Captions").
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspo.shapes.analysis import Analysis, Array, SeenObject, analyse, oklab
from dspo.shapes.grammar import POSITIONS, ObjectRequest, Request
from dspo.shapes.render import PALETTE, SIZE_BOUNDARY, Object, Scene

MOST_OBJECTS = 3  # a picture with more is in pieces
# By how much the best reading must be ahead of the next for a caption to name it.
SHAPE_LEAD, COLOUR_LEAD, PATTERN_LEAD = 0.03, 0.03, 0.12
SIZE_LEAD, POSITION_LEAD, RELATION_LEAD = 0.4, 1.0, 2.0  # pixels
LEAST_OVERLAP = 0.6  # with the best outline, for its shape to be named
FARTHEST_COLOUR = 0.2  # OKLab distance from the palette's nearest, for its name to be used
THIRDS = (25.25, 38.75)  # pixels; where the grammar's positions meet
NAMED_SHARE = {"colour": 0.9, "size": 0.5, "pattern": 0.5, "position": 0.6, "background": 0.8}  # of captions
BOTH_SHARE = 0.9  # of captions of several objects that speak of two

_PALETTE_LAB = {name: oklab(rgb) for name, rgb in PALETTE.items()}


@dataclass(frozen=True)
class Description:
    """The nearest scene of the grammar, and what of it is beyond doubt."""

    seen: Analysis
    scene: Scene
    sure: tuple[ObjectRequest | None, ...]  # of each object; None where its shape is in doubt
    sure_background: str | None


def describe(picture: NDArray[np.uint8]) -> Description | None:
    """Read a picture, uint8 [64, 64, 3]. None if there is no object on it, or more than MOST_OBJECTS."""
    seen = analyse(picture)
    if not 1 <= len(seen.objects) <= MOST_OBJECTS:
        return None
    objects = tuple(
        Object(o.shape, _nearest_colour(o.colour)[0], _best(o.pattern), o.x, o.y, o.radius) for o in seen.objects
    )
    background, sure_background = _nearest_colour(seen.ground)
    return Description(seen, Scene(objects, background), tuple(map(_sure, seen.objects)), sure_background)


def caption(shown: Description, rng: np.random.Generator) -> Request | None:
    """A request that the picture fulfils, of one or two of its objects; None if no object's shape is beyond doubt.

    Of two, as in prompts, only with two different colours, so that it is wrong with colours or places exchanged.
    """
    told = [(place, sure) for place, sure in zip(shown.scene.objects, shown.sure, strict=True) if sure]
    if not told:
        return None
    (place, sure), *others = (told[i] for i in rng.permutation(len(told)))
    background = _told(shown.sure_background, "background", rng)
    if others and rng.random() < BOTH_SHARE:
        relation = _relation(place, others[0][0])
        both = (_words(sure, rng), _words(others[0][1], rng))
        if relation and len({told.colour for told in both if told.colour}) == 2:
            return Request(both, None, relation, background)
    return Request((_words(sure, rng),), _told(_position(place), "position", rng), None, background)


def _nearest_colour(lab: Array) -> tuple[str, str | None]:
    """The palette's nearest colour, and the same if it is beyond doubt."""
    distance = {name: float(np.linalg.norm(lab - value)) for name, value in _PALETTE_LAB.items()}
    nearest, next_one = sorted(distance, key=distance.__getitem__)[:2]
    sure = distance[nearest] < FARTHEST_COLOUR and distance[next_one] - distance[nearest] > COLOUR_LEAD
    return nearest, nearest if sure else None


def _sure(seen: SeenObject) -> ObjectRequest | None:
    if seen.overlap[seen.shape] < LEAST_OVERLAP or _lead(seen.overlap) < SHAPE_LEAD:
        return None
    beyond = seen.radius - SIZE_BOUNDARY
    size = "large" if beyond > SIZE_LEAD else "small" if beyond < -SIZE_LEAD else None
    pattern = _best(seen.pattern) if _lead(seen.pattern) > PATTERN_LEAD else None
    return ObjectRequest(seen.shape, _nearest_colour(seen.colour)[1], size, pattern)


def _best(scores: dict[str, float]) -> str:
    return max(scores, key=scores.__getitem__)


def _lead(scores: dict[str, float]) -> float:
    """How far the best is ahead of the next."""
    next_one, best = sorted(scores.values())[-2:]
    return best - next_one


def _position(place: Object) -> str | None:
    if min(abs(at - edge) for at in (place.x, place.y) for edge in THIRDS) < POSITION_LEAD:
        return None
    column, row = (int(np.searchsorted(THIRDS, at)) for at in (place.x, place.y))
    return POSITIONS[3 * row + column]


def _relation(one: Object, other: Object) -> str | None:
    dx, dy = other.x - one.x, other.y - one.y
    for relation, along, across in (("left of", dx, dy), ("right of", -dx, dy), ("above", dy, dx), ("below", -dy, dx)):
        if along - abs(across) > RELATION_LEAD:
            return relation
    return None


def _words(sure: ObjectRequest, rng: np.random.Generator) -> ObjectRequest:
    return ObjectRequest(sure.shape, *(_told(getattr(sure, name), name, rng) for name in ("colour", "size", "pattern")))


def _told(value: str | None, name: str, rng: np.random.Generator) -> str | None:
    return value if rng.random() < NAMED_SHARE[name] else None
