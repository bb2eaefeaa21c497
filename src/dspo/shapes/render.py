"""The renderer of `shapes`: from a scene to pixels by signed distance, edges smoothed over one pixel."""

import colorsys
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dspo.shapes.grammar import COLOURS, PATTERNS, POSITIONS, SIZES, Request

Array = NDArray[np.float64]
Image = NDArray[np.uint8]

SIDE = 64  # pixels
MARGIN = 2.0  # pixels between any object and the border
RADII = {"small": (6.5, 7.5), "large": (9.75, 10.5)}  # pixels; radius of the circle of equal area
SIZE_BOUNDARY = 8.6
STRIPE_PERIOD = 7.0
DOT_PERIOD = 7.0
SHADE = 0.62  # brightness of a pattern's darker half, as a share of the object's

# Hue in degrees, saturation, value: all saturations and values between 0.35 and 0.85, so that burnt colours lose.
_HSV = {
    "red": (0, 0.78, 0.72),
    "orange": (27, 0.80, 0.85),
    "yellow": (53, 0.62, 0.85),
    "green": (120, 0.60, 0.58),
    "teal": (178, 0.55, 0.72),
    "blue": (222, 0.72, 0.74),
    "purple": (278, 0.62, 0.55),
    "pink": (330, 0.36, 0.85),
}
PALETTE: dict[str, Array] = {name: np.array(colorsys.hsv_to_rgb(h / 360, s, v)) for name, (h, s, v) in _HSV.items()}

_Y, _X = np.mgrid[0:SIDE, 0:SIDE] + 0.5


@dataclass(frozen=True)
class Object:
    """One object: centre (x, y) and radius in pixels; the radius is that of the circle of equal area."""

    shape: str
    colour: str
    pattern: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: str


def signed_distance(shape: str, dx: Array, dy: Array, radius: Array | float) -> Array:
    """Distance in pixels from the outline, negative inside; y points down, all shapes of one radius have equal area."""
    match shape:
        case "circle":
            return np.asarray(np.hypot(dx, dy) - radius)
        case "square":
            return np.asarray(np.maximum(np.abs(dx), np.abs(dy)) - 0.8862 * radius)
        case "triangle":
            slanted = 0.8660 * np.abs(dx) - 0.5 * dy
            return np.asarray(np.maximum(slanted, dy) - 0.7776 * radius)
        case "star":
            return _star_distance(dx, dy, 1.4620 * radius)
        case "cross":
            arm, width = 1.1890 * radius, 0.3963 * radius
            across = np.maximum(np.abs(dx) - arm, np.abs(dy) - width)
            along = np.maximum(np.abs(dx) - width, np.abs(dy) - arm)
            return np.asarray(np.minimum(across, along))
        case "ring":
            return np.asarray(np.abs(np.hypot(dx, dy) - 0.9283 * radius) - 0.2695 * radius)
    raise ValueError(shape)


def _star_distance(dx: Array, dy: Array, outer: Array | float) -> Array:
    """Five-pointed star with an inner radius of half the outer; distance to the nearer edge of its sector."""
    angle = np.arctan2(dx, -dy)  # 0 at the upper point
    folded = np.abs(np.mod(angle + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
    length = np.hypot(dx, dy)
    px, py = length * np.cos(folded), length * np.sin(folded)
    # edge from the point (outer, 0) to the notch (outer/2 at 36 degrees)
    nx, ny = 0.5 * np.cos(np.pi / 5), 0.5 * np.sin(np.pi / 5)
    ex, ey = nx - 1.0, ny
    scale = np.hypot(ex, ey)
    return np.asarray(((px - outer) * ey - py * ex) / scale)


def coverage(shape: str, x: Array | float, y: Array | float, radius: Array | float) -> Array:
    """Share of each pixel that the shape covers, [..., SIDE, SIDE]; arguments may be arrays [..., 1, 1]."""
    return np.asarray(np.clip(0.5 - signed_distance(shape, _X - x, _Y - y, radius), 0.0, 1.0))


def shading(pattern: str, dx: Array, dy: Array) -> Array:
    """0 where the pattern shows the object's colour, 1 where its darker shade; ``dx``, ``dy``: from its centre.

    Arguments broadcast; the result has their shape.
    """
    match pattern:
        case "solid":
            return np.zeros(np.broadcast_shapes(dx.shape, dy.shape))
        case "striped":
            phase = np.mod(dy + STRIPE_PERIOD / 4, STRIPE_PERIOD) + 0 * dx
            return np.asarray(np.clip(0.5 + STRIPE_PERIOD / 4 - np.abs(phase - STRIPE_PERIOD / 2), 0.0, 1.0))
        case "dotted":
            x = np.mod(dx + DOT_PERIOD / 2, DOT_PERIOD) - DOT_PERIOD / 2
            y = np.mod(dy + DOT_PERIOD / 2, DOT_PERIOD) - DOT_PERIOD / 2
            return np.asarray(np.clip(0.5 + 2.0 - np.hypot(x, y), 0.0, 1.0))
    raise ValueError(pattern)


def render_float(scene: Scene) -> Array:
    """Pixels in [0, 1], [SIDE, SIDE, 3], later objects above earlier ones."""
    image = np.broadcast_to(PALETTE[scene.background], (SIDE, SIDE, 3)).copy()
    for o in scene.objects:
        colour = PALETTE[o.colour] * (1 - (1 - SHADE) * shading(o.pattern, _X - o.x, _Y - o.y)[..., None])
        alpha = coverage(o.shape, o.x, o.y, o.radius)[..., None]
        image = image * (1 - alpha) + colour * alpha
    return image


def render(scene: Scene) -> Image:
    """Pixels, uint8 [SIDE, SIDE, 3]."""
    return np.round(render_float(scene) * 255).astype(np.uint8)


def extent(shape: str, radius: float) -> tuple[float, float, float, float]:
    """How far the shape reaches left, right, up and down of its centre, pixels."""
    match shape:
        case "circle":
            return (radius,) * 4
        case "square":
            return (0.8862 * radius,) * 4
        case "triangle":
            return 1.3468 * radius, 1.3468 * radius, 1.5552 * radius, 0.7776 * radius
        case "star":
            outer = 1.4620 * radius
            return 0.9511 * outer, 0.9511 * outer, outer, 0.8090 * outer
        case "cross":
            return (1.1890 * radius,) * 4
        case "ring":
            return (1.1977 * radius,) * 4
    raise ValueError(shape)


def _range(cell: int, low_reach: float, high_reach: float) -> tuple[float, float]:
    """Where a centre may lie along one axis so that it is in third ``cell`` and the object inside the frame."""
    low, high = MARGIN + low_reach, SIDE - MARGIN - high_reach
    bounds = ((14.0, 22.0), (28.5, 35.5), (42.0, 50.0))[cell]
    return min(max(bounds[0], low), high), max(min(bounds[1], high), low)


def random_scene(request: Request, rng: np.random.Generator) -> Scene:
    """A scene that satisfies the request; what the request leaves free is drawn."""
    taken = {c for c in (request.background, *(o.colour for o in request.objects)) if c}
    free = [str(c) for c in rng.permutation([c for c in COLOURS if c not in taken])]
    objects = []
    for wanted in request.objects:
        low, high = RADII[wanted.size or str(rng.choice(SIZES))]
        colour, pattern = wanted.colour or free.pop(), wanted.pattern or str(rng.choice(PATTERNS))
        objects.append(Object(wanted.shape, colour, pattern, 0.0, 0.0, float(rng.uniform(low, high))))
    background = request.background or free.pop()
    if request.relation:
        return Scene(_place_two(objects[0], objects[1], request.relation, rng), background)
    cell = POSITIONS.index(request.position) if request.position else int(rng.integers(9))
    left, right, up, down = extent(objects[0].shape, objects[0].radius)
    x = rng.uniform(*_range(cell % 3, left, right))
    y = rng.uniform(*_range(cell // 3, up, down))
    return Scene((replace(objects[0], x=float(x), y=float(y)),), background)


def _place_two(first: Object, second: Object, relation: str, rng: np.random.Generator) -> tuple[Object, Object]:
    """Put `first` left of / right of / above / below `second`, with a gap of at least 3 pixels along that axis."""
    before, after = (first, second) if relation in ("left of", "above") else (second, first)
    across = relation in ("left of", "right of")
    reach = [extent(o.shape, o.radius) for o in (before, after)]
    (b_low, b_high), (a_low, a_high) = ((r[:2] if across else r[2:]) for r in reach)
    gap = float(rng.uniform(3.0, 8.0))
    slack = SIDE - 2 * MARGIN - (b_low + b_high + a_low + a_high)
    gap = min(gap, slack)
    start = MARGIN + float(rng.uniform(0.0, slack - gap))
    first_along = start + b_low
    second_along = first_along + b_high + gap + a_low
    placed = []
    for o, along, r in ((before, first_along, reach[0]), (after, second_along, reach[1])):
        low, high = r[2:] if across else r[:2]
        side = float(np.clip(rng.normal(SIDE / 2, 4.0), MARGIN + low, SIDE - MARGIN - high))
        placed.append(replace(o, x=along, y=side) if across else replace(o, x=side, y=along))
    return (placed[0], placed[1]) if before is first else (placed[1], placed[0])
