"""What was measured below a folder, by setting and data set: the runs' own test cases, and evaluations of any masks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ultrarefiner.errors import UserError
from ultrarefiner.files import read_csv
from ultrarefiner.results import assessment
from ultrarefiner.results.found import Found, evaluations_in, runs_in

MASKS = ("baseline_coarse", "baseline_refined", *assessment.MASKS)

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
        self.about = {**self.about, "columns": evaluation.about["columns"], "seen": seen}
        self.folder = evaluation.folder

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
    results = [_of_run(run) for run in runs if run.counts]
    places = {run.directory.resolve(): run for run in runs if not run.status.startswith("damaged")}
    for directory, content in evaluations_in(folder):
        file = Path(content["checkpoint"] or directory).resolve()
        run = next((places[p] for p in (*directory.resolve().parents, *file.parents) if p in places), None)
        rows = read_csv(directory / "cases.csv")
        one = Result(_name(content, run), _data(content, run), rows, content, run, directory)
        if _is_own(content, run) and (mine := next((r for r in results if r.run is run and r.folder is None), None)):
            mine.add(one)
        else:
            results.append(one)
    if not results:
        raise UserError(f"runs={folder} holds no finished run and no evaluation: `report list` shows what is there")
    groups: dict[tuple[str, str], Group] = {}
    for result in sorted((r for r in results if r.rows), key=lambda r: (r.data, r.setting)):
        groups.setdefault((result.data, result.setting), Group(result.setting, result.data)).results.append(result)
    return runs, list(groups.values())


def _is_own(content: Mapping[str, Any], run: Found | None) -> bool:
    """Whether an evaluation measures a run's own masks on its own test cases."""
    if run is None or content["predictions"]:
        return False
    return (content["dataset"], content["fold"], content["split"]) == (
        run.config["dataset"]["name"],
        run.config["fold"],
        "test",
    )


def _data(content: Mapping[str, Any], run: Found | None) -> str:
    """On what an evaluation was made: the test cases of a data set where nothing else is said."""
    strange = run is not None and content["dataset"] == run.config["dataset"]["name"] and not content["predictions"]
    if content["split"] != "test" or (strange and not _is_own(content, run)):
        return f"{content['dataset']} ({content['split']}, fold {content['fold']})"
    return str(content["dataset"])


def _name(content: Mapping[str, Any], run: Found | None) -> str:
    names = [] if run is None else [run.setting]
    if content["predictions"]:
        names.append(f"masks of {Path(content['predictions']).name}")
    file = Path(content["checkpoint"] or "")
    return ", ".join(names) or (file.parent if file.suffix == ".safetensors" else file).name  # a folder of `export`


def unfair(seen: Mapping[str, Any]) -> str:
    """What is said of images that weights have seen, see "seen" in summary.json."""
    return f"the weights have seen {seen['test_cases']} of the images before, such as {seen['first']}."


def _of_run(run: Found) -> Result:
    return Result(run.setting, run.config["dataset"]["name"], read_csv(run.directory / "cases.csv"), run.summary, run)
