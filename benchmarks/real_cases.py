"""Real images with a coarse mask each, for the benchmarks that need them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ultrarefiner.data.cases import Case
from ultrarefiner.data.failures import FailureSimulator
from ultrarefiner.data.folds import make_split
from ultrarefiner.data.images import mask_to_square, to_square
from ultrarefiner.data.readers import BusBra, Busi, Reader

IMAGE_SIZE, COARSE_SIZE = 512, 224  # px, those of model=lite and model=base

Coarse = Callable[[Bool[np.ndarray, "C C"]], Float[np.ndarray, "C C"]]
"""From the true mask at the coarse size to a coarse probability."""


class Example(NamedTuple):
    """One case as the refiner meets it in Phase 2."""

    case: Case
    image: Float[Tensor, "1 1 S S"]
    mask: Float[Tensor, "1 1 S S"]
    coarse: Float[Tensor, "1 1 C C"]
    """Coarse probability."""
    coarse_mask: Float[Tensor, "1 1 C C"]
    aspect: Float[Tensor, " 1"]
    """Native width / height."""
    native_mask: Bool[np.ndarray, "H W"]


def example(reader: Reader, case: Case, coarse: Coarse) -> Example:
    """A case with the coarse mask that `coarse` makes of the true one, or knows of."""
    image, mask = reader.read(case)
    coarse_mask = mask_to_square(mask, COARSE_SIZE)
    planes = [
        to_square(image, IMAGE_SIZE).astype(np.float32) / 255,
        mask_to_square(mask, IMAGE_SIZE).astype(np.float32),
        coarse(coarse_mask).astype(np.float32),
        coarse_mask.astype(np.float32),
    ]
    tensors = [torch.from_numpy(plane)[None, None] for plane in planes]
    return Example(case, *tensors, aspect=torch.tensor([mask.shape[1] / mask.shape[0]]), native_mask=mask)


def spread(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` of the cases, evenly over their list; always the same."""
    return [cases[i * len(cases) // count] for i in range(count)]


def examples(data_root: Path, count: int, fold: int = 0) -> list[Example]:
    """`count` patients of the fold's training part of BUS-BRA, one image each, with simulated coarse masks."""
    reader, simulator = BusBra(data_root), FailureSimulator()
    patients = list({case.patient: case for case in make_split(reader.cases(), fold).train}.values())
    return [
        example(reader, case, lambda mask, seed=seed: simulator(mask, seed))
        for seed, case in enumerate(spread(patients, count))
    ]


def busi_examples(reader: Busi, low: float, high: float) -> list[Example]:
    """All cases with a lesion, each with a simulated coarse mask whose Dice is between two bounds."""
    simulator = FailureSimulator(bins=[[low, high, 1.0]])
    lesions = [case for case in reader.cases() if reader.read(case)[1].any()]
    return [example(reader, case, lambda mask, seed=seed: simulator(mask, seed)) for seed, case in enumerate(lesions)]


def predicted_examples(reader: Reader, cases: Sequence[Case], folder: Path, count: int | None = None) -> list[Example]:
    """The cases, or `count` of them, for which `folder` has a network's probability map at its own size, ID.npy (C, C).

    Raises:
        SystemExit: there is none.
    """
    known = [case for case in cases if (folder / f"{case.id}.npy").is_file()]
    if not known:
        raise SystemExit(f"error: {folder} has no map such as {cases[0].id}.npy for a case of {reader.name}.")
    chosen = spread(known, min(count or len(known), len(known)))
    return [example(reader, case, lambda _, name=case.id: np.load(folder / f"{name}.npy")) for case in chosen]
