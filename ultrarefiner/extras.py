"""Packages that are only needed by some options, or not at all."""

import contextlib
import importlib
from types import ModuleType

from ultrarefiner.errors import UserError


def imported(module: str, package: str, extra: str) -> ModuleType:
    """A module of an optional package.

    Args:
        module: its full name.
        package: the package's name. extra: ours that installs it.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs the package {package} ({error}); install it: pip install 'ultrarefiner[{extra}]'."
        ) from error


NOT_NEEDED = frozenset({"torchvision", "matplotlib", "scipy"})


def import_lightning() -> None:
    """Import Lightning a second sooner, in a process that trains.

    Lightning imports all of torchmetrics, and that imports `NOT_NEEDED` where they are installed, for metrics that
    nothing here uses. Here it finds them missing: torchmetrics is then without LPIPS, plots and the like, unless it was
    imported before.
    """
    with contextlib.suppress(Exception):  # of other versions: then all is imported, and it takes longer
        from lightning_utilities.core import imports

        found, met = imports.package_available, imports.RequirementCache.__bool__
        try:
            imports.package_available = lambda name: name not in NOT_NEEDED and found(name)  # type: ignore
            imports.RequirementCache.__bool__ = lambda self: self.requirement not in NOT_NEEDED and met(self)  # type: ignore
            importlib.import_module("torchmetrics")
        finally:
            imports.package_available, imports.RequirementCache.__bool__ = found, met  # type: ignore
