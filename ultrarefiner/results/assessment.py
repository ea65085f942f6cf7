"""An evaluation as a folder: each case is kept as soon as it is measured, and all of them are summed up at the end.

``cases.jsonl`` begins with what was measured with what, and has one line for each case: its numbers, the sums of its
calibration, and the outlines of its masks. An interrupted evaluation goes on behind the last whole line. ``cases.csv``,
``summary.json``, ``tables.md`` and the pictures are made from it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from ultrarefiner.data.cases import Case, people
from ultrarefiner.errors import UserError
from ultrarefiner.files import number, write_atomically, write_csv
from ultrarefiner.results import charts, lesions, metrics, outlines, pictures, statistics
from ultrarefiner.results.calibration import Calibration, Reliability

KIND = "evaluation"
MASKS = ("coarse", "refined", "accepted")
"""accepted: the refined mask, or the coarse one where the rules of safety reject the refined one."""
LINES, PICTURES = "cases.jsonl", "pictures"
PICTURE_PX = 400
"""The longer side of the pictures that are kept."""

Record = dict[str, Any]


class Drawn(NamedTuple):
    """What was drawn on one image.

    Attributes:
        masks: by their names, see `MASKS`.
        probs: probability maps of some of them.
        about: further columns of the case, such as its uncertainty.
    """

    masks: dict[str, Bool[np.ndarray, "H W"]]
    probs: dict[str, Float[np.ndarray, "H W"]]
    about: dict[str, Any]


def picture_name(dataset: str, id: str) -> str:
    """The file name of a case's picture, safe whatever the id holds."""
    return f"{hashlib.sha256(repr((dataset, id)).encode()).hexdigest()[:20]}.jpg"


class Assessment:
    """The folder of one evaluation.

    Args:
        folder: new, or one with an evaluation of the same settings, which is continued.
        settings: what the numbers depend on, as plain data.
        tolerances, tolerances_mm: of the NSD, in px and in mm.
        spacing: mm per px, where a case does not say it itself.
        keep_pictures: whether a small JPEG of each image is kept.

    Raises:
        UserError: the folder holds an evaluation of something else, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        tolerances: Sequence[float] = metrics.TOLERANCES_PX,
        tolerances_mm: Sequence[float] = metrics.TOLERANCES_MM,
        spacing: float | None = None,
        keep_pictures: bool = True,
    ) -> None:
        self.folder, self.spacing, self.keep_pictures = folder, spacing, keep_pictures
        self.tolerances, self.tolerances_mm = list(tolerances), list(tolerances_mm)
        own = {"tolerances": self.tolerances, "tolerances_mm": self.tolerances_mm, "spacing": spacing}
        self.settings: dict[str, Any] = json.loads(json.dumps({**settings, **own}))
        self.records = self._begin()

    def _begin(self) -> dict[tuple[str, str], Record]:
        path = self.folder / LINES
        if not path.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise UserError(f"output={self.folder} holds something else: give a new folder")
            write_atomically(path, f"{json.dumps(self.settings)}\n".encode())
            return {}
        before, records, whole = read_lines(path)
        if before != self.settings:
            keys = sorted(
                key for key in before.keys() | self.settings.keys() if before.get(key) != self.settings.get(key)
            )
            raise UserError(
                f"output={self.folder} holds an evaluation with another {', '.join(keys)}: give another folder, or "
                "delete that one"
            )
        if not whole:
            lines = (json.dumps(line) for line in (before, *records.values()))
            write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
        return records

    def has(self, case: Case, mark: str = "") -> bool:
        """Whether a case was measured already, with the same ``mark`` (of the file its mask was read from, say)."""
        return case.key in self.records and self.records[case.key]["mark"] == mark

    def add(
        self, case: Case, image: UInt8[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"], drawn: Drawn, mark: str = ""
    ) -> None:
        """Measure a case and keep it."""
        record: Record = {
            "mark": mark,
            "size": [image.shape[1], image.shape[0]],
            "row": self._row(case, truth, drawn),
            "calibration": {},
            "outlines": {name: outlines.path_of(mask) for name, mask in {"truth": truth, **drawn.masks}.items()},
        }
        for name, prob in drawn.probs.items():
            counted = Reliability()
            counted.add(prob, truth)
            record["calibration"][name] = counted.sums()
        try:
            if self.keep_pictures:
                outlines.write_jpeg(image, PICTURE_PX, self.folder / PICTURES / picture_name(*case.key))
            with (self.folder / LINES).open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(record)}\n")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; the same command continues") from error
        self.records[case.key] = record

    def _row(self, case: Case, truth: Bool[np.ndarray, "H W"], drawn: Drawn) -> dict[str, Any]:
        who = {"id": case.id, "patient": case.patient, "dataset": case.dataset, "label": case.label}
        said = dict(case.about)
        spacing = _spacing(case, said.pop("spacing", None)) or self.spacing
        own: dict[str, Any] = {"lesion_px": int(truth.sum()), "lesions": len(lesions.match(truth, truth).dice)}
        for name, mask in drawn.masks.items():
            both = None if spacing is None else (spacing, spacing)
            scores = metrics.scores(mask, truth, both, self.tolerances, self.tolerances_mm)
            own |= {f"{name}_{metric}": value for metric, value in scores.items()}
            found = lesions.match(mask, truth)
            own[f"lesions_{name}_dice"] = " ".join(f"{dice:.6g}" for dice in found.dice)
            own[f"lesions_{name}_false"] = found.false_positives
        return who | said | who | own | dict(drawn.about)

    def finish(self, cases: Sequence[Case], about: Mapping[str, Any], read: Callable[[Case], Any]) -> dict[str, Any]:
        """Sum up some of the measured cases and write everything.

        Args:
            cases: which, in order.
            about: what else the summary says.
            read: the image of a case.

        Returns:
            The content of summary.json.
        """
        records = [self.records[case.key] for case in cases]
        columns = [name for name in dict.fromkeys(n for case in cases for n, _ in case.about) if name != "spacing"]
        rows = [
            {name: record["row"].get(name) for name in ("id", "patient", "dataset", "label", *columns)} | record["row"]
            for record in records
        ]
        known = dict.fromkeys((name for row in rows for name in row), math.nan)  # mm of some cases only
        rows = [known | counted(row) for row in rows]
        reliabilities = calibrations(records)
        content = {"kind": KIND, **about} | summarise(rows, ("label", *columns, "dataset"), reliabilities)
        write_csv(self.folder / "cases.csv", rows)
        names = list(content["masks"])
        charts.reliability(reliabilities, self.folder / "reliability.png")
        if "refined" in names:
            coarse, refined = ([row[f"{name}_dice"] for row in rows] for name in ("coarse", "refined"))
            charts.scatter(coarse, refined, self.folder / "scatter.png")
        self._sheet(cases, rows, names, read)
        write_atomically(self.folder / "summary.json", json.dumps(content, indent=2).encode())
        return content

    def _sheet(
        self, cases: Sequence[Case], rows: list[dict[str, Any]], names: list[str], read: Callable[[Case], Any]
    ) -> None:
        """The worst, median and best cases, and those harmed most, as a run shows them."""
        last = "refined" if "refined" in names else "coarse"
        sheet, labels = [], []
        for i, label in pictures.worth_a_look(rows, last):
            record = self.records[cases[i].key]
            mask = {name: outlines.mask_of(path, *record["size"]) for name, path in record["outlines"].items()}
            caption = "  ".join(f"{name} {rows[i][f'{name}_dice']:.3f}" for name in names)
            drawn = mask["coarse"], mask.get("refined")
            labels.append(label)
            sheet.append((cases[i].id, read(cases[i]), mask["truth"], *drawn, f"Dice {caption}"))
        pictures.overlay_sheet(sheet, self.folder / "overlays.png", labels)


def read_lines(path: Path) -> tuple[dict[str, Any], dict[tuple[str, str], Record], bool]:
    """The settings and the records in cases.jsonl, and whether its last line was written whole.

    Raises:
        UserError: it is damaged.
    """
    try:
        first, *lines = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines[:-1]]
        return json.loads(first), {(r["row"]["dataset"], r["row"]["id"]): r for r in records}, not lines[-1]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error}): delete the folder, and evaluate again") from error


def counted(row: Mapping[str, Any]) -> Record:
    """A case's row as means count it: no metric of an image without a lesion, as in the rows of a run.

    Also for rows of older versions, which took them for cases with a Dice of 0.
    """
    masks = () if number(row["lesion_px"]) else tuple(f"{name}_" for name in MASKS)
    return {
        name: math.nan if name.startswith(masks) and not name.endswith("_px") else value for name, value in row.items()
    }


def calibrations(records: Sequence[Record]) -> dict[str, Calibration]:
    """Of each mask with probabilities, over the pixels of all cases."""
    counted: dict[str, Reliability] = {}
    for record in records:
        for name, sums in record["calibration"].items():
            counted.setdefault(name, Reliability()).add_sums(sums)
    return {name: found.result() for name, found in counted.items()}


def masks_in(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The masks that were measured, of `MASKS`."""
    return [name for name in MASKS if rows and f"{name}_dice" in rows[0]]


def summarise(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], reliabilities: Mapping[str, Calibration]
) -> dict[str, Any]:
    """What summary.json says of the cases.

    Args:
        rows: of cases.csv, as numbers or as texts.
        columns: by which they are broken down, beside the size of the lesion.
        reliabilities: see `calibrations`.

    Returns:
        "cases", "patients" (and cases "without_patient"), "columns";
        "masks": of each mask "lesion" and "normal" (see `metrics.summarise`), "over"
        (each metric over the images with a lesion, see `statistics.over_cases`), "lesions" (see `lesions.summarise`)
        and "calibration"; "differences" of Dice to the coarse mask (see `statistics.paired`).
    """
    rows = list(rows)
    with_lesion = [row for row in rows if float(row["lesion_px"]) > 0]
    names = masks_in(rows)
    masks: dict[str, Any] = {}
    for name in names:
        measured = [key for key in rows[0] if key.startswith(f"{name}_") and key != f"{name}_px"]
        masks[name] = metrics.summarise(rows, name) | {
            "over": {
                key.removeprefix(f"{name}_"): statistics.over_cases(with_lesion, key)._asdict() for key in measured
            },
            "lesions": lesions.summarise(lesions_of(row, name) for row in rows),
            "calibration": reliabilities[name]._asdict() if name in reliabilities else None,
        }
    return {
        "cases": len(rows),
        **people([(row["dataset"], row.get("patient")) for row in rows]),
        "columns": list(columns),
        "masks": masks,
        "differences": {
            f"{name} - coarse": statistics.change(rows, "coarse_dice", f"{name}_dice")._asdict()
            for name in names
            if name != "coarse"
        },
    }


def _spacing(case: Case, text: str | None) -> float | None:
    if not text:
        return None
    value = number(text)
    if not 0 < value < 10:
        raise UserError(f"the spacing of {case.dataset} {case.id} must be mm per px, such as 0.08, got {text}")
    return value


def lesions_of(row: Mapping[str, Any], mask: str) -> lesions.Lesions:
    """The lesions of a case, from its row."""
    dice = tuple(float(text) for text in str(row[f"lesions_{mask}_dice"]).split())
    return lesions.Lesions(dice, int(row[f"lesions_{mask}_false"]))
