"""Simulated coarse masks: a lesion mask goes in, the probability a coarse network might have given comes out.

Source: the seed's "Generate Augmented Data" (25 % Dice 0.9–0.99, 40 % 0.8–0.9, 35 % 0.6–0.8, none perfect, soft).
Each mask is made in four steps, all decided by one seed:

1. a Dice bin, a Dice inside it and a failure kind are drawn; kind and Dice depend on the lesion's size and shape;
2. the boundary wanders a little (every network's does), and then the kind's own amplitude is found by bisection so that
   the Dice of ``prob >= 0.5`` with the mask is the wanted one;
3. where a kind cannot go that far (no room for an island, a rim left around a hole), the boundary takes the rest;
4. the prediction becomes soft: a sigmoid of its signed distance over a drawn edge width, with a confidence that levels
   off inside and outside and varies slowly over the image. The 0.5 level set stays where it was solved.

Special cases. *Few pixels*: Dice moves in steps, so a lesion of one to four pixels gets the reachable Dice nearest to
the wanted one (one pixel: 0.667 always; from five on, every bin is reachable). *Empty mask*: Dice has no meaning; the
result is background below 0.5 everywhere, half of the time with a faint spot. *Full mask*: it fails inwards from the
frame. *Near-empty prediction*: the floor of the lowest bin (0.6) keeps it from vanishing, so it is what lies beside the
floor: a small core of low confidence, its Dice in the lowest third of that bin, for small lesions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from ultrarefiner.data.failures.shapes import (
    KINDS,
    REACH,
    Field,
    Lesion,
    Mask,
    Rng,
    bounding_window,
    moved,
    rough_field,
    signed_distance,
)
from ultrarefiner.data.failures.softness import REFERENCE_SIDE, Softness, checked_softness, dice_of, soften, suspect
from ultrarefiner.errors import UserError

BINS = ((0.90, 0.99, 0.25), (0.80, 0.90, 0.40), (0.60, 0.80, 0.35))


@dataclass(frozen=True)
class Failure:
    """One simulated coarse mask and how it came about.

    Attributes:
        prob: (H, W) float32 in [0, 1].
        kind: the failure kind, a key of KINDS; "none" for an empty mask.
        target: the Dice that was wanted; NaN for an empty mask.
        dice: the Dice of ``prob >= 0.5`` with the mask; NaN for an empty mask.
        edge_width: px of a 224 image, from 10 to 90 %.
    """

    prob: Float[np.ndarray, "H W"]
    kind: str
    target: float
    dice: float
    edge_width: float


@dataclass(frozen=True)
class Wanted:
    """A Dice bin [low, high] and the Dice inside it that is to be met."""

    low: float
    high: float
    dice: float

    @property
    def tolerance(self) -> float:
        return min(0.002, 0.05 * (self.high - self.low))

    def met(self, predicted: Mask, mask: Mask) -> bool:
        """Within the bin, and as near to the wanted Dice as the bisection aims or two pixels allow."""
        dice = dice_of(predicted, mask)
        near = abs(dice - self.dice) <= max(self.tolerance, 2 / np.count_nonzero(mask))
        return bool(near and self.low <= dice <= self.high)


class FailureSimulator:
    """Makes coarse masks that fail as networks do: `simulator(mask, seed)` -> probability.

    Args:
        bins: rows (lowest Dice, highest Dice, weight); the weights need not sum to one.
        kinds: weight per failure kind, multiplied with what suits the lesion's size and shape; a kind that is left out
            counts 1 when `kinds` is None, else 0. Names: the keys of `failure_shapes.KINDS`.
        softness: a `Softness`, or its fields by name; None for its defaults.
        wobble: how much of the lost Dice the wandering boundary takes at most, in [0, 1]; 0 leaves the kinds pure.

    Raises:
        UserError: a bin outside (0, 1), an unknown kind, a negative or all-zero weight, an unknown softness field.
    """

    def __init__(
        self,
        bins: Sequence[Sequence[float]] = BINS,
        kinds: Mapping[str, float] | None = None,
        softness: Softness | Mapping[str, Any] | None = None,
        wobble: float = 0.45,
    ) -> None:
        self.bins = _checked_bins(bins)
        self.kinds = _checked_kinds(kinds)
        self.softness = checked_softness(softness)
        self.wobble = float(wobble)
        if not 0 <= self.wobble <= 1:
            raise UserError(f"wobble is {wobble}: give the share of the lost Dice it may take, from 0 to 1.")

    def __call__(self, mask: NDArray[Any], seed: int) -> Float[np.ndarray, "H W"]:
        """The probability (H, W) float32 in [0, 1] for a mask (H, W) bool; the same for the same seed, everywhere."""
        return self.simulate(mask, seed).prob

    def simulate(self, mask: NDArray[Any], seed: int) -> Failure:
        """As calling, with the kind, the wanted and the reached Dice and the edge width.

        Seeds that follow each other (base, base + 1, …) fill the bins evenly: their low-discrepancy sequence meets the
        weights to a few masks in thousands, where independent draws would be a point off in every fourth set of 5000.

        Raises:
            UserError: the mask is not two-dimensional and true/false, or the seed is negative.
        """
        mask = _checked_mask(mask)
        if seed < 0:
            raise UserError(f"The seed of a simulated mask is {seed}: give 0 or more.")
        rng = np.random.Generator(np.random.PCG64(seed))
        if not mask.any():
            width, _, outside = self.softness.draw(rng, 0.85)
            return Failure(
                suspect(mask.shape, self._background(mask, outside, rng), rng), "none", math.nan, math.nan, width
            )

        scale = max(mask.shape) / REFERENCE_SIDE
        low, high = self._bin(seed)
        lesion = _measure(mask)
        kind = self._kind(rng, lesion, scale, lowest=low == min(row[0] for row in self.bins))
        target = _draw_dice(rng, low, high, lesion, scale, near_empty=kind == "near_empty")
        margin = min(REACH[kind] * lesion.radius + 8 * scale, max(mask.shape))
        window = bounding_window(mask, math.ceil(margin))
        level = signed_distance(mask[window], coarse=max(1, min(3, int(lesion.radius / 10))))
        lesion = replace(lesion, level=level, hardness=1 - target)

        predicted = np.zeros_like(mask)
        predicted[window] = self._fail(mask[window], lesion, kind, Wanted(low, high, target), rng)
        dice = dice_of(predicted, mask)
        width, inside, outside = self.softness.draw(rng, dice)
        if kind == "near_empty":
            inside *= rng.uniform(0.1, 0.4)
        prob = soften(predicted, mask, width * scale, inside, self._background(mask, outside, rng), rng)
        return Failure(prob, kind, target, dice, width)

    def _background(self, mask: Mask, outside: float, rng: Rng) -> float | Field:
        """The background's level, or levels where they were measured."""
        levels = self.softness.background_levels(mask.shape, rng)
        return outside if levels is None else levels

    def _bin(self, seed: int) -> tuple[float, float]:
        quantile = (seed * 0x9E3779B97F4A7C15 % 2**64) / 2**64  # Weyl sequence of the golden ratio
        low, high = self.bins[-1][:2]
        for low, high, share in self.bins:  # noqa: B007
            quantile -= share
            if quantile < 0:
                break
        return low, high

    def _kind(self, rng: Rng, lesion: Lesion, scale: float, lowest: bool) -> str:
        suited = _suited(lesion, scale)
        if not lowest:
            suited["near_empty"] = 0.0
        else:
            suited["holes"] *= 0.5  # a lesion that is mostly hole is rare
        weights = [self.kinds[kind] * suited[kind] for kind in KINDS]
        if not any(weights):  # only kinds that do not suit this lesion were asked for: take them as asked
            weights = [self.kinds[kind] for kind in KINDS]
        steps = np.cumsum(weights)
        return list(KINDS)[int(np.searchsorted(steps, rng.random() * steps[-1], side="right"))]

    def _fail(self, mask: Mask, lesion: Lesion, kind: str, wanted: Wanted, rng: Rng) -> Mask:
        """The prediction whose Dice with the mask is the wanted one, as near as pixels allow."""
        wander = rough_field(rng, mask.shape, 0.6 * lesion.radius * (1 + 2 * lesion.hardness))
        share = self.wobble * rng.uniform(0.3, 1.0)
        start = 0.0
        if share and kind != "boundary":
            gentle = replace(wanted, dice=1 - share * (1 - wanted.dice))
            start = _bisect(moved(lesion.level, wander), lesion.radius, mask, gentle, 0.1 * (1 - gentle.dice))
        change = KINDS[kind](replace(lesion, level=lesion.level + np.float32(start) * wander), rng)
        predicted = change.predict(_bisect(change.predict, change.top, mask, wanted))
        if wanted.met(predicted, mask):
            return predicted

        if dice_of(predicted, mask) > wanted.dice:  # the kind has gone as far as it can: the boundary takes the rest
            missing, extra = mask & ~predicted, predicted & ~mask
            for speed in (wander, -1.0):
                further = _holding(moved(lesion.level, speed), missing, extra)
                predicted = further(_bisect(further, 3 * lesion.radius, mask, wanted))
                if wanted.met(predicted, mask):
                    return predicted
        return _by_pixels(mask, lesion.level, wanted, rng)


def fit_bins(pairs: Iterable[tuple[Float[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]]) -> list[list[float]]:
    """Bins of equal weight that follow the Dice distribution of real predictions.

    Their edges are the deciles, kept a little apart and away from 0 (a simulated mask never misses all of a lesion) and
    from 1 (none is perfect).

    Args:
        pairs: (probability (H, W) in [0, 1], mask (H, W) bool) of out-of-fold images; empty masks are passed over.

    Raises:
        UserError: fewer than ten pairs have a lesion.
    """
    dice = [dice_of(prob >= 0.5, mask) for prob, mask in pairs if mask.any()]
    if len(dice) < 10:
        raise UserError(
            f"The bins cannot be fitted to {len(dice)} predictions of lesions: give at least 10 out-of-fold "
            "predictions, or use bins of your own."
        )
    edges = np.quantile(dice, np.linspace(0, 1, 11))
    apart = 0.005 * np.arange(11)
    edges = np.maximum.accumulate(np.maximum(edges, 0.02) - apart) + apart
    edges = np.minimum(edges, 0.99 - apart[::-1])
    return [[float(low), float(high), 0.1] for low, high in pairwise(edges)]


def _measure(mask: Mask) -> Lesion:
    area = np.count_nonzero(mask)
    contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    perimeter = sum(cv2.arcLength(contour, True) for contour in contours) * 0.95  # a staircase is longer than its line
    compactness = min(1.0, 4 * math.pi * area / max(perimeter, 1.0) ** 2)
    return Lesion(np.empty((0, 0), np.float32), math.sqrt(area / math.pi), compactness, 0.0)


def _suited(lesion: Lesion, scale: float) -> dict[str, float]:
    """How likely each kind is for a lesion of this size and shape.

    Small lesions are missed, misplaced or confused with something else; large ones are found in part, with holes or in
    pieces; ragged ones are drawn with a wrong outline.
    """
    radius = lesion.radius / scale
    small = _ramp((30 - radius) / 18)
    large = _ramp((radius - 10) / 25)
    ragged = _ramp((0.85 - lesion.compactness) / 0.4)
    return {
        "offset": 1.0,
        "boundary": 0.8 + 0.6 * ragged,
        "local": 0.8 + 0.4 * ragged,
        "chunk": 0.2 + 0.7 * large,
        "holes": 0.6 * large,
        "fragments": large * (0.2 + 0.5 * ragged),
        "islands": 0.4 + 0.5 * small,
        "bridge": 0.3 + 0.3 * ragged,
        "shift": 0.3 + 0.4 * small,
        "near_empty": 1.5 * small,
    }


def _ramp(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _draw_dice(rng: Rng, low: float, high: float, lesion: Lesion, scale: float, near_empty: bool) -> float:
    """A Dice inside the bin, clear of its borders; small and ragged lesions fail harder within it."""
    if near_empty:
        high = low + (high - low) / 3
    small = _ramp((30 - lesion.radius / scale) / 18)
    quantile = rng.random() ** (1 + 0.4 * small + 0.4 * (1 - lesion.compactness))
    clear = 2 * Wanted(low, high, low).tolerance
    return float(low + clear + (high - low - 2 * clear) * quantile)


def _bisect(
    predict: Callable[[float], Mask], top: float, mask: Mask, wanted: Wanted, tolerance: float | None = None
) -> float:
    """The amplitude in [0, top] at which the prediction's Dice falls to the wanted one; `top` where it never does."""
    tolerance = wanted.tolerance if tolerance is None else tolerance
    excess = partial(_excess, predict, mask, int(np.count_nonzero(mask)), wanted.dice)
    if top <= 0 or (below := excess(top)) > 0:
        return top
    low, high, above = 0.0, top, 1 - wanted.dice
    for step in range(24):
        secant = low + (high - low) * above / (
            above - below
        )  # halves the number of steps; every third one still bisects
        middle = (low + high) / 2 if step % 3 == 2 else secant
        found = excess(middle)
        if abs(found) <= tolerance:
            return middle
        if found > 0:
            low, above = middle, found
        else:
            high, below = middle, found
    return min((low, high), key=lambda amplitude: abs(excess(amplitude)))


def _excess(predict: Callable[[float], Mask], mask: Mask, area: int, wanted: float, amplitude: float) -> float:
    predicted = predict(amplitude)
    return float(2 * np.count_nonzero(predicted & mask) / (np.count_nonzero(predicted) + area) - wanted)


def _holding(predict: Callable[[float], Mask], missing: Mask, extra: Mask) -> Callable[[float], Mask]:
    """A prediction that keeps what another failure has already taken and added."""
    return lambda amplitude: (predict(amplitude) | extra) & ~missing


def _by_pixels(mask: Mask, level: Field, wanted: Wanted, rng: Rng) -> Mask:
    """For a handful of pixels, where Dice moves in steps: whole pixels are added or taken at the edge.

    Of all counts of added or of taken pixels, the one whose Dice is in the bin, else the nearest to the wanted Dice.
    Where nothing can be added or taken (an image of one pixel) the mask stays as it is.
    """
    target = wanted.dice
    area, room = np.count_nonzero(mask), np.count_nonzero(~mask)
    added, taken = np.arange(1, room + 1), np.arange(1, area)
    options = [(abs(2 * area / (2 * area + k) - target), 2 * area / (2 * area + k), k) for k in added[: 2 * area]]
    options += [(abs(2 * (area - k) / (2 * area - k) - target), 2 * (area - k) / (2 * area - k), -k) for k in taken]
    if not options:
        return mask
    _, _, count = min(options, key=lambda option: (not wanted.low <= option[1] <= wanted.high, option[0]))
    order = np.abs(level) + rng.random(mask.shape, dtype=np.float32)
    order[mask == (count > 0)] = np.inf
    changed = np.argsort(order, axis=None)[: abs(count)]
    predicted: Mask = mask.copy()
    predicted.flat[changed] = count > 0
    return predicted


def _checked_mask(mask: NDArray[Any]) -> Mask:
    if mask.ndim != 2 or mask.size == 0:
        raise UserError(f"A lesion mask has shape {mask.shape}: give one of shape (height, width).")
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
        raise UserError("A lesion mask has values other than 0 and 1: give true and false.")
    return np.ascontiguousarray(mask, dtype=bool)


def _checked_bins(bins: Sequence[Sequence[float]]) -> list[tuple[float, float, float]]:
    rows = [tuple(float(value) for value in row) for row in bins]
    for row in rows:
        if len(row) != 3 or not 0 < row[0] < row[1] < 1 or row[2] < 0:
            raise UserError(
                f"bins has the row {list(row)}: give [low, high, weight] with 0 < low < high < 1, weight >= 0."
            )
    total = sum(row[2] for row in rows)
    if total <= 0:
        raise UserError("bins has no weight above 0: give at least one [low, high, weight].")
    return [(low, high, weight / total) for low, high, weight in rows]


def _checked_kinds(kinds: Mapping[str, float] | None) -> dict[str, float]:
    if kinds is None:
        return dict.fromkeys(KINDS, 1.0)
    for kind, weight in kinds.items():
        if kind not in KINDS:
            raise UserError(f"kinds names {kind!r}, which is no failure kind: choose among {', '.join(KINDS)}.")
        if not weight >= 0:
            raise UserError(f"kinds.{kind} is {weight}: give 0 or more.")
    if not any(kinds.values()):
        raise UserError("kinds has no weight above 0: give at least one failure kind.")
    return {kind: float(kinds.get(kind, 0.0)) for kind in KINDS}


_DEFAULT = FailureSimulator()


def simulate_failure(mask: NDArray[Any], seed: int) -> Float[np.ndarray, "H W"]:
    """The default simulator's probability (H, W) float32 in [0, 1] for a lesion mask (H, W) bool and a seed >= 0."""
    return _DEFAULT(mask, seed)
