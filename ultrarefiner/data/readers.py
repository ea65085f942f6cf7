"""One reader for each data set, from the layout its publisher ships. A new data set is one class here.

A reader for files says where it finds them (`FileReader.scan`); everything else, from the search for the folder to the
merging of several masks, is in the base classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, UInt8

from ultrarefiner.data import files
from ultrarefiner.data.cases import Case, Exclusion
from ultrarefiner.data.images import SUFFIXES, image_size, load_colours, load_image, load_mask
from ultrarefiner.errors import UserError


class Reader(ABC):
    """A data set: its cases, and the pixels of each."""

    name: str
    left_out: Sequence[Exclusion] = ()

    @abstractmethod
    def cases(self) -> list[Case]:
        """All cases, in a fixed order. Cheap: nothing is decoded.

        Raises:
            UserError: the folder is not what the data set's publisher ships.
        """

    @abstractmethod
    def read(self, case: Case) -> tuple[UInt8[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]:
        """The grey image and the lesion mask of a case, both at the image's native size.

        Raises:
            UserError: a file cannot be read, or image and mask differ in size.
        """


class FileReader(Reader):
    """A data set that lies in files below one folder.

    Args:
        root: the data set's folder, or the folder around it (see `files.find_root`).

    Attributes:
        folders: names the publisher gives the data set's folder.
        layout: what has to lie in it.
        test_only: True where the data set may be tested on but not trained on.
        known: the readers that have a name of their own, by it.
    """

    folders: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[tuple[str, ...]] = ()
    test_only: ClassVar[bool] = False
    known: ClassVar[dict[str, type["FileReader"]]] = {}

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            FileReader.known[cls.name] = cls

    def __init__(self, root: str | Path | None) -> None:
        self.data_root = root
        self.left_out: list[Exclusion] = []
        self._cases: list[Case] | None = None

    def cases(self) -> list[Case]:
        if self._cases is None:
            self.left_out = []
            self._cases = list(self.scan(files.find_root(self.name, self.data_root, self.folders, self.layout)))
        return self._cases

    @abstractmethod
    def scan(self, root: Path) -> Iterator[Case]:
        """Find the cases below the data set's folder ``root``."""

    def read(self, case: Case) -> tuple[UInt8[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]:
        assert case.image is not None
        image = load_image(case.image)
        merged = np.zeros(image.shape, dtype=bool)
        for path in case.masks:
            mask = load_mask(path)
            if mask.shape != image.shape:
                raise UserError(
                    f"{path} has {mask.shape[1]} × {mask.shape[0]} px but its image {case.image.name} has "
                    f"{image.shape[1]} × {image.shape[0]} (after its EXIF orientation, if any): "
                    "export the mask at the image's size, or remove both."
                )
            merged |= mask
        return image, merged

    def case(self, id: str, image: Path, masks: Sequence[Path], **more: Any) -> Case:
        """A case of this data set; ``more`` are fields of `Case`."""
        if self.test_only:
            more["roles"] = ("test",)
        return Case(id=id, dataset=self.name, image=image, masks=tuple(masks), **more)

    def pairs(
        self, root: Path, images: str, masks: str, prefixes: tuple[str, str] = ("", "")
    ) -> Iterator[tuple[str, Path, Path]]:
        """(stem, image, mask) of two folders in which an image and its mask have the same name.

        Args:
            root: the data set's folder.
            images, masks: the two folders in it.
            prefixes: what the names of images and masks start with and do not share.
        """
        found = []
        for folder, prefix in ((images, prefixes[0]), (masks, prefixes[1])):
            listed = files.images_in(root / folder, root, self.left_out)
            for path in [path for key, path in listed.items() if not key.startswith(prefix)]:
                raise UserError(f"{path} does not start with {prefix!r} as the files of {self.name} do: remove it.")
            found.append({key.removeprefix(prefix): path for key, path in listed.items()})
        files.require_pairs(found[0], found[1], root / images, root / masks)
        for key, image in found[0].items():
            yield image.stem, image, found[1][key]


class BusBra(FileReader):
    """BUS-BRA (Gómez-Flores et al., Medical Physics 2024): 1875 images of 1064 patients, with official folds.

    Args:
        root: the folder with Images/, Masks/ and bus_data.csv, or the one around it.
        official: which official partition to use, 5 or 10 folds; 0 draws folds of one's own.

    In the partition's CSV ``kFold`` is the fold in which an image is tested; ``valid_k`` is 1 where it is trained on in
    fold k, 0 where it validates, NaN where it is tested. Fold k here is the publisher's fold k + 1. Every patient is
    tested in one fold only, but the publisher draws the validation images without regard to patients:
    `folds.make_split` puts such a patient on one side.
    """

    name = "busbra"
    folders = ("BUSBRA", "BUS-BRA")
    layout = ("Images", "Masks", "bus_data.csv")

    def __init__(self, root: str | Path | None, official: int = 5) -> None:
        super().__init__(root)
        if official not in (0, 5, 10):
            raise UserError(
                f"dataset.reader.official={official} is no partition of busbra: choose 5, 10, or 0 for your own."
            )
        self.official = official

    def scan(self, root: Path) -> Iterator[Case]:
        table = files.read_table(root / "bus_data.csv", ("ID", "Case", "Pathology"), key="ID")
        roles = self._roles(root / f"{self.official}-fold-cv.csv", table) if self.official else {}
        found = {image.stem: (image, mask) for _, image, mask in self.pairs(root, "Images", "Masks", ("bus_", "mask_"))}
        for id, (image, _) in found.items():
            if id not in table:
                raise UserError(f"{image} is not in bus_data.csv: add its row (ID, Case, Pathology) or remove it.")
        absent = len(table) - len(found)
        if absent:
            self.left_out.append(Exclusion(f"{absent} rows of bus_data.csv", "neither image nor mask is there"))
        for id, (image, mask) in found.items():
            row = table[id]
            about = tuple((column.lower(), row[column]) for column in ("BIRADS", "Device") if row.get(column))
            label = row["Pathology"].lower()
            yield self.case(id, image, [mask], patient=row["Case"], label=label, roles=roles.get(id, ()), about=about)

    def _roles(self, path: Path, table: dict[str, dict[str, str]]) -> dict[str, tuple[str, ...]]:
        count = self.official
        parts = {"1": "train", "0": "val", "nan": "test", "": "test"}
        rows = files.read_table(path, ("ID", "kFold", *(f"valid_{k + 1}" for k in range(count))), key="ID")
        if rows.keys() != table.keys():
            unknown = sorted(rows.keys() ^ table.keys())[0]
            raise UserError(f"{path} and bus_data.csv do not name the same images ({unknown!r}): restore both files.")
        roles: dict[str, tuple[str, ...]] = {}
        tested: dict[str, str] = {}
        for id, row in rows.items():
            values = [row[f"valid_{k + 1}"].lower() for k in range(count)]
            if not set(values) <= parts.keys():
                raise UserError(f"{path}, ID {id}: {values} are not all 1, 0 or NaN: restore the file.")
            roles[id] = tuple(parts[value] for value in values)
            if [str(k + 1) for k in range(count) if roles[id][k] == "test"] != [row["kFold"]]:
                raise UserError(f"{path}, ID {id}: kFold {row['kFold']} and the valid_ columns disagree: restore it.")
            patient = table[id]["Case"]
            if tested.setdefault(patient, row["kFold"]) != row["kFold"]:
                raise UserError(
                    f"{path} tests patient {patient} in folds {tested[patient]} and {row['kFold']} (ID {id}): "
                    "a patient belongs to one fold, restore the file."
                )
        return roles


class Busi(FileReader):
    """BUSI (Al-Dhabyani et al., Data in Brief 2020): 780 images, no patients named, several lesions in some.

    ``benign/benign (1).png`` with ``benign (1)_mask.png``, ``benign (1)_mask_1.png``, …; the masks in ``normal/`` are
    empty. Copies are about in which images were resized but the masks of further lesions were not: those few cases are
    left out and reported.
    """

    name = "busi"
    folders = ("Dataset_BUSI_with_GT", "BUSI", "BUSI_sample")
    layout = ("benign", "malignant")

    def scan(self, root: Path) -> Iterator[Case]:
        for label in ("benign", "malignant", "normal"):
            if label == "normal" and not (root / label).exists():
                continue  # some mirrors ship the lesions only
            images: dict[str, Path] = {}
            masks: dict[str, list[Path]] = {}
            for key, path in files.images_in(root / label, root, self.left_out).items():
                stem, is_mask, _ = key.partition("_mask")
                if is_mask:
                    masks.setdefault(stem, []).append(path)
                else:
                    images[key] = path
            files.require_pairs(images, masks, root / label, root / label)
            for key, image in images.items():
                sizes = {image_size(path) for path in (image, *masks[key])} if len(masks[key]) > 1 else ()
                if len(sizes) > 1:
                    self.left_out.append(
                        Exclusion(f"{label}/{image.name}", f"its masks differ in size: {sorted(sizes)}")
                    )
                    continue
                yield self.case(image.stem, image, masks[key], label=label)


class Bus(FileReader):
    """BUS: ``original/000001.png`` and ``GT/000001.png``; no patients, no classes."""

    name = "bus"
    folders: ClassVar[tuple[str, ...]] = ("BUS",)
    layout = ("original", "GT")

    def scan(self, root: Path) -> Iterator[Case]:
        for id, image, mask in self.pairs(root, "original", "GT"):
            yield self.case(id, image, [mask])


class Udiat(Bus):
    """UDIAT (Yap et al., IEEE JBHI 2018): laid out like BUS; for testing only."""

    name = "udiat"
    folders = ("UDIAT", "UDIAT_Dataset_B", "Dataset_B")
    test_only = True


class BusUc(FileReader):
    """BUS_UC (Iqbal, Mendeley Data 3ksd7w7jkx): ``All/images/001.png`` and ``All/masks/001.png``; no patients."""

    name = "bus_uc"
    folders = ("BUS_UC",)
    layout = ("All",)

    def scan(self, root: Path) -> Iterator[Case]:
        for id, image, mask in self.pairs(root / "All", "images", "masks"):
            yield self.case(id, image, [mask])


class BusUclm(FileReader):
    """BUS-UCLM (Vallez et al., Scientific Data 2025): 683 images of 38 patients.

    The letters of ``images/ALWI_000.png`` are the patient. The masks are coloured: black is normal tissue, green a
    benign and red a malignant lesion; the class of an image is read from them.
    """

    name = "bus_uclm"
    folders = ("BUS-UCLM", "BUS-UCLM Breast ultrasound lesion segmentation dataset")
    layout = ("images", "masks")

    def scan(self, root: Path) -> Iterator[Case]:
        for id, image, mask in self.pairs(root, "images", "masks"):
            patient, underscore, _ = id.rpartition("_")
            if not underscore:
                raise UserError(f"{image} does not name its patient as bus_uclm does (ALWI_000.png): rename it.")
            yield self.case(id, image, [mask], patient=patient, label=self._label(mask))

    @staticmethod
    def _label(mask: Path) -> str:
        red, green = (load_colours(mask)[..., channel].max(initial=0) > 127 for channel in (0, 1))
        return "malignant" if red else "benign" if green else "normal"


class Folder(FileReader):
    """One's own data: ``images/`` and ``masks/`` with the same names, and perhaps a table of patients and classes.

    Args:
        root: the folder that holds the two.
        name: what to call the data set.
        table: a CSV file in ``root`` (or elsewhere) with a row for each image; None where there is none.
        id_column, patient_column, label_column: its columns; the last two may be None.
        about_columns: further ones that results are broken down by, such as device; "spacing" is a pixel's size in mm.

    A further lesion of ``images/a.png`` may lie in ``masks/a_1.png``, ``masks/a_2.png``, …, if there is no image of
    that name. ``masks/a_mask.png`` is accepted for ``masks/a.png``, and nnU-Net's ``images/a_0000.png`` for
    ``images/a.png``.
    """

    layout = ("images", "masks")

    def __init__(
        self,
        root: str | Path | None,
        name: str = "folder",
        table: str | Path | None = None,
        id_column: str = "id",
        patient_column: str | None = "patient",
        label_column: str | None = "label",
        about_columns: Sequence[str] = (),
    ) -> None:
        super().__init__(root)
        self.name = name
        self.table = table
        self.id_column = id_column
        self.columns = {"patient": patient_column, "label": label_column}
        self.about = tuple(about_columns)

    def scan(self, root: Path) -> Iterator[Case]:
        images = files.images_in(root / "images", root, self.left_out)
        masks: dict[str, list[Path]] = {}
        for key, path in files.images_in(root / "masks", root, self.left_out).items():
            masks.setdefault(self._image_of(key, images), []).append(path)
        files.require_pairs(images, masks, root / "images", root / "masks")
        rows = self._rows(root, images)
        for key, image in images.items():
            yield self.case(image.stem, image, masks[key], **rows.get(key, {}))

    @staticmethod
    def _image_of(mask: str, images: dict[str, Path]) -> str:
        for stem in (mask, mask.removesuffix("_mask"), mask.rpartition("_")[0].removesuffix("_mask")):
            if stem == mask or mask.endswith("_mask") or mask.rpartition("_")[2].isdecimal():
                for name in (stem, f"{stem}_0000"):
                    if name in images:
                        return name
        return mask

    def _rows(self, root: Path, images: dict[str, Path]) -> dict[str, dict[str, Any]]:
        if self.table is None:
            return {}
        path = root / Path(self.table).expanduser()
        columns = {field: column for field, column in self.columns.items() if column}
        table = files.read_table(path, (self.id_column, *columns.values(), *self.about), key=self.id_column)
        rows: dict[str, dict[str, Any]] = {}
        for id, row in table.items():
            key = files.stem_key(Path(id).stem if Path(id).suffix.lower() in SUFFIXES else id)
            if key not in images:
                raise UserError(f"{path} names an unknown image {id!r}: add it to {root / 'images'} or remove the row.")
            rows[key] = {field: row[column] for field, column in columns.items()}
            about = tuple((name, row[name]) for name in self.about)
            rows[key] = {**rows[key], "patient": rows[key].get("patient") or None, "about": about}
        for key, image in images.items():
            if key not in rows:
                raise UserError(f"{image} has no row in {path}: add one, or remove the image.")
        return rows


class Combined(Reader):
    """Several data sets as one. Folds are drawn, or taken from the publisher, in each by itself.

    Args:
        members: names of data sets (the keys of `FileReader.known`), or readers.
        root: the folder that holds the folders of the members given by name.
        name: what to call the whole; by default the members' names joined by "+".
    """

    def __init__(
        self, members: Sequence[str | Reader], root: str | Path | None = None, name: str | None = None
    ) -> None:
        known = FileReader.known
        if not members:
            raise UserError(f"dataset=combined needs dataset.members=[…]: choose among {', '.join(known)}.")
        for member in members:
            if isinstance(member, str) and member not in known:
                raise UserError(f"dataset.members names {member!r}, which is none of {', '.join(known)}.")
        readers = [known[member](root) if isinstance(member, str) else member for member in members]
        self.members = {reader.name: reader for reader in readers}
        if len(self.members) < len(members):
            raise UserError(f"dataset.members names a data set twice ({[r.name for r in readers]}): name each once.")
        self.name = name or "+".join(self.members)

    def cases(self) -> list[Case]:
        return [case for member in self.members.values() for case in member.cases()]

    @property
    def left_out(self) -> list[Exclusion]:  # type: ignore[override]
        return [
            Exclusion(f"{name}: {exclusion.what}", exclusion.reason)
            for name, member in self.members.items()
            for exclusion in member.left_out
        ]

    def read(self, case: Case) -> tuple[UInt8[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]:
        return self.members[case.dataset].read(case)
