"""Files: written whole or not at all, and read without executing what is in them.

Torch is imported where it is used: the commands and the sweep's summary need this room, and must start quickly.
"""

import contextlib
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultrarefiner.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment either the old or the new one is there in full.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    with replacing(path) as part:
        part.write_bytes(content)


def save(content: Any, path: Path) -> None:
    """`torch.save`, atomically; see `write_atomically`."""
    import torch

    with replacing(path) as part:
        torch.save(content, part)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; results are as readable as the user's umask says.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was there before is untouched") from error
    except RuntimeError as error:
        if _DISK_FULL.search(str(error)):  # how torch.save says so
            reason = "the disk may be full"
            raise UserError(f"cannot write {path}: {reason}; what was there before is untouched") from error
        raise
    finally:
        part.unlink(missing_ok=True)


_DISK_FULL = re.compile("write|unexpected pos")


class _Inert:
    """Stands for an object that is of no use here, whatever it is made from."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


# What mmengine's checkpoints hold beside weights: the course of the training, in NumPy arrays.
_INERT = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
)


def load(path: str | Path) -> Any:
    """The content of a PyTorch file, on the CPU; nothing in it is ever executed.

    What mmengine logs beside the weights is not read; something without meaning stands in its place.

    The file's own CRC-32 sums are checked, which PyTorch itself does not do.

    Raises:
        UserError: no such file, damaged, or holding Python objects other than tensors and plain containers.
    """
    import torch

    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist; give the path of a weights file")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                member = archive.testzip()
            if member is not None:
                raise UserError(f"{path} is damaged (checksum of {member}); copy or make it again")
        inert = torch.serialization.safe_globals([(_Inert, name) for name in _INERT])
        with warnings.catch_warnings(), inert:
            # A protocol that PyTorch does not write: what it cannot read for that ends in a sentence below.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is no checkpoint of plain tensors (it is damaged, or holds code that unpickling "
            "would run); save it again as a plain state_dict"
        ) from error
    except Exception as error:  # a damaged file can end in any exception of the unpickler, IndexError included
        raise UserError(f"{path} cannot be read, it is truncated or damaged; copy or make it again") from error
