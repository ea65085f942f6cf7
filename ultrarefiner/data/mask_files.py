"""Coarse masks as files: what Phase 2 trains on and is measured with, instead of simulated ones.

Either a table says whose they are, or their names do.

The table, ``masks.csv``, has the columns file, dataset, id and part; any others are for people. ``file`` is a PNG of 8
or 16 bits, its largest possible value probability 1. A case may have several masks. ``part`` is the part of the fold
that the mask was made for: "train", "val" or "test"; of test cases it is measured only.

Without a table each case has one file of its name, in any subfolder and in any format of `mask_maps`.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float32

from ultrarefiner.data.cases import PARTS, Case
from ultrarefiner.data.failures.softness import dice_of
from ultrarefiner.data.files import read_table, stem_key
from ultrarefiner.data.folds import Split
from ultrarefiner.data.images import image_size, map_to_square
from ultrarefiner.data.mask_maps import ENDINGS, LARGEST, coarse_map, ending, read_map
from ultrarefiner.errors import UserError

log = logging.getLogger(__name__)

TABLE = "masks.csv"
NEEDED = ("file", "dataset", "id", "part")
_MORE = "make the masks again for this fold and dataset (python -m ultrarefiner.simulate)"

Key = tuple[str, str]
Size = tuple[int, int]
"""Width and height in px."""


class MaskFiles:
    """The masks of a folder with a table.

    Args:
        folder: where they lie.
        complete: whether each case of all three parts needs a mask; else masks of val and test may be missing.

    Attributes:
        parts: part → `Case.key` → its files; without a part that has none.

    Raises:
        UserError: the table is damaged, or names a file outside the folder.
    """

    def __init__(self, folder: Path, complete: bool = False) -> None:
        self.folder, self.complete = folder, complete
        table = folder / TABLE
        parts: dict[str, dict[Key, list[Path]]] = {part: defaultdict(list) for part in PARTS}
        for name, row in read_table(table, NEEDED, key="file").items():
            if row["part"] not in parts:
                raise UserError(f"{table}: part of {name} must be train, val or test, got {row['part']!r}")
            path = folder / name
            if not name or not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{table}: the file {name!r} does not lie in the folder: copy it there.")
            parts[row["part"]][row["dataset"], row["id"]].append(path)
        self.parts: Mapping[str, Mapping[Key, Sequence[Path]]] = {part: dict(f) for part, f in parts.items() if f}

    def check(self, split: Split, size: int, native: Mapping[Key, Size]) -> None:
        """Compare the masks with the parts of a fold.

        Args:
            split: the fold.
            size: of the coarse network, px.
            native: the sizes of the images.

        Raises:
            UserError: a mask is of a case that is not in its part here (of a test case, say), a case of a part has no
                mask, or a mask is missing, unreadable, or neither of ``size`` px nor of its image's size.
        """
        for part, found in self.parts.items():
            here = {case.key for case in split.part(part)}
            if strange := [key for key in found if key not in here]:
                tested = sum(case.key in found for case in split.test) if part != "test" else 0
                raise UserError(
                    f"phase.masks={self.folder} has masks of {len(strange)} cases that are not in this fold's part "
                    f"{part} ({tested} of them are its test cases), the first is {strange[0][1]}; {_MORE}"
                )
        for part in PARTS if self.complete else self.parts.keys() | {"train"}:
            self.require(part, split)
            for key, path in ((key, path) for key, files in self.parts[part].items() for path in files):
                _check_size(path, image_size(path), size, native[key])

    def require(self, part: str, split: Split) -> None:
        """Refuse a part with a case that has no mask."""
        bare = [case.id for case in split.part(part) if case.key not in self.parts.get(part, {})]
        if bare:
            raise UserError(
                f"{self.key}={self.folder} has no mask for {len(bare)} of the {len(split.part(part))} cases of "
                f"part {part}, the first is {bare[0]}; {self.remedy}"
            )

    remedy = f"{_MORE}, with more samples"
    key = "phase.masks"

    def draw(self, case: Case, part: str, seed: int, size: int) -> Float32[np.ndarray, "C C"]:
        """One of a case's masks, chosen by the seed, as probability at ``size`` px."""
        files = self.parts[part][case.key]
        return coarse_map(self._read(files[int(np.random.default_rng([seed, 2]).integers(len(files)))]), size)

    def _read(self, path: Path) -> Float32[np.ndarray, "H W"]:
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.uint16):
            raise UserError(f"{path} cannot be read as a grey PNG of 8 or 16 bits; make it again")
        largest = 255 if pixels.dtype == np.uint8 else 65535
        return np.asarray(pixels.astype(np.float32) / np.float32(largest))


class NamedMasks(MaskFiles):
    """One mask for each case of all three parts, in files that have the cases' names.

    Args:
        folder: where they lie, in any subfolder.
        key: by which the folder was given.
    """

    def __init__(self, folder: Path, key: str = "phase.masks") -> None:
        self.folder, self.parts, self.largest, self.key = folder, {}, 1, key
        self.remedy = f"a file needs the case's name and one of {', '.join(ENDINGS)}, or the folder a table {TABLE}"

    def check(self, split: Split, size: int, native: Mapping[Key, Size]) -> None:
        """Find each case's mask by its name and read it; see `MaskFiles.check`.

        Raises:
            UserError: also where a name stands for two cases or two files, or where the masks of a part are all empty
                or their numbers mean nothing.
        """
        named: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(self.folder.rglob("[!.]*"), key=lambda path: ENDINGS.index(ending(path) or ENDINGS[-1])):
            if (end := ending(path)) and path.is_file():
                named[stem_key(path.name[: -len(end)])].append(path)
        self.parts = {part: dict(self._of(split.part(part), named)) for part in PARTS}
        id, times = Counter(case.id for part in PARTS for case in split.part(part)).most_common(1)[0]
        if times > 1:
            raise UserError(f"two data sets have a case {id}: say in {self.folder / TABLE} whose each mask is")
        for part in PARTS:
            self.require(part, split)
        highest = 0.0
        for part, found in self.parts.items():
            most = 0.0
            for key, (path,) in found.items():
                values = read_map(path)
                _check_size(path, values.shape[::-1], size, native[key])
                most = max(most, float(values.max()))
            if found and most == 0:
                raise UserError(f"{self.key}={self.folder}: all {len(found)} masks of part {part} are empty")
            highest = max(highest, most)
        self.largest = next((number for number in LARGEST if highest <= number), 0)
        if highest * 2 < self.largest or not self.largest:
            raise UserError(
                f"{self.key}={self.folder}: the largest number in all masks is {highest:g}; give masks of 0 and 1 or "
                "of 0 and 255, probabilities from 0 to 1, or grey values whose largest stands for probability 1"
            )

    def _of(self, cases: Iterable[Case], named: Mapping[str, list[Path]]) -> Iterable[tuple[Key, list[Path]]]:
        for case in cases:
            found = named.get(stem_key(case.id), [])
            if len({path.parent for path in found}) > 1:
                raise UserError(f"{self.key}: {found[0]} and {found[1]} are both of {case.id}: keep one of them")
            if found:
                yield case.key, found[:1]

    def warn(self, truths: Mapping[str, Mapping[Key, Bool[np.ndarray, "C C"]]]) -> None:
        """Say that masks of training cases must be out-of-fold, and whether they look as if they were not.

        Args:
            truths: part → `Case.key` → the lesion at the coarse network's size.
        """

        def scores(part: str) -> list[float]:
            cases = [(key, mask) for key, mask in truths[part].items() if mask.any()]
            return [dice_of(map_to_square(self._read(self.parts[part][k][0]), len(m)) > 0.5, m) for k, m in cases]

        trained, new = scores("train"), scores("val")
        gap = float(np.mean(trained) - np.mean(new))
        known = f"Dice {np.mean(trained):.3f} on training and {np.mean(new):.3f} on validation cases"
        if gap > 0.01 and gap > 3 * np.sqrt(np.var(trained) / len(trained) + np.var(new) / len(new)):
            log.warning(
                "phase.masks=%s: %s: the tool seems to have seen the training cases. SAM then learns to repair masks "
                "that are too good; give out-of-fold predictions (nnU-Net's fold_*/validation)",
                self.folder,
                known,
            )
        else:
            log.warning(
                "phase.masks=%s: %s. Each mask must be of a network that has not seen the case, and those of test "
                "cases of one that has seen no test case: the files do not say it",
                self.folder,
                known,
            )

    def native(self, case: Case, shape: tuple[int, ...]) -> Float32[np.ndarray, "H W"]:
        """The mask of a test case as probability, at the size (height, width) of its image."""
        values = self._read(self.parts["test"][case.key][0])
        return values if values.shape == shape else cv2.resize(values, shape[::-1], interpolation=cv2.INTER_LINEAR)

    def _read(self, path: Path) -> Float32[np.ndarray, "H W"]:
        return np.asarray(read_map(path) / np.float32(self.largest))


def read_masks(folder: str | Path, complete: bool) -> MaskFiles:
    """The masks of a folder, by its table or by their names; see `MaskFiles`.

    Raises:
        UserError: there is no such folder, or what `MaskFiles` refuses.
    """
    folder = Path(folder).expanduser()
    if (folder / TABLE).is_file():
        return MaskFiles(folder, complete)
    if not any(ending(path) for path in folder.rglob("[!.]*")):
        raise UserError(
            f"phase.masks={folder} has no {TABLE} and no masks: give a folder that `python -m ultrarefiner.simulate` "
            f"has written, or one with a mask for each case, called as the case ({', '.join(ENDINGS)})."
        )
    return NamedMasks(folder)


def _check_size(path: Path, found: Size, size: int, native: Size) -> None:
    if found not in ((size, size), native):
        raise UserError(
            f"{path} has {found[0]} × {found[1]} px, not {size} × {size} (model.coarse_size) nor "
            f"{native[0]} × {native[1]} (its image)"
        )
