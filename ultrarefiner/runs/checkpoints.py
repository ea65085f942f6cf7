"""Checkpoint files: what they say of themselves, and which one is which."""

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn

from ultrarefiner.data.seen import Seen
from ultrarefiner.errors import UserError
from ultrarefiner.files import load
from ultrarefiner.models.weights import SAFETENSORS, load_strictly, read_metadata
from ultrarefiner.settings import COARSE, SAM, portable

log = logging.getLogger(__name__)

BUILDS = ("model", "prompt_style", "roi", "gate", "phase", "fold", "seed")
"""The nodes of the configuration that a checkpoint carries."""
SAID = ("ultrarefiner", "config", "seen")
SHIPPED = Path(__file__).resolve().parents[1] / "shipped"
"""The pair of networks that comes with the project, as `ultrarefiner.export` writes a pair."""
GATE = ".gate.pth"
"""What the file of a trained gate ends in, beside the SAM that it was trained with."""
BEST, LAST, PREVIOUS, BASELINE = "best.ckpt", "last.ckpt", "previous.ckpt", "baseline.pt"


def about(settings: dict[str, Any], config: dict[str, Any], seen: Seen) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Args:
        settings: what defines the result.
        config: the whole configuration; kept is what its networks can be built from, without this machine's paths.
        seen: the images that its weights know, and those of all that they started from.
    """
    kept = {name: node for name, node in config.items() if name in BUILDS}
    return {"ultrarefiner": settings, "config": portable(kept), "seen": seen.as_lists()}


def said_of(path: Path, content: Any = None) -> dict[str, Any]:
    """What a checkpoint of ours says of itself (see `about`); nothing of others.

    Plain weights say it in their .safetensors file; for a .pth file, the one beside it that was written with it.

    Args:
        path: of the checkpoint.
        content: what is in it, where it was read already.

    Raises:
        UserError: what it says is damaged.
    """
    beside = path.with_suffix(SAFETENSORS)
    if path.suffix != ".ckpt" and beside.is_file():
        said = read_metadata(beside)
        try:
            content = {name: json.loads(said[name]) for name in SAID if name in said}
        except ValueError as error:
            raise UserError(f"the metadata of {beside} are damaged ({error}); copy or make it again") from error
    elif content is None:
        content = load(path) if path.suffix == ".ckpt" else {}
    known = isinstance(content, dict) and set(SAID) <= set(content)
    return {name: content[name] for name in SAID} if known else {}


def located(path: str | Path | None) -> Path:
    """The place of a checkpoint that a user names: `shipped`, or nothing, is the pair that comes with the project."""
    return SHIPPED if path is None or path == "shipped" else Path(path).expanduser()


def exported(folder: Path) -> dict[str, Path]:
    """The networks in a folder of `ultrarefiner.export`, by part; nothing where it is no such folder."""
    files = {name: folder / f"{name}{SAFETENSORS}" for name in (COARSE, SAM)}
    return {name: path for name, path in files.items() if path.is_file()}


def best(directory: Path) -> dict[str, Any]:
    """The checkpoint that a finished run chose."""
    content: dict[str, Any] = load(directory / "checkpoints" / BEST)
    return content


def readable(path: Path, otherwise: str) -> Any:
    """What a file of ours holds; None where there is none, or a damaged one, which is named with what happens then."""
    try:
        return load(path) if path.is_file() else None
    except UserError as error:
        log.warning("%s; %s", error, otherwise)
        return None


def resume_point(folder: Path) -> Path | None:
    """The newest readable checkpoint to continue from; a damaged one is named and the previous one taken."""
    paths = (folder / LAST, folder / PREVIOUS)
    return next((path for path in paths if readable(path, "the one before it is used") is not None), None)


def load_gate(gate: nn.Module | None, file: Path) -> None:
    """Give the gate what Phase 2 taught it beside the SAM in a file; beside a publisher's it starts as it is.

    Raises:
        UserError: Phase 2 has trained one, and it is not there.
    """
    if gate is None or not gate.state_dict() or not said_of(file):
        return
    beside = file.with_suffix(GATE)
    if not beside.is_file():
        raise UserError(
            f"phase.sam_checkpoint={file} was trained with a gate, which is not beside it; copy {beside.name} there, "
            "or give the run's best.ckpt"
        )
    load_strictly(gate, load(beside), str(beside))
