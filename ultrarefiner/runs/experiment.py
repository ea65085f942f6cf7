"""One experiment: plan → check → train what is missing → show. `run` is what `train.py` calls.

The directory of a run follows from its settings, so the same call resumes what was interrupted, or shows what is
finished; what a phase starts from is built first.
"""

import logging
import os
import warnings
from pathlib import Path

import torch
from omegaconf import DictConfig

from ultrarefiner.errors import UserError
from ultrarefiner.ranks import agreed
from ultrarefiner.results import tables
from ultrarefiner.runs import start
from ultrarefiner.runs.build import blaming
from ultrarefiner.runs.checkpoints import resume_point
from ultrarefiner.runs.interruption import Deadline
from ultrarefiner.runs.plan import Run, plan, unfinished
from ultrarefiner.runs.provenance import lock
from ultrarefiner.runs.training import check, train

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> Path:
    """Run one phase and what it builds on, or show its result where it is finished, or go on where it was interrupted.

    Args:
        cfg: a composed configuration (`conf/train.yaml`).

    Returns:
        The run directory.

    Raises:
        UserError: a mistake in the configuration, the data or a checkpoint.
        Paused: `trainer.budget_minutes` are up.
    """
    _quiet()
    deadline = Deadline(cfg.trainer.budget_minutes)
    with blaming(cfg, "the plan fails"):
        runs = plan(cfg)
    target = runs[-1]
    if agreed(target.finished):
        tables.summary(target.directory, finished_before=True)
        return target.directory
    for each in unfinished(runs):
        if damage := each.damage:
            what = damage.partition(";")[0]
            if not resume_point(each.directory / "checkpoints"):
                raise UserError(f"{what}, and no checkpoint to measure it again is there; delete {each.directory}")
            log.warning("%s; this run is measured again", what)
    # All that can be wrong is found out here, before hours go into earlier phases.
    with blaming(cfg, "reading the cases fails"):
        for each in runs:
            each.data.prepare_data()
    begun = start.prepare(target)
    check(target, begun.phase)
    with lock(target.directory, wait=False):
        to_do = agreed([each.directory for each in unfinished(runs)])
        for each in runs[:-1]:
            if each.directory in to_do:
                _build(each, cfg.upstream, deadline)
        if target.directory in to_do:  # no other process has finished it meanwhile
            train(target, begun, deadline)
    return target.directory


def _build(earlier: Run, upstream: str, deadline: Deadline) -> None:
    """Train a run that another one starts from, or wait for the process that does."""
    if upstream == "require":
        raise start.missing(earlier)
    with lock(earlier.directory, wait=True):
        if not agreed(earlier.finished):
            train(earlier, start.prepare(earlier), deadline)


def _quiet() -> None:
    """Silence what Lightning says to people who write their own training scripts."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", message=".*ended before the epoch ended.*")  # see data.dataset.EpochSampler
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # SAM's frozen parts
    warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Threads of the data loader's libraries must not fight for the cores of the training process.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("high")
