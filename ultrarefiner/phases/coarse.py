"""Phase 1: the coarse network alone."""

from typing import Any

from torch import Tensor

from ultrarefiner.models.cascade import Cascade, lesion_logit
from ultrarefiner.phases import losses
from ultrarefiner.phases.phase import OptimizerFactory, Phase, poly
from ultrarefiner.settings import COARSE


class CoarsePhase(Phase):
    """Lowers ce_weight·CE + dice_weight·Dice with a polynomially falling learning rate (TransUNet's recipe).

    Args:
        cascade: needs its coarse network only.
        lr: the learning rate at the start.
        poly_power: of the decay (1 − t)^power.
        ce_weight, dice_weight: of the two losses.
    """

    frame = False
    judged_by = "coarse"
    parts = frozenset({COARSE})

    def __init__(
        self,
        cascade: Cascade,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        optimizer: OptimizerFactory,
        poly_power: float,
        ce_weight: float,
        dice_weight: float,
        grad_clip: float | None,
    ) -> None:
        super().__init__(cascade, epochs=epochs, batch_size=batch_size, optimizer=optimizer, grad_clip=grad_clip)
        self.lr, self.decay = lr, poly(poly_power)
        self.ce_weight, self.dice_weight = ce_weight, dice_weight

    def groups(self) -> list[dict[str, Any]]:
        """One group: the coarse network."""
        assert self.cascade.coarse is not None
        return [{"name": "coarse", "params": list(self.cascade.coarse.parameters()), "lr": self.lr}]

    def terms(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy and Dice at the coarse size."""
        assert self.cascade.coarse is not None
        logits = self.cascade.coarse(batch["coarse_image"])
        return coarse_terms(logits, batch["coarse_mask"], self.ce_weight, self.dice_weight)

    def masks(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The coarse mask."""
        assert self.cascade.coarse is not None
        return {"coarse": lesion_logit(self.cascade.coarse(batch["coarse_image"]))}


def coarse_terms(logits: Tensor, target: Tensor, ce_weight: float, dice_weight: float) -> dict[str, Tensor]:
    """The loss of the coarse network and its two terms, in Phase 1 and in Phase 3."""
    ce = losses.cross_entropy(logits, target)
    dice = losses.soft_dice_loss(lesion_logit(logits).sigmoid(), target)
    return {"loss": ce_weight * ce + dice_weight * dice, "ce": ce, "dice": dice}
