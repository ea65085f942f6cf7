"""What the schema knows of each setting beside its type: its range, and what it means for a result.

Imports neither torch nor anything that does.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from ultrarefiner.errors import UserError
from ultrarefiner.files import folder_sha256, sha256

COARSE, SAM, BRIDGE = "coarse", "sam", "bridge"
"""What a phase may train: the coarse network, SAM, and the way between them on which gradients come back."""
PARTS = frozenset({COARSE, SAM, BRIDGE})
WEIGHT_FILES = frozenset({"coarse_weights", "checkpoint", "coarse_checkpoint", "sam_checkpoint"})
"""Keys that hold the path of a file of weights: its content defines a result, not its name."""
STARTS = WEIGHT_FILES | {"random_init", "encoder_weights"}
"""Keys that say where the first weights of a network come from: who brings all of its weights needs none."""
FOLDERS = re.compile(r"phase\.(\w+\.)*masks")
"""Keys that hold the path of a folder: the contents of its files define a result."""
NAMES_OF_WEIGHTS = (None, "pretrained", "auto")
"""What may stand in the place of such a path, and says by itself which weights are meant."""
NAME = re.compile(r"[^./\\\x00-\x1f:][^/\\\x00-\x1f:]{0,79}")
"""What options may be called: part of a folder's name on every system."""
PREDICTING = ("auto", "32-true", "bf16-mixed", "16-mixed")
"""The number formats that trained networks compute in, see `precision`."""
PRECISIONS = (*PREDICTING, "64-true")
"""Those of a training. Weights in 16 bits are none: the small steps of a training would be rounded away."""
PLACES = frozenset({"root"})
"""Keys that say where data lie."""


@dataclass(frozen=True)
class About:
    """What is known of a setting; see `setting`."""

    of: frozenset[str] = PARTS
    fits: bool = False
    result: bool = True
    argument: bool = True
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    one_of: tuple[str | bool | None, ...] = ()

    def refusal(self, value: Any) -> str | None:
        """What the value must be instead, or None if it may be what it is."""
        if self.one_of and value not in self.one_of:
            words = ["null" if word is None else str(word).lower() for word in self.one_of]
            return f"one of {', '.join(words)}" if len(words) > 1 else words[0]
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        allowed = (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        return None if allowed else self._range()

    def _range(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"between {self.at_least} and {self.at_most}"
        words = {"{} or more": self.at_least, "more than {}": self.above}
        words |= {"at most {}": self.at_most, "less than {}": self.below}
        return " and ".join(text.format(bound) for text, bound in words.items() if bound is not None) or "finite"


OPTIMIZER = {
    "momentum": About(at_least=0, below=1),
    "dampening": About(at_least=0, at_most=1),
    "weight_decay": About(at_least=0, below=1),
    "eps": About(above=0, below=1),
    "maximize": About(one_of=(False, None)),
}
"""Ranges of what an optimiser takes, which torch does not know all of."""


def setting(default: Any = MISSING, of: tuple[str, ...] | None = None, **about: Any) -> Any:
    """A field of the schema.

    Args:
        default: its value; a function that makes one for lists, dictionaries and nested settings.
        of: the parts whose training it takes part in (all if not given); in a phase without them it means nothing.
        about: `fits`: a checkpoint of these parts fits only where the setting is the same.
            `result`: False for what changes no result: where files lie, how the machine is used.
            `argument`: of a phase: False for what is not an argument of its class, but says where its data and starting
            weights come from or how its epochs are counted.
            `at_least`, `above`, `at_most`, `below`: the range of a number. `one_of`: the values that a text may have.
    """
    known = About(PARTS if of is None else frozenset(of), **about)
    return field(**{"default_factory" if callable(default) else "default": default}, metadata={"about": known})


def about(one: "Field[Any]") -> About:
    """What is known of a field."""
    known: About = one.metadata.get("about", About())
    return known


def check(cfg: DictConfig, prefix: str = "") -> None:
    """Compare every setting of a composed configuration, and each entry of a list, with its range.

    No text may be empty, no key of the schema may be missing, and only a phase may have more. Names of options become
    folders, and of the weights of a loss one must count.

    Raises:
        UserError: the first that is outside, with what it may be.
    """
    schema = OmegaConf.get_type(cfg)
    known = {one.name: about(one) for one in fields(schema)} if is_dataclass(schema) else {}
    schema_of = OPTIMIZER if prefix.endswith("optimizer.") else known
    names = list(map(str, cfg))
    if lost := [name for name in known if name not in names]:
        raise UserError(f"{prefix}{lost[0]} is needed and cannot be taken away")
    if known and not prefix.startswith("phase.") and (new := [name for name in names if name not in known]):
        raise UserError(f"there is no key {prefix}{new[0]}; `--cfg job` prints all of them")  # it was added with +
    names = [name for name in names if not OmegaConf.is_missing(cfg, name)]
    for name in names:
        key, value = f"{prefix}{name}", cfg[name]
        if isinstance(value, DictConfig):
            check(value, f"{key}.")
            continue
        for one in value if isinstance(value, ListConfig) else [value]:
            if isinstance(one, str) and not one.strip() and not OmegaConf.is_interpolation(cfg, name):
                raise UserError(f"{key} must not be empty, got {one!r}; say what it is, or leave it out")
            if wanted := schema_of.get(name, About()).refusal(one):
                raise UserError(f"{key} must be {wanted}, got {'null' if one is None else one}")
        if name == "name" and key != "model.coarse.name" and not NAME.fullmatch(str(value)):
            raise UserError(f"{key} must be a name of up to 80 letters, without / or \\ or a first dot, got {value!r}")
    weights = [name for name in names if name.endswith("_weight")]
    if len(weights) > 1 and all(cfg[name] == 0 for name in weights):
        listed = ", ".join(f"{prefix}{name}" for name in weights)
        raise UserError(f"one of {listed} must be more than 0: nothing counts")


def defining(cfg: Any, parts: frozenset[str], schema: type) -> dict[str, Any]:
    """Everything that defines the result of training some parts, by dotted key, and nothing that does not.

    Args:
        cfg: the composed configuration.
        parts: what is trained.
        schema: its dataclass.

    Raises:
        UserError: a file of weights that is not there.
    """
    leaves = _leaves(cfg, schema)
    return {key: _portable(_plain(value), key) for key, known, value in leaves if known.result and known.of & parts}


def fitting(cfg: Any, part: str, schema: type) -> dict[str, Any]:
    """What a checkpoint of a part must have been trained with to fit, by dotted key.

    Where its first weights came from says nothing about that.
    """
    leaves = _leaves(cfg, schema)
    return {key: without_start(_plain(value)) for key, known, value in leaves if known.fits and part in known.of}


def comparable(config: Mapping[str, Any], schema: Any = None, prefix: str = "") -> dict[str, Any]:
    """All that may change a result, by dotted key, of a plain configuration; it may be one of an older version."""
    known = {one.name: one for one in fields(schema)} if is_dataclass(schema) else {}
    found: dict[str, Any] = {}
    for name, value in config.items():
        one = known.get(name)
        if name in PLACES or (one is not None and not about(one).result):
            continue
        if isinstance(value, dict):
            found |= comparable(value, one.type if one is not None else None, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _leaves(cfg: Any, schema: type, prefix: str = "") -> Iterator[tuple[str, About, Any]]:
    """Each setting of the schema; those of a nested schema one by one where nothing is said of it as a whole."""
    for one in fields(schema):
        key, value = f"{prefix}{one.name}", cfg[one.name]
        if is_dataclass(one.type) and "about" not in one.metadata:
            yield from _leaves(value, cast(type, one.type), f"{key}.")
        else:
            yield key, about(one), value


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _portable(value: Any, key: str) -> Any:
    """The value with the contents of weight files in place of their paths, and without places of data."""
    if isinstance(value, dict):
        return {name: _portable(inner, f"{key}.{name}") for name, inner in value.items() if name not in PLACES}
    if FOLDERS.fullmatch(key) and value is not None:
        return f"sha256:{folder_sha256(Path(value).expanduser())}"
    if key.rpartition(".")[2] not in WEIGHT_FILES or value in NAMES_OF_WEIGHTS:
        return value
    try:
        return f"sha256:{sha256(Path(value).expanduser())}"
    except OSError as error:
        raise UserError(f"{key}={value} cannot be read ({error.strerror}); give the path of a weights file") from error


def portable(value: Any) -> Any:
    """Plain settings without the paths of this machine: weights that stood in a file are null, data lie nowhere."""
    if not isinstance(value, dict):
        return value
    return {
        name: None if name in WEIGHT_FILES and inner not in NAMES_OF_WEIGHTS else portable(inner)
        for name, inner in value.items()
        if name not in PLACES
    }


def without_start(value: Any) -> Any:
    """Plain settings without what says where the first weights of a network came from."""
    if not isinstance(value, dict):
        return value
    return {name: without_start(inner) for name, inner in value.items() if name not in STARTS}
