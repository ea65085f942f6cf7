"""One part of a split as items a model takes, each determined by (seed, epoch, index) alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch.utils.data import Dataset, Sampler, default_collate

from ultrarefiner.data.augment import Augment, Change
from ultrarefiner.data.cache import Frames, NativeMasks
from ultrarefiner.data.cases import Case
from ultrarefiner.data.mask_files import MaskFiles
from ultrarefiner.data.predictions import Predictions

Simulator = Callable[[Bool[np.ndarray, "C C"], int], Float32[np.ndarray, "C C"]]


@dataclass(frozen=True)
class Source:
    """Where the pixels of the cases come from.

    Attributes:
        positions: `Case.key` → position in the cache.
        native: masks at native size.
        coarse: frames at the coarse network's size C.
        full: frames at S; None where nobody needs them.
        aspects: native width / height by position, as the frames are stretched to squares.
    """

    positions: Mapping[tuple[str, str], int]
    native: NativeMasks
    coarse: Frames
    full: Frames | None
    aspects: Sequence[float]


@dataclass(eq=False)
class Cases(Dataset[dict[str, Any]]):
    """Cases as dictionaries.

    "image" and "mask" (1, S, S), "coarse_image" and "coarse_mask" (1, C, C), "prob" (K, C, C): float32 in [0, 1];
    "aspect" float32, native width / height; "index" int, "id" str, and "native_mask" bool (H, W). image and mask need
    ``source.full``, prob a simulator, native_mask ``native=True``.

    Args:
        cases: the cases, in order.
        source: their pixels.
        seed: of augmentation and simulation.
        augment: draws one geometric and one photometric change for a sample; None leaves it as it is.
        simulator: (coarse mask, seed) → simulated prediction of the coarse network.
        predictions: real ones, of which a share takes the place of simulated ones.
        files: masks that take the place of simulated ones, and the part they are of.
        native: add the mask at the size of its image.
        masks_per_image: K, simulated predictions of one (changed) case.
        crops: so many changed versions of a case take turns over the epochs, each shown in the same crop again; None
            changes it anew in every epoch. "where" (K, C, C) and "margins" (4,) in [0, 1] then say which crop: that
            around the predictions which the version came with first.
    """

    cases: tuple[Case, ...]
    source: Source
    seed: int
    augment: Augment | None = None
    simulator: Simulator | None = None
    predictions: Predictions | None = None
    native: bool = False
    masks_per_image: int = 1
    files: tuple[MaskFiles, str] | None = None
    crops: int | None = None

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        """The item of (epoch, index); a plain index means epoch 0."""
        epoch, index = (0, key) if isinstance(key, int) else key
        version = epoch if self.crops is None else epoch % self.crops
        case = self.cases[index]
        position = self.source.positions[case.key]
        pairs = {"coarse_": (self.source.coarse.image(position), self.source.coarse.mask(position))}
        if self.source.full is not None:
            pairs[""] = (self.source.full.image(position), self.source.full.mask(position))
        change = None
        if self.augment is not None:
            change = self.augment.draw(np.random.default_rng([self.seed, version, index]), pairs["coarse_"][1])
            pairs = {prefix: change(image, mask) for prefix, (image, mask) in pairs.items()}
        aspect = torch.tensor(self.source.aspects[position], dtype=torch.float32)
        item: dict[str, Any] = {"index": index, "id": case.id, "aspect": aspect}
        for prefix, (image, mask) in pairs.items():
            item[f"{prefix}image"] = as_tensor(image)
            item[f"{prefix}mask"] = torch.from_numpy(mask.astype(np.float32))[None]
        if self.simulator is not None or self.predictions is not None:
            item["prob"] = self._probs(index, pairs["coarse_"][1], change, epoch)
            if self.crops is not None:
                again = version != epoch
                item["where"] = self._probs(index, pairs["coarse_"][1], change, version) if again else item["prob"]
                margins = np.random.default_rng([self.seed, version, index, 2]).random(4, dtype=np.float32)
                item["margins"] = torch.from_numpy(margins)
        if self.native:
            item["native_mask"] = self.source.native.mask(position)
        return item

    def _probs(
        self, index: int, mask: Bool[np.ndarray, "C C"], change: Change | None, epoch: int
    ) -> Float[torch.Tensor, "K C C"]:
        several = range(index * self.masks_per_image, (index + 1) * self.masks_per_image)
        seeds = [failure_seed(self.seed, epoch, number) for number in several]
        probs = [self._prob(self.cases[index], mask, change, seed) for seed in seeds]
        return torch.from_numpy(np.stack(probs).astype(np.float32, copy=False))

    def _prob(
        self, case: Case, mask: Bool[np.ndarray, "C C"], change: Change | None, seed: int
    ) -> Float[np.ndarray, "C C"]:
        """A prediction for the (changed) mask: a real one or one from a file, changed alike, or a simulated one."""
        # [seed, 1]: the simulator's own stream starts from the seed, and its first number chooses the kind of failure
        chance = np.random.default_rng([seed, 1])
        if self.predictions is not None and chance.random() < self.predictions.ratio:
            given = self.predictions.load(case, mask.shape[0], int(chance.integers(self.predictions.versions)))
        elif self.files is not None:
            files, part = self.files
            given = files.draw(case, part, seed, mask.shape[0])
        else:
            assert self.simulator is not None
            return self.simulator(mask, seed)
        # what comes into the frame from outside is as sure to be background as anything in it
        return np.maximum(change.warp(given)[0], given.min()) if change else given


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) pairs, the order a permutation by (seed, epoch); Lightning calls `set_epoch`.

    Every process of ``world_size`` computes the same order and takes every ``world_size``-th of it. Shuffled parts
    give each process the same number (the few left over come in another epoch); the others give each case once.

    Args:
        length: number of cases.
        seed: of the permutations.
        shuffle: False keeps the order, and epoch 0.
        rank, world_size: this process among all.
        epoch: the first one. Lightning starts the workers before it calls `set_epoch`.
        done: how many samples of that epoch this process had before it was interrupted; they do not come again, and
            `len` counts them all the same.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        done: int = 0,
    ) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = epoch if shuffle else 0
        self._done = (self.epoch, done)

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation for the next iteration."""
        if self.shuffle:
            self.epoch = epoch

    def __len__(self) -> int:
        if self.shuffle and self.length >= self.world_size:
            return self.length // self.world_size
        return len(range(self.rank, self.length, self.world_size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch, self.length]).permutation(order)
        begun, done = self._done
        for index in order[self.rank :: self.world_size][: len(self)][done if self.epoch == begun else 0 :]:
            yield self.epoch, int(index)


def failure_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of one simulated prediction, independent of the augmentation's stream.

    The seeds of an epoch follow each other from a random base: the simulator then fills its Dice bins evenly.
    """
    return int(np.random.SeedSequence([seed, epoch], spawn_key=(1,)).generate_state(1, np.uint64)[0]) + index


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: tensors stacked, ``native_mask`` a list because sizes differ."""
    native = [item.pop("native_mask") for item in items if "native_mask" in item]
    batch = default_collate(items)
    return {**batch, "native_mask": native} if native else batch


def as_tensor(image: UInt8[np.ndarray, "S S"]) -> Float32[torch.Tensor, "1 S S"]:
    """Grey values 0 to 255 → [0, 1]."""
    return torch.from_numpy(image.astype(np.float32) * np.float32(1 / 255))[None]
