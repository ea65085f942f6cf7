"""What the three phases have in common: a Lightning module around the cascade."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F

from ultrarefiner.errors import UserError
from ultrarefiner.models.cascade import Cascade
from ultrarefiner.phases import losses
from ultrarefiner.precision import FULL, computing
from ultrarefiner.ranks import gather
from ultrarefiner.results import metrics
from ultrarefiner.settings import PARTS

EXPLODED = 1e4
"""A loss that no mask can cause: training diverges."""

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def poly(power: float) -> Callable[[float], float]:
    """(1 − t)^power, t in [0, 1] the share of training that is done."""
    return lambda done: (1 - done) ** power


def cosine(done: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


class Phase(pl.LightningModule):
    """One phase: which data it sees, which loss it lowers, which parameters it moves.

    A subclass sets the class attributes, defines `terms`, `masks` and `groups`, and takes the keys of its YAML file as
    arguments.

    Args:
        cascade: the networks.
        epochs: passes over the training cases.
        batch_size: samples of a step.
        optimizer: parameter groups -> optimiser.
        grad_clip: largest norm of the gradient; None does not clip.
    """

    simulated: ClassVar[bool] = False
    """Whether the data carry simulated coarse masks ("prob")."""
    frame: ClassVar[bool] = True
    """Whether the data carry the S×S frame beside the coarse network's image."""
    judged_by: ClassVar[str] = "refined"
    """Whose validation Dice chooses the best checkpoint: "coarse" or "refined"."""
    compared: ClassVar[bool] = False
    """Whether it is compared with what its weights could do before it, see `start_from`."""
    parts: ClassVar[frozenset[str]] = PARTS
    """What it trains or needs of `settings.PARTS`; it has no networks but these, and no setting of others matters."""

    def __init__(
        self,
        cascade: Cascade,
        *,
        epochs: int,
        batch_size: int,
        optimizer: OptimizerFactory,
        grad_clip: float | None = None,
    ) -> None:
        super().__init__()
        self.cascade = cascade
        self.epochs, self.batch_size = epochs, batch_size
        self.optimizer, self.grad_clip = optimizer, grad_clip
        self.decay: Callable[[float], float] = cosine
        """Factor on the learning rate, from the share of training that is done."""
        self.seed = 0
        self.precision = FULL
        """In which `predict` computes, see `precision.computing`."""
        self.carried: dict[str, Any] = {}
        """What every checkpoint says of itself, see `runs.checkpoints.about`."""
        self.measured = True
        """Whether the weights are the ones that the last validation measured."""
        self.steps_done = 0
        """How many batches of the epoch are done; 0 between epochs."""
        self.begins_at = (0, 0)
        """The epoch and the batch with which training begins: other ones where it is resumed."""
        self._sums: dict[str, float] = {}
        self._rows: list[dict[str, float]] = []
        self._ids: list[str] = []

    @abstractmethod
    def terms(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The terms of the loss by name; "loss" is their weighted sum."""

    @abstractmethod
    def masks(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The logits (B,1,·,·) of each mask that this phase produces: "coarse", "refined"."""

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """All parameter groups of the optimiser, with their learning rates, also those that are frozen at first."""

    def start_from(self, coarse_dice: float) -> None:
        """Take the weights of now as those that training starts from; a phase that is `compared` remembers them.

        Args:
            coarse_dice: of the coarse mask on the validation cases.
        """

    @torch.inference_mode()
    def predict(
        self, batch: dict[str, Any], draw: "Callable[[dict[str, Any]], dict[str, Tensor]] | None" = None
    ) -> dict[str, Tensor]:
        """The logits of each mask for a batch from anywhere, in evaluation mode.

        Args:
            batch: what the loaders give, brought to this phase's device and precision (trainer.precision=64-true).
            draw: batch → logits by name; `masks` if not given.
        """
        self.eval()
        weight = next(self.parameters())
        here = {
            name: (value.to(weight) if value.is_floating_point() else value.to(weight.device))
            if isinstance(value, Tensor)
            else value
            for name, value in batch.items()
        }
        with computing(self.precision, weight.device.type):
            return (draw or self.masks)(here)

    @property
    def monitor(self) -> str:
        """The logged value that chooses the best checkpoint (higher is better)."""
        return f"val/{self.judged_by}/dice"

    def configure_optimizers(self) -> Any:
        """The optimiser with all its groups, and the schedule over the steps of the whole phase."""
        optimizer = self.optimizer(self.groups())
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.decay(min(step / steps, 1.0)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint say what it was trained with, and how far in its epoch; hold the average of weights."""
        checkpoint |= self.carried
        if self.steps_done:
            rows = gather([self._sums])
            sums = {name: sum(row[name] for row in rows) / len(rows) for name in self._sums}
            checkpoint["inside_epoch"] = {"steps_done": self.steps_done, "sums": sums}
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            # Lightning asks no callback about a checkpoint of weights alone.
            if isinstance(callback, WeightAveraging) and "averaging_state" not in checkpoint:
                callback.on_save_checkpoint(self.trainer, self, checkpoint)
                del checkpoint["current_model_state"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The counterpart of `on_save_checkpoint`."""
        self.begins_at = (checkpoint["epoch"] + 1, 0)
        if inside := checkpoint.get("inside_epoch"):
            self.steps_done, self._sums = inside["steps_done"], dict(inside["sums"])
            self.begins_at = (checkpoint["epoch"], self.steps_done)

    def on_train_start(self) -> None:
        """Begin the epoch also where it was begun before: Lightning does not call the hook again."""
        if self.steps_done:
            self.on_train_epoch_start()

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Give each step its own random numbers: resumed at any, training goes on as if never interrupted."""
        stream = np.random.SeedSequence([self.seed, self.current_epoch, batch_idx])
        torch.manual_seed(int(stream.generate_state(1, np.uint64)[0]))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One step: the loss and its terms, logged as means over the epoch.

        Raises:
            UserError: training diverges.
        """
        terms = self.terms(batch)
        self._ids = list(batch["id"])
        if not abs(float(terms["loss"].detach())) < EXPLODED:
            listed = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in terms.items())
            raise self._diverged(f"the loss is {listed}")
        self._count(terms, len(batch["id"]), batch_idx)
        return terms["loss"]

    def _count(self, terms: dict[str, Tensor], samples: int, batch_idx: int) -> None:
        """Add to the epoch's means. Lightning's own would begin anew when training is resumed inside an epoch."""
        self.steps_done = batch_idx + 1
        for name, value in [*terms.items(), ("samples", torch.ones(()))]:
            self._sums[name] = self._sums.get(name, 0.0) + samples * float(value.detach())
        if self.steps_done == self.trainer.num_training_batches:
            for name in terms:
                mean = self._sums[name] / self._sums["samples"]
                self.log(f"train/{name}", mean, on_step=False, on_epoch=True, batch_size=samples, sync_dist=True)
            self.steps_done, self._sums = 0, {}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a gradient that is not finite spoils the weights.

        Raises:
            UserError: training diverges.
        """
        if getattr(self.trainer, "scaler", None) is not None:  # float16 skips such steps by itself
            return
        norms = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if norms and not bool(torch.stack(norms).isfinite().all()):
            raise self._diverged("the loss is finite, its gradient is not")

    def _diverged(self, what: str) -> UserError:
        rates = " or ".join(f"phase.{key}" for key in ("lr", "coarse_lr", "sam_lr") if hasattr(self, key))
        return UserError(
            f"training diverges in epoch {self.current_epoch + 1}, step {self.trainer.global_step + 1}: {what}, on the "
            f"cases {', '.join(self._ids)}; look at these images, lower {rates}, set phase.grad_clip, or train with "
            "trainer.precision=32-true. The checkpoint of the epoch before is kept"
        )

    def on_validation_epoch_start(self) -> None:
        """Begin a new table."""
        self._rows = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Dice and IoU of each case at its native size, where there is a lesion; and the loss of the judged mask.

        That is ½ cross-entropy + ½ Dice loss, Phase 1's loss by default and comparable between phases.
        """
        masks = self.masks(batch)
        target = batch["mask" if self.frame and self.judged_by == "refined" else "coarse_mask"]
        judged = F.interpolate(masks[self.judged_by].float(), target.shape[-2:], mode="bilinear", align_corners=False)
        cross_entropy = losses.pixel_bce(judged, target).mean((1, 2, 3))
        for i, truth in enumerate(batch["native_mask"]):
            dice = losses.soft_dice_loss(judged[i : i + 1].sigmoid(), target[i : i + 1])
            row = {"loss": float(cross_entropy[i] + dice) / 2}
            for which, logits in masks.items():
                found = metrics.native_mask(logits[i], truth.shape)
                scores = metrics.overlap(found, truth) if truth.any() else {"dice": math.nan, "iou": math.nan}
                row |= {f"{which}_{name}": value for name, value in scores.items()}
            self._rows.append(row)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the cases, each counted once."""
        rows = gather(self._rows)
        self.log("val/loss", math.fsum(row["loss"] for row in rows) / max(len(rows), 1), sync_dist=True)
        for which in ("coarse", "refined"):
            for name, value in metrics.mean_scores(rows, which).items():
                self.log(f"val/{which}/{name}", value, sync_dist=True)


def set_trainable(modules: Iterable[nn.Module | None], trainable: bool) -> None:
    """Let the parameters of some modules move, or not."""
    for module in modules:
        if module is not None:
            module.requires_grad_(trainable)
