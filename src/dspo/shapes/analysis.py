"""What is on a picture of `shapes`, measured from pixels: ground, objects, outlines, patterns.

Nothing here knows the prompt, and nothing is trained: the ground is what the border shows, be it shaded evenly across
the picture; objects are connected regions that differ from it, and each is compared with rendered outlines and
patterns. A region that two outlines explain much better than one is two objects that touch.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dspo.shapes.grammar import SHAPES
from dspo.shapes.render import DOT_PERIOD, SHADE, SIDE, STRIPE_PERIOD, shading, signed_distance

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Place = tuple[float, float, float]  # centre (x, y) and radius of the circle of equal area, pixels

_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_Y, _X = np.mgrid[0:SIDE, 0:SIDE] + 0.5
_PLANE = np.stack([np.ones_like(_X), _X / SIDE - 0.5, _Y / SIDE - 0.5], axis=-1)
_BORDER = np.pad(np.zeros((SIDE - 4, SIDE - 4), dtype=bool), 2, constant_values=True)

DIFFERENT = 0.055  # OKLab distance from the ground at which a pixel counts as something else
HALO = 0.2  # share of an object's distance from the ground below which a pixel is beside it, no part of it
LEAST_AREA = 40  # pixels; smaller regions are specks, no objects (the smallest object has 130)
MOST_OBJECTS = 4
WELL_EXPLAINED = 0.85  # overlap with one outline from which on a region is one object
BETTER = 0.1  # two objects instead of one must overlap with their outlines better by so much
TWO_COLOURS = 0.06  # OKLab distance of two chromas, less than the palette's nearest two have
DEEPEST_NECK = 5  # pixels taken off all around a region to see whether it falls apart
ITERATIONS = 8
# Where a pattern may begin, (x, y) in half pixels over a period: dots have two directions, stripes one.
_PHASES = {
    "striped": (np.zeros(1), np.arange(0.0, STRIPE_PERIOD, 0.5)),
    "dotted": (np.arange(0.0, DOT_PERIOD, 0.5), np.arange(0.0, DOT_PERIOD, 0.5)),
}
_SHIFTS = np.array([(dx, dy, 0.0) for dx, dy in product((-1.0, 0.0, 1.0), repeat=2)])
_SCALES = np.array([(0.0, 0.0, scale) for scale in (-0.05, 0.05)])


def oklab(rgb: Array) -> Array:
    """sRGB in [0, 1] to OKLab, [..., 3]; distances there are about perceived differences (B. Ottosson, 2020)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((np.maximum(rgb, 0) + 0.055) / 1.055) ** 2.4)
    return np.asarray(np.cbrt(linear @ _LMS.T) @ _LAB.T)


def bell(value: float, width: float) -> float:
    """exp(-value^2 / 2 width^2)"""
    return float(np.exp(-0.5 * (value / width) ** 2))


@dataclass(frozen=True)
class SeenObject:
    """One object as it is on the picture."""

    x: float  # centre of the best-fitting outline, pixels
    y: float
    radius: float  # of the circle of equal area, pixels
    overlap: dict[str, float]  # shape -> soft intersection over union with the best-fitting outline of that shape
    colour: Array  # OKLab of the lighter part of the interior
    rgb: Array  # the same in sRGB
    pattern: dict[str, float]  # pattern -> likeness in [0, 1]
    unevenness: float  # OKLab deviation of the interior from the best pattern
    outline: Array  # coverage of the best-fitting outline, [SIDE, SIDE]
    edge_width: float  # width of the edge as a multiple of the renderer's

    @property
    def shape(self) -> str:
        return max(self.overlap, key=lambda s: self.overlap[s])


@dataclass(frozen=True)
class Analysis:
    ground: Array  # OKLab
    ground_rgb: Array
    ground_noise: float  # OKLab deviation of the ground
    halo: float  # OKLab deviation of the ground next to the objects
    unexplained: float  # share of pixels that neither ground nor objects explain
    objects: tuple[SeenObject, ...]  # largest first


def analyse(image: NDArray[np.uint8]) -> Analysis:
    """Measure a picture, uint8 [64, 64, 3]."""
    rgb = image.astype(np.float64) / 255
    lab = oklab(rgb)
    shaded = _shaded_ground(rgb)
    difference = np.linalg.norm(lab - oklab(shaded), axis=-1)
    bare = difference < DIFFERENT
    ground, ground_rgb = np.median(lab[bare], axis=0), np.median(rgb[bare], axis=0)
    regions = [part for region in _regions(difference > DIFFERENT) for part in _without_halo(difference, region)]
    seen = [_see(rgb, part, shaded) for region in regions for part in _parts(lab, _part(difference, region))]
    objects = tuple(sorted(seen, key=lambda o: -o.radius)[:MOST_OBJECTS])
    covered = np.max([o.outline for o in objects], axis=0) if objects else np.zeros((SIDE, SIDE))
    distance = ndimage.distance_transform_edt(covered < 0.02)
    plain, near = distance > 3.0, (distance > 0.5) & (distance <= 3.0)
    uneven = np.linalg.norm(lab - ground, axis=-1)
    return Analysis(
        ground=ground,
        ground_rgb=ground_rgb,
        ground_noise=float(np.sqrt(np.mean(uneven[plain] ** 2))) if plain.any() else 1.0,
        halo=float(np.sqrt(np.mean(difference[near] ** 2))) if near.any() else 0.0,
        unexplained=float(np.mean((difference > DIFFERENT) & (distance > 1.0))),
        objects=objects,
    )


def _shaded_ground(rgb: Array) -> Array:
    """The plane through the border's colours, sRGB [SIDE, SIDE, 3].

    Least absolute deviations, by reweighting, so that an object that reaches the border does not tilt it.
    """
    places, colours = _PLANE[_BORDER], rgb[_BORDER]
    fit = np.stack([np.median(colours, axis=0), np.zeros(3), np.zeros(3)])
    for _ in range(ITERATIONS):
        root = np.maximum(np.linalg.norm(colours - places @ fit, axis=-1, keepdims=True), 0.005) ** -0.5
        fit = np.linalg.lstsq(places * root, colours * root, rcond=None)[0]
    return np.asarray(np.clip(_PLANE @ fit, 0.0, 1.0))


def _regions(mask: Mask) -> list[Mask]:
    """Connected parts of a mask, specks left out."""
    labels, number = ndimage.label(ndimage.binary_opening(mask))
    regions = (labels == i for i in range(1, number + 1))
    return [region for region in regions if region.sum() >= LEAST_AREA]


def _without_halo(difference: Array, region: Mask) -> list[Mask]:
    """The region without its faint pixels; what they alone joined falls apart."""
    return _regions(region & (difference > HALO * np.quantile(difference[region], 0.75)))


@dataclass(frozen=True)
class _Part:
    """A region that is taken for one object."""

    region: Mask
    difference: Array  # from the ground; 0 where a neighbour that touches the object lies
    overlap: dict[str, float]  # as in SeenObject
    places: dict[str, Place]  # of each shape's best-fitting outline

    @property
    def likeness(self) -> float:
        return max(self.overlap.values())


def _part(difference: Array, region: Mask) -> _Part:
    cover = _soft_mask(difference, region)
    area = float(cover.sum())
    start = float((cover * _X).sum() / area), float((cover * _Y).sum() / area), float(np.sqrt(area / np.pi))
    overlap, places = {}, {}
    for shape in SHAPES:
        overlap[shape], places[shape] = _fit(shape, cover, start)
    return _Part(region, difference, overlap, places)


def _parts(lab: Array, whole: _Part) -> list[_Part]:
    """The part itself, or those that explain it better than it does alone."""
    best, parts = whole.likeness + BETTER, None
    if whole.likeness < WELL_EXPLAINED:
        for cut in (*_by_colour(lab, whole.region), *_by_neck(whole.region)):
            one, other = (_part(np.where(cut[1 - i], 0.0, whole.difference), cut[i]) for i in (0, 1))
            shares = [part.region.sum() / whole.region.sum() for part in (one, other)]
            likeness = shares[0] * one.likeness + shares[1] * other.likeness
            if likeness > best:
                best, parts = likeness, (one, other)
    return [whole] if parts is None else [smaller for part in parts for smaller in _parts(lab, part)]


def _by_colour(lab: Array, region: Mask) -> list[tuple[Mask, Mask]]:
    """The region cut in two by chroma, which a pattern hardly changes, if it has two: two means on the main axis."""
    chroma = lab[region][:, 1:]
    along = chroma @ np.linalg.svd(chroma - chroma.mean(axis=0), full_matrices=False)[2][0]
    if np.ptp(along) < TWO_COLOURS:
        return []
    middle = (along.min() + along.max()) / 2
    for _ in range(ITERATIONS):
        high, low = along[along > middle].mean(), along[along <= middle].mean()
        middle = (high + low) / 2
    if high - low < TWO_COLOURS:
        return []
    side = np.zeros_like(region)
    side[region] = along > middle
    return _grown(region, ndimage.binary_opening(side), ndimage.binary_opening(region & ~side))


def _by_neck(region: Mask) -> list[tuple[Mask, Mask]]:
    """The region cut in two at a narrow place, if it has one."""
    core = region
    for _ in range(DEEPEST_NECK):
        core = ndimage.binary_erosion(core)
        labels, number = ndimage.label(core)
        if number >= 2:
            areas = ndimage.sum_labels(core, labels, np.arange(1, number + 1))
            first, second = np.argsort(-areas, kind="stable")[:2] + 1
            return _grown(region, labels == first, labels == second)
    return []


def _grown(region: Mask, one: Mask, other: Mask) -> list[tuple[Mask, Mask]]:
    """The region divided by which of two seeds is nearer; nothing if a part would be a speck."""
    if not one.any() or not other.any():
        return []
    nearer = ndimage.distance_transform_edt(~one) < ndimage.distance_transform_edt(~other)
    cut = region & nearer, region & ~nearer
    return [cut] if min(part.sum() for part in cut) >= LEAST_AREA else []


def _see(rgb: Array, part: _Part, ground_rgb: Array) -> SeenObject:
    best = max(SHAPES, key=lambda s: part.overlap[s])
    fx, fy, fr = part.places[best]
    distance = signed_distance(best, _X - fx, _Y - fy, fr)
    outline = np.clip(0.5 - distance, 0.0, 1.0)
    inside = distance < -1.0
    if inside.sum() < 12:
        inside = part.region
    pattern, light, unevenness, shade = _read_pattern(rgb, inside, fx, fy)
    colour = oklab(light)
    drawn = light * (1 - (1 - SHADE) * shade[..., None]) * outline[..., None] + ground_rgb * (1 - outline[..., None])
    ground = oklab(ground_rgb)
    ideal = np.linalg.norm(oklab(drawn) - ground, axis=-1)
    return SeenObject(
        x=fx,
        y=fy,
        radius=fr,
        overlap=part.overlap,
        colour=colour,
        rgb=light,
        pattern=pattern,
        unevenness=unevenness,
        outline=outline,
        edge_width=_edge_width(part.difference, ideal, distance, np.linalg.norm(colour - ground, axis=-1)),
    )


def _soft_mask(difference: Array, region: Mask) -> Array:
    """Coverage of each pixel by the region: 1 inside; at the rim a share of the nearest inner pixel's."""
    core = ndimage.binary_erosion(region)
    if not core.any():
        return region.astype(np.float64)
    nearest = ndimage.distance_transform_edt(~core, return_distances=False, return_indices=True)
    rim = ndimage.binary_dilation(region) & ~core
    share = np.clip(difference / np.maximum(difference[tuple(nearest)], 1e-3), 0.0, 1.0)
    return np.where(core, 1.0, np.where(rim, share, 0.0))


def _fit(shape: str, cover: Array, start: Place) -> tuple[float, Place]:
    """Best overlap of an outline with the mask, from a start on, by shifts and then scales, coarse and then fine.

    Returns the soft intersection over union and the outline's place. Only the window that the outline can reach is
    drawn.
    """
    x, y, radius = start
    reach = 1.6 * radius + 4
    rows = slice(max(0, int(y - reach)), int(y + reach) + 1)
    columns = slice(max(0, int(x - reach)), int(x + reach) + 1)
    window = cover[rows, columns].astype(np.float32)
    pixel_x, pixel_y = _X[rows, columns].astype(np.float32), _Y[rows, columns].astype(np.float32)
    area = window.sum()
    beyond = float(cover.sum()) - float(area)
    best, place = -1.0, start
    for step in (1.0, 0.4):
        for moves in (_SHIFTS, _SCALES):
            tried = np.array(place) + step * moves * np.array([1.0, 1.0, place[2]])
            cx, cy, cr = tried.T.astype(np.float32)[:, :, None, None]
            drawn = np.clip(0.5 - signed_distance(shape, pixel_x - cx, pixel_y - cy, cr), 0.0, 1.0)
            common = np.minimum(drawn, window).sum((1, 2))
            overlap = common / (drawn.sum((1, 2)) + area + beyond - common)
            i = int(np.argmax(overlap))
            if overlap[i] > best:
                best, place = float(overlap[i]), (float(tried[i, 0]), float(tried[i, 1]), float(tried[i, 2]))
    return best, place


def _read_pattern(rgb: Array, inside: Mask, x: float, y: float) -> tuple[dict[str, float], Array, float, Array]:
    """Likeness of the interior to each pattern; its lighter colour, what the best pattern leaves over, and its shading.

    The brightness is regressed on each rendered pattern at every phase, since stripes are stripes wherever the first of
    them lies; likeness is the share of variance that the best phase explains, times how near its depth comes to the
    renderer's.
    """
    pixels = rgb[inside]
    brightness = pixels.max(axis=-1)
    spread = float(brightness.std())
    likeness = {"solid": float(np.exp(-0.5 * (spread / (0.06 * max(float(brightness.mean()), 0.1))) ** 2))}
    fits = {"solid": (pixels.mean(axis=0), spread, np.zeros((SIDE, SIDE)))}
    for pattern, phases in _PHASES.items():
        xs, ys = phases[0] + x, phases[1] + y
        shades = shading(pattern, _X[inside] - xs[:, None, None], _Y[inside] - ys[:, None]).reshape(-1, len(pixels))
        explained = _explained(brightness, shades)
        i = int(np.argmax(explained))
        depth, left, light = _regress(pixels, brightness, shades[i])
        likeness[pattern] = float(explained[i]) * bell(np.log(max(depth, 1e-3) / (1 - SHADE)), 0.45)
        fits[pattern] = (light, left, shading(pattern, _X - xs[i // len(ys)], _Y - ys[i % len(ys)]))
    best = max(likeness, key=lambda p: likeness[p])
    if likeness[best] < 0.25:
        best = "solid"
    light, left, shade = fits[best]
    return likeness, light, left, shade


def _explained(brightness: Array, shades: Array) -> Array:
    """Share of the variance of the brightness [n] that each shade [..., n] explains; 0 where its dark is lighter."""
    bright = brightness - brightness.mean()
    centred = shades - shades.mean(axis=-1, keepdims=True)
    common, variance = centred @ bright, (centred**2).sum(axis=-1) * (bright**2).sum()
    return np.asarray(np.where((common < 0) & (variance > 1e-9), common**2 / np.maximum(variance, 1e-9), 0.0))


def _regress(rgb: Array, brightness: Array, shade: Array) -> tuple[float, float, Array]:
    """Relative depth of the shade, what it leaves over (standard deviation), and the colour where it is 0."""
    centred = shade - shade.mean()
    variance = float((centred**2).sum())
    if variance < 1e-6:
        return 0.0, float(brightness.std()), np.asarray(rgb.mean(axis=0))
    slope = float((centred * brightness).sum() / variance)
    light = np.asarray(rgb.mean(axis=0) - (centred[:, None] * rgb).sum(axis=0) / variance * shade.mean())
    left = float((brightness - brightness.mean() - slope * centred).std())
    return -slope / max(float(light.max()), 0.1), left, np.clip(light, 0.0, 1.0)


def _edge_width(difference: Array, ideal: Array, distance: Array, contrast: Array) -> float:
    """Sum of c(1-c) over the rim against the ideal's; c goes from 0 at the ground beside the object to 1 inside it."""
    rim = np.abs(distance) < 3.0
    beside = rim & (distance > 1.5)

    def softness(shown: Array) -> float:
        level = np.median(shown[beside]) if beside.any() else 0.0
        share = np.clip((shown - level)[rim] / np.maximum(contrast[rim] - level, 1e-3), 0.0, 1.0)
        return float((share * (1 - share)).sum()) + 1.0

    return softness(difference) / softness(ideal)
