"""Files: written whole or not at all, and read without executing what is in them; tables as CSV.

Torch is imported where it is used: the commands and the sweep's summary need this room, and must start quickly.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ultrarefiner.errors import UserError

ONNX, INT8, PROGRAM = "model.onnx", "model.int8.onnx", "model.pt2"
"""The whole pipeline as one graph, in a folder of `ultrarefiner.export`."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment either the old or the new one is there in full.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    with replacing(path) as part:
        part.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write plain content as JSON, atomically; what is not finite becomes null, as JSON knows no NaN."""
    write_atomically(path, json.dumps(_defined(content), indent=2, allow_nan=False).encode())


def _defined(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _defined(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_defined(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `csv_text`, atomically; see `write_atomically`."""
    write_atomically(path, csv_text(rows).encode("utf-8", "backslashreplace"))  # a file's name may be no valid text


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV. The columns are all that any row has, in the order of their first appearance; NaN is left blank.

    A spreadsheet runs a cell that begins with ``=``, ``+``, ``-`` or ``@`` as a formula. Such a text, if it is not a
    number, gets an apostrophe in front. A program that needs the text as it was (an id, to find the image) reads the
    file with `read_csv`, or undoes it by itself: ``re.sub(r"^'(?='*[=+@\\s＝＋－＠-])", "", cell)``.
    """
    rows = list(rows)
    text = io.StringIO()
    writer = csv.writer(text)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer.writerow(map(_harmless, columns))
    writer.writerows([_harmless(row.get(name)) for name in columns] for row in rows)
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file that `write_csv` wrote, with the texts as they were.

    Raises:
        UserError: the file cannot be read, or was cut off.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            header, *lines = ([_GUARD.sub("", cell) for cell in line] for line in csv.reader(file, strict=True))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:  # not UTF-8, no header, an open quote
        raise UserError(f"{path} is damaged or was cut off; make it again") from error
    for position, line in enumerate(lines, 1):
        if len(line) != len(header):
            raise UserError(f"{path} is damaged or was cut off at its row {position}; make it again")
    return [dict(zip(header, line, strict=True)) for line in lines]


def number(cell: Any) -> float:
    """The number in a cell of a table; NaN where there is none."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


_FORMULA = re.compile(r"'*[=+@\s＝＋－＠-]")
_GUARD = re.compile(r"^'(?='*[=+@\s＝＋－＠-])")


def _harmless(cell: Any) -> str:
    """A cell that no spreadsheet runs. What has an apostrophe by itself gets another, so that `_GUARD` undoes both."""
    text = "" if cell is None or cell != cell else str(cell)
    runs = _FORMULA.match(text) and (text.startswith("'") or math.isnan(number(text)))
    return f"'{text}" if runs else text


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
        with contextlib.suppress(OSError):  # where the disk is gone, nothing is left to remove
            part.unlink(missing_ok=True)


def remove_parts(*folders: Path) -> None:
    """Delete what a process that was killed while it wrote left in folders that nobody else writes to now."""
    for path in (path for folder in folders for path in folder.glob(".*-????????") if path.is_file()):
        path.unlink(missing_ok=True)


_DISK_FULL = re.compile("write|unexpected pos")


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def folder_sha256(folder: Path) -> str:
    """One SHA-256 over the names and contents of all files below a folder, but for hidden ones."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("[!.]*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def read_json(path: Path, keys: Iterable[str] = ()) -> Any:
    """The content of a JSON file; where keys are given, an object that has them.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if keys and (lost := set(keys) - set(content if isinstance(content, dict) else ())):
            raise ValueError(f"without {min(lost)}")
        return content
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and what it tells of is made again") from error


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
