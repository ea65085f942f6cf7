"""Phase 2: SAM on simulated coarse masks."""

from typing import Any

import torch
from torch import Tensor, nn

from ultrarefiner import ranks
from ultrarefiner.models.cascade import Cascade, soft_logit
from ultrarefiner.phases import losses
from ultrarefiner.phases.phase import OptimizerFactory, Phase
from ultrarefiner.settings import SAM

# Where K masks share a crop, each side of the box that covers theirs moves outwards by up to this share of its size, so
# that the lesion does not fill every crop alike.
MARGIN = 0.1


def sam_parameters(cascade: Cascade) -> list[nn.Parameter]:
    """What Phases 2 and 3 move of the refiner: SAM's trainable parts and the gate."""
    assert cascade.refiner is not None
    parts = [cascade.refiner] if cascade.gate is None else [cascade.refiner, cascade.gate]
    return [p for part in parts for p in part.parameters() if p.requires_grad]


class SamPhase(Phase):
    """Teaches SAM to repair what a coarse network does wrong, and to leave good masks alone (quality-aware loss).

    bce·BCE + dice·Dice + focal·focal + change·(change penalty) + iou·(MSE of the IoU head).

    Args:
        cascade: needs its refiner; the coarse masks come with the data.
        lr: the learning rate at the start; it falls along a cosine.
        bce_weight, dice_weight, focal_weight, change_weight, iou_weight: of the five terms.
        good_from: coarse Dice from which on a change costs, see `losses.change_penalty`.
    """

    simulated = True
    parts = frozenset({SAM})

    def __init__(
        self,
        cascade: Cascade,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        optimizer: OptimizerFactory,
        bce_weight: float,
        dice_weight: float,
        focal_weight: float,
        change_weight: float,
        iou_weight: float,
        good_from: float,
        grad_clip: float | None,
    ) -> None:
        super().__init__(cascade, epochs=epochs, batch_size=batch_size, optimizer=optimizer, grad_clip=grad_clip)
        if not sam_parameters(cascade):
            raise ValueError("there is nothing to train: model.train holds all of SAM, without LoRA and without a gate")
        self.lr = lr
        self.bce_weight, self.dice_weight, self.focal_weight = bce_weight, dice_weight, focal_weight
        self.change_weight, self.iou_weight = change_weight, iou_weight
        self.good_from = good_from

    def groups(self) -> list[dict[str, Any]]:
        """One group: the trainable parts of SAM, and the gate."""
        return [{"name": "sam", "params": sam_parameters(self.cascade), "lr": self.lr}]

    def terms(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The quality-aware loss in the frame, of all K coarse masks of each image ("prob" is (B,K,C,C))."""
        images, several = batch["prob"].shape[:2]
        coarse = batch["prob"].flatten(0, 1)[:, None]
        target, coarse_target = (batch[name].repeat_interleave(several, dim=0) for name in ("mask", "coarse_mask"))
        assert self.cascade.refiner is not None
        where, margins = batch.get("where", batch["prob"]).flatten(0, 1)[:, None], batch.get("margins")
        if margins is None and several > 1:
            # All processes draw the same numbers, those of one; the sampler deals out its cases in turn.
            margins = torch.rand(images * ranks.size(), 4)[ranks.rank() :: ranks.size()].to(coarse)
        margins = None if margins is None else MARGIN * margins
        boxes = self.cascade.refiner.look(torch.sigmoid(soft_logit(where)), batch["image"], margins, batch["aspect"])
        refined = self.cascade.refine(batch["image"], soft_logit(coarse), boxes, batch["aspect"])
        prob, pixel = refined.logits.sigmoid(), losses.pixel_bce(refined.logits, target)
        terms = {
            "bce": pixel.mean(),
            "dice": losses.soft_dice_loss(prob, target),
            "focal": losses.focal(pixel),
            "change": losses.change_penalty(prob, coarse, coarse_target, self.good_from),
            "iou": losses.iou_head_loss(refined.masks, refined.iou, target, refined.boxes),
        }
        terms["loss"] = sum((getattr(self, f"{name}_weight") * value for name, value in terms.items()), torch.zeros(()))
        return terms

    def masks(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The simulated coarse mask and what SAM makes of it."""
        coarse = soft_logit(batch["prob"])
        return {"coarse": coarse, "refined": self.cascade.refine(batch["image"], coarse, aspect=batch["aspect"]).logits}
