"""What a run starts from: its networks, the weights of earlier runs or of files, and real predictions for Phase 2."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from torch import Tensor

from ultrarefiner.config import Config
from ultrarefiner.errors import UserError
from ultrarefiner.files import load
from ultrarefiner.models.weights import require_finite
from ultrarefiner.phases.phase import Phase
from ultrarefiner.runs.build import build_phase, load_start
from ultrarefiner.runs.checkpoints import best_weights
from ultrarefiner.runs.plan import Run
from ultrarefiner.settings import COARSE, SAM, fitting

PRETRAINED = "pretrained"
MERGED = "model.lora"
"""Plain weights have their LoRA terms merged, and start a model with other ones or none as well."""


class Given(NamedTuple):
    """Checkpoints that were given by path, by the network they are for."""

    states: dict[str, dict[str, Tensor]]
    """Of runs of ours: the weights."""
    files: dict[str, Path]
    """Of publishers, or as plain weights: the path."""


class Beginning(NamedTuple):
    """A phase that is built, and the weights that it is still to take from files of ours."""

    phase: Phase
    states: Mapping[str, dict[str, Tensor]]


def prepare(run: Run) -> Beginning:
    """Build a run's phase, and check all that can be checked before the runs that it starts from are there.

    Raises:
        UserError: a class refuses its arguments, or a given checkpoint is missing, unreadable, or was trained with
            other settings.
    """
    given = Given({}, {})
    for name in (COARSE, SAM):
        path = run.cfg.phase.get(f"{name}_checkpoint")
        if path not in (None, PRETRAINED):
            _read(run, name, Path(path).expanduser(), given)
    return Beginning(build_phase(run.cfg, run.kind, given.files), given.states)


def load_weights(run: Run, begun: Beginning) -> int:
    """Give a phase the weights that it starts from.

    Returns:
        How many steps were done for them.
    """
    states = {**begun.states, **{name: best_weights(earlier.directory) for name, earlier in run.earlier.items()}}
    for name, state in states.items():
        load_start(begun.phase, name, state)
    return sum(last_step(earlier.directory) for earlier in run.earlier.values())


def last_step(directory: Path) -> int:
    """Where a finished run's steps end, counted from the first phase that it builds on."""
    return int(json.loads((directory / "summary.json").read_text(encoding="utf-8"))["last_step"])


def missing(run: Run) -> UserError:
    """For `upstream=require`: what is missing, and the command that builds it."""
    without = run.cfg.dataset.without
    part = [] if without is None else [f"dataset.without=[{','.join(map(str, without))}]"]
    return UserError(
        f"upstream=require, and the finished phase={run.cfg.phase.name} that this run starts from is not there "
        f"({run.directory}); build it with: {command(run.cfg.phase.name, part)}"
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


def _read(run: Run, name: str, path: Path, given: Given) -> None:
    """A checkpoint of ours with its settings, weights of ours with them in a file beside, or a publisher's file."""
    if path.suffix == ".npz":  # of TransUNet's authors' image classifier: no run of ours ends in one
        raise UserError(
            f"phase.{name}_checkpoint={path} is not a segmentation network; give it as model.coarse_weights"
        )
    content = load(path)
    beside = path.with_suffix(".json")
    if isinstance(content, dict) and "ultrarefiner" in content:
        _check(run, name, path, content["ultrarefiner"], merged=False)
        require_finite(content["state_dict"], path)
        given.states[name] = content["state_dict"]
        return
    if beside.is_file():
        _check(run, name, path, json.loads(beside.read_text(encoding="utf-8")), merged=True)
    given.files[name] = path


def _check(run: Run, name: str, path: Path, settings: dict[str, Any], merged: bool) -> None:
    given = f"phase.{name}_checkpoint={path}"
    made_by, phase = settings["phase"]["name"], run.cfg.phase.name
    if made_by not in (name, phase):
        raise UserError(f"{given} was made by phase={made_by}; give one of phase={name}")
    here = {key: value for key, value in fitting(run.cfg, name, Config).items() if not (merged and key == MERGED)}
    trained, wanted = _flat({key: settings.get(key) for key in here}), _flat(here)
    keys = sorted({*trained, *wanted})
    differing = [f"{k}={trained.get(k)} (here {wanted.get(k)})" for k in keys if trained.get(k) != wanted.get(k)]
    if differing:
        raise UserError(f"{given} was trained with other settings: {', '.join(differing)}; make both the same")
    if settings["dataset.name"] == run.cfg.dataset.name and settings["fold"] != run.cfg.fold:
        raise UserError(
            f"{given} was trained on fold={settings['fold']}, whose training cases are test cases of "
            f"fold={run.cfg.fold}; give the one of the same fold"
        )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat
