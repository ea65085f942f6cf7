"""Checkpoints of a training: written whole or not at all, read without running code, the previous one kept."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from ultrarefiner.files import load, replacing
from ultrarefiner.runs.checkpoints import BEST, LAST, PREVIOUS


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints through `save` and `load`; the last one is kept as the previous one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write atomically, after moving what is there to `previous.ckpt` if it is the last one."""
        path = Path(path)
        with replacing(path) as part:
            torch.save(checkpoint, part)
            if path.name == LAST and path.is_file():
                path.replace(path.with_name(PREVIOUS))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read without executing anything, whatever `weights_only` says."""
        checkpoint: dict[str, Any] = load(path)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


class KeepCheckpoints(Checkpoint):
    """After each epoch: `last.ckpt` to resume from, and `best.ckpt` (weights only) when the monitored value rose.

    Args:
        folder: where they go.
        monitor: logged value, higher is better.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        self.folder, self.monitor = folder, monitor
        self.best = float("-inf")
        self.best_epoch = -1

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs to know of the best epoch so far."""
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        self.best, self.best_epoch = state_dict["best"], state_dict["best_epoch"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the best; before the last, so that a `last.ckpt` never speaks of a best one that is not there."""
        # What the guard put together after the validation was not measured: the best only while there is no other.
        value = float(trainer.callback_metrics[self.monitor]) if pl_module.measured else float("-inf")
        if value > self.best or self.best_epoch < 0:
            self.best, self.best_epoch = value, trainer.current_epoch
            trainer.save_checkpoint(self.folder / BEST, weights_only=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the last."""
        trainer.save_checkpoint(self.folder / LAST)
