"""Decoded frames and masks on disk as plain arrays, so that an epoch decodes nothing.

``<cache_dir>/<data set>-<fingerprint>/`` holds the index of the data set and, for each size S, ``images-S.npy``
(N, S, S) uint8, ``masks-S.npy`` (N, S·⌈S/8⌉) uint8 with one bit a pixel, and ``frames-S.json`` with their checksums.
``masks-native.bits`` are the masks at their own sizes, ⌈H·W/8⌉ bytes each, one after the other in the index's order,
and ``masks-native.json`` their checksum: what results are measured with is what the fingerprint was made of, even where
a file changes while a run trains.

Each is written under another name and then renamed, the file that vouches for the others last: a killed build leaves
nothing that looks whole. The folder's name follows from the data, so data that changed are built anew.
"""

import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from filelock import FileLock
from jaxtyping import Bool, UInt8

from ultrarefiner.data.cases import Case
from ultrarefiner.data.duplicates import SIGNATURE_SIZE, signature
from ultrarefiner.data.images import mask_to_square, to_square
from ultrarefiner.data.index import VERSION, Entry, Index, fingerprint, read_entry
from ultrarefiner.data.readers import Reader
from ultrarefiner.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
NATIVE = "masks-native"
HEADER = 128
"""Bytes before the numbers in a .npy file of ours."""


class Frames(NamedTuple):
    """The frames and masks of all cases at one size.

    Attributes:
        folder: the cache's folder of one data set.
        size: side of the frames in px.
    """

    folder: Path
    size: int

    def image(self, position: int) -> UInt8[np.ndarray, "S S"]:
        """A copy of the frame of the case at ``position`` in `Reader.cases`."""
        return self._read(0, position, self.size)

    def mask(self, position: int) -> Bool[np.ndarray, "S S"]:
        """Its lesion mask."""
        bits = self._read(1, position, -(-self.size // 8))
        return np.unpackbits(bits, axis=1, count=self.size).view(bool)

    def _read(self, which: int, position: int, width: int) -> UInt8[np.ndarray, "S _"]:
        count = self.size * width
        return _bytes(_array_files(self.folder, self.size)[which], HEADER + position * count, count).reshape(-1, width)


class NativeMasks:
    """The masks of all cases, each at the size of its image.

    Args:
        folder: the cache's folder of one data set.
        index: its index, for the sizes.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.sizes = np.array([(entry.height, entry.width) for entry in index.entries], dtype=np.int64).reshape(-1, 2)
        self.ends = np.cumsum(-(-self.sizes.prod(axis=1) // 8))

    def mask(self, position: int) -> Bool[np.ndarray, "H W"]:
        """The lesion mask of the case at ``position`` in `Reader.cases`."""
        height, width = map(int, self.sizes[position])
        count = -(-height * width // 8)
        bits = _bytes(_native_file(self.folder), int(self.ends[position]) - count, count)
        return np.unpackbits(bits, count=height * width).view(bool).reshape(height, width)


def _bytes(path: Path, start: int, count: int) -> UInt8[np.ndarray, " n"]:
    """Some bytes of a file, not through a memory map: that of a file that is cut or lost would kill the process.

    Raises:
        UserError: they are not there any more.
    """
    try:
        return np.fromfile(path, np.uint8, count, offset=start).reshape(count)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} was cut or lost while in use; the same command makes it again, and goes on") from error


class UnusableFiles(UserError):
    """Files that have to be corrected before anything is cached: one sentence for each."""

    def __init__(self, sentences: Sequence[str]) -> None:
        self.sentences = tuple(sentences)
        more = len(self.sentences) - 1
        hint = (
            f" ({more} more file{'s' if more > 1 else ''} to correct: ultrarefiner.prepare lists them.)" if more else ""
        )
        super().__init__(self.sentences[0] + hint)


def cache_folder(reader: Reader, mark: str, cache_dir: Path) -> Path:
    """Where the cache of a data set with this fingerprint lies."""
    return Path(cache_dir) / f"{re.sub(r'[^A-Za-z0-9+_-]', '_', reader.name)[:60]}-{mark[:16]}"


def open_cache(
    reader: Reader, sizes: Sequence[int], cache_dir: Path, mark: str | None = None, salt: str = ""
) -> tuple[Index, dict[int, Frames]]:
    """The index of a data set and its frames at ``sizes``; built first where missing, stale or damaged.

    Args:
        reader: the data set.
        sizes: sides of the square frames in px.
        cache_dir: the folder for all caches; one process builds, the others wait for it.
        mark: the data set's `fingerprint`, where the caller has it already.
        salt: what else that follows from.

    Raises:
        UserError: a file of the data set cannot be used, or the cache cannot be written.
    """
    cases = reader.cases()
    mark = mark or fingerprint(reader, cases, salt)
    folder = cache_folder(reader, mark, cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            index = Index.load(folder, mark, len(cases))
            missing = [size for size in dict.fromkeys(sizes) if not _intact(folder, *_frames(folder, size))]
            if index is None or missing or not _intact(folder, NATIVE, _native_file(folder)):
                index = _build(reader, cases, mark, missing, folder)
                if fingerprint(reader, cases, salt) != mark:
                    for voucher in folder.glob("*.json"):
                        voucher.unlink()
                    raise UserError(
                        f"files of {reader.name} changed while they were read: start again once all are there"
                    )
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "choose another output_root"
        raise UserError(f"the cache in {folder} cannot be written ({error.strerror or error}): {hint}.") from error
    return index, {size: Frames(folder, size) for size in sizes}


def _build(reader: Reader, cases: list[Case], mark: str, sizes: list[int], folder: Path) -> Index:
    """Read each case once, fill the arrays of ``sizes``, and put everything in place."""
    log.info("building the cache of %s (%d cases) in %s", reader.name, len(cases), folder)
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        thumbnails = np.zeros((len(cases), SIGNATURE_SIZE, SIGNATURE_SIZE), dtype=np.uint8)
        images = {size: _array(partial, size, 0, (len(cases), size, size)) for size in sizes}
        masks = {size: _array(partial, size, 1, (len(cases), size * (-(-size // 8)))) for size in sizes}

        def fill(position: int) -> tuple[Entry, bytes] | UserError:
            try:
                entry, image, mask = read_entry(reader, cases[position])
            except UserError as error:
                return error
            thumbnails[position] = signature(image)
            for size in sizes:
                images[size][position] = to_square(image, size)
                masks[size][position] = np.packbits(mask_to_square(mask, size), axis=1).ravel()
            return entry, np.packbits(mask).tobytes()

        entries, errors = [], []
        with (
            ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool,  # Pillow and zlib release the GIL
            _native_file(partial).open("wb") as native,
        ):
            for result in shown(pool.map(fill, range(len(cases))), len(cases), f"Reading {reader.name}"):
                if isinstance(result, UserError):
                    errors.append(str(result))
                else:
                    entries.append(result[0])
                    native.write(result[1])
        if errors:
            raise UnusableFiles(errors)
        index = Index(mark, tuple(entries), thumbnails)
        for array in (*images.values(), *masks.values()):
            array.flush()
        _vouch(partial, NATIVE, _native_file(partial))
        for size in sizes:
            _vouch(partial, *_frames(partial, size))
        index.save(partial)
        # each .json comes after the arrays it vouches for
        for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".json"):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return index


def shown(results: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The results, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet = not console.is_terminal
    return iter(track(results, what, total=total, console=console, disable=quiet, transient=True))


def _array_files(folder: Path, size: int) -> tuple[Path, Path]:
    return folder / f"images-{size}.npy", folder / f"masks-{size}.npy"


def _array(folder: Path, size: int, which: int, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    array = np.lib.format.open_memmap(_array_files(folder, size)[which], mode="w+", dtype=np.uint8, shape=shape)
    assert array.offset == HEADER
    return array


def _frames(folder: Path, size: int) -> tuple[str, Path, Path]:
    """The name of the frames at a size, and their files."""
    return f"frames-{size}", *_array_files(folder, size)


def _native_file(folder: Path) -> Path:
    return folder / f"{NATIVE}.bits"


def _vouch(folder: Path, name: str, *files: Path) -> None:
    """Write the checksums of some arrays under their name."""
    record = {"version": VERSION, "checksums": [_checksum(path) for path in files]}
    (folder / f"{name}.json").write_text(json.dumps(record))


def _intact(folder: Path, name: str, *files: Path) -> bool:
    """Whether arrays are there and hold what was written: 1 s for 1 GB."""
    record_file = folder / f"{name}.json"
    try:
        record = json.loads(record_file.read_text())
        whole = record["version"] == VERSION and record["checksums"] == [_checksum(path) for path in files]
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole and record_file.exists():
        log.warning("the cache in %s is damaged (%s) and is built again", folder, name)
    return bool(whole)


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total = zlib.crc32(block, total)
    return total
