"""Check the package's signatures at run time: `install()` before the package is imported."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

SWITCH = "ULTRAREFINER_CHECK_TYPES"
"""The environment variable that switches the checks off where it is 0: for a debugger, or to see what they cost."""

# An int will do for a float, as type checkers see it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
_with_shapes = jaxtyping.jaxtyped


def _checked(what: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """jaxtyping's decorator where a signature speaks of shapes; elsewhere types alone, in a tenth less time."""
    if what is None:
        return partial(_checked, typechecker=typechecker)
    said = {} if isinstance(what, type) else what.__annotations__
    # jaxtyping also lets names pass that are known to type checkers alone.
    shapes = isinstance(what, type) or "jaxtyping." in str(said) or any(isinstance(one, str) for one in said.values())
    return _with_shapes(what, typechecker=typechecker) if shapes else check(what)


def install() -> None:
    """From now on each module of the package that is imported checks its calls: types, shapes and sizes."""
    if os.environ.get(SWITCH, "1") != "0":
        jaxtyping.jaxtyped = _checked
        jaxtyping.install_import_hook("ultrarefiner", "type_checks.check")
