"""Where to look: the region of interest, its crop, and the way back into the frame."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.refine.moments import mask_moments, pixel_centres, precise, spread_box

# The logit outside the pasted box: background, not "undecided" (p = 4.5e-5).
BACKGROUND_LOGIT = -10.0


class LesionRoi(nn.Module):
    """The box around the lesion: centre ± k·σ, grown on every side (seed: "ROI Cropping Mode").

    Args:
        expand_ratio: growth on every side, as a fraction of the box's own width and height.
        k: half the box's width before it grows, in standard deviations.
        min_size: smallest width and height, as a fraction of the frame.
    """

    def __init__(self, expand_ratio: float = 0.2, k: float = 2.5, min_size: float = 0.1) -> None:
        super().__init__()
        if expand_ratio < 0 or k <= 0 or not 0 < min_size <= 1:
            raise ValueError(
                f"a region of interest needs expand_ratio ≥ 0, k > 0 and 0 < min_size ≤ 1, "
                f"got {expand_ratio}, {k}, {min_size}"
            )
        self.expand_ratio, self.k, self.min_size = expand_ratio, k, min_size

    def boxes(self, prob: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 4"]:
        """Boxes (x1, y1, x2, y2) in [0, 1]; the full frame where the map is empty."""
        moments = mask_moments(prob)
        grown = self.k * (1 + 2 * self.expand_ratio)
        smallest = self.min_size / 2 / moments.spread.detach()
        return spread_box(moments, smallest.clamp(min=grown)).clamp(0, 1)


class FullFrame(nn.Module):
    """The box of the whole image: `roi=off` is a box like any other."""

    def boxes(self, prob: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 4"]:
        """(0, 0, 1, 1) for every map."""
        return precise(prob).new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(prob), 4)


def covering(
    boxes: Float[Tensor, "P 4"], images: int, margins: Float[Tensor, "B 4"] | None = None
) -> Float[Tensor, "B 4"]:
    """One box for each of B = `images` images that holds its n = P / B neighbouring boxes; for n = 1 these themselves.

    Args:
        boxes: (x1, y1, x2, y2) in [0, 1].
        margins: how far each side then moves outwards, as a fraction of the box's own width or height; ≥ 0.
    """
    grouped = boxes.unflatten(0, (images, -1))
    box = torch.cat([grouped[..., :2].amin(1), grouped[..., 2:].amax(1)], dim=1)
    if margins is None:
        return box
    size = box[:, 2:] - box[:, :2]
    return torch.cat([box[:, :2] - margins[:, :2] * size, box[:, 2:] + margins[:, 2:] * size], dim=1).clamp(0, 1)


def _sides(boxes: Float[Tensor, "B 4"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = precise(boxes).unbind(1)
    return x1[:, None], y1[:, None], x2[:, None], y2[:, None]


def _sample(x: Tensor, u: Float[Tensor, "B W"], v: Float[Tensor, "B H"]) -> Tensor:
    """Bilinear values of x (B,C,H,W) at the normalised columns u and rows v; its border is repeated outside."""
    batch, width, height = len(u), u.shape[1], v.shape[1]
    grid = torch.stack([u[:, None, :].expand(batch, height, width), v[:, :, None].expand(batch, height, width)], dim=-1)
    # Outside autocast: coordinates in half precision are off by pixels.
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(grid.dtype)
        return F.grid_sample(x, 2 * grid - 1, mode="bilinear", padding_mode="border", align_corners=False)


def crop(x: Float[Tensor, "B C H W"], boxes: Float[Tensor, "B 4"], size: int) -> Float[Tensor, "B C size size"]:
    """The part of x inside each box, resampled to size × size; differentiable in x and in the boxes."""
    x1, y1, x2, y2 = _sides(boxes)
    u = pixel_centres(size, x1)
    return _sample(x, x1 + u * (x2 - x1), y1 + u * (y2 - y1))


def paste(
    logits: Float[Tensor, "B C h w"],
    boxes: Float[Tensor, "B 4"],
    size: int,
    outside: float = BACKGROUND_LOGIT,
) -> Float[Tensor, "B C size size"]:
    """The inverse of `crop`: the logits of each box back in a frame of size × size pixels.

    Outside the box the frame holds the logit `outside`. At the box's edge both are mixed by the share of the pixel that
    the box covers, so the result is continuous and differentiable in the boxes.
    """
    x1, y1, x2, y2 = _sides(boxes)
    centres = pixel_centres(size, x1)  # of columns and rows alike
    # A box without extent (a caller's, ours have a minimum size) must not divide by zero.
    least = torch.finfo(x1.dtype).eps
    u = (centres - x1) / (x2 - x1).clamp(min=least)
    v = (centres - y1) / (y2 - y1).clamp(min=least)
    inside = _sample(logits, u, v)
    across = ((centres - x1) * size + 0.5).clamp(0, 1) * ((x2 - centres) * size + 0.5).clamp(0, 1)
    down = ((centres - y1) * size + 0.5).clamp(0, 1) * ((y2 - centres) * size + 0.5).clamp(0, 1)
    covered = (down[:, :, None] * across[:, None, :])[:, None]
    return outside + covered * (inside - outside)
