"""What a run says while it goes: a line for each epoch, metrics.csv, and the loggers that were asked for."""

import functools
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from tqdm import tqdm

from ultrarefiner import ranks
from ultrarefiner.files import write_csv

log = logging.getLogger(__name__)
NEWS_SECONDS = 60.0
"""How long a log file may say nothing."""


class MetricsTable(Callback):
    """metrics.csv: one row for each epoch, and a line on the terminal.

    The rows belong to the checkpoint: a resumed run writes the same file as one that was never interrupted.
    """

    def __init__(self, path: Path, title: str, seen: bool = False) -> None:
        self.path, self.title, self.news = path, title, News(seen)
        self.rows: list[dict[str, Any]] = []
        self._began = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        self.rows = list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the epoch's clock."""
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how far it is, where nobody sees a bar."""
        if trainer.is_global_zero and self.news.due():
            epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            print(f"{self.title}  {epoch}  step {batch_idx + 1}/{trainer.num_training_batches}", flush=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch's row."""
        values = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        optimizer = trainer.optimizers[0]
        rates = {f"lr/{group.get('name', i)}": group["lr"] for i, group in enumerate(optimizer.param_groups)}
        self.rows.append({"epoch": trainer.current_epoch, "step": trainer.global_step} | values | rates)
        if trainer.is_global_zero:
            write_csv(self.path, self.rows)
            self._speak(trainer, values)

    def _speak(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        parts = [f"loss {values['train/loss']:.4f}"] if "train/loss" in values else []
        dice = [f"{w} {values[f'val/{w}/dice']:.4f}" for w in ("coarse", "refined") if f"val/{w}/dice" in values]
        if dice:
            parts.append("val Dice " + ", ".join(dice))
        seconds = time.monotonic() - self._began
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        print(f"{self.title}  {epoch}  {'  '.join(parts)}  {seconds:.1f} s", flush=True)
        self.news = News(self.news.seen)


class News:
    """When a log file, in which nobody sees a bar, is to hear again of what takes long.

    Args:
        seen: a bar is seen; then never.
    """

    def __init__(self, seen: bool) -> None:
        self.seen, self._last = seen, time.monotonic()

    def due(self) -> bool:
        """Whether it is time for a line."""
        if self.seen or time.monotonic() - self._last < NEWS_SECONDS:
            return False
        self._last = time.monotonic()
        return True


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, which leaves nothing behind: the epoch's line says what is worth keeping."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1, leave=False)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """No metrics beside the bar."""
        return {}


def watched(bar: bool) -> bool:
    """Whether a progress bar is wanted and somebody is there to see it."""
    return bar and sys.stderr.isatty()


class Progress:
    """A bar over the batches of an evaluation, where somebody is looking; else a line now and then."""

    def __init__(self, watched: bool) -> None:
        self.watched = watched

    def __call__(self, batches: Iterable[Any], what: str) -> Iterator[Any]:
        """The same batches."""
        off, news, done = not self.watched, News(self.watched or ranks.rank() > 0), 0
        for batch in tqdm(batches, desc=f"measuring {what}", leave=False, disable=off, file=sys.stderr):
            yield batch
            done += len(batch["id"])
            if news.due():
                print(f"measuring {what}: {done} cases", flush=True)


def callbacks(path: Path, title: str, bar: bool) -> list[Callback]:
    """The table, and a progress bar where somebody is looking."""
    shown: list[Callback] = [ProgressBar()] if watched(bar) else []
    return [*shown, MetricsTable(path, title, watched(bar))]


def group(cfg: DictConfig) -> str:
    """What runs that belong together are called: the sweep they are jobs of, else dataset, model and phase."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return f"sweep {Path(HydraConfig.get().sweep.dir).name}"
    return f"{cfg.dataset.name}-{cfg.model.name}-{cfg.phase.name}"


class _CountedOn:
    """Steps go on from those of the earlier phases that a run starts from: one axis for the whole chain."""

    first_step = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, None if step is None else step + self.first_step)  # type: ignore[misc]


class TensorBoard(_CountedOn, TensorBoardLogger):
    """Files for TensorBoard, see `tensorboard_logger`."""


class Wandb(_CountedOn, WandbLogger):
    """A run of Weights & Biases, see `wandb_logger`."""

    artifact = False


def tensorboard_logger(
    directory: Path, *, name: str, job_type: str, tags: list[str], group: str, settings: Any, first_step: int = 0
) -> Logger:
    """TensorBoard files in the run directory (`tensorboard --logdir outputs`)."""
    logger = TensorBoard(directory, name="", version="tensorboard")
    logger.first_step = first_step
    return logger


def wandb_logger(
    directory: Path,
    *,
    name: str,
    job_type: str,
    tags: list[str],
    group: str,
    settings: dict[str, Any],
    first_step: int = 0,
    project: str = "ultrarefiner",
    entity: str | None = None,
    wandb_group: str | None = None,
    artifact: bool = False,
) -> Logger:
    """A Weights & Biases run that continues when the same directory is resumed.

    When nobody is logged in it is written to disk without a word; `wandb sync` uploads it later.

    Args:
        directory: the run directory; its hash is the run's id.
        name, job_type, tags, group, settings: what the run is called, and its configuration.
        first_step: the number of the first step: those of the earlier phases that this one starts from come before.
        project, entity: where it goes.
        wandb_group: instead of `group`.
        artifact: upload the best checkpoint.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    begin = functools.partial(
        wandb.init,
        project=project,
        entity=entity,
        group=wandb_group or group,
        job_type=job_type,
        name=name,
        tags=tags,
        config=settings,
        id=directory.name,
        dir=directory,
    )

    def finish(run: Any) -> Logger:
        run.define_metric("*", step_metric="trainer/global_step")
        logger = Wandb(experiment=run)
        logger.first_step, logger.artifact = first_step, artifact
        return logger

    if "WANDB_MODE" in os.environ:
        return finish(begin())
    try:
        run = begin(resume="allow") if wandb.login(prompt=False) else begin(mode="offline")
    except wandb.errors.CommError as error:
        log.warning("Weights & Biases cannot be reached (%s); the run is on the disk, `wandb sync` uploads it", error)
        run = begin(mode="offline")
    return finish(run)


def close(loggers: list[Logger], status: str) -> None:
    """End the loggers' runs; the next phase in this process begins its own.

    Args:
        loggers: of the run that ends.
        status: "success" or "failed".
    """
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=0 if status == "success" else 1)


def log_pictures(loggers: list[Logger], pictures: dict[str, Path], step: int) -> None:
    """Give the pictures of a run to the loggers that take pictures; `step` is counted in this phase."""
    for logger in loggers:
        for key, path in pictures.items():
            if isinstance(logger, Wandb):
                logger.log_image(key, [str(path)], step=step)
            elif isinstance(logger, TensorBoard):
                import cv2

                picture = cv2.imread(str(path))
                if picture is not None:
                    logger.experiment.add_image(key, picture[:, :, ::-1], step + logger.first_step, dataformats="HWC")


def log_checkpoint(loggers: list[Logger], path: Path, title: str) -> None:
    """Upload a checkpoint as an artifact where `logger.wandb.artifact` asks for it."""
    for logger in loggers:
        if isinstance(logger, Wandb) and logger.artifact:
            import wandb

            artifact = wandb.Artifact(f"model-{logger.experiment.id}", type="model", description=title)
            artifact.add_file(str(path))
            logger.experiment.log_artifact(artifact, aliases=["best"])
