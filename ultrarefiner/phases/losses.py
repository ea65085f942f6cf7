"""The losses of the three phases. Targets are masks in {0, 1}; every function returns a scalar unless it says so.

They are computed in float32, also under autocast; float64 stays float64, so that finite differences can judge them.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ultrarefiner.refine.moments import precise
from ultrarefiner.refine.roi import coverage, crop, image_within


def soft_dice_loss(prob: Float[Tensor, "B 1 H W"], target: Float[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
    """1 − (2ΣPt + 1) / (ΣP + Σt + 1), the mean over the batch; the 1 (a pixel) makes an empty target sensible."""
    prob, target = precise(prob).flatten(1), precise(target).flatten(1)
    overlap = (prob * target).sum(1)
    return (1 - (2 * overlap + 1) / (prob.sum(1) + target.sum(1) + 1)).mean()


def cross_entropy(logits: Float[Tensor, "B 2 H W"], target: Float[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
    """Two-class cross-entropy, the mean over pixels."""
    return F.cross_entropy(precise(logits), target[:, 0].long())


def pixel_bce(logits: Float[Tensor, "B 1 H W"], target: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 1 H W"]:
    """Binary cross-entropy of every pixel from logits."""
    logits = precise(logits)
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")


def bce(logits: Float[Tensor, "B 1 H W"], target: Float[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
    """Binary cross-entropy from logits, the mean over pixels."""
    return pixel_bce(logits, target).mean()


def focal(pixel: Float[Tensor, "B 1 H W"], gamma: float = 2.0) -> Float[Tensor, ""]:
    """Focal loss (1 − p_t)^γ·BCE without class weights (Lin et al. 2017), the mean over pixels, from `pixel_bce`."""
    return ((1 - torch.exp(-pixel)) ** gamma * pixel).mean()


def hard_dice(pred: Tensor, target: Tensor) -> Float[Tensor, " B"]:
    """Dice of two boolean masks (B, ...), for each sample; 1 when both are empty. No gradient."""
    pred, target = pred.flatten(1), target.flatten(1)
    total = pred.sum(1) + target.sum(1)
    return torch.where(total > 0, 2 * (pred & target).sum(1) / total.clamp(min=1), 1.0)


def change_penalty(
    refined: Float[Tensor, "B 1 S S"],
    coarse: Float[Tensor, "B 1 C C"],
    coarse_target: Float[Tensor, "B 1 C C"],
    good_from: float = 0.6,
) -> Float[Tensor, ""]:
    """How much the refiner changes masks that were already good (the seed's quality-aware loss).

    Mean |P_refined − P_coarse| of each sample, weighed by clamp((Dice(coarse) − good_from) / (1 − good_from), 0, 1).

    Args:
        refined: probabilities in the frame.
        coarse: the coarse probabilities that were refined.
        coarse_target: the truth at the coarse size.
    """
    quality = hard_dice(coarse > 0.5, coarse_target > 0.5)
    weight = ((quality - good_from) / (1 - good_from)).clamp(0, 1)
    before = F.interpolate(precise(coarse), size=refined.shape[-2:], mode="bilinear", align_corners=False)
    return (weight * (precise(refined) - before).abs().mean((1, 2, 3))).mean()


def iou_head_loss(
    masks: Float[Tensor, "B K M M"],
    iou: Float[Tensor, "B K"],
    target: Float[Tensor, "B 1 S S"],
    boxes: Float[Tensor, "B 4"],
) -> Float[Tensor, ""]:
    """MSE between the IoU that SAM predicts for each candidate mask and the IoU that it has, inside box and image."""
    with torch.no_grad():
        inside = coverage(image_within(boxes), masks.shape[-1]) > 0.5
        truth = inside & (crop(target, boxes, masks.shape[-1]) > 0.5)
        drawn = inside & (masks > 0)
        union = (drawn | truth).flatten(2).sum(2)
        actual = torch.where(union > 0, (drawn & truth).flatten(2).sum(2) / union.clamp(min=1), 1.0)
    return F.mse_loss(precise(iou), actual)
