"""Images of any kind that somebody wants to have segmented: found below a folder, read frame by frame.

Unlike a data set they need no layout. A bad file stands for itself: what is wrong with it is said in one sentence, and
the others are read.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from ultrarefiner.data import dicom
from ultrarefiner.data.files import is_hidden, natural, stem_key
from ultrarefiner.data.images import (
    SUFFIXES,
    check_size,
    decoding,
    eight_bits,
    load_mask,
    open_picture,
    picture_frames,
    picture_pixels,
)
from ultrarefiner.errors import UserError
from ultrarefiner.files import sha256

_ADVICE = "restore the file or remove it"
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f<>:"|?*\\\ud800-\udfff]')  # in no name that every system can store
_LONGEST = 120  # bytes of a name that is written; file systems allow 255, and temporary names are longer


@dataclass(frozen=True)
class Scan:
    """One image file.

    Attributes:
        path: where it lies.
        id: where it lies below the folder that was given, with "/".
        name: what files that are made of it are called: as `id`, without its suffix, safe, and no other scan's.
        frames: how many it holds.
    """

    path: Path
    id: str
    name: str
    frames: int

    def frame_name(self, index: int) -> str:
        """What files that are made of one frame, counted from 0, are called."""
        return self.name if self.frames == 1 else f"{self.name}/{index + 1:04d}"

    def read(self, indices: Sequence[int]) -> Iterator[tuple[UInt8[np.ndarray, "H W *rgb"], list[dicom.Region]]]:
        """Some frames, in ascending order and one after the other: grey or RGB, and where pixels have a known size.

        Raises:
            UserError: the file is damaged.
        """
        if not indices:  # to pydicom that means all of them
            return
        with decoding(self.path, _ADVICE):
            if dicom.is_dicom(self.path):
                header = dicom.read_header(self.path)
                regions = dicom.calibration(header)
                for pixels in dicom.frames(self.path, header, indices):
                    yield eight_bits(pixels, self.path), regions
                return
            with open_picture(self.path) as opened:
                for index in indices:
                    opened.seek(index)
                    check_size(self.path, opened.width, opened.height)  # of each: they may differ
                    yield eight_bits(picture_pixels(opened), self.path), []


@dataclass(frozen=True)
class Found:
    """What lies below a folder.

    Attributes:
        scans: the images.
        problems: a sentence for each file that looks like an image and cannot be read.
        others: how many files do not look like one.
    """

    scans: list[Scan]
    problems: list[str]
    others: int


def find_scans(images: str | Path | None, without: Path) -> Found:
    """The images of a folder and of all below it, or a single file; only their headers are read.

    Args:
        images: the folder or the file.
        without: a folder that is left out, as it holds results.

    Raises:
        UserError: there is no such folder or file, or no image in it.
    """
    if images is None:
        raise UserError("images=PATH is needed: a folder of images, or one image.")
    root = Path(images).expanduser()
    if not root.exists():
        raise UserError(f"images={images} does not exist: give a folder of images, or one image.")
    if root.resolve() == without.resolve():
        raise UserError(f"images={images} is the output as well: give another folder for the results.")
    problems: list[str] = []
    paths = [root] if root.is_file() else list(_walk(root, without.resolve(), problems))
    root = root.parent if root.is_file() else root
    looks_like_one = [path for path in paths if _is_image(path)]
    if not looks_like_one and not problems:
        raise UserError(f"images={images} holds no image (PNG, JPEG, TIFF, BMP or DICOM).")
    ids = [path.relative_to(root).as_posix() for path in looks_like_one]
    scans = []
    for path, id, name in zip(looks_like_one, ids, safe_names(ids), strict=True):
        try:
            scans.append(Scan(path, id, name, _count_frames(path)))
        except UserError as error:
            problems.append(str(error))
    return Found(scans, problems, len(paths) - len(looks_like_one))


def safe_names(ids: Sequence[str]) -> list[str]:
    """For each file, given as a relative path with "/", a path without suffix for what is made of it.

    No two are the same where case and accents do not count, and none is the folder of another. Two files that differ
    in their suffix only keep it: "x.png" and "x.jpg". What some system cannot store in a name becomes "_".
    """
    whole = [_safe_path(PurePosixPath(id)) for id in ids]
    bare = [_safe_path(_without_suffix(PurePosixPath(id))) for id in ids]
    sharing = Counter(_key(path) for path in bare)
    taken = {_key(folder) for path in whole for folder in path.parents}
    names = []
    for short, full in zip(bare, whole, strict=True):
        name = short if sharing[_key(short)] == 1 and _key(short) not in taken else full
        number = 1
        while _key(name) in taken:
            number += 1
            name = full.with_name(f"{full.name}-{number}")
        taken.add(_key(name))
        names.append(name.as_posix())
    return names


class CoarseMasks:
    """The masks of another tool, to be refined; found by the name of their image.

    For `a/x.png` that is `a/x` with any suffix; `a/x_mask` and, if the image's name ends in nnU-Net's `_0000`, the name
    without that will do as well. For the third frame of `a/x.dcm` it is `a/x/0003`.

    Args:
        masks: their folder, or one file for a single image.
        images: what the user gave as images.

    Raises:
        UserError: there is no such folder, or nothing in it.
    """

    def __init__(self, masks: str | Path, images: str | Path) -> None:
        self.root = Path(masks).expanduser()
        self.only = self.root if self.root.is_file() and Path(images).expanduser().is_file() else None
        if self.only is None and not self.root.is_dir():
            raise UserError(f"masks={masks} is no folder: give the folder that holds a mask for each image.")
        self.files: dict[str, list[Path]] = {}
        for path in [] if self.only else _walk(self.root, None, []):
            if path.suffix.lower() in SUFFIXES:
                self.files.setdefault(_key(path.relative_to(self.root).with_suffix("")), []).append(path)
        if self.only is None and not self.files:
            raise UserError(f"masks={masks} holds no mask (PNG, JPEG, TIFF, BMP or DICOM).")

    def find(self, scan: Scan, index: int) -> Path:
        """The mask of a frame.

        Raises:
            UserError: there is none, or more than one.
        """
        if self.only:
            return self.only
        name, given = scan.frame_name(index), _without_suffix(PurePosixPath(scan.id))
        names = [name]
        if _safe_path(given).as_posix() == scan.name:  # the mask may have the image's name as it was before
            names.append(replace(scan, name=given.as_posix()).frame_name(index))
        for wanted in (form for one in names for form in (one, f"{one}_mask", re.sub("_0000$", "", one))):
            if found := self.files.get(_key(wanted)):
                if len(found) > 1:
                    raise UserError(f"{found[0]} and {found[1].name} are both masks of {scan.id}: remove one.")
                return found[0]
        raise UserError(f"{scan.path} has no mask {name}.png in {self.root}: add it, or remove the image.")


def load_coarse(path: Path, shape: tuple[int, int]) -> Shaped[np.ndarray, "H W"]:
    """A coarse mask (bool), or from a grey PNG or TIFF of 16 bits its probability (float32, 65535 is 1).

    Args:
        path: the file.
        shape: of its image.

    Raises:
        UserError: it is damaged, or of another size.
    """
    with decoding(path, _ADVICE):
        mask = _soft(path)
        mask = load_mask(path) if mask is None else mask
    if mask.shape != shape:
        (height, width), (rows, columns) = mask.shape, shape
        raise UserError(f"{path} has {width} × {height} px but its image {columns} × {rows}: export it at that size.")
    return mask


def file_hash(path: Path) -> str:
    """The start of a file's SHA-256, by which it is known again."""
    with decoding(path, _ADVICE):
        return sha256(path)[:16]


def _soft(path: Path) -> Float32[np.ndarray, "H W"] | None:
    if dicom.is_dicom(path):
        return None
    with open_picture(path) as opened:
        check_size(path, opened.width, opened.height)
        if not opened.mode.startswith("I"):
            return None
        values = np.asarray(opened)
    # Labels that are stored in 16 bits are no probabilities.
    return values.astype(np.float32) / np.float32(65535) if 255 < values.max(initial=0) <= 65535 else None


def _count_frames(path: Path) -> int:
    with decoding(path, _ADVICE):
        if dicom.is_dicom(path):
            header = dicom.read_header(path)
            check_size(path, int(header.Columns), int(header.Rows))
            return dicom.frame_count(header)
        with open_picture(path) as opened:
            check_size(path, opened.width, opened.height)
            return picture_frames(opened)


def _is_image(path: Path) -> bool:
    if path.suffix.lower() in SUFFIXES:
        return True
    try:  # a pipe, too, is in no hurry to be read
        return path.is_file() and path.name.upper() != "DICOMDIR" and dicom.is_dicom(path)
    except OSError:  # not readable, and by its name no image
        return False


def _walk(root: Path, without: Path | None, problems: list[str]) -> Iterator[Path]:
    """All files below a folder in natural order, but for hidden ones; links to folders are followed, once each.

    Of what an earlier prediction has left only its tables: its pictures are no images that somebody wants segmented.
    """
    seen: set[Path] = set()

    def report(error: OSError) -> None:
        problems.append(f"{error.filename} cannot be read ({error.strerror}): give yourself read permission.")

    for folder, inner, files in os.walk(root, onerror=report, followlinks=True):
        real = Path(folder).resolve()
        if real in seen or real == without:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted((name for name in inner if not name.startswith(".")), key=natural)
        if {"settings.json", "predictions.csv"} <= set(files):
            inner.clear()
        yield from (Path(folder, name) for name in sorted(files, key=natural) if not is_hidden(name))


def _without_suffix(path: PurePosixPath) -> PurePosixPath:
    """Without what follows the last dot, but for the numbers with dots that scanners give as names."""
    return path.with_suffix("") if path.suffix.lower() in SUFFIXES else path


def _safe_path(path: PurePosixPath) -> PurePosixPath:
    return PurePosixPath(*map(_safe, path.parts))


def _safe(part: str) -> str:
    part = _UNSAFE.sub("_", part)
    if len(part.encode()) > _LONGEST:
        part = f"{part[: _LONGEST // 4]}-{hashlib.sha256(part.encode()).hexdigest()[:12]}"
    return part.rstrip(". ") or "_"


def _key(path: str | PurePosixPath | Path) -> str:
    return stem_key(path if isinstance(path, str) else path.as_posix())
