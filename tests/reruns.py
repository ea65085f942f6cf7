"""Commands in processes of their own that may die, and whether a run ended with the same result as another.

Such a process is a fork of one that has imported everything: a new interpreter takes seconds for that. Tests that start
them belong to the xdist_group `GROUP`, so that only one worker has a server.
"""

import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import torch

import type_checks
from ultrarefiner import files
from ultrarefiner.runs import checkpoints

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "conftest",
        "ultrarefiner.runs.experiment",
        "ultrarefiner.data.phantom",
        "ultrarefiner.simulate",
        "ultrarefiner.predict",
        "ultrarefiner.segmenter",
    ]
)
GROUP = "forks"


class Command:
    """`python -m MODULE ARGUMENTS` without the start of an interpreter; the methods are those of `subprocess.Popen`."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._said = Path(tempfile.mkdtemp(prefix="said-"))
        weakref.finalize(self, shutil.rmtree, self._said, ignore_errors=True)
        given = (self._said, dict(environment or os.environ), module, list(arguments))
        self._process = server.Process(target=_run, args=given)
        with mock.patch.dict(os.environ, {type_checks.SWITCH: "0"}):  # the server, should it start now, is as a user's
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked command", timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.said("out"), self.said("err")

    def said(self, stream: str) -> str:
        """What it has printed so far to "out" or "err"."""
        path = self._said / stream
        return path.read_text() if path.is_file() else ""

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self.kill()
        self._process.join()


def _run(said: Path, environment: dict[str, str], module: str, arguments: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(said / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()


def assert_same(one, other, where: str) -> None:
    """Equal to the bit, down to the last tensor."""
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


def assert_same_run(resumed: Path, plain: Path) -> None:
    """Weights, optimiser state, metrics and the measured cases of two run directories."""
    for name in (checkpoints.LAST, checkpoints.BEST):
        one, other = (files.load(folder / "checkpoints" / name) for folder in (resumed, plain))
        # Lightning notes there how often it was started again; no number of the training depends on it.
        assert_same(one.pop("loops", None) and None, other.pop("loops", None) and None, "loops")
        assert_same(one, other, name)
    for name in ("metrics.csv", "cases.csv", "folds.csv"):
        assert (resumed / name).read_bytes() == (plain / name).read_bytes(), name
