"""Who is trained on, who validates, who is tested: one split for all phases of a fold, without leaks.

Cases of one patient, and near-duplicate images, are one *group*, and a group lies in one part. Where the publisher
draws the folds (BUS-BRA) these are used; else a test set is cut off by group first, the same for every fold, and the
rest is dealt out to the folds, each class and lesion size in its share.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ultrarefiner.data.cases import HELD, PARTS, Case, Exclusion
from ultrarefiner.data.duplicates import components, near_duplicates
from ultrarefiner.data.index import Index
from ultrarefiner.errors import UserError
from ultrarefiner.files import write_csv


@dataclass(frozen=True)
class Split:
    """The cases of one fold.

    Attributes:
        left_out: cases that could not be placed without a leak.
        moved: how many cases were moved between train and val, against the publisher's partition, to their patient.
        held: cases taken out of train by `hold_out`.
    """

    train: tuple[Case, ...]
    val: tuple[Case, ...]
    test: tuple[Case, ...]
    left_out: tuple[Exclusion, ...] = ()
    moved: int = 0
    held: tuple[Case, ...] = ()

    def part(self, name: str) -> tuple[Case, ...]:
        """The cases of "train", "val", "test" or "held"."""
        return {"train": self.train, "val": self.val, "test": self.test, HELD: self.held}[name]


@dataclass(frozen=True)
class Limits:
    """The most cases a part may have, for short runs; None leaves it whole."""

    train: int | None = None
    val: int | None = None
    test: int | None = None


def make_split(
    cases: Sequence[Case],
    fold: int,
    folds: int = 5,
    seed: int = 0,
    *,
    groups: Sequence[int] | None = None,
    lesion_shares: Sequence[float] | None = None,
    test_fraction: float = 0.2,
) -> Split:
    """The cases of one fold.

    Args:
        cases: what is to be split.
        fold: which fold, 0 … folds - 1.
        folds: how many there are; has to be the publisher's number where he draws them.
        seed: of the folds drawn here. Another seed is another partition.
        groups: the group of each case (`group_cases`); by patient alone if not given.
        lesion_shares: the lesion's share of each frame, in [0, 1]: each fold gets small and large ones.
        test_fraction: share of the cases held out for testing, where the publisher names no test set.

    Raises:
        UserError: the fold is outside the partition, or there are fewer groups than parts to fill.
    """
    check_fold(cases, fold, folds)
    groups = _by_patient(cases) if groups is None else groups
    shares = [0.0] * len(cases) if lesion_shares is None else lesion_shares
    roles = [""] * len(cases)
    for dataset in dict.fromkeys(case.dataset for case in cases):
        members = [position for position, case in enumerate(cases) if case.dataset == dataset]
        if all(cases[position].roles for position in members):
            drawn = {position: _official(cases[position], fold) for position in members}
        else:
            drawn = _draw(dataset, members, cases, fold, folds, seed, groups, shares, test_fraction)
        for position, role in drawn.items():
            roles[position] = role
    return _reconcile(cases, roles, groups)


def check_fold(cases: Sequence[Case], fold: int, folds: int) -> None:
    """Refuse a fold outside the partition, before anything is read.

    Raises:
        UserError: naming the folds there are.
    """
    for dataset, roles in {case.dataset: case.roles for case in cases}.items():
        if len(roles) > 1 and len(roles) != folds:
            raise UserError(
                f"dataset.folds={folds} is not the official partition of {dataset}, which has {len(roles)} folds: "
                f"set dataset.folds={len(roles)}, or dataset.reader.official=0 to draw your own."
            )
    if folds < 2:
        raise UserError(f"dataset.folds={folds} leaves nothing to train on: choose 2 or more.")
    if not 0 <= fold < folds:
        names = "+".join(dict.fromkeys(case.dataset for case in cases))
        raise UserError(f"fold={fold} is outside the {folds}-fold partition of {names}: choose 0…{folds - 1}.")


def group_cases(cases: Sequence[Case], index: Index) -> list[int]:
    """The group of each case: one patient, one file, or near-duplicates over any path are one group."""
    links = [(pair.first, pair.second) for pair in near_duplicates(index.signatures)]
    first: dict[object, int] = {}
    for position, (case, entry) in enumerate(zip(cases, index.entries, strict=True)):
        for mark in (entry.sha256, *([(case.dataset, case.patient)] if case.patient is not None else [])):
            links.append((first.setdefault(mark, position), position))
    return components(len(cases), links)


def limit_split(
    split: Split, limits: Limits | Mapping[str, int | None] | None, groups: Mapping[Any, Hashable], seed: int
) -> Split:
    """A seeded subset of whole groups of each part, no larger than its limit (but for a first group that is).

    Args:
        split: what to take from.
        limits: the most cases of each part.
        groups: `Case.key` → group.
        seed: of the choice.
    """
    if limits is None:
        return split
    limits = limits if isinstance(limits, Limits) else Limits(**limits)
    chosen: dict[str, Any] = {}
    for number, part in enumerate(PARTS):
        limit = getattr(limits, part)
        if limit is not None and limit < 1:
            raise UserError(f"dataset.limit.{part}={limit} leaves no case: give 1 or more, or null for all.")
        chosen[part] = _some(split.part(part), limit, groups, np.random.default_rng([seed, number]))
    return replace(split, **chosen)


def hold_out(split: Split, part: int, parts: int, groups: Mapping[Any, Hashable], seed: int) -> Split:
    """Take one of ``parts`` out of the training cases, by whole groups, each class in its share.

    A network that is trained on what is left has never seen the part: its predictions of it are out-of-fold. The parts
    together are the training cases.

    Args:
        split: whose training cases are cut into parts.
        part: which one is taken out, 0 … parts - 1.
        parts: how many there are.
        groups: `Case.key` → group.
        seed: of the cut.

    Raises:
        UserError: no such part, or fewer groups than parts.
    """
    if not 0 <= part < parts or parts < 2:
        raise UserError(f"dataset.without=[{part},{parts}] is no part: give [part, parts] with 0 <= part < parts.")
    by_group: dict[object, list[int]] = defaultdict(list)
    for position, case in enumerate(split.train):
        by_group[groups[case.key]].append(position)
    if len(by_group) < parts:
        raise UserError(
            f"{len(by_group)} patients (or groups of like images) to train on are fewer than the {parts} parts that "
            "out-of-fold predictions need: set fewer phase.parts, or a larger dataset.limit.train."
        )
    dealt = _deal(
        list(by_group.values()),
        lambda group: (split.train[group[0]].dataset, split.train[group[0]].label),
        [1 / parts] * parts,
        np.random.default_rng([seed, parts]),
        at_least=(1,) * parts,
    )
    taken = {position for group in dealt[part] for position in group}
    return replace(
        split,
        train=tuple(case for position, case in enumerate(split.train) if position not in taken),
        held=tuple(case for position, case in enumerate(split.train) if position in taken),
    )


def leaks(split: Split, cases: Sequence[Case], index: Index) -> list[str]:
    """What crosses a border of the split, one sentence each; an empty list proves that nothing does.

    Patients, file hashes and near-duplicates are compared anew here, not taken from the groups that made the split.
    """
    position = {case.key: place for place, case in enumerate(cases)}
    part_of = {case.key: part for part in (*PARTS, HELD) for case in split.part(part)}
    placed = [case for part in (*PARTS, HELD) for case in split.part(part)]
    found = []
    marks: dict[object, Case] = {}
    for case in placed:
        entry = index.entries[position[case.key]]
        for mark, what in (((case.dataset, case.patient), f"patient {case.patient}"), (entry.sha256, "the same file")):
            if mark == (case.dataset, None):
                continue
            other = marks.setdefault(mark, case)
            if part_of[other.key] != part_of[case.key]:
                found.append(f"{what}: {other.id} in {part_of[other.key]} and {case.id} in {part_of[case.key]}")
    for pair in near_duplicates(index.signatures[[position[case.key] for case in placed]]):
        one, other = placed[pair.first], placed[pair.second]
        if part_of[one.key] != part_of[other.key]:
            found.append(
                f"near-duplicates (correlation {pair.correlation:.3f}): {one.id} in {part_of[one.key]} "
                f"and {other.id} in {part_of[other.key]}"
            )
    return found


def save_split(split: Split, path: Path) -> None:
    """Write the split as CSV: part, dataset, id, patient, label."""
    write_csv(
        path,
        (
            {"part": part, "dataset": case.dataset, "id": case.id, "patient": case.patient, "label": case.label}
            for part in (*PARTS, HELD)
            for case in split.part(part)
        ),
    )


def _official(case: Case, fold: int) -> str:
    return case.roles[fold if len(case.roles) > 1 else 0]


def _by_patient(cases: Sequence[Case]) -> list[int]:
    first: dict[object, int] = {}
    return [
        first.setdefault((case.dataset, case.patient), position) if case.patient is not None else position
        for position, case in enumerate(cases)
    ]


def _draw(
    dataset: str,
    members: Sequence[int],
    cases: Sequence[Case],
    fold: int,
    folds: int,
    seed: int,
    groups: Sequence[int],
    shares: Sequence[float],
    test_fraction: float,
) -> dict[int, str]:
    """Cut off the test set, deal the rest out to the folds: the role of each member's position in ``fold``."""
    if not 0 <= test_fraction < 1:
        raise UserError(f"dataset.test_fraction={test_fraction} is no share: give 0 or more and less than 1.")
    by_group: dict[int, list[int]] = defaultdict(list)
    for position in sorted(members, key=lambda position: cases[position].id):  # not the order of the folder
        by_group[groups[position]].append(position)
    least = folds + (test_fraction > 0)
    if len(by_group) < least:
        raise UserError(
            f"{dataset} has {len(by_group)} patients (or groups of like images), fewer than the {least} that "
            f"{folds} folds{' and a test set' if test_fraction > 0 else ''} need: set fewer folds, or add data."
        )
    rng = np.random.default_rng([seed, zlib.crc32(dataset.encode())])
    edges = np.quantile([shares[position] for position in members], (1 / 3, 2 / 3))

    def stratum(group: list[int]) -> tuple[str, int]:
        size = float(np.mean([shares[position] for position in group]))
        return cases[group[0]].label, int(np.searchsorted(edges, size))

    remaining = list(by_group.values())
    held_out: list[list[int]] = []
    if test_fraction > 0:
        remaining, held_out = _deal(remaining, stratum, [1 - test_fraction, test_fraction], rng, at_least=(folds, 1))
    dealt = _deal(remaining, stratum, [1 / folds] * folds, rng, at_least=(1,) * folds)
    roles = {position: "test" for group in held_out for position in group}
    for number, part in enumerate(dealt):
        roles |= {position: "val" if number == fold else "train" for group in part for position in group}
    return roles


def _deal(
    groups: list[list[int]],
    stratum: Callable[[list[int]], tuple[Any, ...]],
    shares: Sequence[float],
    rng: np.random.Generator,
    at_least: Sequence[int],
) -> list[list[list[int]]]:
    """Deal groups out to parts so that each part nears its share of every stratum and of the whole.

    Large groups first, in random order among equals; each goes where most of its stratum is missing, and of those
    parts where most is missing over all.
    """
    shuffled = [groups[position] for position in rng.permutation(len(groups))]
    shuffled.sort(key=len, reverse=True)
    total: Counter[tuple[Any, ...] | None] = Counter({None: sum(map(len, groups))})  # None: over all strata
    for group in groups:
        total[stratum(group)] += len(group)
    parts: list[list[list[int]]] = [[] for _ in shares]
    held: list[Counter[tuple[Any, ...] | None]] = [Counter() for _ in shares]
    for group in shuffled:
        kind = stratum(group)
        missing = [
            (share * total[kind] - held[part][kind], share * total[None] - held[part][None])
            for part, share in enumerate(shares)
        ]
        part = missing.index(max(missing))
        parts[part].append(group)
        held[part].update({kind: len(group), None: len(group)})
    for part, least in enumerate(at_least):  # few groups, many strata: rounding may have left a part short
        while len(parts[part]) < least:
            richest = max(range(len(parts)), key=lambda other: len(parts[other]) - at_least[other])
            parts[part].append(parts[richest].pop())
    return parts


def _reconcile(cases: Sequence[Case], roles: Sequence[str], groups: Sequence[int]) -> Split:
    """Bring every group to one side.

    A publisher's partition may tear a patient's images apart between train and val (BUS-BRA's does), or two data sets
    may share an image. Train and val: the whole group goes where its first case is. Test and another: the test cases
    stay, the others are left out, because the test set is what results are compared on.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for position in sorted(range(len(cases)), key=lambda position: cases[position].key):
        members[groups[position]].append(position)
    final = list(roles)
    left_out, moved = [], 0
    for group in members.values():
        present = {roles[position] for position in group}
        if "test" in present and len(present) > 1:
            for position in (position for position in group if roles[position] != "test"):
                final[position] = ""
                left_out.append(Exclusion(cases[position].id, "shares a patient or an image with the test set"))
        elif len(present) > 1:
            chosen = min(group, key=lambda position: zlib.crc32(repr(cases[position].key).encode()))
            moved += sum(roles[position] != roles[chosen] for position in group)
            for position in group:
                final[position] = roles[chosen]
    train, val, test = (tuple(case for case, role in zip(cases, final, strict=True) if role == part) for part in PARTS)
    return Split(train, val, test, tuple(left_out), moved)


def _some(
    cases: tuple[Case, ...], limit: int | None, groups: Mapping[Any, Hashable], rng: np.random.Generator
) -> tuple[Case, ...]:
    if limit is None or len(cases) <= limit:
        return cases
    by_group: dict[object, list[Case]] = defaultdict(list)
    for case in cases:
        by_group[groups[case.key]].append(case)
    names = list(by_group)
    taken: set[tuple[str, str]] = set()
    for position in rng.permutation(len(names)):
        group = by_group[names[position]]
        if not taken or len(taken) + len(group) <= limit:
            taken.update(case.key for case in group)
    return tuple(case for case in cases if case.key in taken)
