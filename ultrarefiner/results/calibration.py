"""Calibration: whether of the pixels that are called lesion with probability 0.8, 80 % are."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Calibration(NamedTuple):
    """The calibration of probability maps, over all their pixels.

    Attributes:
        pixels: how many.
        ece: expected calibration error, Σ (share of pixels) × |frequency − confidence| over the bins, in [0, 1].
        brier: mean of (probability − truth)², in [0, 1].
        confidence: mean probability in each bin; NaN in a bin without pixels.
        frequency: share of lesion among the pixels of each bin; NaN in a bin without pixels.
        counts: pixels in each bin.
    """

    pixels: int
    ece: float
    brier: float
    confidence: list[float]
    frequency: list[float]
    counts: list[int]


class Reliability:
    """Adds up the calibration case by case, in memory that does not grow.

    Of the probability of lesion in bins of equal width (Naeini et al., AAAI 2015; Guo et al., ICML 2017, have 15).
    """

    def __init__(self, bins: int = 15) -> None:
        self._counts = np.zeros(bins, np.int64)
        self._probability, self._lesion = np.zeros(bins), np.zeros(bins)
        self._squares = 0.0

    def add(self, prob: Float[np.ndarray, "H W"], truth: Bool[np.ndarray, "h w"]) -> None:
        """Count the pixels of one case.

        Raises:
            ValueError: a probability is not in [0, 1], or the shapes differ.
        """
        if prob.shape != truth.shape:
            raise ValueError(f"the probability map is {prob.shape}, the truth {truth.shape}")
        if not ((prob >= 0) & (prob <= 1)).all():
            raise ValueError("a probability map must be in [0, 1] everywhere")
        p, y, bins = prob.astype(np.float64).ravel(), truth.ravel(), len(self._counts)
        place = np.minimum((p * bins).astype(np.int64), bins - 1)
        self._counts += np.bincount(place, minlength=bins)
        self._probability += np.bincount(place, p, bins)
        self._lesion += np.bincount(place, y, bins)
        self._squares += float(((p - y) ** 2).sum())

    def sums(self) -> dict[str, Any]:
        """What was counted so far, as plain numbers for a file."""
        arrays = {"counts": self._counts, "probability": self._probability, "lesion": self._lesion}
        return {name: array.tolist() for name, array in arrays.items()} | {"squares": self._squares}

    def add_sums(self, sums: Mapping[str, Any]) -> None:
        """Count what another one has counted, in as many bins; see `sums`."""
        self._counts += np.asarray(sums["counts"], np.int64)
        self._probability += np.asarray(sums["probability"])
        self._lesion += np.asarray(sums["lesion"])
        self._squares += float(sums["squares"])

    def result(self) -> Calibration:
        """Of all cases so far; NaN where there is none."""
        pixels = int(self._counts.sum())
        with np.errstate(invalid="ignore"):
            confidence, frequency = self._probability / self._counts, self._lesion / self._counts
        ece = np.abs(self._lesion - self._probability).sum() / pixels if pixels else math.nan
        brier = self._squares / pixels if pixels else math.nan
        return Calibration(
            pixels, float(ece), brier, confidence.tolist(), frequency.tolist(), [int(n) for n in self._counts]
        )
