"""Checkpoint files: written whole or not at all, read without running code, the previous one kept."""

import json
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from ultrarefiner.data.seen import Seen
from ultrarefiner.errors import UserError
from ultrarefiner.files import load, replacing
from ultrarefiner.models.weights import SAFETENSORS, read_metadata
from ultrarefiner.settings import COARSE, SAM, portable

log = logging.getLogger(__name__)

BUILDS = ("model", "prompt_style", "roi", "gate", "phase", "fold", "seed")
"""The nodes of the configuration that a checkpoint carries."""
SAID = ("ultrarefiner", "config", "seen")
SHIPPED = Path(__file__).resolve().parents[1] / "shipped"
"""The pair of networks that comes with the project, as `ultrarefiner.export` writes a pair."""
BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"


def about(settings: dict[str, Any], config: dict[str, Any], seen: Seen) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Args:
        settings: what defines the result.
        config: the whole configuration; kept is what its networks can be built from, without this machine's paths.
        seen: the images that its weights know, and those of all that they started from.
    """
    kept = {name: node for name, node in config.items() if name in BUILDS}
    return {"ultrarefiner": settings, "config": portable(kept), "seen": seen.as_lists()}


def said_of(path: Path, content: Any = None) -> dict[str, Any]:
    """What a checkpoint of ours says of itself (see `about`); nothing of others.

    Plain weights say it in their .safetensors file; for a .pth file, the one beside it that was written with it.

    Args:
        path: of the checkpoint.
        content: what is in it, where it was read already.

    Raises:
        UserError: what it says is damaged.
    """
    beside = path.with_suffix(SAFETENSORS)
    if path.suffix != ".ckpt" and beside.is_file():
        said = read_metadata(beside)
        try:
            content = {name: json.loads(said[name]) for name in SAID if name in said}
        except ValueError as error:
            raise UserError(f"the metadata of {beside} are damaged ({error}); copy or make it again") from error
    elif content is None:
        content = load(path) if path.suffix == ".ckpt" else {}
    known = isinstance(content, dict) and set(SAID) <= set(content)
    return {name: content[name] for name in SAID} if known else {}


def located(path: str | Path | None) -> Path:
    """The place of a checkpoint that a user names: `shipped`, or nothing, is the pair that comes with the project."""
    return SHIPPED if path is None or path == "shipped" else Path(path).expanduser()


def exported(folder: Path) -> dict[str, Path]:
    """The networks in a folder of `ultrarefiner.export`, by part; nothing where it is no such folder."""
    files = {name: folder / f"{name}{SAFETENSORS}" for name in (COARSE, SAM)}
    return {name: path for name, path in files.items() if path.is_file()}


def best(directory: Path) -> dict[str, Any]:
    """The checkpoint that a finished run chose."""
    content: dict[str, Any] = load(directory / "checkpoints" / BEST)
    return content


def resume_point(folder: Path) -> Path | None:
    """The newest readable checkpoint to continue from; a damaged one is named and the previous one taken."""
    for path in (folder / LAST, folder / PREVIOUS):
        if path.is_file():
            try:
                load(path)
            except UserError as error:
                log.warning("%s; the one before it is used", error)
            else:
                return path
    return None


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
