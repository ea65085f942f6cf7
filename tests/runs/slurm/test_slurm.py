"""Sweeps on a real Slurm: arrays, time limits, preemption, killed and failing jobs, several processes and nodes.

The tests start a Slurm of their own and stop it; without its programs, or without root, they are skipped.
"""

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cluster
import pytest

from conftest import MICRO
from trouble import FOLDER, TROUBLE
from ultrarefiner import files
from ultrarefiner.runs import checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),  # one Slurm, on one worker
    pytest.mark.skipif(bool(cluster.missing()), reason=f"needs Slurm ({cluster.missing()})"),
]

# What a user of this cluster would write, see docs/cluster.md.
SITE = """\
defaults: [slurm]
partition: short
gpus_per_node: null
cpus_per_task: 1
mem_gb: null
timeout_min: 10
array_parallelism: 2
"""
EPOCHS = "model.schedule.coarse.epochs=8"
# What a user's cluster needs minutes for, one on this machine does at once: so a killed job is noticed within seconds.
COMMAND = """
from ultrarefiner import train
from ultrarefiner.runs import jobs
jobs.QUEUE_SECONDS = jobs.FILES_SECONDS = 3
train.main()
"""
PATIENCE_SECONDS = 600


@pytest.fixture(scope="session")
def slurm():
    """The environment variables of a running Slurm."""
    with cluster.running() as environment:
        yield environment


class Sweep:
    """A sweep in a process of its own, as a user starts it."""

    def __init__(self, slurm: dict[str, str], folder: Path, *arguments: str) -> None:
        self.slurm, self.root = slurm, folder / "out"
        site = folder / "site" / "hydra" / "launcher"
        site.mkdir(parents=True, exist_ok=True)
        (site / "cluster.yaml").write_text(SITE)
        self.trouble = folder / "trouble"
        self.trouble.mkdir(exist_ok=True)
        command = [sys.executable, "-c", COMMAND, "--config-dir", str(folder / "site"), "-m"]
        command += ["hydra/launcher=cluster", *MICRO, f"output_root={self.root}", *arguments]
        environment = os.environ | slurm | {"PYTHONPATH": os.pathsep.join(sys.path), FOLDER: str(self.trouble)}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait(self) -> tuple[int, str, str]:
        """Status, output and errors, when it is over."""
        out, err = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, out, err

    def job(self, text: str) -> str:
        """The id of the job in whose log a text appears, such as 3_1; waits for it."""
        return self._until(lambda: next((_id(log) for log in self.logs("out") if text in log.read_text()), ""))

    def saved(self, fold: int) -> str:
        """The id of the job that trains a fold; waits for its first checkpoint."""
        self._until(lambda: str(list(self.root.glob(f"phantom/tiny/coarse/fold{fold}-*/checkpoints/last.ckpt")) or ""))
        return self.job(f"fold {fold} · seed 0\n")

    def log(self, job: str, kind: str) -> str:
        """What the first process of a job said."""
        return "".join(log.read_text() for log in self.logs(kind) if _id(log) == job)

    def logs(self, kind: str) -> list[Path]:
        """The logs of the first process of every job, "out" or "err"."""
        return sorted(self.root.glob(f"sweeps/*/.submitit/*/*_0_log.{kind}"))

    def tell(self, *command: str) -> str:
        """What a command of Slurm's answers."""
        return subprocess.check_output(command, env=os.environ | self.slurm, text=True)

    def _until(self, found: Callable[[], str]) -> str:
        until = time.monotonic() + PATIENCE_SECONDS
        while not (value := found()):
            assert self.process.poll() is None and time.monotonic() < until, self.process.communicate(timeout=10)
            time.sleep(0.2)
        return value

    def table(self, name: str = "sweep.csv") -> list[dict[str, str]]:
        """The rows of the newest summary."""
        with (max((self.root / "sweeps").iterdir()) / name).open(newline="") as file:
            return list(csv.DictReader(file))


def _id(log: Path) -> str:
    return log.name.removesuffix(log.suffix).removesuffix("_0_log")


LIMITED = "test_a_job_at_its_time_limit_is_requeued_and_continues"


@pytest.fixture(scope="module", autouse=True)
def limited(request, slurm, tmp_path_factory):
    """A sweep whose second job sleeps past its time limit, minutes in which the other tests run."""
    if all(item.originalname != LIMITED for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("limited")
    (folder / "trouble").mkdir()
    (folder / "trouble" / "job1-process0").write_text("slow 0")
    limit = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=1", "model.schedule.coarse.epochs=1"]
    long = ["dataset.reader.cases=150", "dataset.limit.train=80", "model.schedule.coarse.batch_size=4"]
    sweep = Sweep(slurm, folder, "phase=coarse", "fold=0,1", TROUBLE, *limit, *long)
    yield sweep
    sweep.process.kill()
    sweep.process.wait()


def test_two_folds_of_two_protections_are_one_array_with_one_summary(slurm, tmp_path):
    sweep = Sweep(slurm, tmp_path, "fold=0,1", "protection=none,roi_on")
    status, out, err = sweep.wait()
    assert status == 0 and "4 jobs, 4 finished, 0 failed" in out, out + err
    assert len({_id(log).partition("_")[0] for log in sweep.logs("out")}) == 1, "one array"
    assert len(list(sweep.root.glob("phantom/tiny/e2e-*/*/summary.json"))) == 4
    rows = sweep.table()
    assert len({row["directory"] for row in rows}) == 4 and {row["status"] for row in rows} == {"finished"}
    for row in rows:
        summary = json.loads((Path(row["directory"]) / "summary.json").read_text())
        assert float(row["test_refined_dice"]) == summary["test"]["refined"]["dice"]
    assert {row["runs"] for row in sweep.table("settings.csv")} == {"2"}
    assert len(list((sweep.root / "sweeps").iterdir())) == 1
    logs = "".join(log.read_text() for log in sweep.logs("out"))
    assert logs.count("coarse · phantom · tiny · fold 1 · seed 0\n") == 1, "trained once, waited for once"


def test_a_job_at_its_time_limit_is_requeued_and_continues(limited):
    """In the middle of an epoch that takes longer than the limit; beside a job that needs no more time than it has."""
    status, out, err = limited.wait()
    assert status == 0 and "2 jobs, 2 finished, 0 failed" in out, out + err
    directory = _continued(limited, next(_id(log) for log in limited.logs("out") if _id(log).endswith("_1")), epochs=1)
    before = files.load(directory / "checkpoints" / checkpoints.PREVIOUS)
    assert before["inside_epoch"]["steps_done"] >= 1, "as far as it came, on a machine of any speed"
    assert [row["fold"] for row in limited.table()] == ["0", "1"]
    assert {row["runs"] for row in limited.table("settings.csv")} == {"2"}


def _continued(sweep: Sweep, job: str, epochs: int) -> Path:
    """A job began twice, in one directory (returned), and went on where it was."""
    said = sweep.log(job, "out")
    assert "Requeued job" in said + sweep.log(job, "err")
    assert said.count("Starting with JobEnvironment") >= 2
    trained = [int(n) for n in re.findall(r"epoch (\d+)/", said)]
    assert trained == list(range(1, epochs + 1)), "it continued"
    (directory,) = {Path(found) for found in re.findall(r"\n  (/\S*/fold\S*/)\n", said)}
    assert (directory / "summary.json").is_file()
    return directory


def test_preempted_killed_and_failing_jobs_beside_a_good_one(slurm, tmp_path):
    """The same command afterwards runs only what is missing."""
    (tmp_path / "trouble").mkdir()
    for job, what in enumerate(("slow 12", "slow 12", "slow 12", "bug")):
        (tmp_path / "trouble" / f"job{job}-process0").write_text(what)
    arguments = ["phase=coarse", "fold=0,1,2,3,4", TROUBLE, "hydra.launcher.array_parallelism=5"]
    sweep = Sweep(slurm, tmp_path, *arguments)
    for fold, how in enumerate((["--signal=USR2"], ["--signal=KILL"], [])):  # preempted, killed, cancelled
        sweep.tell("scancel", *how, sweep.saved(fold))
    status, out, err = sweep.wait()
    assert status == 1 and "5 jobs, 2 finished, 3 failed" in out, out + err
    rows = sweep.table()
    assert [row["status"] for row in rows] == ["finished", "failed", "failed", "failed", "finished"]
    assert all("the job was killed" in row["reason"] for row in rows[1:3])
    assert all(re.search("CANCELLED|Killed|Terminated", row["reason"]) for row in rows[1:3]), "and why"
    assert rows[3]["reason"] == "ZeroDivisionError: division by zero"
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [re.findall(r"fold (\d)", line) for line in errors] == [["1"], ["2"], ["3"]]

    for file in (tmp_path / "trouble").iterdir():
        file.unlink()
    again = Sweep(slurm, tmp_path, *arguments)
    status, out, err = again.wait()
    assert status == 0 and "5 jobs, 5 finished, 0 failed" in out, out + err
    newest = max((again.root / "sweeps").iterdir())
    said = {_id(log)[-1]: log.read_text() for log in again.logs("out") if newest in log.parents}
    assert ["exists already" in said[job] for job in "01234"] == [True, False, False, False, True]
    for job in "12":
        assert "epoch 1/2" not in said[job], "the killed ones continue"
    assert {row["runs"] for row in again.table("settings.csv")} == {"5"}


@pytest.mark.parametrize("nodes, tasks", [(1, 2), (2, 1)])
def test_a_job_of_two_processes_has_one_result_and_is_requeued(slurm, tmp_path, nodes, tasks):
    """On one node and on two; and when one of them is killed, the other is not left waiting."""
    trouble = tmp_path / "trouble"
    trouble.mkdir()
    (trouble / "job0-process1").write_text("slow 12")
    (trouble / "job1-process1").write_text("kill")
    killed = int(nodes == 1)  # so many jobs beside the first
    spread = [f"hydra.launcher.nodes={nodes}", f"hydra.launcher.tasks_per_node={tasks}"]
    together = ["trainer=ddp", f"trainer.num_nodes={nodes}", f"trainer.devices={tasks}"]
    folds = "fold=0,1" if killed else "fold=0"
    sweep = Sweep(slurm, tmp_path, "phase=coarse", folds, TROUBLE, EPOCHS, *spread, *together)
    job = sweep.saved(fold=0)
    sweep.tell("scancel", "--signal=USR2", job)
    status, out, err = sweep.wait()
    assert status == killed and f"{1 + killed} jobs, 1 finished, {killed} failed" in out, out + err
    _continued(sweep, job, epochs=8)
    assert len(list(sweep.root.rglob("summary.json"))) == 1
    if killed:
        assert err.count("error: ") == 1 and "fold 1" in err and "kill" in err.lower(), out + err
