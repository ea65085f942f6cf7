"""How many crops of an image should take turns (`phase.crops`), by what they do to Phase 2 on BUS-BRA.

    python benchmarks/crops_in_turn.py --data-root ~/BUSBRA [--seeds 0 1]     # an hour a seed on two cores

Trains LiteMedSAM with roi=on and eight masks a crop on a part of BUS-BRA's fold 0: one augmented crop of each image
whose embedding is kept, four that take turns, and a new one in every epoch. Each is judged as training judges itself,
after every epoch on the same simulated coarse masks of the same validation images. Interrupted, the same command goes
on.
Writes docs/crops.md; the runs stay in build/crops_in_turn.
"""

import argparse
from pathlib import Path

from masks_per_image import ROOT
from measure import configuration
from page import table

from ultrarefiner.files import read_csv, write_atomically
from ultrarefiner.runs.experiment import run

LIMITS = {"train": 160, "val": 100, "test": 2}
EPOCHS = 8
SETTINGS = {"crops=1": "1", "crops=4": "4", "new crops": "null"}
DICE = "val/refined/dice"


def train(data_root: Path, crops: str, seed: int) -> list[dict[str, str]]:
    """The rows of metrics.csv of a setting, one an epoch."""
    limits = [f"dataset.limit.{part}={count}" for part, count in LIMITS.items()]
    options = ["dataset=busbra", "model=lite", "roi=on", "phase=sam", f"data_root={data_root}", f"seed={seed}"]
    options += ["phase.masks_per_image=8", f"phase.crops={crops}", f"phase.epochs={EPOCHS}", *limits]
    directory = run(configuration(*options, f"output_root={ROOT / 'build' / 'crops_in_turn'}"))
    return read_csv(directory / "metrics.csv")


def page(found: dict[str, list[list[dict[str, str]]]], seeds: list[int]) -> str:
    """docs/crops.md."""
    rows = []
    for name, runs in found.items():
        for seed, epochs in zip(seeds, runs, strict=True):
            rows.append([name, str(seed), f"{float(epochs[0]['val/coarse/dice']):.4f}"])
            rows[-1] += [f"{float(epochs[number - 1][DICE]):.4f}" for number in (1, 2, 4, 6, 8)]
            rows[-1].append(f"{max(float(epoch[DICE]) for epoch in epochs):.4f}")
    best = [float(row[-1]) for row in rows]
    header = ["", "seed", "coarse", *(f"epoch {number}" for number in (1, 2, 4, 6, 8)), "best epoch"]
    return (
        "# Crops that take turns: what they do to the result\n\n"
        "Written by `benchmarks/crops_in_turn.py`: Phase 2 of LiteMedSAM, roi=on, batches of four images, eight "
        f"simulated masks a crop, on {LIMITS['train']} training images of BUS-BRA (fold 0). Mean Dice of the refined "
        f"masks of {LIMITS['val']} validation images, one simulated coarse mask each, the same ones for all. How much "
        "faster epochs are with crops that are kept stands in [performance.md](performance.md).\n\n"
        + table(header, rows)
        + f"\n\nThe best epochs of all runs lie within {max(best) - min(best):.4f} of each other.\n"
    )


def main() -> None:
    """Train what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    found = {
        name: [train(options.data_root, crops, seed) for seed in options.seeds] for name, crops in SETTINGS.items()
    }
    write_atomically(ROOT / "docs" / "crops.md", page(found, options.seeds).encode())


if __name__ == "__main__":
    main()
