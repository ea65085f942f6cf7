"""What keeps a long training from wasting its user's time: memory that is kept, an estimate, an early end."""

import ctypes
import os
import platform
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ultrarefiner.runs.keeping import KeepCheckpoints

TRIAL_STEPS = 10
TRIAL_SECONDS = 20.0
"""The estimate is made after so many steps, or so much time if that is earlier; the first step is not counted."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
LONG_SECONDS = 120.0
"""A training that takes less needs no estimate."""


def keep_pages() -> None:
    """Let this process keep the memory that its tensors leave, for the next ones.

    By default glibc gives large blocks back to the system and asks for new ones, whose pages must be cleared: on a CPU
    that takes a third of a training step. Nothing happens on systems without glibc, nor where MALLOC_MMAP_MAX_ or
    MALLOC_TRIM_THRESHOLD_ say what the user wants.
    """
    chosen = {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ)
    if platform.libc_ver()[0] == "glibc" and not chosen:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


class Patience(Callback):
    """Ends training when the monitored value has not risen for some epochs.

    Lightning's own EarlyStopping forgets, when it is killed after its last epoch, that it had decided to end.

    Args:
        epochs: to wait; None trains to the end.
        keeper: knows the best epoch.
    """

    def __init__(self, epochs: int | None, keeper: KeepCheckpoints) -> None:
        self.epochs, self.keeper = epochs, keeper

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A training that was over when it was killed is over."""
        self._judge(trainer, trainer.current_epoch - 1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the epochs since the best one."""
        self._judge(trainer, trainer.current_epoch)

    def _judge(self, trainer: pl.Trainer, epoch: int) -> None:
        if self.epochs is not None and epoch >= 0 and epoch - self.keeper.best_epoch >= self.epochs:
            trainer.should_stop = True


class Estimate(Callback):
    """After the first steps: how long a step, an epoch and the training take, and how much memory."""

    def __init__(self, long_seconds: float = LONG_SECONDS) -> None:
        self.long_seconds = long_seconds
        self._began: float | None = None
        self._steps = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, and speak once."""
        if self._steps < 0:
            return
        if self._began is None:  # the first step warms up
            self._began = time.monotonic()
            return
        self._steps += 1
        elapsed = time.monotonic() - self._began
        if self._steps < TRIAL_STEPS and elapsed < TRIAL_SECONDS:
            return
        step, self._steps = elapsed / self._steps, -1
        epoch = step * float(trainer.num_training_batches)
        whole = epoch * ((trainer.max_epochs or 0) - trainer.current_epoch)
        if whole >= self.long_seconds and trainer.is_global_zero:
            memory = peak_memory()
            print(
                f"about {step:.2f} s a step, {duration(epoch)} an epoch, {duration(whole)} to the end, validation not "
                f"counted{'' if memory is None else f'; peak memory so far {memory:.1f} GB'}"
            )


def duration(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def peak_memory() -> float | None:
    """The most memory that this process has held: on the GPU where there is one, else of the machine, GB.

    None on systems that keep no such account (Windows).
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
