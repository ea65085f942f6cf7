"""A sweep (`-m`): no job loses the others, and one summary over all runs at the end.

`Sweep` is a Hydra callback that conf/train.yaml registers; it goes along into the jobs, wherever they run. Torch is
not imported here, except to write the summary to Weights & Biases.
"""

import shutil
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ultrarefiner import cli
from ultrarefiner.errors import UserError
from ultrarefiner.files import write_csv
from ultrarefiner.results import statistics, tables
from ultrarefiner.results.tables import read_result
from ultrarefiner.runs import jobs

OVER_RUNS = ("fold", "seed")
"""What runs of one setting differ in."""
MASKS = ("baseline_coarse", "baseline_refined", "coarse", "refined")
METRICS = ("dice", "iou", "hd95", "assd")
WIDTH = 120

Row = dict[str, Any]


@dataclass
class Failure:
    """What a job returns that has no run directory to return."""

    reason: str


@dataclass
class Job:
    """One job of a sweep.

    Attributes:
        overrides: of the command line, by key.
        outcome: its run directory, or why there is none.
        setting: what tells it from other jobs, without fold and seed.
        summary, cases: what is in its summary.json and cases.csv; nothing if it failed.
    """

    overrides: dict[str, str]
    outcome: Path | Failure
    setting: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    cases: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, overrides: Sequence[str], outcome: Any) -> "Job":
        """A job from its command line and what it returned."""
        given = dict(text.lstrip("+~").partition("=")[::2] for text in overrides)
        if isinstance(outcome, Failure):
            return cls(given, outcome)
        directory = Path(outcome)
        try:
            summary, cases = read_result(directory)
        except UserError as error:
            return cls(given, Failure(f"{error}; the same command measures this run again"))
        return cls(given, directory, summary=summary, cases=cases)

    def scores(self, part: str) -> dict[str, dict[str, float]]:
        """mask -> metric -> mean over the cases of "val" or "test"."""
        if not self.summary:
            return {}
        before = (self.summary["baseline"] or {}).get(part, {})
        found = {**{f"baseline_{mask}": values for mask, values in before.items()}, **self.summary[part]}
        return {mask: found[mask] for mask in MASKS if found.get(mask)}


class Sweep(Callback):
    """Gathers the jobs of a sweep and sums them up."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Have every job handed over: submitit's own launcher gives up at the first that was killed."""
        if "submitit" in config.hydra.launcher._target_:
            from submitit.core.core import Job as Submitted

            def results(job: Any) -> list[Any]:
                return [self._wait(job)]

            Submitted.results = results  # type: ignore[method-assign, assignment]

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Turn a failure into a result: Hydra would end the sweep with it. Called where the job runs."""
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            return
        if job_return.status == JobStatus.FAILED:
            failure = _explain(job_return._return_value)
            job_return.status, job_return.return_value = JobStatus.COMPLETED, failure
        self._add(job_return)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and print the summary.

        Raises:
            SystemExit: jobs failed, one sentence for each; or there is no summary, which Hydra would only log.
        """
        try:
            self._sum_up(config)
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc()
            sys.exit(f"error: the jobs are done, their summary is not: {_reason(error)}; the same command tries again")

    def _sum_up(self, config: DictConfig) -> None:
        folder = Path(config.hydra.sweep.dir)
        name_settings(self.jobs, f"{config.phase.name} · {config.dataset.name} · {config.model.name}")
        rows = [row_of(number, job, config) for number, job in enumerate(self.jobs)]
        settings = summarise(self.jobs)
        write_csv(folder / "sweep.csv", rows)
        write_csv(folder / "settings.csv", settings)
        failed = [row for row in rows if row["status"] == "failed"]
        title = f"{len(rows)} jobs, {len(rows) - len(failed)} finished, {len(failed)} failed"
        if unfair := sum(row["seen_test_cases"] > 0 for row in rows):
            title += f"; in {unfair} the weights have seen test cases (allow_seen=true), which is no fair test"
        _print(title, settings, folder)
        if "wandb" in config.logger:
            _log_to_wandb(config, folder, title, rows, settings)
        if failed:
            sys.exit(
                "\n".join(f"error: {r['setting']}, fold {r['fold']}, seed {r['seed']}: {r['reason']}" for r in failed)
            )

    def _add(self, returned: JobReturn) -> None:
        self.jobs.append(Job.of(returned.overrides or (), returned.return_value))

    def _wait(self, submitted: Any) -> JobReturn:
        """What one of submitit's jobs returned; a failure also when it was killed."""
        first = submitted.task(0)  # the other processes of a job help the first
        try:
            returned: JobReturn = jobs.wait_for(first)
        except jobs.Killed as killed:
            overrides = first.submission().args[0]
            returned = JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=Failure(str(killed)))
        self._add(returned)
        return returned


def name_settings(found: Sequence[Job], otherwise: str) -> None:
    """Name each job by the overrides in which the jobs differ, without fold and seed."""
    keys = dict.fromkeys(key for job in found for key in job.overrides if key not in OVER_RUNS)
    differing = [key for key in keys if len({job.overrides.get(key) for job in found}) > 1]
    for job in found:
        job.setting = " ".join(f"{key}={job.overrides[key]}" for key in differing if key in job.overrides) or otherwise


def row_of(number: int, job: Job, config: DictConfig) -> Row:
    """A row of sweep.csv: what was run, what came of it, and the means over its cases."""
    failed = isinstance(job.outcome, Failure)
    about = {
        "job": number,
        "setting": job.setting,
        **{key: job.overrides.get(key, config[key]) for key in OVER_RUNS},
        "status": "failed" if failed else "finished",
        "reason": job.outcome.reason if isinstance(job.outcome, Failure) else "",
        "directory": "" if failed else str(job.outcome),
        "seen_test_cases": ((job.summary or {}).get("seen") or {}).get("test_cases", 0),
        "overrides": " ".join(f"{key}={value}" for key, value in job.overrides.items()),
    }
    scores = {
        f"{part}_{mask}_{metric}": value
        for part in ("val", "test")
        for mask, values in job.scores(part).items()
        for metric, value in values.items()
    }
    return about | scores


def summarise(found: Sequence[Job]) -> list[Row]:
    """A row for each setting, mask and metric on the test cases: over the runs, and over all cases together."""
    settings: dict[str, dict[Path, Job]] = {}
    for job in found:
        if isinstance(job.outcome, Path):
            settings.setdefault(job.setting, {})[job.outcome] = job  # the same run twice counts once
    rows = []
    for setting, runs in settings.items():
        measured = [job.cases for job in runs.values()]
        for mask in MASKS:
            for metric in METRICS:
                over = statistics.over_runs(measured, f"{mask}_{metric}")
                if over["runs"]:
                    rows.append({"setting": setting, "mask": mask, "metric": metric} | over)
    return rows


def _explain(error: BaseException) -> Failure:
    """Why a job failed, as one line; a bug leaves its stack trace where the job runs."""
    if not isinstance(error, UserError | OmegaConfBaseException):
        traceback.print_exception(error)
    return Failure(_reason(error))


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError | OmegaConfBaseException):
        return cli.explain(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _print(title: str, settings: list[Row], folder: Path) -> None:
    by_mask: dict[tuple[str, str], dict[str, Row]] = {}
    for row in settings:
        by_mask.setdefault((row["setting"], row["mask"]), {})[row["metric"]] = row
    rows = [
        {
            "setting": setting,
            "mask": mask,
            "runs": metric["dice"]["runs"],
            "Dice": tables.plus_minus(metric["dice"], 4),
            "HD95 (px)": tables.plus_minus(metric["hd95"], 2),
            "cases": metric["dice"]["cases"],
            "their Dice [95 %]": "{case_mean:.4f} [{case_low:.4f}, {case_high:.4f}]".format(**metric["dice"]),
            "median": f"{metric['dice']['case_median']:.4f}",
        }
        for (setting, mask), metric in by_mask.items()
    ]
    # In a log there is room for all columns side by side.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    print(tables.terminal(rows, title=title, width=width) if rows else title)
    print(f"{folder}/\n  sweep.csv     every job\n  settings.csv  this table, with all metrics")


def _log_to_wandb(config: DictConfig, folder: Path, title: str, rows: list[Row], settings: list[Row]) -> None:
    """A run that holds both tables, and the means as its summary."""
    from ultrarefiner.runs import tracking
    from ultrarefiner.runs.build import build

    about = {
        "name": f"sweep {folder.name}: {title}",
        "job_type": "sweep",
        "group": f"sweep {folder.name}",
        "tags": ["sweep"],
        "settings": {"overrides": list(config.hydra.overrides.task)},
        "_convert_": "all",
    }
    logger = build(config.logger.wandb, "logger.wandb", folder.resolve(), **about)
    import wandb

    for name, table in (("jobs", rows), ("settings", settings)):
        columns: list[Any] = list(dict.fromkeys(key for row in table for key in row))
        cells = [[row.get(column) for column in columns] for row in table]
        logger.experiment.log({name: wandb.Table(columns=columns, data=cells)})
    for row in settings:
        for key in ("mean", "sd", "case_low", "case_high"):
            logger.experiment.summary[f"{row['setting']}/{row['mask']}/{row['metric']}/{key}"] = row[key]
    tracking.close([logger], "success" if all(row["status"] == "finished" for row in rows) else "failed")
