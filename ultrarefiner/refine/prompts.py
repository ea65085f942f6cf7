"""Prompts for a Segment Anything model, computed from a probability map by differentiable formulas."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ultrarefiner.refine.moments import (
    EMPTY_MASS,
    full_precision,
    mask_moments,
    pixel_centres,
    precise,
    sharpen,
    spread_box,
)

# Width of the soft box's edge as a fraction of the frame: two pixels of a 224-pixel map.
BOX_EDGE = 0.01
# Probability 0 and 1 become these logits (seed: "Mask Prompts", (2P − 1)·10).
LOGIT_RANGE = 10.0


class PromptSet(NamedTuple):
    """What the prompt encoder gets, in normalised coordinates; None where a prompt is switched off."""

    points: Float[Tensor, "B N 2"] | None
    labels: Int[Tensor, "B N"] | None
    boxes: Float[Tensor, "B 4"] | None
    masks: Float[Tensor, "B 1 M M"] | None


def foreground_point(prob: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 1 2"]:
    """The positive point: the probability-weighted centre (seed: "Point Prompts (Soft-Argmax)"), (x, y) in [0, 1]."""
    return mask_moments(prob).centre[:, None]


def soft_box(prob: Float[Tensor, "B 1 H W"], k: float = 2.5) -> Float[Tensor, "B 4"]:
    """The box centre ± k·σ, clamped to the frame (seed: "Box Prompts (Weighted Statistics)").

    For a filled ellipse k = 2 is its tight box.
    """
    return spread_box(mask_moments(prob), k).clamp(0, 1)


def background_point(prob: Float[Tensor, "B 1 H W"], box: Float[Tensor, "B 4"]) -> Float[Tensor, "B 1 2"]:
    """The negative point: the centroid of (1 − P)·B, B a soft indicator of the box (seed: "Negative Point").

    Where nothing of the box is background, the point is the centre of the box.
    """
    prob, box = precise(prob), precise(box)
    x, y = pixel_centres(prob.shape[3], prob), pixel_centres(prob.shape[2], prob)
    x1, y1, x2, y2 = (side[:, None] for side in box.unbind(1))
    inside_x = torch.sigmoid((x - x1) / BOX_EDGE) * torch.sigmoid((x2 - x) / BOX_EDGE)
    inside_y = torch.sigmoid((y - y1) / BOX_EDGE) * torch.sigmoid((y2 - y) / BOX_EDGE)
    weight = (1 - prob[:, 0]) * inside_y[:, :, None] * inside_x[:, None, :]
    columns, rows = weight.sum(1), weight.sum(2)
    mass = columns.sum(1)
    missing = (EMPTY_MASS - mass).clamp(min=0)
    middle = (box[:, :2] + box[:, 2:]) / 2
    centroid = torch.stack([(columns * x).sum(1), (rows * y).sum(1)], 1)
    return ((centroid + missing[:, None] * middle) / (mass + missing)[:, None])[:, None]


def gaussian_blur(prob: Float[Tensor, "B 1 H W"], sigma: float) -> Float[Tensor, "B 1 H W"]:
    """Blur with a Gaussian of standard deviation `sigma`, a fraction of the frame's side; the border is replicated."""
    for axis, size in ((2, prob.shape[2]), (3, prob.shape[3])):
        radius = min(max(1, round(3 * sigma * size)), size - 1)
        if radius == 0:  # one row or column: nothing to blur along this axis
            continue
        offsets = torch.arange(-radius, radius + 1, device=prob.device, dtype=prob.dtype)
        kernel = torch.exp(-0.5 * (offsets / (sigma * size)) ** 2)
        kernel = (kernel / kernel.sum()).reshape([1, 1, -1, 1] if axis == 2 else [1, 1, 1, -1])
        padding = [0, 0, radius, radius] if axis == 2 else [radius, radius, 0, 0]
        with full_precision(prob):
            prob = F.conv2d(F.pad(prob, padding, mode="replicate"), kernel)
    return prob


def _as_mask_input(values: Float[Tensor, "B 1 H W"], size: int) -> Float[Tensor, "B 1 size size"]:
    if values.shape[2:] == (size, size):
        return values
    return F.interpolate(values, size=(size, size), mode="bilinear", align_corners=False)


class DirectMaskPrompt(nn.Module):
    """The map as it is: (2P − 1)·10, resized to SAM's mask input. For a SAM that Phase 2 has taught soft masks."""

    def forward(self, prob: Float[Tensor, "B 1 H W"], size: int) -> Float[Tensor, "B 1 size size"]:
        """Probabilities in [0, 1] to logits in [−10, 10]."""
        return _as_mask_input((2 * precise(prob) - 1) * LOGIT_RANGE, size)


class GaussianMaskPrompt(nn.Module):
    """The map blurred first, for a SAM that was not fine-tuned.

    Args:
        sigma: standard deviation of the blur, a fraction of the frame's (or the crop's) side.
    """

    def __init__(self, sigma: float = 0.01) -> None:
        super().__init__()
        if not 0 < sigma <= 1:
            raise ValueError(f"sigma must lie in (0, 1], got {sigma}")
        self.sigma = sigma

    def forward(self, prob: Float[Tensor, "B 1 H W"], size: int) -> Float[Tensor, "B 1 size size"]:
        """Probabilities in [0, 1] to logits in [−10, 10]."""
        return _as_mask_input((2 * gaussian_blur(precise(prob), self.sigma) - 1) * LOGIT_RANGE, size)


class DistanceMaskPrompt(GaussianMaskPrompt):
    """The map weighed by the distance to its boundary: certain far from it, undecided next to it.

    A straight edge blurred with σ becomes P̄ = Φ(d/σ), d the signed distance to it; so w = (2P̄ − 1)² = erf²(d/(σ√2))
    is a smooth function of the distance, 0 on the boundary and 1 beyond about 2.5σ, and differentiable everywhere.

    Args:
        sigma: the reach of the weight, a fraction of the frame's (or the crop's) side.
    """

    def __init__(self, sigma: float = 0.02) -> None:
        super().__init__(sigma)

    def forward(self, prob: Float[Tensor, "B 1 H W"], size: int) -> Float[Tensor, "B 1 size size"]:
        """Probabilities in [0, 1] to logits in [−10, 10]."""
        prob = precise(prob)
        weight = (2 * gaussian_blur(prob, self.sigma) - 1) ** 2
        return _as_mask_input((2 * prob - 1) * weight * LOGIT_RANGE, size)


def _moved_inside(points: Float[Tensor, "B N 2"], box: Float[Tensor, "B 4"]) -> Float[Tensor, "B N 2"]:
    return points.clamp(box[:, None, :2], box[:, None, 2:])


class Prompts(nn.Module):
    """All prompts of one map, each of which can be switched off.

    Args:
        mask: the mask prompt, a module (prob, size) -> logits; None gives no mask prompt.
        use_mask: False leaves the mask prompt out.
        point: the positive point at the centre.
        negative_point: the negative point at the background's centroid in the box; needs `point`.
        box: the box centre ± box_k·σ.
        box_k: half the box's width in standard deviations.
        temperature: sharpening of the map before points and box are computed, in (0, 1]; 1 leaves it as it is.
    """

    def __init__(
        self,
        mask: nn.Module | None = None,
        use_mask: bool = True,
        point: bool = True,
        negative_point: bool = True,
        box: bool = True,
        box_k: float = 2.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        mask = mask if use_mask else None
        if not (mask is not None or point or box):
            raise ValueError("at least one of mask, point and box must be on: a SAM without a prompt segments anything")
        if negative_point and not point:
            raise ValueError("a negative point without the positive one says only where the lesion is not")
        if not 0 < temperature <= 1:
            raise ValueError(f"temperature must lie in (0, 1], got {temperature}")
        if box_k <= 0:
            raise ValueError(f"box_k must be positive, got {box_k}")
        self.mask = mask
        self.point, self.negative_point, self.box = point, negative_point, box
        self.box_k, self.temperature = box_k, temperature

    def forward(
        self, prob: Float[Tensor, "B 1 H W"], mask_size: int, image: Float[Tensor, "B 4"] | None = None
    ) -> PromptSet:
        """The prompts of a map; points and box lie inside the image.

        Args:
            prob: probabilities in [0, 1], 0 outside the image.
            mask_size: width and height of the mask prompt in pixels.
            image: the box of the map that is image, the rest being padding; None: all of it.
        """
        sharp = sharpen(precise(prob), self.temperature)
        box = soft_box(sharp, self.box_k)
        if image is not None:
            box = _moved_inside(box.unflatten(1, (2, 2)), image).flatten(1)
        points = [foreground_point(sharp)] if self.point else []
        if self.negative_point:
            points.append(background_point(sharp, box))
        if image is not None:  # the points of an empty map, and those whose box has a soft edge in the padding
            points = [_moved_inside(point, image) for point in points]
        labels = torch.tensor([1, 0][: len(points)], device=prob.device).expand(prob.shape[0], -1)
        return PromptSet(
            points=torch.cat(points, 1) if points else None,
            labels=labels if points else None,
            boxes=box if self.box else None,
            masks=self.mask(prob, mask_size) if self.mask is not None else None,
        )
