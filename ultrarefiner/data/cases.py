"""What a data set consists of: cases, and what was left out of it and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PARTS = ("train", "val", "test")
HELD = "held"  # training cases that one run leaves out, so that its network may predict them


@dataclass(frozen=True)
class Case:
    """One image with its lesion masks, as paths: nothing is decoded yet.

    Attributes:
        id: unique within its data set, and stable: it names the case in tables and on disk.
        dataset: name of the data set, for instance "busbra".
        patient: who was imaged, unique within the data set; None where the publisher names nobody.
        label: "benign", "malignant", "normal", or "" where no class is known.
        image: the image file; None where the reader computes its images (phantoms).
        masks: one file for each lesion, merged when read; empty where there is none.
        roles: where the publisher draws the folds: the part ("train", "val", "test") in each of them.
            A single role holds in every fold (a data set for testing only).
        about: what else the publisher says, as (column, text) for tables of results: the device, say. "spacing" is the
            size of a pixel in mm.
    """

    id: str
    dataset: str
    patient: str | None = None
    label: str = ""
    image: Path | None = None
    masks: tuple[Path, ...] = ()
    roles: tuple[str, ...] = ()
    about: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """Unique over several data sets."""
        return (self.dataset, self.id)

    @property
    def files(self) -> tuple[Path, ...]:
        """The image and its masks."""
        return (() if self.image is None else (self.image,)) + tuple(self.masks)


@dataclass(frozen=True)
class Exclusion:
    """Something in the data set's folder that is not used, and why: reported, never silent."""

    what: str
    reason: str


def people(cases: Sequence[tuple[str, str | None]]) -> dict[str, int]:
    """How many patients are named, and how many cases name none; for `results.tables.patients`.

    Args:
        cases: of each case the data set and the patient.
    """
    named = [(dataset, patient) for dataset, patient in cases if patient]
    return {"patients": len(set(named)), "without_patient": len(cases) - len(named)}
