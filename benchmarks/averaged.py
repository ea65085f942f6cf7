"""What several coarse networks are worth together, and what refining their mean adds: Dice and HD95 of every case.

    python benchmarks/averaged.py RUN [RUN ...] --data-root ~/BUSBRA [--part val] [--fold 0] [--output averaged.csv]

The first network is the first of the pair that ships, the others are those of the runs. Their logits are averaged; the
mean of the first two, three, ... networks is measured as it is, and redrawn by the SAM of the pair that ships.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
from page import means

from ultrarefiner.data.folds import make_split
from ultrarefiner.data.readers import BusBra
from ultrarefiner.files import write_csv
from ultrarefiner.results.metrics import overlap, surface
from ultrarefiner.results.safety import Safety
from ultrarefiner.segmenter import Segmenter


def mean_of(probabilities: list[np.ndarray]) -> np.ndarray:
    """The mean of the logits, as a probability."""
    clipped = [np.clip(one.astype(np.float64), 1e-6, 1 - 1e-6) for one in probabilities]
    return (1 / (1 + np.exp(-np.mean([np.log(p / (1 - p)) for p in clipped], axis=0)))).astype(np.float32)


def main() -> None:
    """Measure, write the cases, print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--part", choices=("val", "test"), default="val")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--images", type=int, help="only the first so many")
    parser.add_argument("--output", type=Path, default=Path("averaged.csv"))
    args = parser.parse_args()
    pair = Segmenter.load("shipped", "cpu", safety=Safety.none())
    bare = copy.deepcopy(pair.cascade)
    bare.refiner, bare.coarse = None, bare.coarse.members[0]
    networks = [Segmenter(bare, pair.image_size, pair.coarse_size, "cpu")]
    networks += [Segmenter.load(run, "cpu") for run in args.runs]
    reader = BusBra(args.data_root.expanduser())
    rows: list[dict[str, Any]] = []
    for case in getattr(make_split(reader.cases(), args.fold), args.part)[: args.images]:
        image, truth = reader.read(case)
        single = [network(image).coarse_probability for network in networks]
        masks = {f"network {index}": one > 0.5 for index, one in enumerate(single)}
        for several in range(2, len(single) + 1):
            mean = mean_of(single[:several])
            masks |= {f"mean of {several}": mean > 0.5, f"mean of {several}, refined": pair(image, coarse=mean).mask}
        row: dict[str, Any] = {"id": case.id, "patient": case.patient}
        for name, mask in masks.items():
            row[f"{name}_dice"], row[f"{name}_hd95"] = overlap(mask, truth)["dice"], surface(mask, truth)["hd95"]
        rows.append(row)
        print(f"\r{len(rows)}", end="", flush=True)
    write_csv(args.output, rows)
    print("\n" + means(rows))


if __name__ == "__main__":
    main()
