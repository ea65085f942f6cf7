"""When a redrawn mask is not to be trusted: rules, each of which keeps the coarse mask and says why.

Imports no torch where it is read: `--help` of the commands needs the settings.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool

from ultrarefiner.errors import UserError
from ultrarefiner.settings import setting

Mask = Bool[np.ndarray, "H W"]
NO_LESION = "the coarse mask is empty"


@dataclass
class Safety:
    """Which redrawn masks are rejected; None switches a rule off.

    The defaults catch what is no refinement of the coarse mask any more, and leave alone what may be one.
    """

    keep_empty: bool = True
    """An image in whose coarse mask there is no lesion gets none."""
    min_iou: float | None = setting(None, at_least=0, at_most=1)
    """The IoU with the truth that SAM predicts for its best mask must be this or more."""
    min_dice: float | None = setting(0.5, at_least=0, at_most=1)
    """The Dice with the coarse mask must be this or more."""
    min_area: float | None = setting(0.4, at_least=0)
    """The area, as a multiple of the coarse mask's, must be this or more …"""
    max_area: float | None = setting(2.5, above=0)
    """… and this or less."""
    new_lesions: int | None = setting(None, at_least=0)
    """The mask may have so many parts more than the coarse one."""
    band: float | None = setting(None, above=0)
    """No pixel may change that is farther from the coarse outline than this multiple of the coarse mask's diameter (of
    the circle with its area)."""

    def __post_init__(self) -> None:
        """No mask could be accepted where the smallest area is above the largest."""
        if self.min_area is not None and self.max_area is not None and self.min_area > self.max_area:
            raise UserError(f"safety.min_area={self.min_area:g} is above safety.max_area={self.max_area:g}")

    @classmethod
    def none(cls) -> "Safety":
        """No rule: what SAM draws is taken, as the training measures it."""
        rules: dict[str, Any] = dict.fromkeys(one.name for one in fields(cls))
        return cls(**rules | {"keep_empty": False})

    def reasons(self, coarse: Mask, refined: Mask, iou: float | None) -> list[str]:
        """Why a redrawn mask is rejected, a phrase for each rule that it breaks; empty where it is accepted.

        Args:
            coarse, refined: of one image.
            iou: that SAM predicts.
        """
        if not coarse.any():
            return [NO_LESION] if self.keep_empty else []
        found = []
        if self.min_iou is not None and iou is not None and not iou >= self.min_iou:
            found.append(f"predicted IoU {iou:.2f} is below {self.min_iou:g}")
        if self.min_dice is not None and (dice := _dice(coarse, refined)) < self.min_dice:
            found.append(f"Dice with the coarse mask {dice:.2f} is below {self.min_dice:g}")
        area = float(refined.sum() / coarse.sum())
        if self.min_area is not None and area < self.min_area:
            found.append(f"area {area:.2f} of the coarse mask's is below {self.min_area:g}")
        if self.max_area is not None and area > self.max_area:
            found.append(f"area {area:.2f} of the coarse mask's is above {self.max_area:g}")
        if self.new_lesions is not None and (more := _parts(refined) - _parts(coarse)) > self.new_lesions:
            found.append(f"{more} parts more than the coarse mask are above {self.new_lesions}")
        if self.band is not None and (far := _farthest_change(coarse, refined)) > self.band:
            found.append(f"a change at {far:.2f} diameters from the coarse outline is above {self.band:g}")
        return found


def _dice(coarse: Mask, refined: Mask) -> float:
    from ultrarefiner.results.metrics import overlap

    return overlap(refined, coarse)["dice"]


def _parts(mask: Mask) -> int:
    from ultrarefiner.results.measures import numbered

    return numbered(mask)[1]


def _farthest_change(coarse: Mask, refined: Mask) -> float:
    """In diameters of the coarse mask: how far the farthest pixel that changed is from the coarse outline."""
    from scipy.ndimage import distance_transform_edt

    changed = coarse ^ refined
    if not changed.any():
        return 0.0
    padded = np.pad(coarse, 1)  # the outline also runs along the border of the image
    depth = (distance_transform_edt(padded) + distance_transform_edt(~padded))[1:-1, 1:-1]
    return float(depth[changed].max() / (2 * math.sqrt(coarse.sum() / math.pi)))
