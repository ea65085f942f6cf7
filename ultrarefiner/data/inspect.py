"""What a data set holds, as a report a person reads before training on it."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ultrarefiner.data.cache import UnusableFiles, cache_folder, open_cache
from ultrarefiner.data.cases import Case, Exclusion
from ultrarefiner.data.duplicates import near_duplicates
from ultrarefiner.data.index import Index
from ultrarefiner.data.readers import Reader

_SHOWN = 20  # lines of a list on the terminal; the counts are always complete
_COLUMNS = 100
_SMALL, _LARGE = 0.002, 0.7  # share of the frame outside which a lesion is worth a look
_STRETCHED = 4  # ratio of the sides beyond which a frame is distorted much when made square


@dataclass(frozen=True)
class Report:
    """What was found in a data set.

    Attributes:
        dataset: its name.
        facts: (what, value) lines, in order.
        left_out: what is not used and why.
        suspicious: what is used but worth a look.
        errors: what has to be corrected before training; then there is neither index nor cache.
        index: the index file with a hash of every file; None if there are errors.
    """

    dataset: str
    facts: tuple[tuple[str, str], ...]
    left_out: tuple[Exclusion, ...] = ()
    suspicious: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    index: Path | None = None

    @property
    def usable(self) -> bool:
        """Whether one can train on it."""
        return not self.errors

    def __str__(self) -> str:
        width = max((len(what) for what, _ in self.facts), default=0)
        lines = [self.dataset]
        for what, value in self.facts:
            lines += _wrap(value, f"  {what:<{width}}  ")
        lines += _list("Left out", [f"{exclusion.what}: {exclusion.reason}" for exclusion in self.left_out])
        lines += _list("Suspicious", self.suspicious) if self.usable else []  # nobody looked yet
        lines += _list("To correct", self.errors, shown=len(self.errors)) if self.errors else []
        if self.index:
            lines += ["Index with a SHA-256 of every file", f"  {self.index}"]
        return "\n".join(lines)


def inspect_dataset(reader: Reader, cache_dir: Path, sizes: Sequence[int] = (224, 512), salt: str = "") -> Report:
    """Check a data set, write its index and cache, and say what was found.

    Args:
        reader: the data set.
        cache_dir: where index and cache go.
        sizes: of the cached frames, in px.
        salt: of the `index.fingerprint`.

    Raises:
        UserError: the folder is not what the reader expects. Files that cannot be read are listed in the report.
    """
    cases = reader.cases()
    facts = [("cases", str(len(cases))), ("patients", _patients(cases)), ("classes", _counts(cases))]
    try:
        index, _ = open_cache(reader, sizes, cache_dir, salt=salt)
    except UnusableFiles as error:
        return Report(reader.name, tuple(facts), tuple(reader.left_out), errors=error.sentences)
    usable = [entry for entry in index.entries if not entry.fault]
    if usable:
        sides = np.array([(entry.width, entry.height) for entry in usable])
        shares = np.array([entry.lesion_share for entry in usable if entry.lesion_px])
        facts.append(("sizes", " · ".join(f"{name} {w:.0f} × {h:.0f} px" for name, (w, h) in _spread(sides))))
        normal = sum(entry.lesion_px == 0 for entry in usable)
        facts.append(("without lesion", f"{normal} (left out unless dataset.include_normal=true)" if normal else "0"))
        if len(shares):
            facts.append(("lesion", " · ".join(f"{name} {100 * share:.1f} %" for name, share in _spread(shares))))
    faulty = [Exclusion(entry.id, entry.fault) for entry in index.entries if entry.fault]
    return Report(
        reader.name,
        tuple(facts),
        (*reader.left_out, *faulty),
        tuple(_suspicions(cases, index)),
        index=cache_folder(reader, index.fingerprint, cache_dir) / "index.json",
    )


def _suspicions(cases: Sequence[Case], index: Index) -> list[str]:
    notes: list[str] = []

    def note(case: Case, text: str) -> None:
        notes.append(f"{case.dataset} {case.id}: {text}")

    for pair in near_duplicates(index.signatures):
        one, other = cases[pair.first], cases[pair.second]
        same = index.entries[pair.first].sha256 == index.entries[pair.second].sha256
        text = "the same file as" if same else f"nearly the same image (correlation {pair.correlation:.3f}) as"
        patients = one.patient, other.patient
        if None in patients or patients[0] != patients[1]:
            classes = f", and their classes differ ({one.label}, {other.label})" if one.label != other.label else ""
            note(one, f"{text} {other.dataset} {other.id}{classes}")
    for case, entry in zip(cases, index.entries, strict=True):
        if entry.fault:
            continue
        if entry.lesion_px and not _SMALL <= entry.lesion_share <= _LARGE:
            note(case, f"the lesion covers {100 * entry.lesion_share:.2f} % of the frame")
        if max(entry.height, entry.width) > _STRETCHED * min(entry.height, entry.width):
            note(case, f"a frame of {entry.width} × {entry.height} px is distorted much when made square")
        if case.label == "normal" and entry.lesion_px:
            note(case, "of class normal, but its mask shows a lesion")
        if case.label in ("benign", "malignant") and not entry.lesion_px:
            note(case, f"of class {case.label}, but its mask is empty")
    return notes


def _patients(cases: Sequence[Case]) -> str:
    named = {(case.dataset, case.patient) for case in cases if case.patient is not None}
    unnamed = sum(case.patient is None for case in cases)
    if not unnamed:
        return str(len(named))
    return f"{len(named)} named, {unnamed} cases without a name" if named else "not named"


def _counts(cases: Sequence[Case]) -> str:
    counts = Counter(case.label or "not named" for case in cases)
    return " · ".join(f"{label} {count}" for label, count in sorted(counts.items()))


def _spread(values: np.ndarray) -> list[tuple[str, Any]]:  # a number, or one for each column
    return [("least", values.min(axis=0)), ("median", np.median(values, axis=0)), ("most", values.max(axis=0))]


def _list(title: str, notes: Sequence[str], shown: int = _SHOWN) -> list[str]:
    if not notes:
        return [f"{title}: nothing"]
    more = [f"  … and {len(notes) - shown} more"] if len(notes) > shown else []
    return [f"{title} ({len(notes)})", *(line for note in notes[:shown] for line in _wrap(note, "  ")), *more]


def _wrap(text: str, start: str) -> list[str]:
    """Lines of a terminal; paths stay whole, so that they can be copied."""
    return textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent=start,
        subsequent_indent=" " * max(len(start), 4),
        break_long_words=False,
        break_on_hyphens=False,
    )
