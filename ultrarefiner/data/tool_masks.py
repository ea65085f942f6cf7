"""The masks of any other tool, to be measured or refined: one file for each case, which has the case's name."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from ultrarefiner.data.cases import Case
from ultrarefiner.data.files import stem_key
from ultrarefiner.data.mask_maps import ENDINGS, LARGEST, ending, read_map
from ultrarefiner.errors import UserError


class ToolMasks:
    """The masks of some cases.

    A file is called as its case, or has ``_mask`` behind that, and lies in any subfolder; of several formats the first
    of `mask_maps.ENDINGS` counts. The largest number in all files says what stands for probability 1.

    Args:
        folder: where they lie.
        cases: whose masks are needed.

    Raises:
        UserError: a case has no file or two, or two cases have one name, or a file cannot be read.
    """

    def __init__(self, folder: str | Path, cases: Iterable[Case]) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise UserError(f"predictions={folder} is no folder: give the one that holds the masks")
        named = self._named()
        cases = list(cases)
        self.paths: dict[tuple[str, str], Path] = {}
        for case in cases:
            found = named.get(stem_key(case.id), [])
            if len({path.parent for path in found}) > 1:
                raise UserError(f"{found[0]} and {found[1]} are both of {case.id}: keep one of them")
            if found:
                self.paths[case.key] = found[0]
        if bare := [case.id for case in cases if case.key not in self.paths]:
            raise UserError(
                f"predictions={folder} has no mask for {len(bare)} of the {len(cases)} cases, the first is {bare[0]}; "
                f"a file needs the case's name and one of {', '.join(ENDINGS)}"
            )
        if len(set(self.paths.values())) < len(cases):
            raise UserError(f"predictions={folder}: two data sets have cases of one name; evaluate them one by one")
        self.largest = self._largest()

    def _named(self) -> Mapping[str, list[Path]]:
        named: dict[str, list[Path]] = {}
        for path in sorted(self.folder.rglob("[!.]*"), key=lambda path: ENDINGS.index(ending(path) or ENDINGS[-1])):
            if (end := ending(path)) and path.is_file():
                named.setdefault(stem_key(path.name[: -len(end)].removesuffix("_mask")), []).append(path)
        return named

    def _largest(self) -> int:
        highest = max((float(read_map(path).max()) for path in self.paths.values()), default=0.0)
        for number in LARGEST:
            if highest <= number and (highest == 0 or 2 * highest >= number):
                return number
        raise UserError(
            f"predictions={self.folder}: the largest number in all masks is {highest:g}; give masks of 0 and 1 or of 0 "
            "and 255, probabilities from 0 to 1, or grey values whose largest stands for probability 1"
        )

    def read(self, case: Case, shape: tuple[int, ...]) -> Float32[np.ndarray, "H W"]:
        """The probabilities of a case, in [0, 1]; 0 and 1 alone where the file holds a mask.

        Raises:
            UserError: the file has another size than the image, whose (height, width) is ``shape``.
        """
        values = read_map(self.paths[case.key])
        if values.shape != shape:
            raise UserError(
                f"{self.paths[case.key]} has {values.shape[1]} × {values.shape[0]} px, "
                f"its image {shape[1]} × {shape[0]}"
            )
        return np.asarray(values / np.float32(self.largest))
