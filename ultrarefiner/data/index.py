"""What is known of each case once its files were read: hashes, sizes, and a thumbnail; and what is wrong with it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from ultrarefiner.data.cases import Case
from ultrarefiner.data.images import MIN_SIDE
from ultrarefiner.data.readers import Reader
from ultrarefiner.errors import UserError
from ultrarefiner.files import sha256

VERSION = 2  # raised when the meaning of an index or a cache changes: older ones are then built anew


@dataclass(frozen=True)
class Entry:
    """One case, read.

    Attributes:
        dataset, id: the case.
        sha256: of the image file; of the pixels where the reader computes the image.
        mask_sha256: of each mask file.
        height, width: native size in px.
        lesion_px: area of the merged mask in px.
        fault: why the case is left out; "" if it is not.
    """

    dataset: str
    id: str
    sha256: str
    mask_sha256: tuple[str, ...]
    height: int
    width: int
    lesion_px: int
    fault: str

    @property
    def lesion_share(self) -> float:
        """The lesion's share of the frame, in [0, 1]."""
        return self.lesion_px / max(self.height * self.width, 1)


@dataclass(frozen=True)
class Index:
    """The entries of all cases of a data set, in the order of `Reader.cases`, and their thumbnails."""

    fingerprint: str
    entries: tuple[Entry, ...]
    signatures: UInt8[np.ndarray, "N 64 64"]

    def select(self, positions: Sequence[int]) -> "Index":
        """The index of some of the cases, in the order of ``positions``."""
        return replace(
            self, entries=tuple(self.entries[place] for place in positions), signatures=self.signatures[list(positions)]
        )

    def save(self, folder: Path) -> None:
        """Write ``index.json`` and ``signatures.npy``; index.json last, so that it vouches for both."""
        np.save(folder / "signatures.npy", self.signatures)
        record = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "signatures_sha256": _digest(self.signatures),
            "cases": [asdict(entry) for entry in self.entries],
        }
        (folder / "index.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, fingerprint: str, count: int) -> "Index | None":
        """The index in ``folder``, or None if it is missing, damaged, or of other data."""
        try:
            record = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            signatures = np.load(folder / "signatures.npy")
            entries = tuple(Entry(**{**row, "mask_sha256": tuple(row["mask_sha256"])}) for row in record["cases"])
            intact = (
                record["version"] == VERSION
                and record["fingerprint"] == fingerprint
                and len(entries) == len(signatures) == count
                and record["signatures_sha256"] == _digest(signatures)
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return None
        return cls(fingerprint, entries, signatures) if intact else None


def read_entry(reader: Reader, case: Case) -> tuple[Entry, np.ndarray, np.ndarray]:
    """Read a case: its entry, image (H, W) uint8 and mask (H, W) bool.

    Raises:
        UserError: as `Reader.read`.
    """
    image, mask = reader.read(case)
    wanted = image.ndim == 2 and image.dtype == np.uint8 and mask.shape == image.shape and mask.dtype == bool
    if not wanted:
        raise UserError(
            f"read() of {type(reader).__name__} must give an image (H, W) of uint8 and a mask (H, W) of bool, got "
            f"{image.shape} of {image.dtype} and {mask.shape} of {mask.dtype} for {case.id}"
        )
    hashes = [sha256(path) for path in case.files]
    own = hashes[0] if case.image is not None else hashlib.sha256(image.tobytes()).hexdigest()
    masks = tuple(hashes[1:] if case.image is not None else hashes)
    entry = Entry(
        dataset=case.dataset,
        id=case.id,
        sha256=own,
        mask_sha256=masks,
        height=image.shape[0],
        width=image.shape[1],
        lesion_px=int(mask.sum()),
        fault=_fault(image, mask),
    )
    return entry, image, mask


def fingerprint(reader: Reader, cases: Sequence[Case], salt: str = "") -> str:
    """A hash over what the cases are and hold, the same for the same data at another path or on another day.

    Names, patients, classes, official folds, and the files' contents. Readers that compute their images count by their
    settings and their first image.

    Args:
        salt: what else the cases follow from: of a reader of the user's own its settings and its code.

    Raises:
        UserError: two cases of a data set have the same id, or a file cannot be read.
    """
    total = hashlib.sha256(f"{VERSION} {reader.name}{salt}".encode())
    seen: set[tuple[str, str]] = set()
    for case in cases:
        if case.key in seen:
            raise UserError(f"{case.dataset} has two cases named {case.id!r} (one is {case.image}): rename one.")
        seen.add(case.key)
        names = [path.name for path in case.files]
        total.update(repr((case.dataset, case.id, case.patient, case.label, case.roles, names)).encode())
        for path in case.files:
            total.update(_content(path))
    computed = next((case for case in cases if case.image is None), None)
    if computed is not None:
        settings = {key: value for key, value in vars(reader).items() if isinstance(value, int | float | str)}
        total.update(repr(sorted(settings.items())).encode())
        for pixels in reader.read(computed):
            total.update(pixels.tobytes())
    return total.hexdigest()


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _fault(image: np.ndarray, mask: np.ndarray) -> str:
    if min(image.shape) < MIN_SIDE:
        return f"the image has {image.shape[1]} × {image.shape[0]} px, less than {MIN_SIDE} on a side"
    if mask.all():
        return "the mask covers the whole image"
    return ""


def _content(path: Path) -> bytes:
    try:
        total = hashlib.blake2b(str(path.stat().st_size).encode(), digest_size=32)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore the file or its permissions.") from error
    return total.digest()
