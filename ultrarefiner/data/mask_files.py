"""A folder of coarse masks with a table that says whose they are: what Phase 2 trains on instead of new ones.

The table, ``masks.csv``, has the columns file, dataset, id and part; any others are for people. ``file`` is a PNG of 8
or 16 bits at the coarse network's size, its largest possible value probability 1. A case may have several masks.
``part`` is the part of the fold that the mask was made for: "train" or "val".
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float32

from ultrarefiner.data.cases import Case
from ultrarefiner.data.files import read_table
from ultrarefiner.data.folds import Split
from ultrarefiner.data.images import image_size
from ultrarefiner.errors import UserError

TABLE = "masks.csv"
NEEDED = ("file", "dataset", "id", "part")
_MORE = "make the masks again for this fold and dataset (python -m ultrarefiner.simulate)"

Key = tuple[str, str]


@dataclass(frozen=True)
class MaskFiles:
    """The masks of a folder.

    Attributes:
        folder: where they lie.
        parts: part → `Case.key` → its files.
    """

    folder: Path
    parts: Mapping[str, Mapping[Key, Sequence[Path]]]

    @classmethod
    def read(cls, folder: str | Path) -> "MaskFiles":
        """The table of a folder.

        Raises:
            UserError: it is not there or damaged, names a file outside the folder, or has masks of test cases.
        """
        folder = Path(folder).expanduser()
        table = folder / TABLE
        if not table.is_file():
            raise UserError(
                f"phase.masks={folder} has no {TABLE}: give a folder that `python -m ultrarefiner.simulate` has "
                "written, or one with such a table."
            )
        parts: dict[str, dict[Key, list[Path]]] = {"train": defaultdict(list), "val": defaultdict(list)}
        for name, row in read_table(table, NEEDED, key="file").items():
            if row["part"] == "test":
                raise UserError(f"{table}: {name} has part=test, and test cases are not to be trained on: remove it.")
            if row["part"] not in parts:
                raise UserError(f"{table}: part of {name} must be train or val, got {row['part']!r}")
            path = folder / name
            if not name or not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{table}: the file {name!r} does not lie in the folder: copy it there.")
            parts[row["part"]][row["dataset"], row["id"]].append(path)
        return cls(folder, {part: dict(found) for part, found in parts.items() if found})

    def check(self, split: Split, size: int) -> None:
        """Compare the masks with the parts of a fold.

        Raises:
            UserError: a mask is of a case that is not in its part here (of a test case, say), a case of a part has no
                mask, or a mask is missing, unreadable, or not of ``size`` px.
        """
        for part, found in self.parts.items():
            here = {case.key for case in split.part(part)}
            if strange := [key for key in found if key not in here]:
                tested = sum(case.key in found for case in split.test)
                raise UserError(
                    f"phase.masks={self.folder} has masks of {len(strange)} cases that are not in this fold's part "
                    f"{part} ({tested} of them are its test cases), the first is {strange[0][1]}; {_MORE}"
                )
        for part in self.parts.keys() | {"train"}:
            bare = [case.id for case in split.part(part) if case.key not in self.parts.get(part, {})]
            if bare:
                raise UserError(
                    f"phase.masks={self.folder} has no mask for {len(bare)} of the {len(split.part(part))} cases of "
                    f"part {part}, the first is {bare[0]}; {_MORE}, with more samples"
                )
            for path in (path for files in self.parts[part].values() for path in files):
                width, height = image_size(path)
                if (width, height) != (size, size):
                    raise UserError(f"{path} has {width} × {height} px, not {size} × {size} (model.coarse_size)")

    def draw(self, case: Case, part: str, seed: int) -> Float32[np.ndarray, "C C"]:
        """One of a case's masks, chosen by the seed, as probability."""
        files = self.parts[part][case.key]
        path = files[int(np.random.default_rng([seed, 2]).integers(len(files)))]
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.uint16):
            raise UserError(f"{path} cannot be read as a grey PNG of 8 or 16 bits; make it again")
        largest = 255 if pixels.dtype == np.uint8 else 65535
        return np.asarray(pixels.astype(np.float32) / np.float32(largest))
