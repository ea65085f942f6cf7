"""What the benchmarks share: clocks, peak memory, the machine, and processes that are measured in turn."""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from ultrarefiner import cli, config

Repeat = Callable[[], dict[str, float] | None]
"""One repeat of what is measured; what it returns is noted beside its time."""
Figures = dict[str, Any]


def configuration(*overrides: str) -> DictConfig:
    """What `python -m ultrarefiner.train` would compose."""
    config.register()
    Plugins.instance().register(cli.ExperimentsPath)
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return compose("train", list(overrides))


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds of one run on the wall, those of the processor (less disturbed by other programs), and its result."""
    start, processor = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - start, time.process_time() - processor, result


def matrix_rate(repeats: int = 5, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s that a plain matrix product of a transformer's size reaches here: the bound of everything else."""
    rows = 4096 if device == "cpu" else 65536
    left, right = torch.rand(rows, 768, device=device, dtype=dtype), torch.rand(768, 3072, device=device, dtype=dtype)

    def products() -> None:
        for _ in range(20):
            left @ right
        if device != "cpu":
            torch.cuda.synchronize()

    products()
    return 20 * 2 * rows * 768 * 3072 / statistics.median(timed(products)[0] for _ in range(repeats))


def machine() -> Figures:
    """The processor, and what else ran on it when it was asked."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gflops": matrix_rate() / 1e9,
        "load": os.getloadavg()[0],
    }


class Apart:
    """Something to measure in a process of its own, so that its peak memory is its own.

    Args:
        factory: makes it, in that process; a function of a module.
        arguments: of the factory.
    """

    def __init__(self, factory: Callable[..., Repeat], *arguments: Any) -> None:
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._process.submit(_make, factory, arguments).result()

    def __call__(self) -> dict[str, float]:
        """One repeat: "seconds", "processor", "peak_gb" (of the process's whole life), and what the repeat returns."""
        try:
            return self._process.submit(_repeat).result()
        except BrokenProcessPool:
            raise SystemExit(
                "error: a measured process was killed, for want of memory? See that 12 GB are free."
            ) from None

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()


_made: Repeat


def _make(factory: Callable[..., Repeat], arguments: tuple) -> None:
    global _made
    _made = factory(*arguments)


def _repeat() -> dict[str, float]:
    seconds, processor, noted = timed(_made)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "processor": processor, "peak_gb": peak} | (noted or {})


def in_turn(factories: Mapping[str, tuple], repeats: int, warm: int = 0, alone: bool = False) -> dict[str, Figures]:
    """Measure several things in turn, so that whatever else the machine does falls on all alike.

    Args:
        factories: name → (factory, arguments...), see `Apart`.
        repeats: of each; medians are kept of all that they note, and the largest "peak_gb".
        warm: repeats before them that do not count.
        alone: a new process for each repeat, with a warm one before it, so that only one of them takes memory at a
            time.
    """
    processes: dict[str, Apart] = {}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in factories}
    try:
        for number in range(warm + repeats):
            for name, made in factories.items():
                if name not in processes:
                    processes[name] = Apart(*made)
                    if alone:
                        processes[name]()
                one = processes[name]()
                if alone:
                    processes.pop(name).close()
                if number >= warm:
                    found[name].append(one)
                print(f"  {name}: {one['seconds']:.2f} s, processor {one['processor']:.2f} s", flush=True)
    finally:
        for process in processes.values():
            process.close()
    return {name: summary(rows) for name, rows in found.items()}


def summary(rows: list[dict[str, float]]) -> Figures:
    """Medians, the largest peak, and the seconds of every repeat."""
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return medians | {"peak_gb": max(row["peak_gb"] for row in rows), "every": [row["seconds"] for row in rows]}
