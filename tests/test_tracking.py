"""Loggers: what they get, and that nobody is asked for anything."""

import os
import subprocess
import sys

import pytest

from conftest import MICRO, compose
from ultrarefiner.experiment import run


def test_tensorboard_gets_metrics_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = run(compose(f"output_root={tmp_path}", "phase=coarse", "logger=tensorboard"))
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"train/loss", "val/coarse/dice", "best/test/coarse/hd95"} <= set(tags["scalars"])
    assert {"curves", "overlays"} <= set(tags["images"])
    assert len(events.Scalars("val/coarse/dice")) == 2


@pytest.mark.slow
def test_wandb_is_offline_and_silent_when_nobody_is_logged_in(tmp_path):
    """In a process of its own, without a home to find a login in, and without a terminal to ask on."""
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    arguments = [*MICRO, "model.schedule.coarse.epochs=1", f"output_root={tmp_path}/out", "logger=[wandb,tensorboard]"]
    done = subprocess.run(
        [sys.executable, "-m", "ultrarefiner.train", *arguments],
        capture_output=True,
        text=True,
        env=surroundings,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "wandb:" not in done.stdout.lower()
    for phase in ("coarse", "sam", "e2e"):  # each phase is a run of its own
        assert len(list(tmp_path.glob(f"out/phantom/tiny/{phase}*/*/wandb/offline-run-*/*.wandb"))) == 1
        assert len(list(tmp_path.glob(f"out/phantom/tiny/{phase}*/*/tensorboard/events*"))) >= 1
