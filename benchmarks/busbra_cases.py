"""Training cases of BUS-BRA with a simulated coarse mask each, for the benchmarks that need real images."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ultrarefiner.data.failures import FailureSimulator
from ultrarefiner.data.folds import make_split
from ultrarefiner.data.images import mask_to_square, to_square
from ultrarefiner.data.readers import BusBra

IMAGE_SIZE, COARSE_SIZE = 512, 224  # px, those of model=lite and model=base


class Example(NamedTuple):
    """One case as the refiner meets it in Phase 2."""

    image: Float[Tensor, "1 1 S S"]
    mask: Float[Tensor, "1 1 S S"]
    coarse: Float[Tensor, "1 1 C C"]
    """Simulated coarse probability."""
    coarse_mask: Float[Tensor, "1 1 C C"]
    native_mask: Bool[np.ndarray, "H W"]


def examples(data_root: Path, count: int, fold: int = 0) -> list[Example]:
    """`count` patients of the fold's training part, one image each, spread evenly over its list; always the same."""
    reader, simulator = BusBra(data_root), FailureSimulator()
    patients = list({case.patient: case for case in make_split(reader.cases(), fold).train}.values())
    chosen = [patients[i * len(patients) // count] for i in range(count)]
    found = []
    for seed, case in enumerate(chosen):
        image, mask = reader.read(case)
        coarse_mask = mask_to_square(mask, COARSE_SIZE)
        planes = [
            to_square(image, IMAGE_SIZE).astype(np.float32) / 255,
            mask_to_square(mask, IMAGE_SIZE).astype(np.float32),
            simulator(coarse_mask, seed),
            coarse_mask.astype(np.float32),
        ]
        found.append(Example(*(torch.from_numpy(plane)[None, None] for plane in planes), native_mask=mask))
    return found
