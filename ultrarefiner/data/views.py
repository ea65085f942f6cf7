"""The same image shown in several ways, for the mean of what is found in each (test-time augmentation)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from ultrarefiner.errors import UserError


@dataclass(frozen=True)
class View:
    """One way to show an image.

    Attributes:
        mirror: left becomes right; never upside down, as sound comes from the top.
        zoom: below 1 adds a black frame around the image, above 1 leaves its border out.
    """

    mirror: bool = False
    zoom: float = 1.0

    def show(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """An image, or a map of its size, (H, W), in this way."""
        if self.mirror:
            pixels = pixels[:, ::-1]
        (top, left), (height, width) = self._margins(pixels.shape), pixels.shape
        if self.zoom < 1:
            pixels = np.pad(pixels, ((top, top), (left, left)))
        elif self.zoom > 1:
            pixels = pixels[top : height - top, left : width - left]
        return np.ascontiguousarray(pixels)

    def back(self, seen: Float32[np.ndarray, "h w"], shape: tuple[int, int]) -> Float32[np.ndarray, "H W"]:
        """A map of what was shown as one of the image, of (H, W) = ``shape``; NaN where nothing was shown."""
        (top, left), (height, width) = self._margins(shape), shape
        if self.zoom < 1:
            seen = seen[top : top + height, left : left + width]
        elif self.zoom > 1:
            seen = np.pad(seen, ((top, top), (left, left)), constant_values=np.nan)
        return np.ascontiguousarray(seen[:, ::-1] if self.mirror else seen)

    def _margins(self, shape: tuple[int, ...]) -> tuple[int, int]:
        share = abs(1 - 1 / self.zoom) / 2
        return round(shape[0] * share), round(shape[1] * share)


VIEWS = {"flips": (View(mirror=True),), "scales": (View(zoom=0.8), View(zoom=1.25))}
"""What is shown beside the image itself."""


def views(names: str | Sequence[str] | None) -> list[View]:
    """The image itself, and the views of one name or of several; none for None and "none".

    Raises:
        UserError: a name that there is not.
    """
    names = [names] if isinstance(names, str) else names or []
    names = [name for name in names if name != "none"]
    for name in names:
        if name not in VIEWS:
            raise UserError(f"tta={name} is not there; choose one or several of {', '.join(VIEWS)}, or none")
    return [View(), *(view for name in dict.fromkeys(names) for view in VIEWS[name])]


def mean(maps: Sequence[Float32[np.ndarray, "H W"]]) -> Float32[np.ndarray, "H W"]:
    """The mean of each pixel over the maps that know it."""
    return np.asarray(np.nanmean(np.stack(maps), axis=0), dtype=np.float32)
