"""Phase 3: both networks; the loss of the redrawn mask reaches the coarse network."""

import copy
import logging
from typing import Any

from torch import Tensor

from ultrarefiner.config import ProtectionConfig
from ultrarefiner.models.cascade import Cascade, lesion_logit
from ultrarefiner.phases import losses
from ultrarefiner.phases.coarse import coarse_terms
from ultrarefiner.phases.phase import OptimizerFactory, Phase, set_trainable
from ultrarefiner.phases.protection import WeightAnchor, hold_batchnorm
from ultrarefiner.phases.sam import sam_parameters
from ultrarefiner.settings import BRIDGE, COARSE, SAM

log = logging.getLogger(__name__)


class E2EPhase(Phase):
    """λc·(CE + Dice of the coarse mask) + λr·(BCE + Dice of the redrawn mask) + anchor.

    Args:
        cascade: both networks, holding the weights of Phases 1 and 2.
        protection: λc, λr and what else shields the coarse network.
        coarse_lr, sam_lr: learning rates at the start; both fall along a cosine.
        ce_weight, coarse_dice_weight: inside the coarse loss.
        bce_weight, dice_weight: inside the refined loss.
    """

    compared = True
    parts = frozenset({COARSE, SAM, BRIDGE})

    def __init__(
        self,
        cascade: Cascade,
        *,
        protection: ProtectionConfig,
        epochs: int,
        batch_size: int,
        coarse_lr: float,
        sam_lr: float,
        optimizer: OptimizerFactory,
        ce_weight: float,
        coarse_dice_weight: float,
        bce_weight: float,
        dice_weight: float,
        grad_clip: float | None,
    ) -> None:
        super().__init__(cascade, epochs=epochs, batch_size=batch_size, optimizer=optimizer, grad_clip=grad_clip)
        assert cascade.coarse is not None
        cascade.grad_scale = protection.grad_scale
        self.protection = protection
        self.coarse_lr, self.sam_lr = coarse_lr, sam_lr
        self.ce_weight, self.coarse_dice_weight = ce_weight, coarse_dice_weight
        self.bce_weight, self.dice_weight = bce_weight, dice_weight
        self.anchor: WeightAnchor | None = None
        # Named once: freezing later must not change what the optimiser holds.
        self._sam = sam_parameters(cascade)
        if protection.freeze_epochs and (protection.sam_freeze_epochs or not self._sam):
            holder = "protection.sam_freeze_epochs" if protection.sam_freeze_epochs else "model.train"
            raise ValueError(
                f"protection.freeze_epochs holds the coarse network and {holder} all of SAM: nothing would move in "
                "the first epoch; set one of them to 0"
            )
        for key, instead in (("freeze_epochs", "coarse_lr"), ("sam_freeze_epochs", "sam_lr")):
            if (frozen := getattr(protection, key)) >= epochs:
                raise ValueError(
                    f"protection.{key}={frozen} is all of phase.epochs={epochs}: give less, or phase.{instead}=0 if "
                    "this network is to stay as it is"
                )
        if 2 * protection.freeze_epochs > epochs:
            log.warning(
                "protection.freeze_epochs=%d leaves the coarse network %d of %d epochs to move in; Phase 3 is there to "
                "move it",
                protection.freeze_epochs,
                epochs - protection.freeze_epochs,
                epochs,
            )
        self.baseline: float | None = None
        """Validation Dice of the Phase 1 network, which every epoch is compared with."""
        self._best_coarse: tuple[float, dict[str, Tensor]] | None = None

    def groups(self) -> list[dict[str, Any]]:
        """Two groups, both there from the start: the coarse network, and the trainable parts of SAM with the gate."""
        assert self.cascade.coarse is not None
        return [
            {"name": "coarse", "params": list(self.cascade.coarse.parameters()), "lr": self.coarse_lr},
            {"name": "sam", "params": self._sam, "lr": self.sam_lr},
        ]

    def on_train_epoch_start(self) -> None:
        """Freeze what is frozen in this epoch: without a gradient the optimiser leaves a parameter alone."""
        assert self.cascade.coarse is not None and self.cascade.refiner is not None
        coarse_moves = self.current_epoch >= self.protection.freeze_epochs
        sam_moves = self.current_epoch >= self.protection.sam_freeze_epochs
        set_trainable([self.cascade.coarse], coarse_moves)
        for parameter in self._sam:
            parameter.requires_grad_(sam_moves)
        # What is frozen keeps its batch statistics too.
        self.cascade.coarse.train(coarse_moves)
        self.cascade.refiner.sam.train(sam_moves)
        if self.protection.hold_batchnorm:
            hold_batchnorm(self.cascade.coarse)

    def terms(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The coarse loss at the coarse size, the refined loss in the frame, and the pull towards Phase 1."""
        out = self.cascade(batch["coarse_image"], batch["image"], batch["aspect"])
        coarse = coarse_terms(out.coarse_logits, batch["coarse_mask"], self.ce_weight, self.coarse_dice_weight)["loss"]
        refined = self.bce_weight * losses.bce(out.refined.logits, batch["mask"])
        refined = refined + self.dice_weight * losses.soft_dice_loss(out.refined.logits.sigmoid(), batch["mask"])
        loss = self.protection.coarse_loss_weight * coarse + self.protection.refined_loss_weight * refined
        terms = {"coarse": coarse, "refined": refined}
        if self.anchor is not None:
            terms["anchor"] = self.anchor(self.cascade.coarse)
            loss = loss + self.protection.weight_reg * terms["anchor"]
        return terms | {"loss": loss}

    def masks(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The coarse mask and what SAM makes of it."""
        out = self.cascade(batch["coarse_image"], batch["image"], batch["aspect"])
        return {"coarse": lesion_logit(out.coarse_logits), "refined": out.refined.logits}

    def on_validation_epoch_end(self) -> None:
        """Compare the coarse network with its Phase 1 baseline: warn when it degrades, restore it when so asked."""
        super().on_validation_epoch_end()
        assert self.cascade.coarse is not None
        if self.baseline is None:
            return
        dice = float(self.trainer.callback_metrics["val/coarse/dice"])
        drop = self.baseline - dice
        self.log("val/coarse/vs_baseline", -drop, sync_dist=True)
        self.measured = True
        self._remember(dice)
        if self.protection.guard is not None and self._best_coarse is not None and drop > self.protection.guard:
            self.cascade.coarse.load_state_dict(self._best_coarse[1])
            self.measured = False
            for optimizer in self.trainer.optimizers:  # its moments would go on in the direction that did the harm
                for parameter in self.cascade.coarse.parameters():
                    optimizer.state.pop(parameter, None)
            log.warning(
                "epoch %d: coarse Dice %.4f is %.4f below the Phase 1 baseline, more than protection.guard=%g; "
                "its best weights (Dice %.4f) are restored",
                self.current_epoch,
                dice,
                drop,
                self.protection.guard,
                self._best_coarse[0],
            )
        elif drop > self.protection.warn_drop:
            log.warning(
                "epoch %d: the coarse network degrades: Dice %.4f, Phase 1 baseline %.4f; "
                "a smaller protection.grad_scale or phase.coarse_lr protects it",
                self.current_epoch,
                dice,
                self.baseline,
            )

    def start_from(self, coarse_dice: float) -> None:
        """Take the weights of now as those of Phase 1, and its Dice on the validation cases as the baseline."""
        assert self.cascade.coarse is not None
        self.baseline = coarse_dice
        if self.protection.weight_reg > 0:
            self.anchor = WeightAnchor(self.cascade.coarse).to(self.device)
        self._best_coarse = None
        self._remember(coarse_dice)

    def _remember(self, dice: float) -> None:
        """Keep the coarse weights of now for `protection.guard` if they are the best so far."""
        assert self.cascade.coarse is not None
        if self.protection.guard is not None and (self._best_coarse is None or dice > self._best_coarse[0]):
            self._best_coarse = (dice, copy.deepcopy(self.cascade.coarse.state_dict()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the best coarse weights for `protection.guard` across a resume."""
        super().on_save_checkpoint(checkpoint)
        if self._best_coarse is not None:
            checkpoint["best_coarse"] = {"dice": self._best_coarse[0], "state_dict": self._best_coarse[1]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The counterpart of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        if (best := checkpoint.get("best_coarse")) is not None:
            self._best_coarse = (best["dice"], best["state_dict"])
