"""How soft a coarse network's output is: drawn for simulated masks, fitted to real predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float

from ultrarefiner.data.failures.shapes import Field, Mask, Rng, bounding_window, coarse_field, signed_distance
from ultrarefiner.errors import UserError

REFERENCE_SIDE = 224  # px; edge widths and lesion sizes are meant for an image of this side
QUANTILES = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 1)
"""Of an image's background, at which its logit is kept: the last few are its faint spots."""
_IMAGES = 64  # whose background is kept
SIGMOID_10_90 = 2 * math.log(9)  # a sigmoid of distance/w rises from 0.1 to 0.9 over this many w


@dataclass(frozen=True)
class Softness:
    """How soft a network's output is.

    The defaults lie near what :meth:`fit` found for a small U-Net (trained for 20 minutes on a CPU) on 306 images of
    held-out BUS-BRA patients: width 4.5, spread 0.27, trend 0.7 to 1.1, inside 4.2, outside 7.1, level spread 0.12.
    They are a little sharper and more spread, because a network trained to the end is surer. Fit your own.

    Attributes:
        width: px of a 224 image; median over images of the distance over which the edge rises from 0.1 to 0.9.
        width_spread: standard deviation of the logarithm of the width.
        width_trend: growth of the logarithm of the width per unit of Dice lost (counted from Dice 0.85).
        inside: median logit at which the lesion's confidence levels off.
        outside: median of −logit at which the background's does.
        level_spread: standard deviation of the logarithm of both levels.
        background: of some images each, the logit of the background far from the lesion at `QUANTILES`, all below 0;
            one of them is drawn in place of ``outside``, so that faint spots are as many and as faint as a network's.
    """

    width: float = 4.0
    width_spread: float = 0.4
    width_trend: float = 1.0
    inside: float = 4.5
    outside: float = 7.0
    level_spread: float = 0.2
    background: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(QUANTILES) or list(row) != sorted(row) or not row[-1] < 0 for row in self.background):
            raise UserError(f"softness.background needs rows of {len(QUANTILES)} ascending logits below 0.")
        for name in ("width", "inside", "outside"):
            if not getattr(self, name) > 0:
                raise UserError(f"softness.{name} is {getattr(self, name)}: give a number above 0.")
        for name in ("width_spread", "level_spread"):
            if not getattr(self, name) >= 0:
                raise UserError(f"softness.{name} is {getattr(self, name)}: give 0 or more.")

    def draw(self, rng: Rng, dice: float) -> tuple[float, float, float]:
        """One image's edge width (px of a 224 image), and its inside and outside levels (logits, both positive)."""
        width, inside, outside = rng.standard_normal(3)
        return (
            self.width * math.exp(self.width_spread * width + self.width_trend * (0.85 - dice)),
            self.inside * math.exp(self.level_spread * inside),
            self.outside * math.exp(self.level_spread * outside),
        )

    def background_levels(self, shape: tuple[int, int], rng: Rng) -> Field | None:
        """−logit of the background (H, W), above 0: the values of one image in smooth patches; None without any."""
        if not self.background:
            return None
        row = self.background[int(rng.integers(len(self.background)))]
        height, width = shape
        field = coarse_field(rng, (1 + width // 4, 1 + height // 4), max(shape) / 36)
        rank = np.empty(field.size)
        rank[np.argsort(field, axis=None)] = np.linspace(0, 1, field.size)
        levels = -np.interp(rank, QUANTILES, row).astype(np.float32).reshape(field.shape)
        return cv2.resize(levels, (width, height), interpolation=cv2.INTER_LINEAR)

    @classmethod
    def fit(cls, pairs: Iterable[tuple[Float[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]]) -> Softness:
        """Measures real predictions.

        Args:
            pairs: (probability (H, W) in [0, 1], mask (H, W) bool) of out-of-fold images. A pair whose prediction or
                mask is empty or full has no edge to measure and is passed over.

        Raises:
            UserError: fewer than ten pairs have an edge.
        """
        measured = [found for prob, mask in pairs if (found := measure_softness(prob, mask))]
        if len(measured) < 10:
            raise UserError(
                f"Softness cannot be fitted to {len(measured)} predictions with an edge: give at least 10 out-of-fold "
                "predictions, or use the default softness."
            )
        width, inside, outside, dice = np.array([one[:4] for one in measured], dtype=np.float64).T
        lost, log_width = 0.85 - dice, np.log(width)
        trend = float(np.polyfit(lost, log_width, 1)[0]) if np.ptp(lost) > 0.05 else 0.0
        rest = log_width - trend * lost
        levels = np.concatenate([np.log(side / np.median(side)) for side in (inside, outside)])
        return cls(
            width=math.exp(float(np.median(rest))),
            width_spread=_spread(rest),
            width_trend=trend,
            inside=float(np.median(inside)),
            outside=float(np.median(outside)),
            level_spread=_spread(levels),
            background=_some([one.background for one in measured if one.background]),
        )


class Measured(NamedTuple):
    """What one prediction shows of a network's softness."""

    width: float
    """Of the edge, px of a 224 image."""
    inside: float
    outside: float
    """Levels, logits above 0."""
    dice: float
    background: tuple[float, ...]
    """Logits at `QUANTILES`; empty where nothing is far from the lesion."""


def measure_softness(prob: Float[np.ndarray, "H W"], mask: Bool[np.ndarray, "H W"]) -> Measured | None:
    """What one prediction shows; None without an edge.

    The width follows from the logit's slope across the 0.5 level set (10 to 90 % is 2·ln 9 over the slope), the median
    over the edge; the levels are the medians of |logit| further than two widths from the edge, or the largest there is.
    The background is what lies so far from the edge and is neither lesion nor predicted.
    """
    prob = np.clip(np.asarray(prob, dtype=np.float32), 1e-7, 1 - 1e-7)
    predicted, mask = prob >= 0.5, np.asarray(mask, dtype=bool)
    if predicted.all() or not predicted.any() or mask.all() or not mask.any():
        return None
    logit = np.log(prob / (1 - prob))
    distance = signed_distance(predicted)
    dy, dx = np.gradient(logit)
    slope = float(np.median(np.hypot(dx, dy)[np.abs(distance) < 1]))
    if slope <= 0:
        return None
    width = SIGMOID_10_90 / slope
    levels = [_level(sign * logit, sign * distance > 2 * width) for sign in (1, -1)]
    far = logit[(distance < -2 * width) & ~mask]
    background = np.minimum(np.quantile(far, QUANTILES), -0.05).tolist() if far.size else ()
    width *= REFERENCE_SIDE / max(prob.shape)
    return Measured(width, levels[0], levels[1], dice_of(predicted, mask), tuple(background))


def soften(predicted: Mask, mask: Mask, width: float, inside: float, outside: float | Field, rng: Rng) -> Field:
    """Makes a prediction soft as a network's is, its 0.5 level set staying where it is.

    The logit is the signed distance over w, levelled off at `inside` and −`outside`. Networks are less sure where they
    are wrong: both levels fall around missed and false pixels, too gradually to give the true edge away. And there are
    dim spots in the lesion and faint ones outside.

    Args:
        predicted, mask: (H, W) bool, the prediction (not empty) and the truth.
        width: px, over which the edge rises from 0.1 to 0.9; w = width/(2·ln 9).
        inside, outside: logits, positive; outside one for each pixel where they were measured (faint spots and all).

    Returns:
        (H, W) float32 in (0, 1), at least 0.5 exactly where `predicted` is true.
    """
    w = width / SIGMOID_10_90
    levels = np.broadcast_to(np.float32(outside), predicted.shape)
    window = bounding_window(predicted | mask, math.ceil(float(np.max(outside)) * w) + 2)
    certainty = _certainty(predicted[window] ^ mask[window], math.sqrt(np.count_nonzero(mask) / math.pi), rng)
    logit = -levels
    distance = signed_distance(predicted[window])
    distance *= np.float32(1 / w)
    logit[window] = np.clip(distance, -levels[window] * certainty, inside * certainty)
    confidence = _confidence(rng, predicted.shape)
    if isinstance(outside, np.ndarray):
        confidence[logit < 0] = 1
    logit *= confidence
    return _sigmoid(logit)


def suspect(shape: tuple[int, int], outside: float | Field, rng: Rng) -> Field:
    """What a network gives where there is no lesion: (H, W) float32 below 0.5, half of the time with a faint spot."""
    logit = -np.broadcast_to(np.float32(outside), shape)
    if rng.random() < 0.5:
        y, x = np.ogrid[: shape[0], : shape[1]]
        cx, cy, size = rng.uniform(0, shape[1]), rng.uniform(0, shape[0]), max(shape) * rng.uniform(0.03, 0.1)
        logit += np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * size**2)) * (np.median(outside) - rng.uniform(0.3, 3.0))
    logit *= _confidence(rng, shape)
    return _sigmoid(logit)


def _certainty(wrong: Mask, radius: float, rng: Rng) -> Field:
    """A factor in (0, 1] for the levels, lower around wrong pixels, blurred over half the lesion's radius (px)."""
    height, width = wrong.shape
    coarse = max(1, round(radius / 6))
    spread = wrong[::coarse, ::coarse].astype(np.float32)
    spread *= rng.random(spread.shape, dtype=np.float32)
    cv2.GaussianBlur(spread, (0, 0), 0.5 * radius / coarse, dst=spread)
    spread *= np.float32(rng.uniform(0.6, 1.8))
    certainty = np.maximum(1 - spread, np.float32(0.1))
    return np.asarray(cv2.resize(certainty, (width, height), interpolation=cv2.INTER_LINEAR))


def _confidence(rng: Rng, shape: tuple[int, int]) -> Field:
    """A factor for the logit, about one, with a few blotches of down to a fifth, more of them in some images."""
    height, width = shape
    field = coarse_field(rng, (1 + width // 4, 1 + height // 4), max(shape) / 36)
    blotch = np.clip((field - np.float32(rng.uniform(0.9, 2.2))) * np.float32(0.5), 0, np.float32(0.8))
    factor = np.maximum(1 + np.float32(0.1) * field, np.float32(0.5)) * (1 - blotch)
    return np.asarray(cv2.resize(factor, (width, height), interpolation=cv2.INTER_LINEAR))


def _sigmoid(logit: Field) -> Field:
    np.negative(logit, out=logit)
    cv2.exp(logit, dst=logit)
    logit += 1
    return np.asarray(np.reciprocal(logit, out=logit))


def checked_softness(softness: Softness | Mapping[str, Any] | None) -> Softness:
    if softness is None or isinstance(softness, Softness):
        return softness or Softness()
    known = [field.name for field in fields(Softness)]
    for name in softness:
        if name not in known:
            raise UserError(f"softness has the key {name!r}: choose among {', '.join(known)}.")
    values: dict[str, Any] = {name: float(value) for name, value in softness.items() if name != "background"}
    rows = tuple(tuple(float(value) for value in row) for row in softness.get("background", ()))
    return Softness(**values, background=rows)


def dice_of(predicted: Mask, mask: Mask) -> float:
    """Dice in [0, 1] of two masks that are not both empty."""
    both = np.count_nonzero(predicted & mask)
    return float(2 * both / (np.count_nonzero(predicted) + np.count_nonzero(mask)))


def _level(logit: Field, far: Mask) -> float:
    return max(float(np.median(logit[far]) if far.any() else logit.max()), 0.01)


def _some(rows: list[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
    """At most `_IMAGES` rows that stand for all: evenly from those with the cleanest background to those with spots."""
    rows = sorted(rows, key=lambda row: float(np.mean(np.exp(row))))
    places = np.linspace(0, len(rows) - 1, min(len(rows), _IMAGES)).round().astype(int)
    return tuple(rows[place] for place in places)


def _spread(values: Float[np.ndarray, " n"]) -> float:
    """Standard deviation from the quartiles: one odd prediction does not widen it."""
    lower, upper = np.percentile(values, [25, 75])
    return float(upper - lower) / 1.349
