"""Several processes that train one run: they compute what one computes, and have one fate."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import MICRO
from reruns import GROUP, Command
from trouble import FOLDER, TROUBLE
from ultrarefiner import files
from ultrarefiner.runs import checkpoints

pytestmark = pytest.mark.xdist_group(GROUP)  # on one worker, so that `one` and `two` are trained once

# So many steps that the coarse network finds something. Nine cases for validation in batches of four: at the end one
# of two processes has a batch more than the other.
# In double precision, or rounding errors would grow from step to step until nothing could be compared.
SMALL = [
    *MICRO,
    "trainer.precision=64-true",
    "dataset.reader.cases=53",
    "dataset.limit.val=9",
    "model.schedule.coarse.epochs=8",
    "model.schedule.e2e.epochs=3",
    *(f"model.schedule.{phase}.batch_size=4" for phase in ("coarse", "sam", "e2e")),
]
STEEP = ["phase.optimizer={_target_: torch.optim.SGD}", "phase.coarse_lr=1", "phase.sam_lr=1", "phase.grad_clip=null"]
ENDS_SECONDS = 40


def start(
    root: Path, *arguments: str, trouble: Path | None = None, by: tuple[str, ...] | None = None
) -> Command | subprocess.Popen:
    """A training in a process of its own: a fork, or a new interpreter, by a launcher where one is named."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), FOLDER: str(trouble)}
    given = [*SMALL, f"output_root={root}", *arguments]
    if by is None:
        return Command("ultrarefiner.train", *given, environment=environment)
    command = [sys.executable, *by, "-m", "ultrarefiner.train", *given]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train(root: Path, *arguments: str, **how) -> tuple[int, str, str]:
    """Status, output and errors of a training."""
    with start(root, *arguments, **how) as process:
        try:
            out, err = process.communicate(timeout=280)
        finally:
            process.kill()
    return process.returncode, out, err


def trained(root: Path, *arguments: str, **how) -> Path:
    """The run directory of a training that went well."""
    before = set(root.rglob("summary.json"))
    status, out, err = train(root, *arguments, **how)
    assert status == 0, out + err
    finished = max(set(root.rglob("summary.json")) - before, key=lambda path: path.stat().st_mtime)
    return finished.parent


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def weights(directory: Path, name: str = checkpoints.LAST) -> dict[str, torch.Tensor]:
    return files.load(directory / "checkpoints" / name)["state_dict"]


def helpers(root: Path) -> list[int]:
    """The processes that still work on a root: the first's helpers hold its configuration file."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"ultrarefiner.runs.worker" in words and str(root) in Path(words[-2].decode()).read_text():
                found.append(int(process.name))
        except OSError:  # it has ended
            continue
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """All three phases in one process."""
    root = tmp_path_factory.mktemp("one")
    trained(root, "protection.freeze_epochs=1")
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The same in two processes, started as a user starts them."""
    root = tmp_path_factory.mktemp("two")
    trained(root, "protection.freeze_epochs=1", "trainer=ddp", by=())
    return root


@pytest.fixture
def earlier(one, tmp_path) -> Path:
    """An output_root in which the first two phases are finished."""
    root = Path(shutil.copytree(one, tmp_path / "out"))
    for directory in root.glob("phantom/tiny/e2e-*"):
        shutil.rmtree(directory)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["coarse", "sam-roi_on", "e2e-roi_on-protection_roi_on"])
def test_two_processes_do_what_one_does(one, two, phase):
    """Weights, metrics and files of each phase; Phase 3 with its baseline, anchor and frozen first epoch."""
    (alone,), (together,) = ((root / "phantom" / "tiny" / phase).glob("*") for root in (one, two))
    names = [sorted(str(path.relative_to(d)) for path in d.rglob("*")) for d in (alone, together)]
    assert names[0] == names[1]
    expected, found = weights(alone), weights(together)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-8, msg=name)
    for expected_row, row in zip(rows(alone / "metrics.csv"), rows(together / "metrics.csv"), strict=True):
        for name, value in expected_row.items():
            assert float(row[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-8), name
    cases = [rows(directory / "cases.csv") for directory in (alone, together)]
    assert [row["id"] for row in cases[0]] == [row["id"] for row in cases[1]]
    summaries = [json.loads((directory / "summary.json").read_text()) for directory in (alone, together)]
    for part in ("val", "test", "baseline"):
        flat = [_flat(summary[part] or {}) for summary in summaries]
        assert flat[1] == pytest.approx(flat[0], rel=1e-5, abs=1e-8), part


def _flat(tree: dict, prefix: str = "") -> dict[str, float]:
    found = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.slow
def test_phase_3_is_frozen_anchored_and_compared_with_its_baseline(two):
    (directory,) = (two / "phantom" / "tiny").glob("e2e-*/*")
    epochs = rows(directory / "metrics.csv")
    baseline = json.loads((directory / "summary.json").read_text())["baseline"]["val"]["coarse"]["dice"]
    assert float(epochs[0]["val/coarse/dice"]) == pytest.approx(baseline) and baseline > 0.1
    assert [float(row["train/anchor"]) > 0 for row in epochs] == [False, True, True]


@pytest.mark.slow
def test_gradients_are_those_of_one_process(one, tmp_path):
    """One step of plain descent with rate 1 from trained weights: what the weights move is the gradient."""
    step = ["dataset.limit.train=4", "phase.epochs=1", *STEEP, "protection=none"]
    before = {}
    for name in ("coarse", "sam"):
        (best,) = one.glob(f"phantom/tiny/{name}*/*/checkpoints/best.ckpt")
        step.append(f"phase.{name}_checkpoint={best}")
        before |= files.load(best)["state_dict"]
    alone, together = (
        {name: before[name] - value for name, value in weights(trained(tmp_path / t, *step, f"trainer={t}")).items()}
        for t in ("default", "ddp")
    )
    assert sum(float(value.abs().max()) > 1e-5 for value in alone.values()) > 100
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.slow
def test_the_guard_restores_the_weights_of_phase_1(earlier):
    """A coarse network that is driven apart at once is put back; the last step has a rate of nearly zero."""
    destroy = ["phase.coarse_lr=0.1", "protection=none", "protection.guard=0.01", "trainer=ddp"]
    directory = trained(earlier, *destroy)
    epochs = rows(directory / "metrics.csv")
    assert all(float(row["val/coarse/vs_baseline"]) < -0.01 for row in epochs)
    baseline = json.loads((directory / "summary.json").read_text())["baseline"]["val"]["coarse"]["dice"]
    best = files.load(directory / "checkpoints" / checkpoints.LAST)["best_coarse"]
    assert best["dice"] == pytest.approx(baseline)
    end = weights(directory)
    for name, value in best["state_dict"].items():
        assert torch.equal(end[f"cascade.coarse.{name}"], value), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "process, what, said",
    [
        (1, "mistake", "error: this image cannot be read"),
        (0, "mistake", "error: this image cannot be read"),
        (1, "bug", "error: process 1 failed with ZeroDivisionError: division by zero"),
        (1, "kill", "error: the connection to another process was lost: it was killed"),
    ],
)
def test_an_error_in_one_process_ends_all_with_one_sentence(tmp_path, process, what, said):
    (tmp_path / f"job0-process{process}").write_text(what)
    status, _, err = train(tmp_path / "out", "phase=coarse", TROUBLE, "trainer=ddp", trouble=tmp_path)
    lines = err.strip().splitlines()
    assert status == 1 and lines[-1].startswith(said), err
    assert len(lines) == 1 or what == "bug", err
    assert not helpers(tmp_path / "out")
    assert not list(tmp_path.rglob("summary.json"))


@pytest.mark.slow
def test_a_mistake_of_all_is_said_once(tmp_path):
    status, _, err = train(tmp_path, "phase=coarse", "fold=9", "trainer=ddp")
    assert status == 1 and err.count("error:") == 1 and len(err.strip().splitlines()) == 1, err


def test_a_batch_that_cannot_be_divided_is_refused(command, tmp_path):
    """Before any other process is started."""
    done = command(*SMALL, "phase=coarse", "trainer=ddp", "trainer.devices=3", f"output_root={tmp_path}")
    assert done.status == 1 and "cannot be divided among 3 processes" in done.err
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number, status, then", [(signal.SIGTERM, 143, "ddp"), (signal.SIGKILL, -9, "default")])
def test_ended_from_outside_the_others_end_and_the_same_command_continues(two, tmp_path, number, status, then):
    """Inside an epoch if it was asked; to the same end: bit by bit, or but for rounding with another number of them."""
    arguments = ["phase=coarse", TROUBLE]
    (tmp_path / "job0-process0").write_text("slow 20")
    root = tmp_path / "out"
    with start(root, *arguments, "trainer=ddp", trouble=tmp_path) as process:
        try:
            while not list(root.rglob(checkpoints.LAST)):
                assert process.poll() is None, process.communicate()
                time.sleep(0.1)
            assert helpers(root)
            process.send_signal(number)
            process.communicate(timeout=ENDS_SECONDS)
        finally:
            process.kill()
    assert process.returncode == status
    until = time.monotonic() + ENDS_SECONDS
    while helpers(root) and time.monotonic() < until:
        time.sleep(0.2)
    assert not helpers(root)
    last = files.load(next(root.rglob(checkpoints.LAST)))
    assert ("inside_epoch" in last) == (number == signal.SIGTERM)
    (tmp_path / "job0-process0").unlink()
    status, out, err = train(root, *arguments, f"trainer={then}", trouble=tmp_path)
    assert status == 0 and "epoch 1/8" not in out and "epoch 8/8" in out, out + err
    (resumed,), (straight,) = ((r / "phantom" / "tiny" / "coarse").glob("*") for r in (root, two))
    exact = {"rtol": 0, "atol": 0} if then == "ddp" else {"rtol": 1e-5, "atol": 1e-8}
    for name, value in weights(straight).items():
        torch.testing.assert_close(weights(resumed)[name], value, **exact, msg=name)
    for row, expected in zip(rows(resumed / "metrics.csv"), rows(straight / "metrics.csv"), strict=True):
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-8), name
    assert len(list(root.rglob("summary.json"))) == 1


@pytest.mark.slow
def test_started_by_torchrun(two, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    directory = trained(tmp_path, "phase=coarse", "trainer=ddp", by=launcher)
    (straight,) = (two / "phantom" / "tiny" / "coarse").glob("*")
    assert directory.name == straight.name
    for name, value in weights(straight).items():
        assert torch.equal(weights(directory)[name], value), name


def test_processes_that_nobody_asked_for_are_refused(command, tmp_path, monkeypatch):
    """As many experiments in one directory they would be."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    done = command("phase=coarse", f"output_root={tmp_path}")
    assert done.status == 1 and "SLURM started 2 processes on 1 nodes for trainer.devices=1" in done.err
    assert "hydra.launcher.tasks_per_node" in done.err


def test_a_batch_script_without_srun_is_one_process(monkeypatch):
    """`sbatch -n 2` sets the variables of a first task, and no second one comes."""
    from ultrarefiner.runs import launch

    for name, value in (("NTASKS", 2), ("PROCID", 0), ("LOCALID", 0), ("NODEID", 0), ("JOB_ID", 7)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert launch._place(local=2, nodes=1) is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    place = launch._place(local=2, nodes=1)
    assert place is not None and (place["RANK"], place["WORLD_SIZE"], place["MASTER_ADDR"]) == ("0", "2", "127.0.0.1")
