"""Packages that are only needed by some options."""

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
