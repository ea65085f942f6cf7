"""Loggers: what they get, and that nobody is asked for anything."""

import os
import subprocess
import sys

import pytest

from conftest import MICRO, compose
from ultrarefiner.runs import tracking
from ultrarefiner.runs.experiment import run


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


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A run of Weights & Biases on disk, the third phase of a chain."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    about = {"name": "a run", "job_type": "e2e", "group": "a sweep", "tags": ["fold0"], "settings": {"fold": 0}}
    logger = tracking.wandb_logger(tmp_path, **about, first_step=100, artifact=True)
    yield logger
    tracking.close([logger], "success")


def test_wandb_counts_steps_on_over_the_phases(offline):
    offline.log_metrics({"train/loss": 0.5}, step=7)
    assert offline.experiment.summary["trainer/global_step"] == 107
    assert offline.experiment.group == "a sweep"
    assert offline.experiment.job_type == "e2e"


def test_wandb_uploads_the_best_checkpoint_on_request(offline, tmp_path, monkeypatch):
    uploaded = []
    monkeypatch.setattr(
        offline.experiment, "log_artifact", lambda artifact, aliases: uploaded.append((artifact, aliases))
    )
    path = tmp_path / "best.ckpt"
    path.write_bytes(b"weights")
    tracking.log_checkpoint([offline], path, "a run")
    ((artifact, aliases),) = uploaded
    assert list(artifact.manifest.entries) == ["best.ckpt"] and aliases == ["best"]
    offline.artifact = False
    tracking.log_checkpoint([offline], path, "a run")
    assert len(uploaded) == 1


def test_tensorboard_counts_on_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    about = {"name": "n", "job_type": "sam", "tags": [], "group": "g", "settings": {}}
    logger = tracking.tensorboard_logger(tmp_path, **about, first_step=100)
    logger.log_metrics({"loss": 1.0}, step=3)
    tracking.close([logger], "success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [103]


def test_jobs_of_a_sweep_are_one_group(monkeypatch):
    from types import SimpleNamespace

    from hydra.types import RunMode

    cfg = compose("phase=coarse")
    assert tracking.group(cfg) == "phantom-tiny-coarse"
    job = SimpleNamespace(mode=RunMode.MULTIRUN, sweep=SimpleNamespace(dir="outputs/sweeps/2026-01-02"))
    monkeypatch.setattr(tracking, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: job))
    assert tracking.group(cfg) == "sweep 2026-01-02"
