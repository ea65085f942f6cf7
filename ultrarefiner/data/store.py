"""A data set as all runs of a command read it: listed, hashed and opened once."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from ultrarefiner.data.cache import Frames, NativeMasks, cache_folder, open_cache
from ultrarefiner.data.cases import Case
from ultrarefiner.data.index import Index, fingerprint
from ultrarefiner.data.readers import Reader
from ultrarefiner.errors import UserError


class Store:
    """A reader, and the cache of what it reads.

    Args:
        reader: the data set.
        cache_dir: where decoded frames are kept.
        salt: what else the cases follow from, see `index.fingerprint`.
    """

    def __init__(self, reader: Reader, cache_dir: str | Path, salt: str = "") -> None:
        self.reader, self.cache_dir, self.salt = reader, Path(cache_dir), salt
        self._opened: dict[tuple[int, ...], tuple[Index, dict[int, Frames]]] = {}

    @cached_property
    def cases(self) -> list[Case]:
        """All cases, in the reader's order.

        Raises:
            UserError: the reader, perhaps a class of the user's own, does not give what `Reader` promises.
        """
        kind, name = type(self.reader).__name__, getattr(self.reader, "name", None)
        if not isinstance(self.reader, Reader) or not isinstance(name, str) or not name:
            raise UserError(f'dataset.reader: {kind} must be a subclass of data.readers.Reader with a name = "…"')
        cases = list(self.reader.cases())
        for case in cases:
            paths = isinstance(case, Case) and isinstance(case.masks, list | tuple)
            if not paths or not all(isinstance(path, Path) for path in case.files):
                raise UserError(f"dataset.reader: cases() of {kind} must give Case with paths, got {case!r}")
        return cases

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the data set's content, wherever it lies (see `index.fingerprint`)."""
        return fingerprint(self.reader, self.cases, self.salt)

    def open(self, sizes: Sequence[int]) -> tuple[Index, dict[int, Frames]]:
        """The index and the frames at some sizes (px); built first where they are missing, see `cache.open_cache`."""
        key = tuple(sizes)
        if key not in self._opened:
            self._opened[key] = open_cache(self.reader, key, self.cache_dir, self.fingerprint, salt=self.salt)
        return self._opened[key]

    def native_masks(self, index: Index) -> NativeMasks:
        """The masks at native size of the data set that was opened with this index."""
        return NativeMasks(cache_folder(self.reader, index.fingerprint, self.cache_dir), index)
