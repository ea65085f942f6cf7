"""The shapes of what coarse networks get wrong, each as a prediction that grows worse with one amplitude.

A failure kind takes a :class:`Lesion` and a random generator and returns a :class:`Change`: a function from an
amplitude (px) to the predicted mask, and the largest amplitude at which the kind still looks like itself. The amplitude
that gives a wanted Dice is found elsewhere (:mod:`ultrarefiner.data.failures`), so no kind needs to know about Dice.

All kinds read the lesion's level function: its signed distance (px, positive inside), on which smooth unions and
intersections are closed formulas. Lengths scale with the lesion's radius, so small and large lesions fail alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

Mask = Bool[np.ndarray, "H W"]
Field = Float[np.ndarray, "H W"]
Rng = np.random.Generator

_FAR = np.float32(1e6)  # px; an amplitude no kind reaches
_CHAMFER = 1.03  # what OpenCV's 5×5 chamfer distance falls short by on average, measured on discs
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


@dataclass(frozen=True)
class Lesion:
    """A lesion in its window, as the failure kinds see it.

    Attributes:
        level: (H, W) float32, px, positive inside; the signed distance, or a slightly deformed one.
        radius: px, of the disc of the same area.
        compactness: 4π·area/perimeter², in (0, 1]; 1 is a disc.
        hardness: 1 − the wanted Dice, in (0, 1): how much is to go wrong.
    """

    level: Field
    radius: float
    compactness: float
    hardness: float

    @cached_property
    def inside(self) -> Mask:
        return self.level > 0

    @cached_property
    def edge(self) -> Mask:
        return np.asarray(np.abs(self.level) < 1)

    @property
    def error_radius(self) -> float:
        """px; radius of one false-positive disc that alone would lower Dice by `hardness`: area·2h/(1−h)."""
        return self.radius * math.sqrt(2 * self.hardness / (1 - self.hardness))


@dataclass(frozen=True)
class Change:
    """`predict(amplitude)` -> (H, W) bool for an amplitude in [0, `top`] px; at 0 the level function's own mask."""

    predict: Callable[[float], Mask]
    top: float


def signed_distance(mask: Mask, coarse: int = 1) -> Field:
    """Distance to the mask's edge in px, positive inside, float32; the edge lies half-way between pixel centres.

    The staircase of slanted edges is smoothed, but no pixel changes its sign: `signed_distance(m) > 0` equals `m`.
    A mask without an edge (all true or all false) takes the image's frame as its edge.

    Args:
        mask: (H, W) bool.
        coarse: measures on a grid this many times coarser: several times faster, wrong by half a grid step at most.
    """
    if mask.all() or not mask.any():
        framed = np.pad(mask, 1, constant_values=not mask[0, 0])
        return signed_distance(framed)[1:-1, 1:-1]
    height, width = mask.shape
    pixels = np.ascontiguousarray(mask[coarse // 2 :: coarse, coarse // 2 :: coarse]).view(np.uint8)
    rim = pixels - cv2.erode(pixels, _CROSS)  # the outermost pixels inside; half a pixel from the edge
    distance = cv2.distanceTransform(1 - rim, cv2.DIST_L2, 5)
    distance *= _sign(pixels)
    distance += np.float32(0.5)
    distance *= np.float32(_CHAMFER * coarse)
    cv2.GaussianBlur(distance, (5, 5), 1.0, dst=distance)
    if coarse > 1:
        distance = cv2.resize(distance, (width, height), interpolation=cv2.INTER_LINEAR)
    sign = _sign(mask.view(np.uint8))
    distance *= sign
    np.maximum(distance, np.float32(0.05), out=distance)
    distance *= sign
    return distance


def _sign(pixels: UInt8[np.ndarray, "H W"]) -> Field:
    return (2 * pixels.view(np.int8) - 1).astype(np.float32)


def bounding_window(mask: Mask, margin: int) -> tuple[slice, slice]:
    """Rows and columns of the true pixels' bounding box, grown by `margin` px and clipped to the image."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    return slice(max(y - margin, 0), y + height + margin), slice(max(x - margin, 0), x + width + margin)


def random_field(rng: Rng, shape: tuple[int, int], cell: float, detail: float = 0.0) -> Field:
    """Smooth Gaussian random field, zero mean, variance just below one, float32, that changes over about `cell` px.

    `detail` adds that much of a second field, 2.5 times finer.
    """
    height, width = shape
    finest = max(cell / 2.5, 1.0) if detail else cell
    coarse = max(1, min(4, int(finest / 3)))  # cubic on a coarser grid, linear from there: much faster, looks the same
    size = (1 + width // coarse, 1 + height // coarse)
    field = coarse_field(rng, size, cell / coarse)
    if detail:
        field += np.float32(detail) * coarse_field(rng, size, finest / coarse)
    return cv2.resize(field, (width, height), interpolation=cv2.INTER_LINEAR)


def coarse_field(rng: Rng, size: tuple[int, int], cell: float) -> Field:
    width, height = size
    """A random field as `random_field` gives, of a small (width, height), all cubic."""
    noise = rng.standard_normal((2 + round(height / cell), 2 + round(width / cell)), dtype=np.float32)
    return cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC)


def rough_field(rng: Rng, shape: tuple[int, int], cell: float) -> Field:
    """A random field with finer detail on top: the way a network's boundary wanders."""
    return random_field(rng, shape, max(cell, 2.0), detail=0.25)


def moved(level: Field, speed: Field | float) -> Callable[[float], Mask]:
    """The edge moved outwards by amplitude × speed (px)."""
    edge = -level
    return lambda amplitude: np.float32(amplitude) * speed > edge


def offset(lesion: Lesion, rng: Rng) -> Change:
    """The whole edge too far out or too far in."""
    sign = 1.0 if rng.random() < 0.5 else -1.0
    speed = sign * (1 + 0.25 * random_field(rng, lesion.level.shape, 1.5 * lesion.radius))
    return Change(moved(lesion.level, speed), 3 * lesion.radius)


def boundary(lesion: Lesion, rng: Rng) -> Change:
    """The edge wanders, displaced by a Gaussian random field: finer on ragged lesions, wider where much goes wrong."""
    cell = lesion.radius * rng.uniform(0.6, 1.1) * (0.5 + 0.5 * lesion.compactness) * (1 + 3 * lesion.hardness)
    return Change(moved(lesion.level, rough_field(rng, lesion.level.shape, cell)), 1.2 * lesion.radius)


def local(lesion: Lesion, rng: Rng) -> Change:
    """One to four dents and bulges, Gaussian bumps on the edge; where much is to go wrong, wide and all one way."""
    y, x = _grid(lesion.level.shape)
    speed = np.zeros_like(lesion.level)
    outwards = 1.0 if rng.random() < 0.5 else -1.0
    for _ in range(rng.integers(1, 5)):
        px, py = _pick(rng, lesion.edge)
        spread = 2 * (lesion.radius * (rng.uniform(0.2, 0.4) + lesion.hardness)) ** 2
        bump = np.exp(-((y - py) ** 2) / spread) * np.exp(-((x - px) ** 2) / spread)
        speed += bump * (outwards if lesion.hardness > 0.15 or rng.random() < 0.5 else -outwards)
    return Change(moved(lesion.level, speed), 1.5 * lesion.radius)


def chunk(lesion: Lesion, rng: Rng) -> Change:
    """A part is missing, eaten from one side: from a round bite to a nearly straight cut."""
    shape, radius = lesion.level.shape, lesion.radius
    y, x = _grid(shape)
    px, py = _pick(rng, lesion.edge)
    cx, cy = _centre(lesion.inside)
    away = math.hypot(px - cx, py - cy) or 1.0
    back = radius * rng.uniform(0.0, 3.0)  # the circle's centre lies this far outside: the further, the straighter
    ox, oy = px + (px - cx) / away * back, py + (py - cy) / away * back
    depth = np.sqrt((x - ox) ** 2 + (y - oy) ** 2) + 0.15 * radius * rough_field(rng, shape, 0.7 * radius)
    return _removed(lesion.inside, depth - _rounding(lesion.level, 0.35 * radius))


def holes(lesion: Lesion, rng: Rng) -> Change:
    """One to three holes inside; a rim is always left."""
    shape, radius = lesion.level.shape, lesion.radius
    deepest = float(lesion.level.max())
    distance = _nearest(rng, shape, [_pick(rng, lesion.level > 0.5 * deepest) for _ in range(rng.integers(1, 4))])
    distance += 0.15 * radius * rough_field(rng, shape, 0.6 * radius)
    rim = lesion.level - max(1.5, 0.35 * deepest)
    distance += _rounding(rim, 0.3 * radius)
    distance[rim <= 0] = _FAR
    return _removed(lesion.inside, distance)


def fragments(lesion: Lesion, rng: Rng) -> Change:
    """Falls into two to four pieces: fissures across the long axis open from one side while the pieces shrink."""
    shape, radius = lesion.level.shape, lesion.radius
    y, x = _grid(shape)
    cx, cy = _centre(lesion.inside)
    angle, sigma = _long_axis(lesion.inside)
    count = 1 + rng.binomial(2, min(0.8, 1.2 - lesion.compactness))
    first = rng.uniform(-0.5, 0.5)
    wave = rough_field(rng, shape, 0.6 * radius)
    gap = np.full(shape, _FAR, np.float32)
    for position in first + 1.5 * (np.arange(count) - (count - 1) / 2):
        turn = angle + rng.normal(0, 0.3)
        along = (x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)
        across = ((y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)) * (1 if rng.random() < 0.5 else -1)
        opening = 0.2 * np.maximum(across + 1.5 * radius, 0)  # a wedge: widest where it enters
        gap = np.minimum(gap, np.abs(along - position * sigma + 0.12 * radius * wave) + opening)
    gap -= _rounding(lesion.level, 0.3 * radius)
    return _removed(lesion.inside, np.minimum(gap, lesion.level / 0.4 + 0.2 * radius))


def islands(lesion: Lesion, rng: Rng) -> Change:
    """One to three false findings elsewhere in the image, never touching the lesion."""
    shape, gap = lesion.level.shape, max(2.5, 0.15 * lesion.radius)
    count = int(rng.integers(1, 4))
    size = min(lesion.error_radius / math.sqrt(count), lesion.radius)
    room = lesion.level < -(gap + 1.2 * size)
    if not room.any():
        return _unchanged(lesion)
    distance = _nearest(rng, shape, [_pick(rng, room) for _ in range(count)], layered=True)
    distance += 0.25 * size * rough_field(rng, shape, 0.8 * size)
    distance[lesion.level > -gap] = _FAR
    return _added(lesion, distance, 2.0 * size)


def bridge(lesion: Lesion, rng: Rng) -> Change:
    """A false finding beside the lesion, joined to it by a thin bridge."""
    shape = lesion.level.shape
    y, x = _grid(shape)
    size = min(0.9 * lesion.error_radius, lesion.radius)
    reach = size + max(3.0, size * rng.uniform(0.4, 1.0))
    ring = np.abs(lesion.level + reach) < 1.5
    if not ring.any():
        return _unchanged(lesion)
    px, py = _pick(rng, ring)
    dx, dy, reach = _towards(lesion.inside, px, py)
    distance = _nearest(rng, shape, [(px, py)])
    wave = size * rough_field(rng, shape, 0.8 * size)
    distance += 0.2 * wave
    along = (x - px) * dx + (y - py) * dy
    aside = (y - py) * dx - (x - px) * dy + 0.3 * wave  # never quite straight
    past = along - np.minimum(np.maximum(along, 0), np.float32(reach))
    beside = np.sqrt(aside * aside + past * past)
    thinness = rng.uniform(2.5, 6.0)
    distance = np.minimum(distance, thinness * np.maximum(beside - 1.0, 0))
    distance -= _rounding(-lesion.level, 0.25 * size)
    return _added(lesion, distance, 2.0 * size)


def shift(lesion: Lesion, rng: Rng) -> Change:
    """The right shape in the wrong place: moved, and turned a little on the way."""
    height, width = lesion.level.shape
    cx, cy = _centre(lesion.inside)
    direction, turn = rng.uniform(0, 2 * math.pi), rng.normal(0, 0.2) / lesion.radius

    def predict(amplitude: float) -> Mask:
        c, s = math.cos(amplitude * turn), math.sin(amplitude * turn)
        tx, ty = cx + amplitude * math.cos(direction), cy + amplitude * math.sin(direction)
        move = np.array([[c, -s, tx - c * cx + s * cy], [s, c, ty - s * cx - c * cy]])
        return cv2.warpAffine(lesion.level, move, (width, height), borderMode=cv2.BORDER_REPLICATE) > 0

    return Change(predict, lesion.radius)


def near_empty(lesion: Lesion, rng: Rng) -> Change:
    """Almost nothing is found: the prediction shrinks towards a point off the lesion's centre."""
    shape, radius = lesion.level.shape, lesion.radius
    distance = _nearest(rng, shape, [_pick(rng, lesion.level > 0.5 * float(lesion.level.max()))])
    distance += 0.2 * radius * rough_field(rng, shape, 0.8 * radius)
    return _removed(lesion.inside, lesion.level - distance)


KINDS: dict[str, Callable[[Lesion, Rng], Change]] = {
    kind.__name__: kind
    for kind in (offset, boundary, local, chunk, holes, fragments, islands, bridge, shift, near_empty)
}

# How far beyond the lesion a kind may reach, in radii; it is worked out in a window of that size.
REACH = dict.fromkeys(KINDS, 1.3) | dict.fromkeys(("chunk", "holes", "fragments", "near_empty"), 0.6)
REACH |= {"shift": 1.0, "bridge": 4.0, "islands": math.inf}


def _grid(shape: tuple[int, int]) -> tuple[Float[np.ndarray, "H 1"], Float[np.ndarray, "1 W"]]:
    return np.arange(shape[0], dtype=np.float32)[:, None], np.arange(shape[1], dtype=np.float32)[None]


def _pick(rng: Rng, where: Mask) -> tuple[int, int]:
    """A random (x, y) among the true pixels; the image's centre if there is none."""
    height, width = where.shape
    for x, y in zip(rng.integers(width, size=8).tolist(), rng.integers(height, size=8).tolist(), strict=True):
        if where[y, x]:  # a few tries are cheaper than a list of all places
            return x, y
    places = np.flatnonzero(where)
    place = int(places[rng.integers(len(places))]) if len(places) else where.size // 2 + width // 2
    return place % width, place // width


def _centre(mask: Mask) -> tuple[float, float]:
    moments = cv2.moments(mask.view(np.uint8), binaryImage=True)
    mass = moments["m00"] or 1.0
    return moments["m10"] / mass, moments["m01"] / mass


def _long_axis(mask: Mask) -> tuple[float, float]:
    """Angle (rad) of the axis of largest spread and the standard deviation along it (px)."""
    moments = cv2.moments(mask.view(np.uint8), binaryImage=True)
    mass = moments["m00"] or 1.0
    xx, yy, xy = moments["mu20"] / mass, moments["mu02"] / mass, moments["mu11"] / mass
    widest = (xx + yy) / 2 + math.hypot((xx - yy) / 2, xy)
    return 0.5 * math.atan2(2 * xy, xx - yy), math.sqrt(widest)


def _towards(mask: Mask, x: int, y: int) -> tuple[float, float, float]:
    """Unit vector (x, y) from a pixel outside to the mask's nearest pixel, and the distance to it (px)."""
    rows, columns = np.nonzero(mask)
    nearest = int(np.argmin((columns - x) ** 2 + (rows - y) ** 2))
    dx, dy = float(columns[nearest] - x), float(rows[nearest] - y)
    length = math.hypot(dx, dy) or 1.0
    return dx / length, dy / length, length


def _nearest(rng: Rng, shape: tuple[int, int], centres: list[tuple[int, int]], layered: bool = False) -> Field:
    """Distance (px) to the nearest of some centres, each with its own random size, aspect and direction.

    `layered` ones are long and lie nearly level, as tissue layers do in ultrasound.
    """
    y, x = _grid(shape)
    nearest = np.full(shape, _FAR, np.float32)
    for px, py in centres:
        angle = rng.normal(0, 0.3) if layered else rng.uniform(0, math.pi)
        aspect, size = rng.uniform(1.0, 1.8 if layered else 1.25), rng.uniform(0.7, 1.3)
        a, b = (math.cos(angle) / (aspect * size)) ** 2, (math.sin(angle) / (aspect * size)) ** 2
        c, d = (math.sin(angle) * aspect / size) ** 2, (math.cos(angle) * aspect / size) ** 2
        mixed = math.sin(2 * angle) * (1 / (aspect * size) ** 2 - (aspect / size) ** 2)
        squared = (y - py) * (np.float32(mixed) * (x - px))
        squared += np.float32(a + c) * (x - px) ** 2
        squared += np.float32(b + d) * (y - py) ** 2
        np.minimum(nearest, squared, out=nearest)
    np.maximum(nearest, 0, out=nearest)
    return np.sqrt(nearest, out=nearest)


def _rounding(level: Field, radius: float) -> Field:
    """How much earlier (px) a front d < a reaches a pixel near the edge, so that front and edge meet in a round corner.

    The quadratic smooth minimum min(s, q) − max(k − |s − q|, 0)²/4k is zero at q = (√k − √s)² for s < k: with
    q = d − a, the corner's pixels belong to the front from a = d − q on.
    """
    short = np.sqrt(np.float32(max(radius, 1e-3))) - np.sqrt(np.maximum(level, 0))
    return np.asarray(np.maximum(short, 0) ** 2)


def _removed(inside: Mask, order: Field) -> Change:
    """Takes the pixels of `inside` away in the given order (px)."""
    steps = order[inside]
    start = float(steps.min(initial=_FAR))
    top = float(steps.max(where=steps < _FAR / 2, initial=start))
    return Change(lambda amplitude: inside & (order >= start + amplitude), top - start)


def _added(lesion: Lesion, order: Field, top: float) -> Change:
    """Adds pixels to the lesion in the given order (px)."""
    start = min(float(order.min()), 0.0)
    return Change(lambda amplitude: lesion.inside | (order < start + amplitude), top - start)


def _unchanged(lesion: Lesion) -> Change:
    return Change(lambda amplitude: lesion.inside, 0.0)
