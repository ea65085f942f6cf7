"""Random changes of a sample: one geometric and one photometric, the same at every resolution.

What is drawn is a *change*, described in normalised coordinates (0 and 1 are the frame's edges) and in display grey
values. It is then applied to the sample's images at 224 and 512 px alike.
"""

from dataclasses import dataclass, fields
from functools import cache

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Real, UInt8

_CONTROL = 6  # control points of the elastic deformation along each side
_TILE = 768  # px: side of the noise from which every sample's speckle is cut
_TRIES = 4


@dataclass(frozen=True)
class Change:
    """One drawn change.

    Attributes:
        matrix: 2×3, from output to input coordinates, both normalised.
        bend: displacement (x, y) at the control points, normalised; None for none.
        tone: grey value → grey value.
        speckle: (strength, row, column): multiplicative noise and where it is cut from the tile; strength 0 for none.
        attenuation: relative loss of grey value from the top to the bottom of the frame; negative for a gain.
    """

    matrix: Float32[np.ndarray, "2 3"]
    bend: Float32[np.ndarray, "K K 2"] | None
    tone: UInt8[np.ndarray, " 256"]
    speckle: tuple[float, float, float]
    attenuation: float

    def __call__(
        self, image: UInt8[np.ndarray, "S S"], mask: Bool[np.ndarray, "S S"]
    ) -> tuple[UInt8[np.ndarray, "S S"], Bool[np.ndarray, "S S"]]:
        """The changed image and mask at any size S."""
        image, coverage = self.warp(image, mask.view(np.uint8) * np.uint8(255))
        return self._shade(image), coverage >= 128

    def warp(self, *planes: Real[np.ndarray, "S S"]) -> list[Real[np.ndarray, "S S"]]:
        """The geometric part, of planes (uint8 or float32) of one size; linear interpolation, 0 outside the frame."""
        size = planes[0].shape[0]
        # pixel j is at (j + 0.5)/size: in pixels the linear part stays and the shift takes up the half pixels
        linear = self.matrix[:, :2]
        shift = size * (linear @ np.full(2, 0.5 / size) + self.matrix[:, 2]) - 0.5
        pixels = np.column_stack([linear, shift]).astype(np.float32)
        # one plane at a time: OpenCV has fast paths for one and four channels, two take six times as long
        if self.bend is None:
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            return [cv2.warpAffine(plane, pixels, (size, size), flags=flags) for plane in planes]
        places = cv2.transform(_grid(size), pixels)
        places += cv2.resize(self.bend * np.float32(size), (size, size), interpolation=cv2.INTER_CUBIC)
        # no second map, x and y stand in the first: allowed, but not in OpenCV's stubs
        return [cv2.remap(plane, places, None, cv2.INTER_LINEAR) for plane in planes]  # type: ignore[call-overload]

    def _shade(self, image: UInt8[np.ndarray, "S S"]) -> UInt8[np.ndarray, "S S"]:
        image = cv2.LUT(image, self.tone)
        size = image.shape[0]
        strength, row, column = self.speckle
        if not strength and not self.attenuation:
            return image
        depth = (np.arange(size, dtype=np.float32) + 0.5) / size
        gain = np.repeat((1 - self.attenuation * depth)[:, None], size, axis=1)
        if strength:
            gain *= 1 + np.float32(strength) * _speckle(size, row, column)
        return cv2.multiply(image, gain, dtype=cv2.CV_8U)


@dataclass(frozen=True)
class Augment:
    """Draws a `Change`. Each range is symmetric unless said; each part happens with its probability.

    Attributes:
        flip: probability of a left-right mirror (never upside down: sound comes from the top).
        rotate_deg: largest rotation.
        scale: largest relative change of size.
        shift: largest shift, as a share of the frame.
        elastic: largest displacement of a control point, as a share of the frame.
        elastic_probability: how often.
        brightness: largest change, as a share of the grey range.
        contrast: largest relative change around middle grey.
        speckle: largest strength of multiplicative noise.
        speckle_probability: how often.
        attenuation: largest relative change of grey value over the depth of the frame.
        attenuation_probability: how often.
    """

    flip: float = 0.5
    rotate_deg: float = 15.0
    scale: float = 0.2
    shift: float = 0.05
    elastic: float = 0.02
    elastic_probability: float = 0.3
    brightness: float = 0.1
    contrast: float = 0.2
    speckle: float = 0.15
    speckle_probability: float = 0.3
    attenuation: float = 0.2
    attenuation_probability: float = 0.5

    def __post_init__(self) -> None:
        for one in fields(Augment):
            most, value = 180 if one.name == "rotate_deg" else 1, getattr(self, one.name)
            if not 0 <= value <= most:
                raise ValueError(f"{one.name} must be between 0 and {most}, got {value}")

    def draw(self, rng: np.random.Generator, mask: Bool[np.ndarray, "S S"]) -> Change:
        """A change for a sample with this mask; one that keeps at least half of the lesion in the frame."""
        tone, speckle = self._tone(rng), self._speckle(rng)
        attenuation = float(rng.uniform(-self.attenuation, self.attenuation))
        attenuation *= rng.random() < self.attenuation_probability
        identity = np.eye(2, 3, dtype=np.float32)
        for _ in range(_TRIES):
            matrix, bend, area = self._geometry(rng)
            change = Change(matrix, bend, tone, speckle, attenuation)
            if _keeps(change, mask, area):
                return change
        return Change(identity, None, tone, speckle, attenuation)

    def _geometry(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None, float]:
        """Matrix, bend, and the factor by which areas grow."""
        angle = np.deg2rad(rng.uniform(-self.rotate_deg, self.rotate_deg))
        size = np.exp(rng.uniform(-1, 1) * np.log1p(self.scale))
        mirror = -1.0 if rng.random() < self.flip else 1.0
        cosine, sine = np.cos(angle) / size, np.sin(angle) / size
        linear = np.array([[cosine * mirror, -sine], [sine * mirror, cosine]])
        middle = 0.5 + rng.uniform(-self.shift, self.shift, 2)
        matrix = np.column_stack([linear, middle - linear @ [0.5, 0.5]]).astype(np.float32)
        bend = None
        if rng.random() < self.elastic_probability:
            bend = rng.uniform(-self.elastic, self.elastic, (_CONTROL, _CONTROL, 2)).astype(np.float32)
        return matrix, bend, float(size**2)

    def _tone(self, rng: np.random.Generator) -> np.ndarray:
        contrast = 1 + rng.uniform(-self.contrast, self.contrast)
        brightness = 255 * rng.uniform(-self.brightness, self.brightness)
        grey = (np.arange(256) - 127.5) * contrast + 127.5 + brightness
        grey[0] = 0  # outside the sector is black and stays so
        return np.clip(np.round(grey), 0, 255).astype(np.uint8)

    def _speckle(self, rng: np.random.Generator) -> tuple[float, float, float]:
        strength, row, column = rng.uniform(0, self.speckle), rng.random(), rng.random()
        return (float(strength) if rng.random() < self.speckle_probability else 0.0, float(row), float(column))


def _keeps(change: Change, mask: np.ndarray, area: float) -> bool:
    """Whether at least half of the lesion is still in the frame; by every fourth pixel where that is enough."""
    thinned = mask[::4, ::4]
    mask = np.ascontiguousarray(thinned) if thinned.sum() >= 20 else mask
    before = int(mask.sum())
    if before == 0:
        return True
    after = int((change.warp(mask.view(np.uint8) * np.uint8(255))[0] >= 128).sum())
    return after >= max(1, 0.5 * area * before)


def _speckle(size: int, row: float, column: float) -> Float32[np.ndarray, "S S"]:
    """Noise of unit variance with grains of about 1/200 of the frame, cut from the tile at (row, column)."""
    cut = 512  # the same stretch of noise, resampled, at every size
    top, left = int(row * (_TILE - cut)), int(column * (_TILE - cut))
    noise = _tile()[top : top + cut, left : left + cut]
    return noise if size == cut else cv2.resize(noise, (size, size), interpolation=cv2.INTER_AREA)


@cache
def _grid(size: int) -> Float32[np.ndarray, "S S 2"]:
    """(x, y) of every pixel."""
    along = np.arange(size, dtype=np.float32)
    return np.stack(np.meshgrid(along, along), axis=-1)


@cache
def _tile() -> Float32[np.ndarray, "768 768"]:
    """Made once a process, from a fixed seed: drawing 262 144 normal numbers for each sample would take 2 ms."""
    noise = np.random.default_rng(0).standard_normal((_TILE, _TILE), dtype=np.float32)
    grains = np.asarray(cv2.GaussianBlur(noise, (0, 0), 1.2), dtype=np.float32)
    return np.asarray(grains / grains.std())
