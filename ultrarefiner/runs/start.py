"""What a run starts from: its networks, the weights of earlier runs or of files, and real predictions for Phase 2."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from torch import Tensor

from ultrarefiner.config import Config
from ultrarefiner.data.cases import Case
from ultrarefiner.data.datamodule import DataModule
from ultrarefiner.data.seen import Seen
from ultrarefiner.errors import UserError
from ultrarefiner.files import load, read_json
from ultrarefiner.models.weights import SAFETENSORS, require_finite
from ultrarefiner.phases.phase import Phase
from ultrarefiner.runs import checkpoints
from ultrarefiner.runs.assemble import build_phase, load_start
from ultrarefiner.runs.plan import Run
from ultrarefiner.settings import COARSE, NAMES_OF_WEIGHTS, SAM, comparable, fitting, without_start

_PARTS = {"val": "validation", "train": "training"}
MERGED = "model.lora"
"""Plain weights have their LoRA terms merged, and start a model with other ones or none as well."""


class Given(NamedTuple):
    """Checkpoints that were given by path, by the network they are for."""

    states: dict[str, dict[str, Tensor]]
    """Of runs of ours: the weights."""
    files: dict[str, Path]
    """Of publishers, or as plain weights: the path."""


class Beginning(NamedTuple):
    """A phase that is built, the weights that it is still to take from files of ours, and what given ones have seen."""

    phase: Phase
    states: Mapping[str, dict[str, Tensor]]
    seen: Seen


def prepare(run: Run) -> Beginning:
    """Build a run's phase, and check all that can be checked before the runs that it starts from are there.

    Raises:
        UserError: a class refuses its arguments, or a given checkpoint is missing, unreadable, was trained with other
            settings, or has seen test cases of this run.
    """
    given, seen = Given({}, {}), Seen()
    for name in (COARSE, SAM):
        path = run.cfg.phase.get(f"{name}_checkpoint")
        if path not in NAMES_OF_WEIGHTS:
            seen |= _read(run, name, Path(path).expanduser(), given)
    model = run.cfg.model
    for name, key, path in (
        (COARSE, "model.coarse_weights", model.coarse_weights),
        (SAM, "model.sam.checkpoint", model.sam.get("checkpoint")),
    ):
        if name in run.kind.parts and path not in NAMES_OF_WEIGHTS:
            seen |= _unseen(run, f"{key}={path}", checkpoints.said_of(Path(path).expanduser()))
    phase = build_phase(run.cfg, run.kind, given.files)
    if SAM in given.files:
        checkpoints.load_gate(phase.cascade.gate, given.files[SAM])
    return Beginning(phase, given.states, seen)


def load_weights(run: Run, begun: Beginning) -> tuple[int, Seen]:
    """Give a phase the weights that it starts from.

    Returns:
        How many steps were done for them, and the images that the phase will have seen: its own, and those of all that
        it starts from.
    """
    seen = begun.seen | Seen(frozenset(run.data.marks("train")), frozenset(run.data.marks("val")))
    states = dict(begun.states)
    for name, earlier in run.earlier.items():
        best = checkpoints.best(earlier.directory)
        states[name] = best["state_dict"]
        seen |= Seen.of_lists(best["seen"])
    for name, state in states.items():
        load_start(begun.phase, name, state)
    return sum(last_step(earlier.directory) for earlier in run.earlier.values()), seen


def last_step(directory: Path) -> int:
    """Where a finished run's steps end, counted from the first phase that it builds on."""
    return int(read_json(directory / "summary.json")["last_step"])


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
    overrides, kept = [], [f"phase={phase}"]
    if HydraConfig.initialized():
        overrides = list(HydraConfig.get().overrides.task)
        sources = HydraConfig.get().runtime.config_sources
        kept[:0] = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.startswith(f"phase.{phase}."):
            kept.append(override.replace(f"phase.{phase}.", "phase.", 1))
        elif key not in ("phase", "upstream") and not key.startswith("phase."):
            kept.append(override)
    return shlex.join(["python", "-m", "ultrarefiner.train", *kept, *more])


def _read(run: Run, name: str, path: Path, given: Given) -> Seen:
    """A checkpoint of ours, plain weights of ours, both with their settings, or a publisher's file."""
    key = f"phase.{name}_checkpoint={path}"
    if path.suffix == ".npz":  # of TransUNet's authors' image classifier: no run of ours ends in one
        raise UserError(f"{key} is not a segmentation network; give it as model.coarse_weights")
    content = {} if path.suffix == SAFETENSORS else load(path)
    said = checkpoints.said_of(path, content)
    ours = isinstance(content, dict) and "ultrarefiner" in content
    if said:
        _check(run, name, key, said["ultrarefiner"], merged=not ours)
    seen = _unseen(run, key, said)
    if ours:
        require_finite(content["state_dict"], path)
        given.states[name] = content["state_dict"]
    else:
        given.files[name] = path
    return seen


def require_unseen(data: DataModule, parts: Sequence[str], key: str, seen: Seen, allowed: bool) -> list[Case]:
    """The cases of some parts of a fold that given weights know.

    Args:
        data: the fold.
        parts: "test", …
        key: how the weights were given, such as "checkpoint=best.ckpt".
        seen: what they have seen.
        allowed: whether someone said that this is wanted.

    Raises:
        UserError: there are such cases, and it is not wanted.
    """
    found: list[Case] = []
    for part in parts:
        known = data.known(part, seen)
        if known and not allowed:
            raise UserError(
                f"{key} has seen {len(known)} of the {len(data.split.part(part))} {_PARTS.get(part, part)} cases of "
                f"fold={data.fold}, the first is {known[0].id}; give weights that were trained on other cases, or "
                "set allow_seen=true to measure all the same (every table then says so)"
            )
        found += known
    return found


def _unseen(run: Run, key: str, said: Mapping[str, Any]) -> Seen:
    """The images that given weights have seen.

    Raises:
        UserError: test cases of this run are among them, and nobody said that this is wanted.
    """
    seen = Seen.of_lists(said["seen"]) if said else Seen()
    require_unseen(run.data, ("test", "val"), key, seen, run.cfg.allow_seen)
    return seen


def _check(run: Run, name: str, key: str, settings: dict[str, Any], merged: bool) -> None:
    made_by, phase = settings["phase"]["name"], run.cfg.phase.name
    if made_by not in (name, phase):
        raise UserError(f"{key} was made by phase={made_by}; give one of phase={name}")
    here = {key: value for key, value in fitting(run.cfg, name, Config).items() if not (merged and key == MERGED)}
    trained, wanted = comparable(without_start({key: settings.get(key) for key in here})), comparable(here)
    keys = [k for k in sorted({*trained, *wanted}) if trained.get(k) != wanted.get(k)]
    keys = [k for k in keys if f"{k.partition('.')[0]}.name" not in keys or k.endswith(".name")]  # roi=off says it all
    said = {k: k.removesuffix(".name") if k.count(".") == 1 else k for k in keys}
    differing = [f"{said[k]}={trained.get(k)} (here {wanted.get(k)})" for k in keys]
    if differing:
        raise UserError(f"{key} was trained with other settings: {', '.join(differing)}; make both the same")
