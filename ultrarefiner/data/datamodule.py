"""The data of one fold, for Lightning: split, cache and loaders."""

import multiprocessing
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import cv2
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from ultrarefiner import ranks
from ultrarefiner.data import folds as partition
from ultrarefiner.data.augment import Augment
from ultrarefiner.data.cache import Frames
from ultrarefiner.data.cases import HELD, PARTS, Case, Exclusion, people
from ultrarefiner.data.dataset import Cases, EpochSampler, Simulator, Source, collate
from ultrarefiner.data.folds import Limits, Split
from ultrarefiner.data.index import Index
from ultrarefiner.data.mask_files import MaskFiles, NamedMasks
from ultrarefiner.data.predictions import Predictions
from ultrarefiner.data.seen import Seen, marks_of
from ultrarefiner.data.store import Store
from ultrarefiner.errors import UserError


class DataModule(pl.LightningDataModule):
    """Loaders of the three parts of one fold. See `dataset.Cases` for what an item holds.

    Build the Trainer with ``use_distributed_sampler=False``: the samplers here know the processes themselves.

    Args:
        store: the data set.
        fold, folds, test_fraction: see `folds.make_split`.
        seed: of order, augmentation and simulation.
        split_seed: of the partition and of what a limit takes: runs that differ in `seed` are tested on the same cases.
        image_size, coarse_size: S and C in px.
        batch_size, eval_batch_size: cases in a batch; the second is the first if not given.
        num_workers: processes of each loader; the batches do not depend on it.
        augment: of the training part.
        simulator: of coarse predictions, for all parts; the same ones in every epoch for val and test.
        predictions: real coarse predictions, of which a share takes the place of simulated ones in the training part,
            and all of them in the others.
        masks: files that take the place of simulated predictions in the parts that they are of.
        masks_per_image: K, coarse predictions of one training case in a batch; val and test have one each.
        crops: so many changed versions of a training case take turns, see `dataset.Cases`; None: new ones for ever.
        frame: False leaves out the images at S (Phase 1 needs only C).
        limit: the most cases of each part, for short runs.
        without: [part, parts] leaves one of several parts out of the training cases, see `folds.hold_out`.
        include_normal: keep images without a lesion; else they are left out and counted.
    """

    def __init__(
        self,
        store: Store,
        *,
        fold: int,
        seed: int,
        batch_size: int,
        folds: int = 5,
        image_size: int = 512,
        coarse_size: int = 224,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        augment: Augment | None = None,
        simulator: Simulator | None = None,
        predictions: Predictions | None = None,
        masks: MaskFiles | None = None,
        masks_per_image: int = 1,
        crops: int | None = None,
        frame: bool = True,
        limit: Limits | Mapping[str, int | None] | None = None,
        include_normal: bool = False,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        without: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.store, self.reader = store, store.reader
        self.fold, self.folds, self.test_fraction = fold, folds, test_fraction
        self.seed, self.split_seed = seed, split_seed
        self.image_size, self.coarse_size = image_size, coarse_size
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers = num_workers
        self.augment, self.frame = augment, frame
        self.simulator, self.predictions, self.masks = simulator, predictions, masks
        if masks_per_image < 1:
            raise UserError(f"phase.masks_per_image={masks_per_image} leaves nothing to refine: give 1 or more.")
        self.masks_per_image, self.crops = masks_per_image, crops
        self.limit = limit
        if without is not None and len(without) != 2:
            raise UserError(f"dataset.without={list(without)} is no part: give [part, parts].")
        self.without = without
        self.include_normal = include_normal

    def prepare_data(self) -> None:
        """Check the data and build the cache if it is missing or stale."""
        _ = self.split

    def setup(self, stage: str | None = None) -> None:
        """Check that the parts the stage needs have cases."""
        for part in {"fit": PARTS[:2], "validate": PARTS[1:2], "test": PARTS[2:]}.get(stage or "", ()):
            if not self.split.part(part):
                raise UserError(
                    f"{self.reader.name} has no cases for {part} in fold {self.fold}: it may be a data set for testing "
                    "only, or too small; train on another one, or combine it with one (dataset=combined)."
                )

    @cached_property
    def split(self) -> Split:
        """The cases of this fold's parts, after limits; proven free of leaks."""
        cases, index = self._usable
        groups = partition.group_cases(cases, index)
        shares = [entry.lesion_share for entry in index.entries]
        split = partition.make_split(
            cases,
            self.fold,
            self.folds,
            self.split_seed,
            groups=groups,
            lesion_shares=shares,
            test_fraction=self.test_fraction,
        )
        named = {case.key: group for case, group in zip(cases, groups, strict=True)}
        split = partition.limit_split(split, self.limit, named, self.split_seed)
        if self.without is not None:
            part, parts = self.without
            split = partition.hold_out(split, part, parts, named, self.split_seed)
        leaks = partition.leaks(split, cases, index)
        if leaks:
            raise UserError(f"fold {self.fold} of {self.reader.name} leaks: {leaks[0]} ({len(leaks)} in all).")
        if self.masks is not None:
            self.masks.check(split, self.coarse_size, self.sizes)
            if isinstance(self.masks, NamedMasks) and ranks.rank() == 0:
                truth = self._source.coarse.mask
                place = self._source.positions
                self.masks.warn({part: {c.key: truth(place[c.key]) for c in split.part(part)} for part in PARTS[:2]})
        return split

    @property
    def sizes(self) -> dict[tuple[str, str], tuple[int, int]]:
        """`Case.key` → width and height of its image, px."""
        cases, index = self._usable
        return {case.key: (entry.width, entry.height) for case, entry in zip(cases, index.entries, strict=True)}

    def marks(self, part: str) -> list[str]:
        """By what the images of a part are recognised, see `seen`."""
        cases, index = self._usable
        position = {case.key: i for i, case in enumerate(cases)}
        return marks_of(index, [position[case.key] for case in self.split.part(part)])

    def known(self, part: str, seen: Seen) -> list[Case]:
        """The cases of "val" or "test" that weights know: that they were trained on or, of test, chosen by.

        What was seen and lies in an earlier part here is proven to be none of these cases; so is what looks like it to
        the short marks.
        """
        earlier = [mark for other in PARTS[: PARTS.index(part)] for mark in self.marks(other)]
        seen = (seen if part == "test" else Seen(seen.trained)).without(earlier)
        return [self.split.part(part)[i] for i in seen.among(self.marks(part))]

    @cached_property
    def left_out(self) -> tuple[Exclusion, ...]:
        """What of the data set's folder is not used in this fold, and why."""
        faulty = [Exclusion(entry.id, entry.fault) for entry in self._opened[0].entries if entry.fault]
        return (*self.reader.left_out, *faulty, *self.split.left_out)

    def describe(self) -> dict[str, Any]:
        """Counts of cases, of the patients that are named, and of classes of each part; and what was left out."""
        parts = {
            part: {
                "cases": len(self.split.part(part)),
                **people([(case.dataset, case.patient) for case in self.split.part(part)]),
                "classes": _count(case.label or "unknown" for case in self.split.part(part)),
            }
            for part in (*PARTS, *([HELD] if self.split.held else []))
        }
        normal = sum(not entry.fault and not entry.lesion_px for entry in self._opened[0].entries)
        return {
            "dataset": self.reader.name,
            "fold": self.fold,
            "folds": self.folds,
            **parts,
            "without_lesion": {"cases": normal, "used": self.include_normal},
            "moved_to_their_patient": self.split.moved,
            "left_out": [f"{exclusion.what}: {exclusion.reason}" for exclusion in self.left_out],
        }

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        data = self.dataset("train", augment=self.augment)
        return self._loader(data, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.dataset("val", native=True), self.eval_batch_size, shuffle=False)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.dataset("test", native=True), self.eval_batch_size, shuffle=False)

    def dataset(self, part: str, augment: Augment | None = None, native: bool = False) -> Cases:
        """The items of "train", "val", "test" or "held"."""
        predictions, several, crops = self.predictions, self.masks_per_image, self.crops
        if part != "train":
            predictions, several, crops = predictions and replace(predictions, ratio=1.0, versions=1), 1, None
        cases = self.split.part(part)  # it also finds the masks
        files = (self.masks, part) if self.masks is not None and part in self.masks.parts else None
        return Cases(
            cases, self._source, self.seed, augment, self.simulator, predictions, native, several, files, crops
        )

    def _loader(self, data: Cases, batch_size: int, shuffle: bool) -> DataLoader[dict[str, Any]]:
        processes = ranks.size()
        if len(data) < processes:
            raise UserError(f"{self.reader.name}: {len(data)} cases are too few for {processes} processes")
        if shuffle:
            batch_size //= processes  # so that their batches together are the batch of one
        phase: Any = self.trainer.lightning_module if self.trainer and shuffle else None
        epoch, batches = phase.begins_at if phase else (0, 0)
        place = (ranks.rank(), processes)
        sampler = EpochSampler(len(data), self.seed, shuffle, *place, epoch, batches * batch_size)
        return DataLoader(
            data,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            drop_last=shuffle and len(sampler) > batch_size,  # a single short batch is better than none
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_begin_worker,
            # A child of this process sees that it has ended; a child of a fork server would wait for ever.
            multiprocessing_context="fork" if self.num_workers and _forks() else None,
        )

    @cached_property
    def _opened(self) -> tuple[Index, dict[int, Frames]]:
        partition.check_fold(self.store.cases, self.fold, self.folds)
        return self.store.open((self.coarse_size, self.image_size))

    @cached_property
    def _usable(self) -> tuple[list[Case], Index]:
        """The cases without fault, with a lesion unless normal images are wanted, and their index."""
        index = self._opened[0]
        kept = [
            position
            for position, entry in enumerate(index.entries)
            if not entry.fault and (entry.lesion_px or self.include_normal)
        ]
        cases = self.store.cases
        return [cases[position] for position in kept], index.select(kept)

    @cached_property
    def _source(self) -> Source:
        index, frames = self._opened
        positions = {case.key: position for position, case in enumerate(self.store.cases)}
        full = frames[self.image_size] if self.frame else None
        aspects = [entry.width / max(entry.height, 1) for entry in index.entries]
        return Source(positions, self.store.native_masks(index), frames[self.coarse_size], full, aspects)


def _forks() -> bool:
    """Whether a process may be forked safely: macOS can, but its own libraries do not survive it."""
    return sys.platform == "linux" and hasattr(os, "fork")


def _begin_worker(_: int) -> None:
    # PyTorch's own watch takes whoever is the parent now: a worker whose process was killed while this one was starting
    # would wait for ever. (A process from a fork server is no child of the one that asked for it.)
    parent = multiprocessing.parent_process()
    if parent and multiprocessing.get_start_method() == "fork" and os.getppid() != parent.pid:
        os._exit(1)
    cv2.setNumThreads(0)  # a worker is one of many: OpenCV would start a thread for each core in each of them


def _count(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts
