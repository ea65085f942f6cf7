"""One experiment: check → build → train → measure → leave the results behind.

`run` is what `train.py` calls. The directory of a run follows from its settings, so the same call resumes what was
interrupted, or shows what is finished; a phase that needs earlier ones builds them by the same call first.
"""

import csv
import functools
import io
import json
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging
from pytorch_lightning.loggers import Logger
from torch.utils.data import DataLoader

from ultrarefiner import ranks
from ultrarefiner.data.datamodule import DataModule
from ultrarefiner.data.dataset import collate
from ultrarefiner.data.folds import save_split
from ultrarefiner.errors import UserError
from ultrarefiner.files import load, save, write_atomically
from ultrarefiner.models.lora import merge_lora
from ultrarefiner.phases.e2e import E2EPhase
from ultrarefiner.phases.phase import Phase
from ultrarefiner.results import metrics, pictures, tables
from ultrarefiner.results.evaluation import evaluate, predict
from ultrarefiner.runs import callbacks, checkpoints, ddp, interruption, provenance, tracking
from ultrarefiner.runs.build import build, build_data, build_phase, load_start, plain
from ultrarefiner.runs.out_of_fold import add_predictions
from ultrarefiner.runs.start import defined_by, earlier_runs, given_checkpoints, settled

Rows = list[dict[str, Any]]


def run(cfg: DictConfig, wait: bool = False, deadline: interruption.Deadline | None = None) -> Path:
    """Run one phase, or show its result where it is finished, or continue where it was interrupted.

    Args:
        cfg: a composed configuration (`conf/train.yaml`).
        wait: for another run, which starts from this one: wait where another process is building the same result
            instead of refusing, and say nothing where it is finished.
        deadline: of that other run; without it, `trainer.budget_minutes` count from here.

    Returns:
        The run directory.

    Raises:
        UserError: a mistake in the configuration, the data or a checkpoint.
        Paused: `trainer.budget_minutes` are up.
    """
    _quiet()
    deadline = deadline or interruption.Deadline(cfg.trainer.budget_minutes)
    run_earlier = functools.partial(run, deadline=deadline)
    if cfg.upstream not in ("build", "require"):
        raise UserError(f"upstream={cfg.upstream} is not one of build, require")
    cfg = settled(cfg)
    kind: type[Phase] = get_class(cfg.phase._target_)
    data = build_data(cfg, kind)
    data.prepare_data()
    settings = provenance.settings(cfg, defined_by(cfg), data.fingerprint())
    directory = provenance.run_directory(cfg, settings)
    finished = directory / "summary.json"
    if not ranks.agreed(finished.is_file()):
        # All that can be wrong is found out here, before hours go into earlier phases.
        given = given_checkpoints(cfg)
        phase = build_phase(cfg, kind, given.files)
        with provenance.lock(directory, wait):
            if not ranks.agreed(finished.is_file()):  # by the process that we waited for
                earlier = earlier_runs(cfg, run_earlier)
                states = given.states | {name: best_weights(where) for name, where in earlier.items()}
                for name, state in states.items():
                    load_start(phase, name, state)
                add_predictions(cfg, data, directory, run_earlier)
                first_step = sum(last_step(where) for where in earlier.values())
                _run(cfg, phase, data, settings, directory, first_step, deadline)
                ranks.agreed(None)  # the first process has written the summary
                tables.summary(directory, finished_before=False)
                return directory
    if not wait:
        tables.summary(directory, finished_before=True)
    return directory


def best_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The weights that a finished run chose."""
    state: dict[str, torch.Tensor] = load(directory / "checkpoints" / checkpoints.BEST)["state_dict"]
    return state


def last_step(directory: Path) -> int:
    """Where a finished run's steps end, counted from the first phase that it builds on."""
    return int(json.loads((directory / "summary.json").read_text(encoding="utf-8"))["last_step"])


def _run(
    cfg: DictConfig,
    phase: Phase,
    data: DataModule,
    settings: dict[str, Any],
    directory: Path,
    first_step: int,
    deadline: interruption.Deadline,
) -> None:
    title = f"{cfg.phase.name} · {cfg.dataset.name} · {cfg.model.name} · fold {cfg.fold} · seed {cfg.seed}"
    if cfg.dataset.without is not None:
        title += " · without part {} of {}".format(*cfg.dataset.without)
    first = ranks.rank() == 0
    if first:
        write_atomically(directory / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
        save_split(data.split, directory / "folds.csv")
    tables.beginning(title, data.describe(), directory)
    phase.settings = settings
    loggers = _loggers(cfg, title, settings, directory, first_step) if first else []
    status = "failed"
    try:
        if cfg.trainer.compile:
            phase.cascade.compile_networks()
        trainer = _trainer(cfg, phase, loggers, directory, deadline)
        # Before a checkpoint is read: Lightning converts after that, and trainer.precision=64-true would lose digits.
        trainer.precision_plugin.convert_module(phase)
        phase.to(trainer.strategy.root_device)
        if phase.device.type == "cpu":
            callbacks.keep_pages()
        measured = tracking.Progress(watched=tracking.watched(cfg.trainer.progress_bar))
        baseline = _baseline(phase, data, measured)
        _fit(trainer, phase, data, directory / "checkpoints")
        results = {part: evaluate(phase, measured(loader, part)) for part, loader in _measured(data).items()}
        if not first:
            return
        _save_networks(phase, directory / "checkpoints")
        _write_cases(directory / "cases.csv", data, results["test"], baseline.get("test"))
        drawn = _draw(phase, data, results["test"], directory)
        summary = _summarise(cfg, title, data, results, baseline, trainer) | {
            "first_step": first_step,
            "last_step": first_step + trainer.global_step,
        }
        tracking.log_pictures(loggers, drawn, trainer.global_step)
        tracking.log_checkpoint(loggers, directory / "checkpoints" / checkpoints.BEST, title)
        for logger in loggers:
            logger.log_metrics(_flat_scores(summary), trainer.global_step)
        status = "success"
    finally:
        tracking.close(loggers, status)
    # Last: a directory with a summary is a finished run.
    write_atomically(directory / "summary.json", json.dumps(summary, indent=2).encode())


def _measured(data: DataModule) -> dict[str, DataLoader]:
    return {"val": data.val_dataloader(), "test": data.test_dataloader()}


def _baseline(phase: Phase, data: DataModule, measured: tracking.Progress) -> dict[str, Rows]:
    """Phase 3 begins with what Phase 1 can do, and is compared with it from then on."""
    if not isinstance(phase, E2EPhase):
        return {}
    parts = {part: measured(loader, f"baseline, {part}") for part, loader in _measured(data).items()}
    rows = {part: evaluate(phase, batches, phase.coarse_masks) for part, batches in parts.items()}
    phase.start_from(metrics.mean_scores(rows["val"], "coarse")["dice"])
    return rows


def _fit(trainer: pl.Trainer, phase: Phase, data: DataModule, folder: Path) -> None:
    """Train, or go on training, and leave the phase with its best weights."""
    phase.train()  # Lightning trains in whatever mode it finds
    try:
        trainer.fit(phase, datamodule=data, ckpt_path=checkpoints.resume_point(folder), weights_only=True)
    except SystemExit:  # Lightning's way to end when the user interrupts
        raise KeyboardInterrupt from None
    phase.load_state_dict(load(folder / checkpoints.BEST)["state_dict"])
    phase.to(trainer.strategy.root_device)


def _trainer(
    cfg: DictConfig, phase: Phase, loggers: list[Logger], directory: Path, deadline: interruption.Deadline
) -> pl.Trainer:
    t = cfg.trainer
    keeper = checkpoints.KeepCheckpoints(directory / "checkpoints", phase.monitor)
    average: list[Callback] = []
    if cfg.phase.ema_decay is not None:
        average = [EMAWeightAveraging(decay=cfg.phase.ema_decay)]
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
            interruption.Interruption(directory / "checkpoints" / checkpoints.LAST, deadline, t.save_minutes),
        ],
        plugins=[checkpoints.SafeCheckpointIO(), *ddp.plugins()],
        enable_progress_bar=tracking.watched(t.progress_bar),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _loggers(cfg: DictConfig, title: str, settings: dict[str, Any], directory: Path, first_step: int) -> list[Logger]:
    about = {
        "name": title,
        "job_type": cfg.phase.name,
        "group": tracking.group(cfg),
        "tags": [f"fold{cfg.fold}", f"roi_{cfg.roi.name}", f"protection_{cfg.protection.name}", cfg.prompt_style.name],
        "settings": settings,
        "first_step": first_step,
    }
    # Not recursive: the settings that go along name targets of their own.
    whole = {"_recursive_": False, "_convert_": "all"}
    return [build(plain(node) | whole, f"logger.{name}", directory, **about) for name, node in cfg.logger.items()]


def _save_networks(phase: Phase, folder: Path) -> None:
    """The best weights of each network under its publisher's own names, their settings beside them."""
    cascade = phase.cascade
    states = {
        "coarse": None if cascade.coarse is None else cascade.coarse.state_dict(),
        "sam": None if cascade.refiner is None else merge_lora(cascade.refiner.sam),  # the publisher knows no LoRA
    }
    for name, state in states.items():
        if state is not None:
            save({key: value.detach().cpu() for key, value in state.items()}, folder / f"best_{name}.pth")
            beside = json.dumps(phase.settings, indent=2).encode()
            write_atomically(folder / f"best_{name}.json", beside)


def _write_cases(path: Path, data: DataModule, rows: Rows, baseline: Rows | None) -> None:
    """cases.csv: one row for each test case."""
    text = io.StringIO()
    writer = None
    for position, row in enumerate(rows):
        case = data.split.test[row["index"]]
        columns = {"id": case.id, "patient": case.patient, "dataset": case.dataset, "label": case.label}
        columns |= {name: value for name, value in row.items() if name != "index"}
        if baseline is not None:
            columns |= {f"baseline_{m}": baseline[position][f"coarse_{m}"] for m in metrics.METRICS}
        if writer is None:
            writer = csv.DictWriter(text, list(columns))
            writer.writeheader()
        writer.writerow(columns)
    write_atomically(path, text.getvalue().encode())


def _draw(phase: Phase, data: DataModule, rows: Rows, directory: Path) -> dict[str, Path]:
    """The curves of the training, and the worst, median and best test cases."""
    drawn = {"curves": directory / "curves.png", "overlays": directory / "overlays.png"}
    baseline = phase.baseline if isinstance(phase, E2EPhase) else None
    pictures.curves(directory / "metrics.csv", drawn["curves"], baseline=baseline)
    judged = f"{phase.judged_by}_dice"
    chosen = [rows[i]["index"] for i in pictures.pick_worst_median_best([row[judged] for row in rows], 2)]
    scores = {row["index"]: row for row in rows}
    test = data.dataset("test", native=True)
    sheet = []
    for index in chosen:
        batch = collate([test[index]])
        masks = predict(phase, batch)[0]
        case = data.split.test[index]
        image, _ = data.reader.read(case)
        caption = "  ".join(f"{w} {scores[index][f'{w}_dice']:.3f}" for w in ("coarse", "refined") if w in masks)
        sheet.append((case.id, image, masks["truth"], masks.get("coarse"), masks.get("refined"), f"Dice {caption}"))
    pictures.overlay_sheet(sheet, drawn["overlays"])
    return drawn


def _summarise(
    cfg: DictConfig,
    title: str,
    data: DataModule,
    results: dict[str, Rows],
    baseline: dict[str, Rows],
    trainer: pl.Trainer,
) -> dict[str, Any]:
    scores = {
        part: {w: s for w in ("coarse", "refined") if (s := metrics.mean_scores(rows, w))}
        for part, rows in results.items()
    }
    keeper = next(c for c in trainer.callbacks if isinstance(c, checkpoints.KeepCheckpoints))  # type: ignore[attr-defined]
    return {
        "title": title,
        "baseline": {part: metrics.mean_scores(rows, "coarse") for part, rows in baseline.items()} or None,
        **scores,
        "best_epoch": keeper.best_epoch,
        "epochs": trainer.current_epoch,
        "data": data.describe(),
        "environment": provenance.environment(),
        "config": plain(cfg),
    }


def _flat_scores(summary: dict[str, Any]) -> dict[str, float]:
    return {
        f"best/{part}/{which}/{name}": value
        for part in ("val", "test")
        for which, values in summary[part].items()
        for name, value in values.items()
        if math.isfinite(value)
    }


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
