"""Trainings in processes of their own that may die, and whether a run ended with the same result as another."""

import multiprocessing
from pathlib import Path

import torch

from ultrarefiner import files
from ultrarefiner.runs import checkpoints

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["conftest", "ultrarefiner.runs.experiment", "ultrarefiner.data.phantom"])


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
