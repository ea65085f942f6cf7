"""Sweeps: every job gets its turn and its row, and the numbers over them are right."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import MICRO
from ultrarefiner.results import statistics
from ultrarefiner.runs import sweep

SHORT = [*MICRO, "model.schedule.coarse.epochs=1", "model.schedule.e2e.epochs=1"]


def table(root: Path, name: str = "sweep.csv") -> list[dict[str, str]]:
    """The rows of the newest sweep's summary."""
    with (max((root / "sweeps").iterdir()) / name).open(newline="") as file:
        return list(csv.DictReader(file))


def launch(*arguments: str) -> subprocess.CompletedProcess:
    """A sweep as a process of its own."""
    return subprocess.run([sys.executable, "-m", "ultrarefiner.train", *arguments], capture_output=True, text=True)


@pytest.fixture
def root(finished_runs, tmp_path) -> Path:
    """An output_root in which fold 0 is finished."""
    return Path(shutil.copytree(finished_runs, tmp_path / "out"))


def test_a_failing_job_leaves_the_others_and_is_named_once(command, root):
    done = command("-m", *MICRO, f"output_root={root}", "phase=coarse", "fold=9,0,1")
    assert done.status == 1
    assert [line for line in done.err.splitlines() if line] == [
        "error: coarse · phantom · tiny, fold 9, seed 0: fold=9 is outside the 5-fold partition of phantom: choose 0…4."
    ]
    assert "3 jobs, 2 finished, 1 failed" in done.out
    rows = table(root)
    assert [(row["fold"], row["status"]) for row in rows] == [("9", "failed"), ("0", "finished"), ("1", "finished")]
    assert "outside" in rows[0]["reason"] and rows[0]["test_coarse_dice"] == ""
    for row in rows[1:]:
        summary = json.loads((Path(row["directory"]) / "summary.json").read_text())
        assert float(row["test_coarse_dice"]) == summary["test"]["coarse"]["dice"]
        assert float(row["val_coarse_hd95"]) == summary["val"]["coarse"]["hd95"]


def test_the_same_command_runs_only_what_is_missing_and_sums_up_all(command, root):
    sweep = ["-m", *MICRO, f"output_root={root}", "phase=coarse", "fold=range(3)"]
    command("-m", *MICRO, f"output_root={root}", "phase=coarse", "fold=0,2")
    done = command(*sweep)
    assert done.status == 0, done.err
    assert done.out.count("epoch 1/2") == 1 and done.out.count("exists already") == 2
    assert [row["fold"] for row in table(root)] == ["0", "1", "2"]
    dice = next(row for row in table(root, "settings.csv") if (row["mask"], row["metric"]) == ("coarse", "dice"))
    means = [float(row["test_coarse_dice"]) for row in table(root)]
    assert int(dice["runs"]) == 3 and float(dice["mean"]) == pytest.approx(np.mean(means))
    assert float(dice["sd"]) == pytest.approx(np.std(means, ddof=1))


def test_a_bug_in_one_job_leaves_the_others(command, root, monkeypatch):
    from ultrarefiner.runs import experiment

    def broken(cfg, *rest):
        if cfg.fold == 1:
            raise ZeroDivisionError("division by zero")
        return original(cfg, *rest)

    original = experiment.run
    monkeypatch.setattr(experiment, "run", broken)
    done = command("-m", *MICRO, f"output_root={root}", "phase=coarse", "fold=1,0")
    assert done.status == 1 and "in broken" in done.err  # the stack trace
    assert done.err.splitlines()[-1].endswith("fold 1, seed 0: ZeroDivisionError: division by zero")
    assert [row["status"] for row in table(root)] == ["failed", "finished"]


def test_a_mistake_in_every_job_is_found_before_the_first_begins(command, tmp_path):
    done = command("-m", *MICRO, f"output_root={tmp_path}/out", "protection=none,nothing")
    assert done.status == 1 and len(done.err.strip().splitlines()) == 1 and "protection=nothing" in done.err
    assert not list(tmp_path.rglob("summary.json"))


def test_a_job_whose_cases_are_gone_is_measured_again_and_counted(command, root):
    (cases,) = root.glob("phantom/tiny/coarse/*/cases.csv")
    cases.write_text('id,"pati')
    done = command("-m", *MICRO, f"output_root={root}", "phase=coarse", "fold=0")
    assert done.status == 0 and "1 jobs, 1 finished, 0 failed" in done.out, done.err
    assert table(root, "settings.csv")[0]["cases"] == str(len(cases.read_text().splitlines()) - 1)


@pytest.mark.parametrize("name", ["summary.json", "cases.csv"])
@pytest.mark.parametrize("content", [None, "", "null", 'id,"pati'])
def test_a_result_that_is_damaged_when_it_is_summed_up_is_a_failed_job(root, name, content):
    (damaged,) = root.glob(f"phantom/tiny/coarse/*/{name}")
    damaged.unlink() if content is None else damaged.write_text(content)
    job = sweep.Job.of(["fold=0"], str(damaged.parent))
    assert (
        isinstance(job.outcome, sweep.Failure) and str(damaged) in job.outcome.reason and "again" in job.outcome.reason
    )


def test_a_sweep_whose_summary_fails_does_not_end_well(command, root, monkeypatch):
    """Hydra logs what a callback raises, and ends with status 0."""
    monkeypatch.setattr(sweep, "summarise", lambda _: 1 / 0)
    done = command("-m", *MICRO, f"output_root={root}", "phase=coarse", "fold=0")
    assert done.status == 1 and "error: the jobs are done, their summary is not: ZeroDivisionError" in done.err


def test_settings_are_what_differs_beside_fold_and_seed(command, root):
    done = command("-m", *MICRO, f"output_root={root}", "fold=0", "protection=none,roi_on")
    assert done.status == 0, done.err
    assert [row["setting"] for row in table(root)] == ["protection=none", "protection=roi_on"]
    rows = table(root, "settings.csv")
    assert {(row["setting"], row["mask"]) for row in rows} == {
        (f"protection={protection}", mask)
        for protection in ("none", "roi_on")
        for mask in ("baseline_coarse", "baseline_refined", "coarse", "refined")
    }
    refined = next(row for row in rows if (row["mask"], row["metric"]) == ("refined", "dice"))
    assert refined["sd"] == "" and float(refined["case_low"]) <= float(refined["mean"]) <= float(refined["case_high"])


def test_an_experiment_can_be_a_sweep(command, root, tmp_path):
    (tmp_path / "own" / "experiments").mkdir(parents=True)
    prepared = "# @package _global_\ndefaults:\n  - override /phase: coarse\nhydra:\n  mode: MULTIRUN\n"
    prepared += "  sweeper:\n    params:\n      fold: range(2)\n      seed: 0,1\n"
    (tmp_path / "own" / "experiments" / "cv.yaml").write_text(prepared)
    done = command("--config-dir", str(tmp_path / "own"), "+experiments=cv", *SHORT, f"output_root={root}")
    assert done.status == 0, done.err
    assert [(row["fold"], row["seed"]) for row in table(root)] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert len({row["setting"] for row in table(root)}) == 1
    assert {row["runs"] for row in table(root, "settings.csv")} == {"4"}


def test_busbra_cv5_is_ten_jobs(command, tmp_path):
    done = command(
        "+experiments=busbra_cv5", "logger=csv", f"data_root={tmp_path}/nowhere", f"output_root={tmp_path}/out"
    )
    assert done.status == 1 and "10 jobs, 0 finished, 10 failed" in done.out
    lines = done.err.strip().splitlines()
    assert len(lines) == 10 and all(line.startswith("error: protection=") and "nowhere" in line for line in lines)


def test_the_summary_goes_to_wandb_offline(command, root, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = command("-m", *MICRO, f"output_root={root}", "phase=coarse", "fold=0,9", "logger=wandb")
    assert done.status == 1
    folder = max((root / "sweeps").iterdir())
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert list(folder.glob("wandb/offline-run-*/files/media/table/jobs*.json"))


@pytest.mark.slow
def test_parallel_jobs_share_their_earlier_phases_and_a_killed_one_leaves_the_others(tmp_path):
    """Two jobs need the same Phases 1 and 2 at the same time; a third is killed from outside."""
    arguments = ["-m", *SHORT, f"output_root={tmp_path}", "hydra/launcher=local", "protection=none,roi_on", "fold=0,1"]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "ultrarefiner.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    victim = None
    until = time.monotonic() + 120
    while victim is None and time.monotonic() < until:
        time.sleep(0.2)
        for log in tmp_path.glob("sweeps/*/.submitit/*/*_0_log.out"):
            if "fold 1" in log.read_text() and "epoch 1/1" in log.read_text():
                victim = _worker(log.parent)
    _kill(victim)
    out, err = sweep.communicate(timeout=280)
    rows = table(tmp_path)
    assert sweep.returncode == 1 and "4 jobs, 3 finished, 1 failed" in out, err
    assert [row["status"] for row in rows if row["fold"] == "0"] == ["finished", "finished"]
    failed = [row for row in rows if row["status"] == "failed"]
    assert len(failed) == 1 and failed[0]["fold"] == "1" and "the job was killed" in failed[0]["reason"]
    assert err.strip().splitlines()[-1].startswith("error: protection=")
    logs = "".join(log.read_text() for log in tmp_path.glob("sweeps/*/.submitit/*/*_0_log.out"))
    for phase in ("coarse", "sam"):
        assert logs.count(f"{phase} · phantom · tiny · fold 0 · seed 0\n") == 1, "trained once, waited for once"
    again = launch(*arguments)
    assert again.returncode == 0 and "4 jobs, 4 finished, 0 failed" in again.stdout, again.stderr


def _worker(folder: Path) -> int | None:
    """The process that runs the job of a submitit folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            ours = f"SUBMITIT_LOCAL_JOB_ID={folder.name}\0".encode() in (process / "environ").read_bytes()
        except OSError:  # it has ended
            continue
        if ours and b"submitit.core._submit" in words:
            return int(process.name)
    return None


def _kill(process: int | None) -> None:
    assert process is not None, "the job never began"
    os.kill(process, signal.SIGKILL)


def rows_of(values: dict[tuple[str, str], list[float]]) -> list[dict[str, str]]:
    """Rows of cases.csv from (patient, case) -> values of several runs."""
    return [
        {"dataset": "d", "patient": patient, "id": case, "dice": str(value)}
        for (patient, case), found in values.items()
        for value in found
    ]


def test_statistics_over_cases_count_a_case_once_and_draw_patients():
    rng = np.random.default_rng(1)
    values = {}
    for patient in range(30):
        level = rng.normal(0.8, 0.1)
        for image in range(4):
            values[f"p{patient}", f"c{patient}-{image}"] = list(level + rng.normal(0, 0.01, 2))
    found = statistics.over_cases(rows_of(values), "dice")
    means = np.array([np.mean(v) for v in values.values()])
    assert found.cases == 120
    assert found.mean == pytest.approx(means.mean()) and found.median == pytest.approx(np.median(means))
    # An independent bootstrap, one patient after the other.
    drawn = []
    by_patient = means.reshape(30, 4)
    for _ in range(4000):
        drawn.append(by_patient[rng.integers(0, 30, 30)].mean())
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.004) and found.high == pytest.approx(high, abs=0.004)
    alone = {("", case): v for (_, case), v in values.items()}
    narrower = statistics.over_cases(rows_of(alone), "dice")
    assert narrower.high - narrower.low < 0.7 * (found.high - found.low)


def test_mean_and_sd_of_few_runs():
    assert statistics.mean_sd([0.5, 0.7]) == (pytest.approx(0.6), pytest.approx(np.std([0.5, 0.7], ddof=1)))
    mean, sd = statistics.mean_sd([0.5])
    assert mean == 0.5 and np.isnan(sd)
