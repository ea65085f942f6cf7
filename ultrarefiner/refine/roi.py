"""Where to look: the region of interest, its crop, and the way back into the frame."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.refine.moments import full_precision, mask_moments, pixel_centres, precise, sharpen, spread_box

# The logit outside the pasted box: background, not "undecided" (p = 4.5e-5).
BACKGROUND_LOGIT = -10.0


class LesionRoi(nn.Module):
    """The box around the lesion: centre ± k·σ, grown on every side (seed: "ROI Cropping Mode").

    Args:
        expand_ratio: growth on every side, as a fraction of the box's own width and height.
        k: half the box's width before it grows, in standard deviations.
        min_size: smallest width and height, as a fraction of the frame.
        square: True makes the box a square in native pixels (`squared`), so that SAM sees the lesion's own shape;
            False clamps it to the frame and stretches what it shows (the seed's way).
        temperature: sharpening of the map before its moments are taken, in (0, 1]; 1 leaves it as it is.
    """

    def __init__(
        self,
        expand_ratio: float = 0.2,
        k: float = 2.5,
        min_size: float = 0.1,
        square: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if expand_ratio < 0 or k <= 0 or not 0 < min_size <= 1 or not 0 < temperature <= 1:
            raise ValueError(
                f"a region of interest needs expand_ratio ≥ 0, k > 0, 0 < min_size ≤ 1 and 0 < temperature ≤ 1, "
                f"got {expand_ratio}, {k}, {min_size}, {temperature}"
            )
        self.expand_ratio, self.k, self.min_size = expand_ratio, k, min_size
        self.square, self.temperature = square, temperature

    @property
    def keeps_aspect(self) -> bool:
        """Whether boxes are native squares, which may be larger than the image."""
        return self.square

    def boxes(self, prob: Float[Tensor, "B 1 H W"], aspect: Float[Tensor, " B"] | None = None) -> Float[Tensor, "B 4"]:
        """Boxes (x1, y1, x2, y2), x and y in [0, 1] over the image; the full frame where the map is empty.

        Args:
            prob: probabilities in [0, 1].
            aspect: native width / height of each image, for `square`; None: square images.
        """
        moments = mask_moments(sharpen(precise(prob), self.temperature))
        grown = self.k * (1 + 2 * self.expand_ratio)
        smallest = self.min_size / 2 / moments.spread.detach()
        box = spread_box(moments, smallest.clamp(min=grown))
        return squared(box, aspect) if self.square else box.clamp(0, 1)


class FullFrame(nn.Module):
    """The box of the whole image: `roi=off` is a box like any other.

    Args:
        pad: True takes the smallest native square that holds the image (`squared`); False stretches the image.
    """

    def __init__(self, pad: bool = False) -> None:
        super().__init__()
        self.pad = pad

    @classmethod
    def of(cls, frame: str) -> "FullFrame":
        """The full frame by the name of the configuration: "pad" or "stretch"."""
        if frame not in ("pad", "stretch"):
            raise ValueError(f"model.frame must be pad or stretch, got {frame!r}")
        return cls(pad=frame == "pad")

    @property
    def keeps_aspect(self) -> bool:
        """Whether boxes are native squares, which may be larger than the image."""
        return self.pad

    def boxes(self, prob: Float[Tensor, "B 1 H W"], aspect: Float[Tensor, " B"] | None = None) -> Float[Tensor, "B 4"]:
        """(0, 0, 1, 1) for every map; with `pad` x2 or y2 is larger where the image's width and height differ."""
        box = precise(prob).new_tensor([0.0, 0.0, 1.0, 1.0]).expand(prob.shape[0], 4)
        return squared(box, aspect) if self.pad else box


def squared(boxes: Float[Tensor, "B 4"], aspect: Float[Tensor, " B"] | None = None) -> Float[Tensor, "B 4"]:
    """The smallest square in native pixels around each box, but none larger than what holds the whole image.

    It grows about the box's centre and then moves into the image as far as it fits. Where it is larger than the image,
    it begins at the image's left or top edge, so that the padding lies right or below, as in SAM's and LiteMedSAM's own
    preprocessing (segment_anything `Sam.preprocess`, LiteMedSAM's `pad_image`).

    Args:
        boxes: (x1, y1, x2, y2) in [0, 1] over the image, or beyond it.
        aspect: native width / height of each image; None: square images.
    """
    ones = boxes.new_ones(boxes.shape[0])
    native = torch.stack([ones if aspect is None else aspect.to(ones), ones], dim=1)  # in heights of the image
    low, high = boxes[:, :2], boxes[:, 2:]
    side = ((high - low) * native).amax(1, keepdim=True).minimum(native.amax(1, keepdim=True))
    size = side / native
    low = ((low + high - size) / 2).clamp(min=0).minimum((1 - size).clamp(min=0))
    return torch.cat([low, low + size], dim=1)


def covering(
    boxes: Float[Tensor, "P 4"],
    images: int | torch.SymInt,
    margins: Float[Tensor, "B 4"] | None = None,
    aspect: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "B 4"]:
    """One box for each of B = `images` images that holds its n = P / B neighbouring boxes; for n = 1 these themselves.

    Args:
        boxes: (x1, y1, x2, y2) as a ROI gives them.
        margins: how far each side then moves outwards, as a fraction of the box's own width or height; ≥ 0.
        aspect: native width / height of each image where boxes are native squares, as the result then is; None clamps
            it to the frame.
    """
    if margins is None and boxes.shape[0] == images:
        return boxes
    grouped = boxes.unflatten(0, (images, -1))
    low, high = grouped[..., :2].amin(1), grouped[..., 2:].amax(1)
    if margins is not None:
        size = high - low
        low, high = low - margins[:, :2] * size, high + margins[:, 2:] * size
    box = torch.cat([low, high], dim=1)
    return box.clamp(0, 1) if aspect is None else squared(box, aspect)


def _sides(boxes: Float[Tensor, "B 4"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = precise(boxes).unbind(1)
    return x1[:, None], y1[:, None], x2[:, None], y2[:, None]


def _sample(x: Tensor, u: Float[Tensor, "B W"], v: Float[Tensor, "B H"]) -> Tensor:
    """Bilinear values of x (B,C,H,W) at the normalised columns u and rows v; its border is repeated outside."""
    batch, width, height = u.shape[0], u.shape[1], v.shape[1]
    grid = torch.stack([u[:, None, :].expand(batch, height, width), v[:, :, None].expand(batch, height, width)], dim=-1)
    # Outside autocast: coordinates in half precision are off by pixels.
    with full_precision(x):
        x = x.to(grid.dtype)
        return F.grid_sample(x, 2 * grid - 1, mode="bilinear", padding_mode="border", align_corners=False)


def crop(x: Float[Tensor, "B C H W"], boxes: Float[Tensor, "B 4"], size: int) -> Float[Tensor, "B C size size"]:
    """The part of x inside each box, resampled to size × size; differentiable in x and in the boxes.

    Where a box leaves the image, the image's border is repeated; `coverage` of `image_within` tells which pixels are
    image.
    """
    x1, y1, x2, y2 = _sides(boxes)
    u = pixel_centres(size, x1)
    return _sample(x, x1 + u * (x2 - x1), y1 + u * (y2 - y1))


def paste(
    logits: Float[Tensor, "B C h w"], boxes: Float[Tensor, "B 4"], size: int, outside: float = BACKGROUND_LOGIT
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
    return outside + coverage(boxes, size) * (_sample(logits, u, v) - outside)


def coverage(boxes: Float[Tensor, "B 4"], size: int) -> Float[Tensor, "B 1 size size"]:
    """The share of each pixel of a size × size frame that a box covers, in [0, 1]; differentiable in the boxes."""
    x1, y1, x2, y2 = _sides(boxes)
    centres = pixel_centres(size, x1)
    across = ((centres - x1) * size + 0.5).clamp(0, 1) * ((x2 - centres) * size + 0.5).clamp(0, 1)
    down = ((centres - y1) * size + 0.5).clamp(0, 1) * ((y2 - centres) * size + 0.5).clamp(0, 1)
    return (down[:, :, None] * across[:, None, :])[:, None]


def image_within(boxes: Float[Tensor, "B 4"]) -> Float[Tensor, "B 4"]:
    """Where the image lies in the crop of each box, in coordinates of the crop; beyond [0, 1] where the crop ends."""
    boxes = precise(boxes)
    size = boxes[:, 2:] - boxes[:, :2]
    return torch.cat([-boxes[:, :2] / size, (1 - boxes[:, :2]) / size], dim=1)
