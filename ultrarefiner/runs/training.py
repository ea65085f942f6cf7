"""One run: train a phase, measure it, leave the results behind."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.loggers import Logger

from ultrarefiner import ranks
from ultrarefiner.data.datamodule import DataModule
from ultrarefiner.data.dataset import collate
from ultrarefiner.data.folds import save_split
from ultrarefiner.errors import UserError
from ultrarefiner.files import remove_parts, save, write_atomically
from ultrarefiner.models.weights import fingerprint
from ultrarefiner.phases.phase import Phase
from ultrarefiner.results import tables
from ultrarefiner.results.evaluation import Rows, evaluate
from ultrarefiner.results.metrics import mean_scores
from ultrarefiner.runs import callbacks, checkpoints, ddp, history, keeping, outcome, start, tracking
from ultrarefiner.runs.build import blaming, build, find, misfit, own_targets, plain
from ultrarefiner.runs.interruption import Deadline, Interruption
from ultrarefiner.runs.out_of_fold import add_predictions
from ultrarefiner.runs.plan import Run


def train(run: Run, begun: start.Beginning, deadline: Deadline) -> None:
    """Train a run, or go on training it, and measure it on its validation and test cases.

    Args:
        run: whose directory is locked, and whose earlier runs are finished.
        begun: its phase; see `start.prepare`.
        deadline: of the whole command.

    Raises:
        UserError: training diverges, or something cannot be written.
        Paused: the time is up.
    """
    with history.recorded(run) as said:
        _train(run, begun, deadline, said)
    tables.summary(run.directory, finished_before=False)


def _train(run: Run, begun: start.Beginning, deadline: Deadline, said: Callable[[str], dict[str, Any]]) -> None:
    cfg, phase, directory = run.cfg, begun.phase, run.directory
    first_step, seen = start.load_weights(run, begun)
    add_predictions(run)
    first = ranks.rank() == 0
    if first:
        remove_parts(directory, directory / "checkpoints")
        write_atomically(directory / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
        save_split(run.data.split, directory / "folds.csv")
    tables.beginning(run.title, run.data.describe(), directory)
    phase.carried = checkpoints.about(run.settings, plain(cfg), seen)
    if first:
        history.go_on_from_fewer_epochs(run, phase)
    ranks.agreed(None)  # whose checkpoints all of them read
    loggers = _loggers(run, first_step) if first else []
    status = "failed"
    try:
        if cfg.trainer.compile:
            phase.cascade.compile_networks()
        keeper = keeping.KeepCheckpoints(directory / "checkpoints", phase.monitor)
        trainer = _trainer(run, phase, loggers, keeper, deadline)
        # Before a checkpoint is read: Lightning converts after that, and trainer.precision=64-true would lose digits.
        trainer.precision_plugin.convert_module(phase)
        phase.to(trainer.strategy.root_device)
        if phase.device.type == "cpu":
            callbacks.keep_pages()
        measured = tracking.Progress(watched=tracking.watched(cfg.trainer.progress_bar))
        with _enough_memory():
            baseline = _baseline(phase, run, measured) if phase.compared else {}
            _fit(trainer, phase, run)
            results = _measure(phase, run.data, measured)
        if first:
            steps = (first_step, first_step + trainer.global_step)
            left = outcome.Outcome(run, phase, results, baseline, seen, steps, keeper.best_epoch, trainer.current_epoch)
            left.write(loggers, trainer.global_step)
            status = "success"
    finally:
        tracking.close(loggers, status)
    if first:
        left.finish(said("finished"))
    ranks.agreed(None)  # the first process has written the summary


def check(run: Run, phase: Phase) -> None:
    """Find out what only the machine, a logger or a class of the user's own can tell, before hours go by.

    Raises:
        UserError: Lightning cannot train so here, a logger does not take what it is given, or a batch fails.
    """
    t = run.cfg.trainer
    try:
        pl.Trainer(
            accelerator=t.accelerator, devices=1, strategy=ddp.strategy(t.strategy, False), precision=t.precision
        )
    except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"trainer={{accelerator: {t.accelerator}, strategy: {t.strategy}}}: {reason}") from error
    for name, node in plain(run.cfg.logger).items():
        target = node.get("_target_") if isinstance(node, dict) else None
        if not isinstance(target, str):
            raise UserError(
                f"logger.{name} is no logger: it needs {name}._target_; choose logger=[csv,wandb] or another"
            )
        find(target, f"logger.{name}")
        if reason := misfit(node, (run.directory,), _about(run, 0)):
            raise UserError(f"logger.{name}: {target} says: {reason}")
    if own_targets(run.cfg):
        with blaming(run.cfg, "a first case fails"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            _try(run.data, phase)


def _try(data: DataModule, phase: Phase) -> None:
    """What a class of the user's own gives for one case must be what docs/contracts.md says."""
    training = phase.training
    phase.eval()
    batch = collate([data.dataset("val", native=True)[0]])
    if phase.cascade.refiner is not None:
        roi = phase.cascade.refiner.roi
        boxes = roi.boxes(batch["coarse_mask"], batch["aspect"])  # type: ignore[operator]
        inside = roi.keeps_aspect or bool(((boxes >= 0) & (boxes <= 1)).all())
        if boxes.shape != (1, 4) or not inside or not (boxes[:, :2] < boxes[:, 2:]).all():
            raise ValueError(f"boxes() of roi must be (x1, y1, x2, y2) in [0, 1], got {boxes.tolist()}")
    loss = phase.terms(collate([data.dataset("train", augment=data.augment)[0]]))["loss"]
    if loss.numel() != 1 or not loss.isfinite():
        raise ValueError(f'terms()["loss"] must be one finite number, got {loss}')
    for name, logits in phase.masks(batch).items():
        if logits.ndim != 4 or logits.shape[:2] != (1, 1) or not logits.isfinite().all():
            raise ValueError(f"the {name} mask must be finite logits (1, 1, height, width), got {tuple(logits.shape)}")
    phase.train(training)


def _measure(phase: Phase, data: DataModule, measured: tracking.Progress, what: str = "") -> dict[str, Rows]:
    loaders = {"val": data.val_dataloader(), "test": data.test_dataloader()}
    return {part: evaluate(phase.predict, measured(loader, f"{what}{part}")) for part, loader in loaders.items()}


def _baseline(phase: Phase, run: Run, measured: tracking.Progress) -> dict[str, Rows]:
    """What the weights can do that a phase starts from, which is compared with them from then on.

    It is kept with the checkpoints: a run that is interrupted again and again measures it once.
    """
    file = run.directory / "checkpoints" / checkpoints.BASELINE
    mark = fingerprint(phase.cascade, run.data.store.fingerprint)
    kept = checkpoints.readable(file, "it is measured again")
    known: tuple[str, dict[str, Rows]] = ranks.agreed(kept or ("", {}))
    if known[0] != mark:
        known = mark, _measure(phase, run.data, measured, "baseline, ")
        if ranks.rank() == 0:
            save(known, file)
    phase.start_from(mean_scores(known[1]["val"], "coarse")["dice"])
    return known[1]


def _fit(trainer: pl.Trainer, phase: Phase, run: Run) -> None:
    """Train, or go on training, and leave the phase with its best weights."""
    phase.train()  # Lightning trains in whatever mode it finds
    resumed = checkpoints.resume_point(run.directory / "checkpoints")
    try:
        trainer.fit(phase, datamodule=run.data, ckpt_path=resumed, weights_only=True)
    except SystemExit:  # Lightning's way to end when the user interrupts
        raise KeyboardInterrupt from None
    phase.load_state_dict(checkpoints.best(run.directory)["state_dict"])
    phase.to(trainer.strategy.root_device)


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    """Turn that the memory does not suffice, here or in a loader's worker, into one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or ["it is used up"])[-1]
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        raise UserError(
            f"the memory may not suffice ({reason[:200]}): lower phase.batch_size, trainer.num_workers or "
            "model.image_size; the same command continues, a changed one begins anew"
        ) from error


_NO_MEMORY = re.compile("out of memory|can't allocate memory|worker .* (killed by signal|exited unexpectedly)", re.I)


def _trainer(
    run: Run, phase: Phase, loggers: list[Logger], keeper: keeping.KeepCheckpoints, deadline: Deadline
) -> pl.Trainer:
    cfg, t, directory = run.cfg, run.cfg.trainer, run.directory
    average = [] if cfg.phase.ema_decay is None else [EMAWeightAveraging(decay=cfg.phase.ema_decay)]
    return pl.Trainer(
        default_root_dir=directory,
        max_epochs=phase.epochs,
        accelerator=t.accelerator,
        devices=t.devices,
        num_nodes=t.num_nodes,
        # Of SAM some parts are frozen for some epochs, and prompts that are switched off leave others idle.
        strategy=ddp.strategy(t.strategy, idle_parts=phase.cascade.refiner is not None),
        precision=t.precision,
        accumulate_grad_batches=t.accumulate,
        gradient_clip_val=phase.grad_clip,
        # Some CUDA kernels have no deterministic form (grid_sample's backward): take the others all the same.
        deterministic="warn" if t.deterministic else False,
        logger=loggers,
        callbacks=[
            *average,
            *tracking.callbacks(directory / "metrics.csv", cfg.phase.name, t.progress_bar),
            callbacks.Estimate(),
            keeper,
            callbacks.Patience(cfg.phase.patience, keeper),
            Interruption(directory / "checkpoints" / checkpoints.LAST, deadline, t.save_minutes),
        ],
        plugins=[keeping.SafeCheckpointIO(), *ddp.plugins()],
        enable_progress_bar=tracking.watched(t.progress_bar),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _about(run: Run, first_step: int) -> dict[str, Any]:
    """What a logger is told of a run."""
    cfg = run.cfg
    return {
        "name": run.title,
        "job_type": cfg.phase.name,
        "group": tracking.group(cfg),
        "tags": [f"fold{cfg.fold}", f"roi_{cfg.roi.name}", f"protection_{cfg.protection.name}", cfg.prompt_style.name],
        "settings": run.settings,
        "first_step": first_step,
    }


def _loggers(run: Run, first_step: int) -> list[Logger]:
    # Not recursive: the settings that go along name targets of their own.
    about = _about(run, first_step) | {"_recursive_": False, "_convert_": "all"}
    return [build(node, f"logger.{name}", run.directory, **about) for name, node in plain(run.cfg.logger).items()]
