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
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from conftest import MICRO, compose
from reruns import GROUP, Command, server
from trouble import FOLDER, TROUBLE
from ultrarefiner import files, ranks
from ultrarefiner.data.dataset import EpochSampler
from ultrarefiner.models.efficient_unet import EfficientUNet
from ultrarefiner.phases.sam import SamPhase
from ultrarefiner.runs import assemble, checkpoints
from ultrarefiner.runs.ddp import SharedStatistics

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


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks in training and a batch of unlike images for each; the same ones in every process."""
    torch.manual_seed(0)
    signals = nn.Sequential(nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.Conv1d(3, 2, 3), nn.BatchNorm1d(2, affine=False))
    volumes = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2, momentum=None, track_running_stats=False))
    found = {
        "unet": (EfficientUNet(64, pretrained=False), torch.rand(4, 1, 64, 64)),
        "signals": (signals, torch.rand(4, 1, 9)),
        "volumes": (volumes, torch.rand(4, 1, 5, 5, 5)),
    }
    for _, x in found.values():
        x[2:] *= 0.3
    return {name: (network.double().train(), x.double()) for name, (network, x) in found.items()}


def pass_through(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a network gives, its gradients and buffers."""
    out = network(x)
    (out**2).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters()}
    return {"out": out.detach(), **gradients, **dict(network.named_buffers())}


def as_one_of_two(rank: int, folder: Path) -> None:
    """The part of one of two processes: every second image."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, (network, x) in networks().items():
        found = pass_through(SharedStatistics().apply(network), x[rank::2])
        torch.save(found, folder / f"{name}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_batch_statistics_are_those_of_one_process(tmp_path):
    """Of every kind of layer; most of those in EfficientUNet are timm's, with an activation inside."""
    processes = [server.Process(target=as_one_of_two, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(280)
        process.kill()
    for name, (network, x) in networks().items():
        expected = pass_through(network, x)
        parts = [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]
        for what, value in expected.items():
            one, two = (part[what] for part in parts)
            if what == "out":
                one = two = torch.stack([one, two], 1).flatten(0, 1)
            elif what.startswith("gradient"):
                one = two = one + two
            for found in (one, two):
                torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-9, msg=f"{name}: {what}")


class Doubled(nn.BatchNorm2d):
    """Does something else than its base."""

    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.BatchNorm2d):
    """Does nothing else than its base."""


def test_layers_are_exchanged_and_put_back_and_strange_ones_are_named(caplog):
    kinds = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d, Renamed, Doubled, Doubled]
    network, x = nn.Sequential(*(kind(2) for kind in kinds)), torch.rand(2, 2, 3, 3)
    expected = network[3].eval()(x)
    shared = SharedStatistics()
    for _ in range(2):
        shared.apply(network)
    assert [type(layer) in kinds for layer in network] == [False] * 5 + [True] * 2
    assert torch.equal(network[3](x), expected)
    shared.revert(network)
    assert [type(layer) for layer in network] == kinds
    assert [record.message.count("class Doubled,") for record in caplog.records] == [1, 1]


def test_each_process_has_the_margins_of_its_own_cases(monkeypatch):
    """Where K masks share a crop, its margins are drawn in the step, which has the same seed in all processes."""
    phase, found = assemble.build_phase(compose("phase=sam"), SamPhase, {}), []
    look = phase.cascade.refiner.look
    monkeypatch.setattr(phase.cascade.refiner, "look", lambda *a: (found.append(a[2]), look(*a))[1])
    order = [[case for _, case in EpochSampler(4, 0, True, *place)] for place in ((0, 1), (0, 2), (1, 2))]
    for place, cases in zip(((0, 1), (0, 2), (1, 2)), order, strict=True):
        monkeypatch.setattr(ranks, "rank", lambda place=place: place[0])
        monkeypatch.setattr(ranks, "size", lambda place=place: place[1])
        mask, prob = torch.ones(len(cases), 1, 64, 64), torch.rand(len(cases), 2, 64, 64)
        torch.manual_seed(1)
        phase.terms({"image": mask, "mask": mask, "coarse_mask": mask, "prob": prob, "aspect": torch.ones(len(cases))})
    of_case = dict(zip(order[0], found[0], strict=True))
    assert len({tuple(margins.tolist()) for margins in of_case.values()}) == 4
    for cases, margins in zip(order[1:], found[1:], strict=True):
        assert torch.equal(margins, torch.stack([of_case[case] for case in cases]))


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
