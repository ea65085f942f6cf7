"""Ending a training that is asked to, and saving inside an epoch: between two steps, so that nothing is repeated."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ultrarefiner import ranks
from ultrarefiner.errors import Paused

SIGNALS: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
"""Ctrl-C, kill, and what submitit lets SLURM send before a time limit (Windows has only the first two)."""
WORTH_SAVING = 1.0
"""Minutes of training that are saved before an epoch's last step: in the validation after it nothing can be saved."""


class Deadline:
    """When a command's time is up.

    Args:
        minutes: from now; None never ends.
    """

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self._end = float("inf") if minutes is None else time.monotonic() + 60 * minutes

    @property
    def over(self) -> bool:
        """Whether it is."""
        return time.monotonic() >= self._end


class Interruption(Callback):
    """Saves and ends between two steps when a signal or the time budget asks for it.

    A signal does what it did before the training, only later: after the step that it fell into, and after a checkpoint;
    in a validation, where there is nothing to save, after the batch. Never in the middle of something: an exception
    that a signal raises may be lost there (in a finaliser, say). Ctrl-C that is pressed again acts at once. Where
    several processes train together, one of them being asked is enough.

    Must come after the callbacks that change something after a step.

    Args:
        path: of the checkpoint.
        deadline: of the whole command.
        save_minutes: save also when this long nothing was saved.
    """

    def __init__(self, path: Path, deadline: Deadline, save_minutes: float) -> None:
        self.path, self.deadline, self.save_minutes = path, deadline, save_minutes
        self._before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        self._asked: list[int] = []
        self._steps = 0
        self._saved = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals that somebody listens to.

        Now, because Lightning just put a handler of its own before SIGTERM's, which tells the other processes by a
        collective that meets theirs at another place: they would wait for ever. It puts all of them back at the end.
        """
        self._saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                if callable(handler):
                    signal.signal(number, self._hear)
                elif number == signal.SIGTERM:
                    signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if number in self._asked:
            self._before[number](number, frame)
            return
        self._asked.append(number)
        if number == signal.SIGINT and ranks.rank() == 0:
            with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, b"ending after this step (Ctrl-C again: at once)\n")

    def _answer(self) -> None:
        asked, self._asked = self._asked, []
        for number in asked:
            self._before[number](number, None)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End before an epoch: the one before is saved.

        Raises:
            Paused: the time is up.
        """
        self._saved = time.monotonic()
        self._answer()
        (over,) = ranks.one_says(self.deadline.over)
        if over and self._steps:  # each start does something, or a small budget would never come to an end
            raise self._paused(f"after epoch {trainer.current_epoch} of {trainer.max_epochs}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, and end, if either is due.

        Raises:
            Paused: the time is up.
        """
        self._steps += 1
        done, batches, together = batch_idx + 1, int(trainer.num_training_batches), trainer.accumulate_grad_batches
        if done % together or done == batches:
            return  # gradients that are not applied yet are not saved; the epoch's end saves by itself
        minutes = (time.monotonic() - self._saved) / 60
        due = minutes >= self.save_minutes or (minutes >= WORTH_SAVING and done + together >= batches)
        asked, over, due = ranks.one_says(bool(self._asked), self.deadline.over, due)
        if asked or over or due:
            trainer.save_checkpoint(self.path)
            self._saved = time.monotonic()
        self._answer()
        if over:
            epoch = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
            raise self._paused(f"in {epoch}, after step {done} of {batches}")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """End before a batch of a validation."""
        self._answer()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What was asked for while the last epoch was saved."""
        self._answer()

    def _paused(self, where: str) -> Paused:
        budget = f"trainer.budget_minutes={self.deadline.minutes:g}"
        return Paused(f"{budget} are up {where}; the same command continues there")
