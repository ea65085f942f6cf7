"""A folder of segmented images: masks, probabilities, overlays and tables, written so that a killed run continues."""

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Shaped, UInt8

from ultrarefiner.data.dicom import Region, spacing_at
from ultrarefiner.data.scans import CoarseMasks, Scan, file_hash, load_coarse
from ultrarefiner.data.views import views
from ultrarefiner.errors import UserError
from ultrarefiner.files import read_csv, read_json, write_atomically, write_csv
from ultrarefiner.results.measures import describe, separate
from ultrarefiner.results.pictures import png
from ultrarefiner.results.segmentation import Segmentation

TABLE, LESIONS, SETTINGS = "predictions.csv", "lesions.csv", "settings.json"
EXTRAS = ("probabilities", "overlays")
SAVING = 0.05
"""The most of the time that writing tables may take; what was done since the last time is done again after a kill."""
_PARTIAL = re.compile(r"\..+\.(png|csv|json|dcm)-\w{8}")  # of `files.replacing`

Rows = list[dict[str, Any]]
Segment = Callable[[list[Any], list[Any] | None], list[Segmentation]]
"""Images, and their coarse masks where they come from elsewhere → what is found in each."""


class Item(NamedTuple):
    """A frame that is read."""

    scan: Scan
    frame: int
    image: UInt8[np.ndarray, "H W *rgb"]
    regions: list[Region]
    coarse: Shaped[np.ndarray, "H W"] | None
    marks: dict[str, str]
    """By which its files are known again."""


class Predictions:
    """The results in a folder; those of an earlier, interrupted call are kept.

    Args:
        folder: where they go: a new folder, an empty one, or one that was made with the same settings.
        settings: what defines a result, beside the images; plain data.
        spacing: (row, column) in mm, of images whose file does not say it.
        extras: of "probabilities" and "overlays", those to write.

    Raises:
        UserError: the folder holds something else, or results of other settings, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        spacing: tuple[float, float] | None = None,
        extras: Sequence[str] = EXTRAS,
    ) -> None:
        self.folder, self.spacing, self.extras = folder, spacing, extras
        self._claim(json.loads(json.dumps(settings)))
        for left in folder.rglob(".*"):  # a write that was killed
            if _PARTIAL.fullmatch(left.name):
                left.unlink()
        self.rows: dict[str, dict[str, Any]] = {row["id"]: dict(row) for row in self._read(TABLE)}
        self.lesions: dict[str, Rows] = {id: [] for id in self.rows}
        for row in self._read(LESIONS):
            if row["id"] in self.rows:
                self.lesions[row["id"]].append(dict(row))
        self._due = 0.0

    def has(self, name: str, marks: Mapping[str, str]) -> bool:
        """Whether a frame was done before, from the same files."""
        row = self.rows.get(name)
        return (
            row is not None
            and all(row.get(key) == mark for key, mark in marks.items())
            and all(path.is_file() for path in self._files(name).values())
        )

    def add(self, item: Item, found: Segmentation) -> None:
        """Write the files of a frame, and note its rows."""
        name = item.scan.frame_name(item.frame)
        paths = self._files(name)
        write_atomically(paths["masks"], png(found.mask.astype(np.uint8) * 255))
        if "probabilities" in paths:
            write_atomically(paths["probabilities"], png(np.round(found.probability * 65535).astype(np.uint16)))
        if "overlays" in paths:
            write_atomically(paths["overlays"], png(found.overlay()))
        height, width = found.mask.shape
        parts = separate(found.mask)
        spacings = [spacing_at(item.regions, part.centre, self.spacing) for part in parts]
        self.rows[name] = {
            "id": name,
            "image": item.scan.id,
            "frame": item.frame + 1,
            "mask": paths["masks"].relative_to(self.folder).as_posix(),
            "width": width,
            "height": height,
            "lesions": len(parts),
            **describe(parts[0] if parts else None, spacings[0] if parts else None, int(found.mask.sum())),
            "accepted": int(found.accepted),
            "reason": found.reason,
            "predicted_iou": "" if found.iou is None else round(found.iou, 4),
            "uncertainty": round(found.uncertainty, 4),
            **item.marks,
        }
        self.lesions[name] = [
            {"id": name, "lesion": number, **describe(part, spacing)}
            for number, (part, spacing) in enumerate(zip(parts, spacings, strict=True), 1)
        ]

    def save(self, names: Sequence[str] = ()) -> None:
        """Write the tables, if not too much time goes into that; with names, now, in their order, others behind."""
        begun = time.monotonic()
        if names or begun > self._due:
            order = [name for name in dict.fromkeys([*names, *self.rows]) if name in self.rows]
            write_csv(self.folder / LESIONS, [row for name in order for row in self.lesions[name]])
            write_csv(self.folder / TABLE, [self.rows[name] for name in order])
            ended = time.monotonic()
            self._due = ended + (ended - begun) / SAVING

    def _files(self, name: str) -> dict[str, Path]:
        return {kind: self.folder / kind / f"{name}.png" for kind in ("masks", *self.extras)}

    def _read(self, table: str) -> list[dict[str, str]]:
        return read_csv(self.folder / table) if (self.folder / table).is_file() else []

    def _claim(self, settings: Mapping[str, Any]) -> None:
        path = self.folder / SETTINGS
        if not path.is_file():
            if not self.folder.is_dir() or any(not path.name.startswith(".") for path in self.folder.iterdir()):
                raise UserError(f"output={self.folder} holds something else: give a new folder.")
            return write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())
        before = read_json(path)
        for key in settings:
            if before.get(key) != settings[key]:
                raise UserError(
                    f"output={self.folder} was made with {key}={json.dumps(before.get(key))}, now it is "
                    f"{json.dumps(settings[key])}: give a new folder, or the same settings."
                )
        return None


def settled(asked: Any, folder: Path) -> dict[str, Any]:
    """The settings of a call, checked before networks are loaded.

    One number for `spacing` is both. `precision=auto` is the one that the folder was begun in: measured anew it may be
    another, and the same command could not continue.

    Args:
        asked: as plain data.
        folder: where the results go.

    Raises:
        UserError: a value that cannot be.
    """
    views(asked["tta"])
    if wrong := set(asked["extras"]) - set(EXTRAS):
        raise UserError(f"extras must be of {', '.join(EXTRAS)}, got {', '.join(sorted(wrong))}")
    spacing, precision = asked["spacing"], asked["precision"]
    if spacing is not None:
        sides = spacing if isinstance(spacing, list) else [spacing, spacing]
        if len(sides) != 2 or not all(isinstance(side, int | float) and 0 < side < math.inf for side in sides):
            raise UserError(f"spacing must be the height and the width of a pixel in mm, or one number, got {spacing}")
        spacing = (float(sides[0]), float(sides[1]))
    if precision == "auto" and (folder / SETTINGS).is_file():
        precision = read_json(folder / SETTINGS).get("precision", precision)
    return {**asked, "spacing": spacing, "precision": precision}


def predict(
    segment: Segment,
    scans: Sequence[Scan],
    results: Predictions,
    batch_size: int,
    masks: CoarseMasks | None = None,
    step: Callable[[int], object] = lambda frames: None,
) -> list[str]:
    """Segment all frames that are not done yet, and forget what is known of an image under a name of before.

    Batches are always the same ones, whatever of them is done: a network's last digits may depend on its batch.

    Args:
        segment: the networks.
        scans: the images.
        results: where everything goes.
        batch_size: how many frames at once.
        masks: of another tool, which take the place of the coarse network's.
        step: called with the number of frames that are dealt with.

    Returns:
        A sentence for each file that could not be read.
    """
    problems: list[str] = []
    names = [scan.frame_name(index) for scan in scans for index in range(scan.frames)]
    position = {name: number // batch_size for number, name in enumerate(names)}
    items = _read(scans, results, masks, problems, step)
    for _, group in groupby(items, key=lambda item: position[item.scan.frame_name(item.frame)]):
        batch = list(group)
        given = None if masks is None else [item.coarse for item in batch]
        for item, found in zip(batch, segment([item.image for item in batch], given), strict=True):
            results.add(item, found)
        results.save()
        step(len(batch))
    here = {scan.id for scan in scans}
    for name in results.rows.keys() - position.keys():
        if results.rows[name]["image"] in here:  # its results have another name now
            del results.rows[name]
    results.save(names)
    return problems


def _read(
    scans: Sequence[Scan],
    results: Predictions,
    masks: CoarseMasks | None,
    problems: list[str],
    step: Callable[[int], object],
) -> Iterator[Item]:
    """The frames that are to be done, in order."""
    for scan in scans:
        left = scan.frames
        try:
            mark = file_hash(scan.path)
            todo = []
            for index in range(scan.frames):
                mask = None if masks is None else masks.find(scan, index)
                marks = {"image_sha256": mark, "coarse_sha256": "" if mask is None else file_hash(mask)}
                if not results.has(scan.frame_name(index), marks):
                    todo.append((index, mask, marks))
            step(scan.frames - len(todo))
            left = len(todo)
            pixels = scan.read([index for index, _, _ in todo])
            for (index, mask, marks), (image, regions) in zip(todo, pixels, strict=True):
                coarse = None if mask is None else load_coarse(mask, (image.shape[0], image.shape[1]))
                left -= 1
                yield Item(scan, index, image, regions, coarse, marks)
        except UserError as error:
            problems.append(str(error))
            step(left)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time writes into a folder, which is made if it is missing.

    Raises:
        UserError: another one does, or the folder cannot be made.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"another process writes into output={folder}: wait for it, or give another folder.") from None
    except OSError as error:
        raise UserError(f"output={folder} cannot be written ({error.strerror}): give another folder.") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, and the function that moves it on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("Segmenting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda frames: bar.advance(task, frames)


def summary(results: Predictions) -> str:
    """What was found, for a look."""
    rows = list(results.rows.values())
    lesions, redrawn = (sum(int(row[key]) > 0 for row in rows) for key in ("lesions", "accepted"))
    kept = len(rows) - redrawn
    return (
        f"{len(rows)} images: {lesions} with a lesion, {redrawn} redrawn, {kept} as the coarse mask says\n"
        f"  {results.folder / TABLE} says why, {results.folder / 'masks'} holds the masks"
    )


def finish(results: Predictions, problems: Sequence[str], not_dicom: int = 0) -> None:
    """Print what was found, and what went wrong with which file.

    Raises:
        UserError: something did.
    """
    print(summary(results))
    if not_dicom:
        print(f"  {not_dicom} files are not DICOM: there are no DICOM objects of them")
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        raise UserError(f"{len(problems)} files could not be read (see above); the others are done.")
