"""On macOS and Windows: the package runs where the system has less than Linux has."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ultrarefiner
from conftest import MICRO

# Python imports a module of this name before anything else, in processes that are started later too.
POORER = """
import multiprocessing, os, platform, signal, sys

sys.modules["resource"] = sys.modules["fcntl"] = None  # an import fails from now on
for name in ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "alarm", "setitimer", "pthread_kill"):
    delattr(signal, name)
for name in ("sched_getaffinity", "fork", "forkpty", "getpgid", "killpg"):
    delattr(os, name)
signal.valid_signals = lambda: {signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
multiprocessing.set_start_method("spawn")
real = platform.system
platform.libc_ver = lambda *args, **kwargs: ("", "")


def system():
    # PyTorch asks which libraries of its own to load, and they are Linux's; Lightning which signals there are.
    asks = sys._getframe(1).f_globals["__name__"].partition(".")[0]
    if asks in ("pytorch_lightning", "lightning_fabric"):
        return "Windows"
    return "SYSTEM" if asks in ("ultrarefiner", "submitit") else real()


platform.system = system
"""


@pytest.fixture(params=["Windows", "Darwin"])
def elsewhere(request, tmp_path):
    """Runs Python with arguments as if on another system; what it printed."""
    (tmp_path / "sitecustomize.py").write_text(POORER.replace("SYSTEM", request.param))
    path = os.pathsep.join([str(tmp_path), str(Path(ultrarefiner.__file__).parents[1])])
    # The code page of a Western Windows console.
    environment = os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "cp1252", "WANDB_MODE": "disabled"}

    def run(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, timeout=240)
        assert done.returncode == 0, done.stderr.decode("cp1252")[-3000:]
        assert b"Traceback" not in done.stderr, done.stderr.decode("cp1252")[-3000:]
        return done.stdout.decode("cp1252")

    return run


def test_the_names_are_gone(elsewhere):
    said = elsewhere("-c", "import os, signal; print(hasattr(os, 'fork'), hasattr(signal, 'SIGUSR1'))")
    assert said.split() == ["False", "False"]
    with pytest.raises(AssertionError, match="resource"):
        elsewhere("-c", "import resource")


def test_every_module_can_be_imported(elsewhere):
    names = sorted(one.name for one in pkgutil.walk_packages(ultrarefiner.__path__, "ultrarefiner."))
    assert len(names) > 60
    lines = [f"import {name}" for name in names]
    assert elsewhere("-c", "\n".join([*lines, "print('all')"])).split() == ["all"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("elsewhere", "phase", "workers", "runs"),
    [("Windows", "e2e", 0, 3), ("Darwin", "coarse", 1, 1)],
    indirect=["elsewhere"],
)
def test_phases_train(elsewhere, phase, workers, runs, tmp_path):
    """Workers that load data are started anew there instead of forked."""
    small = ["dataset.limit.val=2", "dataset.limit.test=2", "dataset.reader.cases=12", f"trainer.num_workers={workers}"]
    short = [f"model.schedule.{name}.epochs=1" for name in ("coarse", "sam", "e2e")]
    elsewhere("-m", "ultrarefiner.train", *MICRO, *small, *short, f"phase={phase}", f"output_root={tmp_path / 'out'}")
    assert len(list((tmp_path / "out").rglob("summary.json"))) == runs
