"""What `lesions=each` changes where an image has several lesions.

    python benchmarks/several_lesions.py --data-root ~/BUSI [--checkpoint shipped] [--masks 12]

Takes BUSI's cases whose true mask has more than one lesion, draws simulated coarse masks of each (seeds 0, 1, …), keeps
those in which the lesions are as many, redraws them in both ways, and shows what the pair finds by itself. Prints a
Markdown table of the mean Dice with the true mask.
"""

import argparse
from pathlib import Path

import numpy as np
from page import table

from ultrarefiner.data.failures import FailureSimulator
from ultrarefiner.data.readers import Busi
from ultrarefiner.results.measures import separate
from ultrarefiner.results.metrics import overlap
from ultrarefiner.segmenter import Segmentation, Segmenter

WAYS = ("together", "each")


def count(mask: np.ndarray, least: int = 50) -> int:
    """The lesions of a mask, without specks of a few pixels."""
    return sum(int(lesion.mask.sum()) >= least for lesion in separate(mask))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--checkpoint", default="shipped")
    parser.add_argument("--masks", type=int, default=12)
    chosen = parser.parse_args()
    reader, simulator = Busi(chosen.data_root), FailureSimulator()
    segmenters = {way: Segmenter.load(chosen.checkpoint, "cpu", lesions=way) for way in WAYS}
    rows = []
    for case in reader.cases():
        image, truth = reader.read(case)
        if count(truth) < 2:
            continue

        def scores(found: dict[str, Segmentation], truth: np.ndarray = truth) -> list[float]:
            return [overlap(one.mask, truth)["dice"] for one in found.values()]

        own = {way: segmenter(image) for way, segmenter in segmenters.items()}
        found = f"{count(own['together'].coarse)} of {count(truth)}"
        coarse, drawn, seed = [], [], 0
        while len(coarse) < chosen.masks and seed < 20 * chosen.masks:
            simulated = simulator(truth, seed)
            seed += 1
            if count(simulated > 0.5) == count(truth):
                coarse.append(overlap(simulated > 0.5, truth)["dice"])
                drawn.append(scores({way: one(image, coarse=simulated) for way, one in segmenters.items()}))
        rows.append(
            [case.id, "the pair's own", found, *means([overlap(own["each"].coarse, truth)["dice"]], [scores(own)])]
        )
        rows.append([case.id, f"{len(coarse)} simulated", f"{count(truth)} of {count(truth)}", *means(coarse, drawn)])
        print(table(["case", "coarse masks", "lesions in them", "coarse", *WAYS, "each better"], rows), flush=True)


def means(coarse: list[float], drawn: list[list[float]]) -> list[str]:
    """The cells of a row."""
    together, each = np.array(drawn).T
    return [f"{np.mean(values):.4f}" for values in (coarse, together, each)] + [
        f"{sum(each > together)} of {len(each)}"
    ]


if __name__ == "__main__":
    main()
