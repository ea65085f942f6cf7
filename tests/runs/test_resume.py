"""Killed at any moment and started again with the same command: the same result, to the last bit."""

import contextlib
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import compose
from reruns import GROUP, Command, assert_same_run, server
from ultrarefiner import files

pytestmark = pytest.mark.xdist_group(GROUP)

KILLS = 10
KILLS_A_RUN = 4
SETTINGS = [
    "dataset.reader.cases=12",
    "model.schedule.coarse.epochs=4",
    "model.schedule.sam.epochs=3",
    "model.schedule.e2e.epochs=3",
    *(f"model.schedule.{phase}.batch_size=2" for phase in ("coarse", "sam", "e2e")),
    "protection.freeze_epochs=1",
    "protection.guard=0.01",
]


def train(arguments: list[str]) -> None:
    """The whole of a command, in a process that may be killed."""
    from ultrarefiner.runs.experiment import run

    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        run(compose(*SETTINGS, *arguments))


def train_until(moment: str, number: signal.Signals, arguments: list[str]) -> None:
    """The same, and at a moment of the second epoch a signal: before step N, or "validation"."""
    import pytorch_lightning as pl

    from ultrarefiner.runs import tracking

    class Tell(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and moment == str(batch_idx):
                os.kill(os.getpid(), number)

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if trainer.current_epoch == 1 and moment == "validation":
                os.kill(os.getpid(), number)

    def leave(*_) -> None:
        raise KeyboardInterrupt

    signal.signal(number, leave)  # what the command line does
    whole = tracking.callbacks
    tracking.callbacks = lambda *args: [*whole(*args), Tell()]
    with contextlib.suppress(KeyboardInterrupt):
        train(arguments)
        os._exit(0)
    os._exit(3)


def start(*arguments: str, target=train, first=()):
    process = server.Process(target=target, args=(*first, list(arguments)))
    process.start()
    return process


def finish(*arguments: str, status: int = 0, **how) -> None:
    process = start(*arguments, **how)
    process.join(120)
    ended = process.exitcode
    process.kill()  # or it would go on after the test
    process.join()
    assert ended == status


def result(root: Path, phase: str) -> Path:
    (summary,) = root.glob(f"phantom/tiny/{phase}*/*/summary.json")
    return summary.parent


def assert_same_result(root: Path, whole: Path, phase: str) -> None:
    assert_same_run(result(root, phase), result(whole, phase))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["coarse", "sam", "e2e"])
def test_killed_at_random_moments_the_result_is_the_same_to_the_bit(tmp_path, phase):
    """Weights, optimiser state, metrics and the measured cases; the moments fall into steps, validation and writing.

    Half of the trainings save after every step.
    """
    # What is not to be killed is there before: the images, and for Phase 3 the earlier phases.
    before, whole = tmp_path / "before", tmp_path / "whole"
    for earlier in {"e2e": ("coarse", "sam")}.get(phase, ()):
        finish(f"phase={earlier}", f"output_root={before}")
    before.mkdir(exist_ok=True)
    shutil.copytree(before, whole)
    ready = server.Process(target=int)  # the server has imported all: otherwise that would count
    ready.start()
    ready.join()
    began = time.monotonic()
    finish(f"phase={phase}", f"output_root={whole}")
    lasts = time.monotonic() - began
    draw = random.Random(random.random())  # of the seed of these tests: other moments in each run of them

    kills = 0
    for attempt in range(10 * KILLS):
        root = tmp_path / f"killed{attempt}"
        shutil.copytree(before, root)
        saved = f"trainer.save_minutes={attempt % 2 * 15}"
        for _ in range(KILLS_A_RUN):
            process = start(f"phase={phase}", f"output_root={root}", saved)
            process.join(draw.uniform(0.1, 1) * lasts)
            if process.exitcode is not None:
                break
            kills += 1
            process.kill()
            process.join()
        finish(f"phase={phase}", f"output_root={root}")
        assert_same_result(root, whole, phase)
        if kills >= KILLS and attempt:
            return
        shutil.rmtree(root)
    pytest.fail(f"only {kills} of {KILLS} kills hit a run that was not over")


@pytest.mark.parametrize(
    ("moment", "steps", "options"),
    [
        ("0", 1, []),
        ("2", 3, []),
        ("2", 3, ["phase.ema_decay=0.5", "trainer.num_workers=2"]),
        ("0", 2, ["trainer.accumulate=2"]),  # gradients that were not applied yet are in no checkpoint
        ("3", 0, ["trainer.num_workers=2"]),  # the last one: the validation follows, and is left
        ("validation", 0, []),
    ],
)
def test_a_signal_saves_the_step_it_fell_into(tmp_path, moment, steps, options):
    """Without a save in the time before; and the same command ends with the same result, to the bit."""
    settings = ["phase=coarse", "phase.epochs=3", *options]
    finish(*settings, f"output_root={tmp_path / 'whole'}")
    root = tmp_path / "asked"
    number = signal.SIGTERM if options else signal.SIGINT
    finish(*settings, f"output_root={root}", target=train_until, first=(moment, number), status=3)
    (last,) = root.glob("phantom/tiny/*/*/checkpoints/last.ckpt")
    content = files.load(last)
    assert content["epoch"] == (1 if steps else 0)
    assert content.get("inside_epoch", {"steps_done": 0})["steps_done"] == steps
    finish(*settings, f"output_root={root}")
    assert_same_result(root, tmp_path / "whole", "coarse")


@pytest.mark.parametrize(("number", "anew"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_asked_to_end_it_ends_within_seconds_and_goes_on_later(tmp_path, number, anew):
    """With a sentence instead of a stack trace; in an interpreter that was started anew, and in a fork of ours."""
    import subprocess
    import sys

    from conftest import MICRO

    arguments = [*MICRO, "phase=coarse", f"output_root={tmp_path}", "phase.epochs=200"]
    if anew:
        command = [sys.executable, "-m", "ultrarefiner.train", *arguments]
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell runs in the background ignores it
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running = subprocess.Popen(command, text=True, preexec_fn=heard, **pipes)
    else:
        running = Command("ultrarefiner.train", *arguments)
    last = "phantom/tiny/coarse*/*/checkpoints/last.ckpt"
    until = time.monotonic() + 120
    try:
        while not list(tmp_path.glob(last)):
            assert time.monotonic() < until and running.poll() is None
            time.sleep(0.1)
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 128 + number
    assert "the same command continues" in err and "Traceback" not in err
    (path,) = tmp_path.glob(last)
    # of 200, each of which takes a tenth of a second here: seconds depend on what else the machine does
    assert 0 <= files.load(path)["epoch"] <= 20
