"""What happened in a run's directory: its starts and how they ended; and runs that differ from it in little."""

import contextlib
import datetime
import json
import logging
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from ultrarefiner import ranks
from ultrarefiner.config import Config
from ultrarefiner.errors import Paused, UserError
from ultrarefiner.files import load, read_json, save, write_json
from ultrarefiner.phases.phase import Phase
from ultrarefiner.results.found import Found, differing
from ultrarefiner.runs import checkpoints
from ultrarefiner.runs.build import plain
from ultrarefiner.runs.plan import Run
from ultrarefiner.settings import COARSE, NAMES_OF_WEIGHTS, SAM, comparable

log = logging.getLogger(__name__)
RECORD = "run.json"
EPOCHS = "phase.epochs"


@contextlib.contextmanager
def recorded(run: Run) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Keep in run.json when, where and with which command a run was started, from what, and how that ended.

    The block gets a function that says all this, for summary.json. A start that was killed leaves "ended": null.
    """
    path, began, first = run.directory / RECORD, time.monotonic(), ranks.rank() == 0
    before: Any = {}
    with contextlib.suppress(UserError):
        before = read_json(path)
    before = before if isinstance(before, dict) else {}
    record = {
        "began": before.get("began") or _now(),
        "starts": int(before.get("starts") or 0) + 1,
        "host": platform.node(),
        "command": shlex.join(sys.argv),
        "started_from": _started_from(run),
    }

    def said(ended: str | None) -> dict[str, Any]:
        """With the seconds of all starts but those that were killed."""
        seconds = float(before.get("seconds") or 0) + time.monotonic() - began
        return record | {"seconds": round(seconds, 1), "last": _now(), "ended": ended}

    if first:
        write_json(path, said(None))
    ended = "finished"
    try:
        yield said
    except BaseException as error:
        ended = "paused" if isinstance(error, Paused) else f"failed: {error}"
        if not isinstance(error, UserError):
            ended = (
                "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}: {error}"
            )
        raise
    finally:
        if first:
            with contextlib.suppress(UserError):  # the disk may be full: what ended the training is what to show
                write_json(path, said(ended))


def go_on_from_fewer_epochs(run: Run, phase: Phase) -> None:
    """Before a run's first step: take over what the same run with fewer epochs has done, or say why that cannot be.

    Where the learning rate does not fall, the epochs of both are the same. Also says where the same settings gave
    another result, because data, a file of weights or the code of a class is not what it was.
    """
    if checkpoints.resume_point(run.directory / "checkpoints"):
        return
    here, shorter = comparable(plain(run.cfg), Config), []
    for path in run.directory.parent.glob(f"fold{run.cfg.fold}-seed{run.cfg.seed}-*/config.yaml"):
        other = Found.read(path.parent)
        keys = differing([here, comparable(other.config, Config)]) if path.parent != run.directory else [""]
        if not keys:
            log.warning("%s has these settings with other data, weights or code; it is left as it is", path.parent)
        elif keys == [EPOCHS] and 0 < other.epochs < phase.epochs:
            shorter.append(other)
    if not shorter:
        return
    longest = max(shorter, key=lambda other: other.epochs)
    done = f"{longest.directory} has {longest.epochs} of these {phase.epochs} epochs"
    if len({phase.decay(share / 8) for share in range(9)}) > 1:
        print(f"{done}, but its learning rate fell to its end over them, so that it cannot go on; this run begins anew")
        return
    try:
        taken = {name: load(longest.directory / "checkpoints" / name) for name in (checkpoints.BEST, checkpoints.LAST)}
    except UserError:
        return
    if all(_without_epochs(content["ultrarefiner"]) == _without_epochs(run.settings) for content in taken.values()):
        print(f"{done}; this run goes on from them")
        for name, content in taken.items():
            save(content | phase.carried, run.directory / "checkpoints" / name)


def _without_epochs(settings: dict[str, Any]) -> str:
    phase = {key: value for key, value in settings["phase"].items() if key != "epochs"}
    return json.dumps(settings | {"phase": phase}, sort_keys=True, default=str)


def _started_from(run: Run) -> dict[str, str]:
    """The directories of the runs, and the files, that the first weights came from."""
    model, phase = run.cfg.model, run.cfg.phase
    files = {f"{name}_checkpoint": phase.get(f"{name}_checkpoint") for name in (COARSE, SAM)}
    if COARSE in run.kind.parts:
        files["coarse_weights"] = model.coarse_weights
    if SAM in run.kind.parts:
        files["sam_weights"] = model.sam.get("checkpoint")
    given = {name: path for name, path in files.items() if path not in NAMES_OF_WEIGHTS}
    runs = {name: earlier.directory.as_posix() for name, earlier in run.earlier.items()}
    predictors = {f"predictor_{i}": other.directory.as_posix() for i, other in enumerate(run.predictors)}
    return runs | predictors | given


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
