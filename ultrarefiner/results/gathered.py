"""What was measured below a folder, by setting and data set: the runs' own test cases, and evaluations of any masks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ultrarefiner.errors import UserError
from ultrarefiner.files import read_csv
from ultrarefiner.results import assessment
from ultrarefiner.results.found import Found, differing, evaluations_in, runs_in, told
from ultrarefiner.settings import comparable

MASKS = ("baseline_coarse", "baseline_refined", *assessment.MASKS)
AS_TRAINED = {"tta": None, "lesions": "together"}
"""How a run draws its masks when it measures itself."""

Row = dict[str, Any]


@dataclass
class Result:
    """The masks of one run, or of one evaluation, on one data set.

    Attributes:
        setting, data: what is measured, and on what.
        rows: of its cases.csv.
        about: its summary.json.
        run: whose masks they are; None of another tool's, or of a run that lies elsewhere.
        folder: of the evaluation; None where the run has measured itself.
    """

    setting: str
    data: str
    rows: list[Row]
    about: Mapping[str, Any]
    run: Found | None
    folder: Path | None = None

    def add(self, evaluation: "Result") -> None:
        """Take what an evaluation has measured of the same masks on the same cases."""
        measured = {(row["dataset"], row["id"]): row for row in evaluation.rows}
        columns = dict.fromkeys(name for row in (self.rows[0], evaluation.rows[0]) for name in row)
        self.rows = [
            dict.fromkeys(columns, "") | row | measured.get((row["dataset"], row["id"]), {}) for row in self.rows
        ]
        seen = self.about.get("seen") or evaluation.about["seen"]
        added = {name: evaluation.about[name] for name in ("columns", "settings") if name in evaluation.about}
        self.about = {**self.about, **added, "seen": seen}
        self.folder = evaluation.folder

    @property
    def own(self) -> bool:
        """Whether the run has measured itself, whatever an evaluation has added."""
        return self.about.get("kind") != assessment.KIND

    @cached_property
    def records(self) -> dict[tuple[str, str], assessment.Record]:
        """Outlines and sums of the calibration of each case; nothing without an evaluation."""
        return {} if self.folder is None else assessment.read_lines(self.folder / assessment.LINES)[1]


@dataclass
class Group:
    """The results of one setting on one data set, over folds and seeds."""

    setting: str
    data: str
    results: list[Result] = field(default_factory=list)

    @cached_property
    def rows(self) -> list[Row]:
        """The cases of all of them, each with all columns."""
        columns = dict.fromkeys(name for result in self.results for name in result.rows[0])
        return [dict.fromkeys(columns, "") | row for result in self.results for row in result.rows]

    @property
    def masks(self) -> list[str]:
        """What was measured."""
        return [mask for mask in MASKS if f"{mask}_dice" in self.rows[0]]

    def metrics(self, mask: str) -> list[str]:
        """What was measured of a mask."""
        names = [name.removeprefix(f"{mask}_") for name in self.rows[0] if name.startswith(f"{mask}_")]
        return [name for name in names if name != "px"]

    @property
    def last(self) -> str:
        """The mask that counts in the end, of those that all results have."""
        common = [mask for mask in self.masks if all(f"{mask}_dice" in result.rows[0] for result in self.results)]
        return (common or self.masks)[-1]

    @property
    def columns(self) -> list[str]:
        """By what its cases are broken down."""
        said = [name for result in self.results for name in result.about.get("columns", ())]
        return list(dict.fromkeys(("label", *said, "dataset")))

    @property
    def simulated(self) -> bool:
        """Whether its coarse masks are simulated, so that it compares with no other."""
        return any(
            r.run is not None and r.folder is None and r.run.config["phase"]["name"] == "sam" for r in self.results
        )


def gather(folder: Path) -> tuple[list[Found], list[Group]]:
    """The runs below a folder, and what was measured of them and of other tools, by setting and data set.

    Raises:
        UserError: nothing is finished there, or a file is damaged.
    """
    runs = runs_in(folder)
    own = {run: _of_run(run) for run in runs if run.counts}
    results = list(own.values())
    places = {run.directory.resolve(): run for run in runs if not run.status.startswith("damaged")}
    evaluations = evaluations_in(folder)
    sources = [path for _, content in evaluations for path in _sources(content).values()]
    for directory, content in evaluations:
        file = Path(content["checkpoint"] or directory).resolve()
        run = next((places[p] for p in (*directory.resolve().parents, *file.parents) if p in places), None)
        rows = [assessment.counted(row) for row in read_csv(directory / "cases.csv")]
        one = Result(_name(content, run, sources), str(content["dataset"]), rows, content, run, directory)
        mine = None if run is None else own.get(run)
        one.data = _data(one, mine)
        if mine is not None and mine.folder is None and (one.data, one.setting) == (mine.data, mine.setting):
            mine.add(one)
        else:
            results.append(one)
    if not results:
        raise UserError(f"runs={folder} holds no finished run and no evaluation: `report list` shows what is there")
    _tell_apart(results, folder)
    groups: dict[tuple[str, str], Group] = {}
    for result in sorted((r for r in results if r.rows), key=lambda r: (r.data, r.setting)):
        groups.setdefault((result.data, result.setting), Group(result.setting, result.data)).results.append(result)
    return runs, list(groups.values())


def _data(one: Result, mine: Result | None) -> str:
    """On what an evaluation was made: the test cases of a data set where nothing else is said.

    Args:
        one: the evaluation.
        mine: what its run has measured itself; None where there is none.
    """
    content, config = one.about, {} if one.run is None else one.run.config
    alike = bool(config) and content["dataset"] == config["dataset"]["name"]
    tested = alike and (content["fold"], content["split"]) == (config["fold"], "test")
    trained_on = content.get("trained_on")
    other = alike and trained_on is not None and trained_on != content["settings"]["data"]
    other = other or (tested and mine is not None and not _known(one) <= _known(mine))
    part = f"{content['split']}, fold {content['fold']}"
    if other:  # of the same name
        return f"{content['dataset']} ({part}, {Path(content.get('data_root') or one.folder or '').name})"
    if content["split"] != "test" or (alike and not tested and not content["predictions"]):
        return f"{content['dataset']} ({part})"
    return str(content["dataset"])


def _known(result: Result) -> set[tuple[Any, ...]]:
    """By what its cases are known again."""
    return {tuple(row.get(name) for name in ("dataset", "id", "lesion_px")) for row in result.rows}


def _sources(content: Mapping[str, Any]) -> dict[str, Path]:
    """Where the masks of an evaluation come from: a run's directory, a folder of `export` or a file, and a tool's."""
    found = {}
    if content["checkpoint"]:
        file = Path(content["checkpoint"]).resolve()
        inner = file.parent if file.suffix == ".safetensors" or file.parent.name == "checkpoints" else file
        found["checkpoint"] = inner.parent if inner.name == "checkpoints" else inner
    if content["predictions"]:
        found["predictions"] = Path(content.get("settings", {}).get("predictions") or content["predictions"])
    return found


def _name(content: Mapping[str, Any], run: Found | None, sources: Iterable[Path]) -> str:
    """What an evaluation measures; `sources` are those of all evaluations."""
    places = {kind: _ending(path, sources) for kind, path in _sources(content).items()}
    names = [places.get("checkpoint", "") if run is None else run.setting]
    if "predictions" in places:
        names.append(f"masks of {places['predictions']}")
    settings = AS_TRAINED | content.get("settings", {})
    changed = [key for key, value in AS_TRAINED.items() if (settings[key] or value) != value]
    return " ".join([", ".join(filter(None, names)), *told(settings, changed)])


def _ending(path: Path, others: Iterable[Path]) -> str:
    """So many of a path's last parts as tell it from the others."""
    count = 1
    while any(path.parts[-count:] == other.parts[-count:] for other in others if other != path):
        count += 1
    return "/".join(path.parts[-count:])


def _tell_apart(results: Iterable[Result], folder: Path) -> None:
    """Add to the names of evaluations what they differ in: those that keep one name are runs of one setting."""
    for some in _alike(results):
        flat = [comparable(result.about.get("settings", {})) for result in some]
        keys = [key for key in differing([f for f in flat if f]) if key not in ("data", "checkpoint", "predictions")]
        for result, settings in zip(some, flat, strict=True):
            if not result.own:
                result.setting = " ".join([result.setting, *told(settings, keys)])
    for some in _alike(results):
        seen: list[Any] = []
        for result in some:
            # Of a tool nothing but the fold tells its trainings apart; what lies elsewhere is one training.
            who = result.run or (None if result.about["checkpoint"] else result.about["fold"])
            if who in seen and result.folder is not None:
                result.setting += f" ({result.folder.relative_to(folder).as_posix()})"
            seen.append(who)


def _alike(results: Iterable[Result]) -> list[list[Result]]:
    """The results by their names, those of the runs themselves first."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault((result.data, result.setting), []).append(result)
    return list(found.values())


def unfair(seen: Mapping[str, Any]) -> str:
    """What is said of images that weights have seen, see "seen" in summary.json."""
    return f"the weights have seen {seen['test_cases']} of the images before, such as {seen['first']}."


def _of_run(run: Found) -> Result:
    return Result(run.setting, run.config["dataset"]["name"], read_csv(run.directory / "cases.csv"), run.summary, run)
