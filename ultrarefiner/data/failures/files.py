"""Simulated coarse masks as files, for those who want a fixed set: training makes its own on the fly.

`data.mask_files` reads them.
"""

import csv
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from ultrarefiner.data.cache import shown
from ultrarefiner.data.dataset import Cases, failure_seed
from ultrarefiner.data.failures.simulator import Failure, FailureSimulator
from ultrarefiner.data.mask_files import NEEDED, TABLE
from ultrarefiner.errors import UserError

SHEET = "sheet.png"
COLUMNS = (*NEEDED, "kind", "target", "dice")
_OURS = re.compile(rf"{re.escape(TABLE)}|{re.escape(SHEET)}|\d{{6,}}-[A-Za-z0-9_-]*\.png")  # names in a set
_SHOWN, _ROW = 32, 8  # on the contact sheet: simulated masks in all and in a row
_GREEN, _ORANGE = (115, 158, 0), (0, 159, 230)  # BGR; truth and simulated mask as in the pictures of a run


def write_failures(cases: Cases, simulator: FailureSimulator, part: str, count: int, folder: Path) -> None:
    """Write ``count`` simulated coarse masks of the cases in turn, a table of them and a contact sheet.

    Each mask is a PNG of 16 bits (65535 is probability 1) at the coarse size. Everything is written beside ``folder``
    first and takes its place at the end: an interrupted call leaves nothing, and the same call gives the same files.

    Args:
        cases: of one part; their seed is that of the simulation.
        simulator: makes the masks.
        part: its name, for the table.
        count: how many.
        folder: where they go; may hold an earlier set, and nothing beside it, which is replaced.

    Raises:
        UserError: there is no case, or the folder holds something else or cannot be written.
    """
    if not len(cases):
        raise UserError(f"part={part} has no case, so no coarse mask can be simulated: give another part or dataset.")
    frames = cases.source.coarse
    with _replaced(folder) as partial, (partial / TABLE).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        panels = []
        for number in shown(range(count), count, "Simulating"):
            case = cases.cases[number % len(cases)]
            position = cases.source.positions[case.key]
            mask = frames.mask(position)
            failure = simulator.simulate(mask, failure_seed(cases.seed, 0, number))
            name = file_name(number, case.id)
            _write_png(partial / name, np.round(failure.prob * 65535).astype(np.uint16))
            made = (failure.kind, f"{failure.target:.4f}", f"{failure.dice:.4f}")
            table.writerow([name, case.dataset, case.id, part, *made])
            if number < _SHOWN:
                panels.append(_panel(frames.image(position), mask, failure))
        _write_png(partial / SHEET, _tile(panels))


def file_name(number: int, id: str) -> str:
    """A name that is unique by the number and safe whatever the case's id holds."""
    return f"{number:06d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', id)[:60]}.png"


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``folder``, which may be missing, empty or an earlier set."""
    folder = folder.expanduser()
    partial = None
    try:
        if folder.exists() and not _is_ours(folder):
            raise UserError(f"output={folder} holds something else: give a new folder.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        partial.chmod(0o755)
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    except OSError as error:
        raise UserError(f"output={folder} cannot be written ({error.strerror or error}).") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty or holds a set and nothing else: other tools' masks may have a table of that name."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [""]
    if TABLE not in names:
        return not names
    with (folder / TABLE).open(encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip("\n") == ",".join(COLUMNS) and all(map(_OURS.fullmatch, names))


def _write_png(path: Path, pixels: np.ndarray) -> None:
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


def _panel(image: UInt8[np.ndarray, "C C"], mask: Bool[np.ndarray, "C C"], failure: Failure) -> np.ndarray:
    """The image with both outlines above the simulated probability, and what it is: (2·112 + 16, 112, 3)."""
    top = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    for outline, colour in ((mask, _GREEN), (failure.prob >= 0.5, _ORANGE)):
        contours, _ = cv2.findContours(outline.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(top, contours, -1, colour, max(1, len(mask) // 112))
    bottom = cv2.cvtColor(_grey(failure.prob), cv2.COLOR_GRAY2BGR)
    shown = [cv2.resize(part, (112, 112), interpolation=cv2.INTER_AREA) for part in (top, bottom)]
    label = np.full((16, 112, 3), 255, np.uint8)
    text = f"{failure.kind} {failure.dice:.2f}"
    cv2.putText(label, text, (2, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([*shown, label])


def _grey(prob: Float[np.ndarray, "C C"]) -> UInt8[np.ndarray, "C C"]:
    return np.round(prob * 255).astype(np.uint8)


def _tile(panels: list[np.ndarray]) -> np.ndarray:
    blank = np.full_like(panels[0], 255)
    columns = min(_ROW, len(panels))
    panels = panels + [blank] * (-len(panels) % columns)
    rows = [np.concatenate(panels[start : start + columns], axis=1) for start in range(0, len(panels), columns)]
    return np.concatenate(rows)
