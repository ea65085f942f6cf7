"""What was found in one image."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from ultrarefiner.results.pictures import overlay, png


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What was found in one image, at the image's own size. In a notebook it shows itself as a picture.

    Attributes:
        mask: the lesion.
        coarse: what it was before it was redrawn.
        probability: of each pixel, in [0, 1]; `mask` is where it exceeds 0.5.
        box: where SAM looked, (x1, y1, x2, y2) in px; None where nothing was redrawn.
        accepted: whether `mask` is the redrawn mask (True) or the coarse one (False).
        uncertainty: in [0, 1]: 4·p·(1 − p), averaged over the pixels of both masks; 0 where both are empty.
        iou: the IoU with the truth that SAM predicts for its best mask; None where nothing was redrawn.
        reason: why the redrawn mask was not accepted; "" where it was.
        refined: the redrawn mask, accepted or not; None where nothing was redrawn.
        coarse_probability: of each pixel before it was redrawn, in [0, 1].
        image: what was segmented, grey or RGB.
    """

    mask: Bool[np.ndarray, "H W"]
    coarse: Bool[np.ndarray, "H W"]
    probability: Float32[np.ndarray, "H W"]
    box: tuple[float, float, float, float] | None
    accepted: bool
    uncertainty: float
    iou: float | None
    reason: str
    refined: Bool[np.ndarray, "H W"] | None
    coarse_probability: Float32[np.ndarray, "H W"]
    image: UInt8[np.ndarray, "H W *rgb"]

    def overlay(self) -> UInt8[np.ndarray, "H W 3"]:
        """The image with the outlines of the coarse mask (orange) and of the accepted redrawn one (blue)."""
        return overlay(self.image, self.coarse, self.mask if self.accepted else None)

    def _repr_png_(self) -> bytes:
        return png(self.overlay())

    def __repr__(self) -> str:
        height, width = self.mask.shape
        what = f"lesion of {int(self.mask.sum())} px" if self.mask.any() else "no lesion"
        how = "redrawn" if self.accepted else f"not redrawn: {self.reason}"
        return f"Segmentation({what} in {width} × {height}, {how})"
