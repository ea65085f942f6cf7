"""Check the package's signatures at run time: `install()` before the package is imported."""

import os

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

SWITCH = "ULTRAREFINER_CHECK_TYPES"
"""The environment variable that switches the checks off where it is 0: for a debugger, or to see what they cost."""

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float, as type checkers see it


def install() -> None:
    """From now on each module of the package that is imported checks its calls: types, shapes and sizes."""
    if os.environ.get(SWITCH, "1") != "0":
        install_import_hook("ultrarefiner", "type_checks.check")
