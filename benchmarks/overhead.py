"""What watching a training costs: logging, tables and checkpoints as a share of its time; and how long the start takes.

    python benchmarks/overhead.py [--cases 96] [model=lite phase=sam logger=[csv,tensorboard] ...]

Trains one epoch of the given experiment on phantoms with every callback and logger in its place, and adds up the wall
time inside them. Then takes the time of `--help`, `--cfg job` and completion, and of the embedded default from the
shell to its first step. Prints Markdown.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins

from ultrarefiner import cli, config
from ultrarefiner.runs import experiment, training

WATCHERS = ("MetricsTable", "KeepCheckpoints", "Estimate", "Patience", "Interruption", "ProgressBar")
START = """
import os, sys, time
from ultrarefiner import extras, train
def stop(self, *rest):
    print("first step", time.time())
    sys.stdout.flush()
    os._exit(0)
def watched():  # where the command imports Lightning
    as_ever()
    from ultrarefiner.phases.phase import Phase
    Phase.on_train_batch_end = stop
as_ever, extras.import_lightning = extras.import_lightning, watched
train.main()
"""


def measure(overrides: list[str]) -> tuple[float, dict[str, float], int]:
    """Seconds of the fit, seconds inside each watcher, and the number of steps."""
    spent: dict[str, float] = defaultdict(float)
    whole: dict[str, float] = {}

    def timed(name: str, call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - began

        return wrapper

    make = training._trainer

    def watched(*args: Any) -> pl.Trainer:
        trainer = make(*args)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for hook in dir(pl.Callback):
                if hook.startswith("on_") and type(callback).__name__ in WATCHERS:
                    setattr(callback, hook, timed(type(callback).__name__, getattr(callback, hook)))
        for logger in trainer.loggers:
            for hook in ("log_metrics", "log_hyperparams", "save"):
                setattr(logger, hook, timed(type(logger).__name__, getattr(logger, hook)))
        fit = trainer.fit

        def fitted(*args: Any, **kwargs: Any) -> None:
            began = time.perf_counter()
            fit(*args, **kwargs)
            whole["seconds"], whole["steps"] = time.perf_counter() - began, trainer.global_step

        trainer.fit = fitted  # type: ignore[method-assign]
        return trainer

    training._trainer = watched
    config.register()
    Plugins.instance().register(cli.ExperimentsPath)
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        cfg = compose("train", overrides)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        experiment.run(cfg)
    training._trainer = make
    return whole["seconds"], dict(spent), int(whole["steps"])


def start() -> float:
    """Seconds from the shell to the end of the first step of the embedded default, whose images are there already."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", START, "phase=coarse", f"output_root={folder}", "trainer.progress_bar=false"]
        times = []
        for _ in range(4):  # the first makes the images
            began = time.time()
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            times.append(float(out.split("first step")[1].split()[0]) - began)
    return statistics.median(times[1:])


def looking_around() -> dict[str, float]:
    """Seconds of what is asked for while composing a command, the median of five."""
    took = {}
    for arguments in ("--help", "--cfg job", "-sc query=bash"):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "ultrarefiner.train", *arguments.split()],
                env=os.environ | {"COMP_LINE": "ultrarefiner-train phase=", "COMP_POINT": "25"},
                capture_output=True,
                check=True,
            )
            times.append(time.perf_counter() - began)
        took[arguments] = statistics.median(times)
    return took


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=96, help="phantoms, of which five eighths are trained on")
    parser.add_argument("overrides", nargs="*", default=["model=lite", "phase=sam", "logger=[csv,tensorboard]"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        common = [f"dataset.reader.cases={args.cases}", "phase.epochs=1", f"output_root={folder}"]
        seconds, spent, steps = measure([*args.overrides, *common, "trainer.progress_bar=false"])
    watching = sum(spent.values())
    print(f"`{' '.join(args.overrides)}`, one epoch of {steps} steps with its validation: {seconds:.1f} s\n")
    print("| | s | share |\n|---|---|---|")
    for name, value in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {name} | {value:.3f} | {value / seconds:.2%} |")
    print(f"| logging and checkpoints together | {watching:.3f} | {watching / seconds:.2%} (goal: under 3 %) |\n")
    for arguments, seconds in looking_around().items():
        print(f"`{arguments}`: {seconds:.2f} s (goal: under 1.5 s)\n")
    print(f"From the shell to the first step of model=tiny: {start():.1f} s (goal: under 10 s)")


if __name__ == "__main__":
    main()
