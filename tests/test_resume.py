"""Killed at any moment and started again with the same command: the same result, to the last bit."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from conftest import compose
from ultrarefiner.runs import checkpoints

KILLS = 20
KILLS_A_RUN = 4
SETTINGS = [
    "dataset.reader.cases=12",
    "model.schedule.coarse.epochs=6",
    "model.schedule.sam.epochs=4",
    "model.schedule.e2e.epochs=4",
    "model.schedule.sam.batch_size=2",
    "model.schedule.e2e.batch_size=2",
    "protection.freeze_epochs=1",
    "protection.guard=0.01",
]

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["ultrarefiner.experiment", "ultrarefiner.data.phantom", "conftest"])


def train(arguments: list[str]) -> None:
    """The whole of a command, in a process that may be killed."""
    from ultrarefiner.experiment import run

    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        run(compose(*SETTINGS, *arguments))


def start(*arguments: str):
    process = server.Process(target=train, args=(list(arguments),))
    process.start()
    return process


def finish(*arguments: str) -> None:
    process = start(*arguments)
    process.join(120)
    assert process.exitcode == 0


def result(root: Path, phase: str) -> Path:
    (summary,) = root.glob(f"phantom/tiny/{phase}*/*/summary.json")
    return summary.parent


def assert_same(one, other, where: str) -> None:
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other or one != one, where


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["coarse", "sam", "e2e"])
def test_killed_at_random_moments_the_result_is_the_same_to_the_bit(tmp_path, phase):
    """Weights, optimiser state, metrics and the measured cases; the moments fall into steps, validation and writing."""
    # What is not to be killed is there before: the images, and for Phase 3 the earlier phases.
    before, whole = tmp_path / "before", tmp_path / "whole"
    for earlier in {"e2e": ("coarse", "sam")}.get(phase, ()):
        finish(f"phase={earlier}", f"output_root={before}")
    before.mkdir(exist_ok=True)
    shutil.copytree(before, whole)
    began = time.monotonic()
    finish(f"phase={phase}", f"output_root={whole}")
    lasts = time.monotonic() - began
    draw = random.Random(phase)

    kills = 0
    for attempt in range(10 * KILLS):
        root = tmp_path / f"killed{attempt}"
        shutil.copytree(before, root)
        for _ in range(KILLS_A_RUN):
            process = start(f"phase={phase}", f"output_root={root}")
            process.join(draw.uniform(0.1, 1) * lasts)
            if process.exitcode is None:
                kills += 1
            process.kill()
            process.join()
        finish(f"phase={phase}", f"output_root={root}")
        resumed, plain = result(root, phase), result(whole, phase)
        for name in (checkpoints.LAST, checkpoints.BEST):
            one, other = (checkpoints.load(folder / "checkpoints" / name) for folder in (resumed, plain))
            # Lightning notes there how often it was started again; no number of the training depends on it.
            assert_same(one.pop("loops", None) and None, other.pop("loops", None) and None, "loops")
            assert_same(one, other, name)
        for name in ("metrics.csv", "cases.csv", "folds.csv"):
            assert (resumed / name).read_bytes() == (plain / name).read_bytes(), name
        if kills >= KILLS:
            return
        shutil.rmtree(root)
    pytest.fail(f"only {kills} of {KILLS} kills hit a run that was not over")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end_it_ends_within_seconds_and_goes_on_later(tmp_path, number):
    """With a sentence instead of a stack trace."""
    import subprocess
    import sys

    from conftest import MICRO

    command = [sys.executable, "-m", "ultrarefiner.train", *MICRO, "phase=coarse", f"output_root={tmp_path}"]
    command += ["phase.epochs=200"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    last = "phantom/tiny/coarse*/*/checkpoints/last.ckpt"
    until = time.monotonic() + 120
    while not list(tmp_path.glob(last)):
        assert time.monotonic() < until and running.poll() is None
        time.sleep(0.1)
    running.send_signal(number)
    asked = time.monotonic()
    _, err = running.communicate(timeout=60)
    assert time.monotonic() - asked < 20
    assert running.returncode == 128 + number
    assert "the same command continues" in err and "Traceback" not in err
    (path,) = tmp_path.glob(last)
    assert checkpoints.load(path)["epoch"] >= 0
