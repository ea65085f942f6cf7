"""What the tests share."""

# ruff: noqa: E402  # the checks must be there before the package is
import type_checks

type_checks.install()

import contextlib
import copy
import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache, lru_cache, partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import MISSING, DictConfig, OmegaConf

from data_layouts import SHARED
from ultrarefiner import cli, config, settings, train
from ultrarefiner.data import phantom

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Pytest's workers and what they start share the cores, where threads would only wait for each other. And a process that
# has used threads cannot be forked: they would be missing, and waited for (`reruns.server`).
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
config.register = cache(config.register)  # once in a process, as in a user's, and not in each command
gc.freeze()  # a tenth of the time went into looking through what was imported again and again


def _seed(item: pytest.Item) -> None:
    """PyTorch's numbers follow pytest-randomly's seed too: others in each run, and `--randomly-seed=N` repeats them."""
    torch.manual_seed(item.config.getoption("randomly_seed", 0) + zlib.crc32(item.nodeid.encode()))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures."""
    _seed(item)


def pytest_runtest_call(item: pytest.Item) -> None:
    """Before the test itself, which must not depend on what its fixtures drew."""
    _seed(item)


FAREWELL_SECONDS = 60
"""How long a process may take to end after the last test, before it counts as left over."""
MARK = "ULTRAREFINER_TESTS"
"""The environment variable by which processes are known that the tests started, their children included."""


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """After the last test no process may be left over: it would train on for hours. It is named, and ended."""
    os.environ[MARK] = str(uuid.uuid4())
    yield
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()  # its service is one for all runs of a process, and ends with it
    forkserver._forkserver._stop()  # as it does by itself when this process ends
    until = time.monotonic() + FAREWELL_SECONDS
    while (left := _left_over()) and time.monotonic() < until:
        time.sleep(0.2)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    assert not left, f"still running after the tests: {left}"


def _left_over() -> dict[int, str]:
    """The processes that tests started and that still run, by number; without /proc only forks of this one."""
    found = {process.pid or 0: process.name for process in multiprocessing.active_children()}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            # Python's own resource tracker ends with this process.
            if f"{MARK}={os.environ[MARK]}".encode() in environment and "resource_tracker" not in command:
                found[int(process.name)] = command
    return found


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real BUS-BRA and BUSI images, which a user's clone does not have."""
    folder = SHARED
    if not folder.is_dir():
        pytest.skip("needs BUS-BRA and BUSI: set ULTRAREFINER_TEST_DATA to a folder with BUSBRA/ and BUSI_sample/")
    return folder


MICRO = [
    "dataset.reader.cases=20",
    "dataset.reader.size=64",
    "model.image_size=64",
    "model.schedule.coarse.epochs=2",
    "model.schedule.sam.epochs=1",
    "model.schedule.e2e.epochs=2",
    "trainer.progress_bar=false",
]
"""The embedded default, so small that all three phases take seconds: what it learns is not the point."""


_drawn = lru_cache(maxsize=1000)(phantom.make_phantom)


@pytest.fixture(scope="session", autouse=True)
def phantoms_are_drawn_once() -> Iterator[None]:
    """Each test has an output_root of its own, but all have the same images; `make_phantom` itself keeps nothing."""

    def read(self: phantom.Phantoms, case: phantom.Case) -> tuple:
        image, mask = _drawn(int(case.id.removeprefix("phantom_")), self.seed, self.size)
        return image.copy(), mask.copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom.Phantoms, "read", read)
        yield


@pytest.fixture(scope="session", autouse=True)
def configuration_files_are_parsed_once() -> Iterator[None]:
    """Each command puts some twenty of them together; a file with another content is parsed anew."""
    parse, parsed = OmegaConf.load, {}

    def load(file: Any) -> Any:
        if not hasattr(file, "seek"):
            return parse(file)
        text = file.read()
        if text not in parsed:
            file.seek(0)
            parsed[text] = parse(file)
        return copy.deepcopy(parsed[text])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", load)
        yield


def compose(*overrides: str, micro: bool = True) -> DictConfig:
    """The configuration of a command line, without Hydra's own entry point."""
    config.register()
    Plugins.instance().register(cli.ExperimentsPath)
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        cfg = hydra_compose("train", [*(MICRO if micro else []), *overrides])
    settings.check(cfg)
    return cfg


def phase_defaults(schema: type[config.PhaseConfig]) -> dict[str, Any]:
    """The arguments of a phase's class that have a default, with it."""
    known = {one.name: one.default for one in fields(schema) if one.name not in config.not_arguments()}
    return {name: value for name, value in known.items() if name != "_target_" and value != MISSING}


class Finished(NamedTuple):
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def execute(monkeypatch, capsys):
    """Run the `main` of a command with its arguments inside this process, and say how it ended."""

    def run(main: Callable[[], None], *arguments: str) -> Finished:
        monkeypatch.setattr(sys, "argv", ["ultrarefiner", *arguments])
        capsys.readouterr()
        status = 0
        message = ""
        try:
            main()
        except SystemExit as end:
            # A text as status is what the interpreter prints on stderr, with status 1.
            status = end.code if isinstance(end.code, int) else 1
            message = end.code if isinstance(end.code, str) else ""
        finally:
            GlobalHydra.instance().clear()
        printed = capsys.readouterr()
        return Finished(status, printed.out, printed.err + message)

    return run


@pytest.fixture
def command(execute):
    """Run `python -m ultrarefiner.train ...` inside this process."""
    return partial(execute, train.main)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium for pages; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium, such as Debian's package chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def axe(tmp_path_factory) -> str:
    """The checks of accessibility that axe-core makes, from npm's registry."""
    folder = tmp_path_factory.mktemp("axe")
    if not (npm := shutil.which("npm")):
        pytest.skip("needs npm, to fetch axe-core")
    try:
        subprocess.run([npm, "pack", "axe-core", "--silent"], cwd=folder, check=True, capture_output=True, timeout=60)
    except (subprocess.SubprocessError, OSError):
        pytest.skip("npm cannot fetch axe-core here")
    shutil.unpack_archive(next(folder.glob("axe-core-*.tgz")), folder)
    return (folder / "package" / "axe.min.js").read_text()


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory) -> Path:
    """An output_root in which all three phases of the micro experiment are finished."""
    from ultrarefiner.runs.experiment import run

    root = tmp_path_factory.mktemp("finished")
    run(compose(f"output_root={root}"))
    return root
