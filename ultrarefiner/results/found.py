"""The runs and evaluations that lie below a folder, as plain data: what they are, how far, how good."""

import csv
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from ultrarefiner.config import Config
from ultrarefiner.errors import UserError
from ultrarefiner.files import number, read_json
from ultrarefiner.settings import comparable

OVER_RUNS = ("fold", "seed")
"""What runs of one setting differ in."""


@dataclass(eq=False)
class Found:
    """One run.

    Attributes:
        directory: where it lies.
        config: its configuration.
        summary: what is in its summary.json; nothing while it is not finished.
        status: "finished", "running", "paused", "interrupted", "killed" (it could not say why it ended), or "failed"
            and "damaged" with the reason behind it.
        epochs: how many are done.
        best: the highest validation Dice so far, of the mask that the phase is judged by; NaN where there is none.
        setting: what it is called beside its fold and seed, see `name_settings`.
    """

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    status: str = "interrupted"
    epochs: int = 0
    best: float = float("nan")
    setting: str = ""

    @classmethod
    def read(cls, directory: Path) -> "Found":
        """What a run's directory holds; one that is damaged says so in its status."""
        found = cls(directory)
        try:
            config = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
            assert isinstance(config, dict)
            found.config = {str(name): value for name, value in config.items()}
            found._read_metrics()
            if (directory / "summary.json").is_file():
                found.summary = read_json(directory / "summary.json", ("epochs", "test", "data"))
                found.status = "finished"
                found.epochs = int(found.summary["epochs"])
            elif _locked(directory):
                found.status = "running"
            elif (directory / "run.json").is_file():
                ended = read_json(directory / "run.json", ["ended"])["ended"] or "killed"
                found.status = "interrupted" if ended == "finished" else str(ended)
            found.base  # noqa: B018  # a configuration that does not even name its phase is none
        except (UserError, OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            found.status = f"damaged: {error}"
        except Exception as error:  # of the YAML parser, which has many
            found.status = f"damaged: config.yaml is no configuration ({type(error).__name__})"
        return found

    @property
    def base(self) -> str:
        """What is trained, on what, with what."""
        return " · ".join(str(self.config[group]["name"]) for group in ("phase", "dataset", "model"))

    @property
    def planned(self) -> int:
        """How many epochs it is to have."""
        return int(self.config.get("phase", {}).get("epochs", 0))

    @property
    def counts(self) -> bool:
        """Whether it is finished and a result of its own: not a helper that predicts cases for Phase 2."""
        return self.status == "finished" and self.config["dataset"].get("without") is None

    def score(self, mask: str, metric: str = "dice") -> float:
        """A mean over its test cases; NaN where there is none."""
        return number(self.summary.get("test", {}).get(mask, {}).get(metric))

    def _read_metrics(self) -> None:
        path = self.directory / "metrics.csv"
        if not path.is_file():
            return
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        dice = [number(row.get("val/refined/dice", row.get("val/coarse/dice"))) for row in rows]
        self.epochs = len(rows)
        self.best = max((value for value in dice if value == value), default=self.best)


def runs_in(folder: Path) -> list[Found]:
    """All runs below a folder, by their directories, each with the name of its setting.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"runs={folder} is no folder: give the output_root of the training, or one above it")
    found = [Found.read(path.parent) for path in _files(folder, "config.yaml") if _is_run(path.parent)]
    name_settings([run for run in found if not run.status.startswith("damaged")])
    return found


def evaluations_in(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The directories of all finished evaluations below a folder, and their summaries."""
    found = [(path.parent, path.parent / "summary.json") for path in _files(folder, "cases.jsonl")]
    return [(directory, read_json(path)) for directory, path in found if path.is_file()]


def name_settings(runs: Sequence[Found]) -> None:
    """Name each run by what it trains and by the settings in which it differs from others that train the same.

    The names of options come first: other settings are told only where the options do not tell runs apart.
    """
    flat = [{**comparable(run.config, Config)} for run in runs]
    for settings in flat:
        for name in OVER_RUNS:
            settings.pop(name, None)
    for base in {run.base for run in runs}:
        some = [i for i, run in enumerate(runs) if run.base == base]
        options = [key for key in differing([flat[i] for i in some]) if key.endswith(".name")]
        named: dict[str, list[int]] = {}
        for i in some:
            named.setdefault(" ".join([base, *told(flat[i], options)]), []).append(i)
        for name, alike in named.items():
            others = differing([flat[i] for i in alike])
            for i in alike:
                runs[i].setting = " ".join([name, *told(flat[i], others)])


def differing(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which settings differ."""
    keys = dict.fromkeys(key for settings in flat for key in settings)
    return [key for key in keys if len({repr(settings.get(key, "")) for settings in flat}) > 1]


def listed(runs: Sequence[Found], folder: Path) -> list[dict[str, Any]]:
    """A row for each run, for people."""
    rows = []
    for run in runs:
        row: dict[str, Any] = {"run": run.directory.relative_to(folder).as_posix(), "setting": run.setting}
        row |= {name: run.config.get(name, "") for name in OVER_RUNS}
        row |= {"status": run.status, "epochs": f"{run.epochs}/{run.planned}", "val Dice": run.best}
        row |= {f"test {mask}": run.score(mask) for mask in ("coarse", "refined")}
        rows.append(row | {"last change": _changed(run.directory)})
    return rows


def status_counts(runs: Sequence[Found]) -> str:
    """How many runs there are of each status, in words."""
    counts = Counter(run.status.partition(":")[0] for run in runs)
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))


def told(settings: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """What settings say of some keys, as names tell it."""
    return [f"{key.removesuffix('.name')}={settings.get(key, 'not there')}" for key in keys]


def _files(folder: Path, name: str) -> Iterator[Path]:
    """The files of a name below a folder, but for hidden folders and caches."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(inner for inner in folders if not inner.startswith(".") and inner != "cache")
        if name in files:
            yield Path(root, name)


def _is_run(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("summary.json", "metrics.csv", "folds.csv", "checkpoints"))


def _locked(directory: Path) -> bool:
    """Whether a process works in a run's directory."""
    if not (directory / ".lock").is_file():
        return False
    try:
        with FileLock(directory / ".lock", timeout=0):
            return False
    except (Timeout, OSError):
        return True


def _changed(directory: Path) -> str:
    times = [
        path.stat().st_mtime
        for name in ("summary.json", "metrics.csv", "config.yaml")
        if (path := directory / name).exists()
    ]
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(max(times, default=0)))
