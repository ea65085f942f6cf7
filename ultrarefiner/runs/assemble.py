"""What a training needs, from its configuration: the cases of a fold, and the phase around its networks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from ultrarefiner.config import ProtectionConfig, not_arguments
from ultrarefiner.data.datamodule import DataModule
from ultrarefiner.data.mask_files import MaskFiles, read_masks
from ultrarefiner.data.store import Store
from ultrarefiner.errors import UserError
from ultrarefiner.phases.phase import Phase
from ultrarefiner.runs.build import augments, build, build_cascade, own_targets, plain
from ultrarefiner.runs.provenance import sources
from ultrarefiner.settings import BRIDGE, COARSE


def build_store(cfg: DictConfig) -> Store:
    """The data set, for all runs of a command."""
    if cfg.dataset.members and "members" not in cfg.dataset.reader:
        raise UserError(f"dataset.members={cfg.dataset.members} is for dataset=combined; choose that, or leave it")
    reader, salt = build(cfg.dataset.reader, "dataset.reader"), ""
    if own_targets(cfg.dataset.reader):  # what it makes of the files is not known from the files
        node = {key: value for key, value in plain(cfg.dataset.reader).items() if key != "root"}
        salt = json.dumps([node, sources(node)], sort_keys=True, default=str)
    return Store(reader, Path(cfg.output_root).expanduser() / "cache", salt)


def build_data(cfg: DictConfig, kind: type[Phase], store: Store | None = None) -> DataModule:
    """The cases of the configured fold, and their loaders."""
    dataset = cfg.dataset
    return DataModule(
        store or build_store(cfg),
        **_partition(cfg),
        seed=cfg.seed,
        coarse_size=cfg.model.coarse_size,
        image_size=cfg.model.image_size,
        batch_size=cfg.phase.batch_size,
        num_workers=cfg.trainer.num_workers,
        augment=build(dataset.augment, "dataset.augment") if augments(cfg) else None,
        simulator=build(cfg.phase.failures, "phase.failures") if kind.simulated else None,
        masks=_masks(cfg) if kind.simulated else None,
        masks_per_image=cfg.phase.masks_per_image if kind.simulated else 1,
        crops=cfg.phase.get("crops"),
        frame=kind.frame,
        without=plain(dataset.without),
    )


def _masks(cfg: DictConfig) -> MaskFiles | None:
    alone = cfg.model.coarse is None
    if cfg.phase.masks is not None:
        return read_masks(cfg.phase.masks, complete=alone)
    if alone:
        raise UserError("model/coarse=files needs phase.masks=FOLDER, with a mask of each case by another tool")
    return None


def build_fold(cfg: DictConfig, size: int, seed: int = 0) -> DataModule:
    """The configured fold without a phase that would use it, with frames of one size (px)."""
    return DataModule(
        build_store(cfg), **_partition(cfg), coarse_size=size, image_size=size, seed=seed, batch_size=1, frame=False
    )


def _partition(cfg: DictConfig) -> dict[str, Any]:
    """Which cases are in which part."""
    dataset = cfg.dataset
    return {
        "fold": cfg.fold,
        "folds": dataset.folds,
        "limit": dict(dataset.limit),
        "include_normal": dataset.include_normal,
        "test_fraction": dataset.test_fraction,
        "split_seed": dataset.split_seed,
    }


def build_phase(cfg: DictConfig, kind: type[Phase], files: Mapping[str, Path]) -> Phase:
    """The phase around its networks; see `build_cascade`."""
    ours = not_arguments()
    settings = {key: value for key, value in plain(cfg.phase).items() if key not in ours}
    settings["optimizer"] = build_optimizer(cfg)
    if BRIDGE in kind.parts:
        settings |= {"protection": ProtectionConfig(**plain(cfg.protection)), "_convert_": "object"}  # and it stays one
    pl.seed_everything(cfg.seed, verbose=False)  # of the processes too that Lightning starts
    phase: Phase = build(settings, "phase", build_cascade(cfg, kind.parts, files))
    try:
        phase.optimizer(phase.groups())  # its arguments are wrong now or after an hour of earlier phases
    except (TypeError, ValueError) as error:
        raise UserError(f"phase.optimizer: {cfg.phase.optimizer._target_} says: {error}") from error
    phase.seed, phase.precision = cfg.seed, cfg.trainer.precision
    return phase


def build_optimizer(cfg: DictConfig) -> Any:
    """Parameter groups → optimiser; arguments that are null are not given."""
    given = {key: value for key, value in plain(cfg.phase.optimizer).items() if value is not None}
    if "lr" in given:
        rates = ", ".join(f"phase.{key}" for key in cfg.phase if key == "lr" or key.endswith("_lr"))
        raise UserError(f"phase.optimizer.lr would not be used; the learning rates are {rates}")
    return build({**given, "_partial_": True}, "phase.optimizer")


def load_start(phase: Phase, name: str, state: Mapping[str, torch.Tensor]) -> None:
    """Give the networks that an earlier phase trained ("coarse", or "sam" and the gate) the weights it left."""
    cascade = phase.cascade
    if name == COARSE:
        networks = {"cascade.coarse.": cascade.coarse}
    else:
        assert cascade.refiner is not None
        networks = {"cascade.refiner.sam.": cascade.refiner.sam, "cascade.gate.": cascade.gate}
    for prefix, network in networks.items():
        assert network is not None
        network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
