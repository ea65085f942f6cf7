"""What a phase starts from: runs of earlier phases, or checkpoints given by path, checked against the experiment."""

import copy
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from ultrarefiner.errors import UserError
from ultrarefiner.files import load
from ultrarefiner.models.weights import require_finite
from ultrarefiner.phases.coarse import CoarsePhase
from ultrarefiner.runs import provenance
from ultrarefiner.runs.build import build_data

PRETRAINED = "pretrained"
# What a checkpoint must have been trained with to fit this experiment, by the phase that made it.
MUST_AGREE = {
    "coarse": ("model.coarse", "model.coarse_size"),
    "sam": ("model.sam", "model.lora", "model.coarse_size", "model.image_size", "prompt_style", "roi", "gate"),
}
# Plain weights have their LoRA terms merged, and start a model with other ones or none as well.
MERGED = ("model.lora",)
FIT = "fit"
# Where weights came from before training says nothing about whether they fit.
NOT_COMPARED = ("checkpoint",)


class Given(NamedTuple):
    """Checkpoints that were given by path, by the network they are for."""

    states: dict[str, dict[str, Tensor]]
    """Of runs of ours: the weights."""
    files: dict[str, Path]
    """Of publishers, or as plain weights: the path."""


def given_checkpoints(cfg: DictConfig) -> Given:
    """What `phase.coarse_checkpoint` and `phase.sam_checkpoint` name, checked against the experiment.

    Raises:
        UserError: a file is missing, unreadable, or was trained with other settings.
    """
    given = Given({}, {})
    for name in MUST_AGREE:
        path = cfg.phase.get(f"{name}_checkpoint")
        if path not in (None, PRETRAINED):
            _read(cfg, name, Path(path).expanduser(), given)
    return given


def earlier_runs(cfg: DictConfig, run: Callable[[DictConfig, bool], Path]) -> dict[str, Path]:
    """The directories of the earlier phases that this one names and that were not given; built or refused.

    Args:
        cfg: the composed configuration.
        run: runs an experiment, or finds it finished, and returns its directory.

    Raises:
        UserError: with `upstream=require`, a run is missing; the sentence has the command that builds it.
    """
    directories = {}
    for name in MUST_AGREE:
        if f"{name}_checkpoint" in cfg.phase and cfg.phase[f"{name}_checkpoint"] is None:
            earlier = earlier_phase(cfg, name)
            if cfg.upstream == "require":
                require_run(earlier, name)
            directories[name] = run(earlier, True)
    return directories


def wants_predictions(phase: DictConfig) -> bool:
    """Whether a phase's configuration asks for out-of-fold predictions of Phase 1 (only Phase 2's can)."""
    return phase.get("softness") == FIT or phase.get("real_ratio", 0) > 0


def settled(cfg: DictConfig) -> DictConfig:
    """The configuration, with how the coarse network is trained for out-of-fold predictions only where they are wanted.

    What a phase does not use must not define its result; and the precision that the machine decides does.

    Raises:
        UserError: what is said of the predictions, of patience or of averaging is out of range or contradicts itself.
    """
    cfg = copy.deepcopy(cfg)
    if cfg.trainer.precision == "auto":
        gpu = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        cfg.trainer.precision = "bf16-mixed" if gpu and torch.cuda.is_bf16_supported() else "32-true"
    _check_epochs(cfg)
    node = cfg.phase.get("sam", cfg.phase)
    if "softness" in node:
        _check_predictions(node)
        wanted = wants_predictions(node)
        with open_dict(cfg):
            node.coarse = cfg.phase.coarse if wanted else None
    return cfg


def defined_by(cfg: DictConfig) -> tuple[str, ...]:
    """The configuration nodes that define the phase's result, beside the ones that every phase has."""
    kind: Any = get_class(cfg.phase._target_)
    return (*kind.defined_by, *(CoarsePhase.defined_by if wants_predictions(cfg.phase) else ()))


def _check_epochs(cfg: DictConfig) -> None:
    patience, decay = cfg.phase.patience, cfg.phase.ema_decay
    if patience is not None and patience < 1:
        raise UserError(f"phase.patience={patience} would end before the first epoch; give 1 or more, or null")
    if decay is not None and not 0 < decay < 1:
        raise UserError(f"phase.ema_decay={decay} is no decay; give a value between 0 and 1 such as 0.999, or null")
    if decay is not None and cfg.protection.guard is not None and cfg.phase.name == "e2e":
        raise UserError("protection.guard restores weights, phase.ema_decay averages them; give one of them")
    if cfg.trainer.budget_minutes is not None and cfg.trainer.budget_minutes <= 0:
        raise UserError(f"trainer.budget_minutes={cfg.trainer.budget_minutes} leaves no time; give more, or null")
    if cfg.trainer.save_minutes < 0:
        raise UserError(f"trainer.save_minutes={cfg.trainer.save_minutes} is no time; give 0 (each step) or more")


def _check_predictions(node: DictConfig) -> None:
    if node.softness not in (None, FIT):
        raise UserError(f"phase.softness={node.softness} is not one of null, {FIT}")
    if not 0 <= node.real_ratio <= 1:
        raise UserError(f"phase.real_ratio={node.real_ratio} is no share; give 0 to 1")
    if node.parts < 2:
        raise UserError(f"phase.parts={node.parts} leaves nothing to train on; give 2 or more")
    if node.softness == FIT and node.failures.get("softness") is not None:
        raise UserError(f"phase.softness={FIT} and phase.failures.softness contradict each other; give one of them")


def earlier_phase(cfg: DictConfig, name: str) -> DictConfig:
    """The same experiment with the earlier phase in place of this one."""
    earlier = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    with open_dict(earlier):
        earlier.phase = earlier.phase[name]
    assert isinstance(earlier, DictConfig)
    return earlier


def require_run(earlier: DictConfig, name: str) -> None:
    """Refuse to go on without a finished run.

    Raises:
        UserError: it is not finished; the sentence has the command that builds it.
    """
    data = build_data(earlier, get_class(earlier.phase._target_))
    directory = provenance.run_directory(earlier, provenance.settings(earlier, defined_by(earlier), data.fingerprint()))
    if not (directory / "summary.json").is_file():
        without = earlier.dataset.without
        part = [] if without is None else [f"dataset.without=[{','.join(map(str, without))}]"]
        raise UserError(
            f"upstream=require, and the finished phase={name} that this run starts from is not there "
            f"({directory}); build it with: {command(name, part)}"
        )


def command(phase: str, more: Sequence[str] = ()) -> str:
    """The command line of the earlier phase: this one's, with what is said of `phase.NAME.` said of `phase.`."""
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    kept = [f"phase={phase}"]
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.startswith(f"phase.{phase}."):
            kept.append(override.replace(f"phase.{phase}.", "phase.", 1))
        elif key not in ("phase", "upstream") and not key.startswith("phase."):
            kept.append(override)
    return shlex.join(["python", "-m", "ultrarefiner.train", *kept, *more])


def _read(cfg: DictConfig, name: str, path: Path, given: Given) -> None:
    """A checkpoint of ours with its settings, weights of ours with them in a file beside, or a publisher's file."""
    if path.suffix == ".npz":  # of TransUNet's authors' image classifier: no run of ours ends in one
        raise UserError(
            f"phase.{name}_checkpoint={path} is not a segmentation network; give it as model.coarse_weights"
        )
    content = load(path)
    beside = path.with_suffix(".json")
    if isinstance(content, dict) and "ultrarefiner" in content:
        _check(cfg, name, path, content["ultrarefiner"], MUST_AGREE[name])
        require_finite(content["state_dict"], path)
        given.states[name] = content["state_dict"]
        return
    if beside.is_file():
        nodes = [node for node in MUST_AGREE[name] if node not in MERGED]
        _check(cfg, name, path, json.loads(beside.read_text(encoding="utf-8")), nodes)
    given.files[name] = path


def _check(cfg: DictConfig, name: str, path: Path, settings: dict[str, Any], nodes: Sequence[str]) -> None:
    given = f"phase.{name}_checkpoint={path}"
    made_by = settings["phase"]["name"]
    if made_by not in (name, cfg.phase.name):
        raise UserError(f"{given} was made by phase={made_by}; give one of phase={name}")
    trained: dict[str, Any] = {}
    here: dict[str, Any] = {}
    for node in nodes:
        trained |= _flat(node, settings[node])
        here |= _flat(node, OmegaConf.to_container(cfg, resolve=True), node.split("."))
    differing = [
        f"{key}={trained.get(key)} (here {here.get(key)})"
        for key in sorted({*trained, *here})
        if trained.get(key) != here.get(key) and key.rpartition(".")[2] not in NOT_COMPARED
    ]
    if differing:
        raise UserError(f"{given} was trained with other settings: {', '.join(differing)}; make both the same")
    if settings["dataset"]["name"] == cfg.dataset.name and settings["fold"] != cfg.fold:
        raise UserError(
            f"{given} was trained on fold={settings['fold']}, whose training cases are test cases of fold={cfg.fold}; "
            "give the one of the same fold"
        )


def _flat(key: str, value: Any, path: list[str] | None = None) -> dict[str, Any]:
    for step in path or []:
        value = value[step]
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _flat(f"{key}.{name}", inner).items()}
    return {key: value}
