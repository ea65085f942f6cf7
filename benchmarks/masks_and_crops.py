"""How many masks should share a crop (`phase.masks_per_image`), and how many crops take turns (`phase.crops`).

    python benchmarks/masks_and_crops.py --data-root ~/BUSBRA [--seeds 0 1]     # two hours a seed on two cores

By what they do to Phase 2 on BUS-BRA: trains LiteMedSAM with roi=on on a part of fold 0. First eight masks share a
crop: one augmented crop of each image whose embedding is kept, four that take turns, or a new one in every epoch. Then
one mask a crop: for as many epochs, and for about as long. Each is judged as training judges itself, after every epoch
on the same simulated coarse masks of the same validation images. Interrupted, the same command goes on.
Writes docs/masks_and_crops.md; the runs stay in build/masks_and_crops.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from measure import configuration
from page import table

from ultrarefiner.files import read_csv, write_atomically
from ultrarefiner.runs.experiment import run

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"train": 160, "val": 100, "test": 2}
DICE, SHOWN = "val/refined/dice", (1, 2, 4, 8)


class Setting(NamedTuple):
    """What differs between the trainings."""

    name: str
    masks: int
    crops: str
    epochs: int = 8


SETTINGS = (
    Setting("8 masks, crops=1", 8, "1"),
    Setting("8 masks, crops=4", 8, "4"),
    Setting("8 masks, new crops", 8, "null"),
    Setting("1 mask, new crops", 1, "null"),
    Setting("1 mask, new crops, about as long", 1, "null", 14),
)


def train(data_root: Path, setting: Setting, seed: int) -> Path:
    """The run directory of a setting."""
    limits = [f"dataset.limit.{part}={count}" for part, count in LIMITS.items()]
    options = ["dataset=busbra", "model=lite", "roi=on", "phase=sam", f"data_root={data_root}", f"seed={seed}"]
    options += [f"phase.masks_per_image={setting.masks}", f"phase.crops={setting.crops}"]
    options += [f"phase.epochs={setting.epochs}", *limits]
    return run(configuration(*options, f"output_root={ROOT / 'build' / 'masks_and_crops'}"))


def row(setting: Setting, seed: int, directory: Path) -> list[str]:
    """A row of the table: what a run ended with, epoch by epoch."""
    epochs = read_csv(directory / "metrics.csv")
    steps = json.loads((directory / "summary.json").read_text())["last_step"]
    dice = [float(epoch[DICE]) for epoch in epochs]
    cells = [setting.name, str(seed), str(steps), str(4 * setting.masks * steps)]
    cells += [f"{dice[number - 1]:.4f}" for number in SHOWN]
    return [*cells, f"{dice[-1]:.4f} ({len(dice)})", f"{max(dice):.4f}"]


def page(rows: list[list[str]], coarse: float) -> str:
    """docs/masks_and_crops.md."""
    best = [float(cells[-1]) for cells in rows if cells[0].startswith("8")]
    header = ["", "seed", "steps", "masks seen", *(f"epoch {number}" for number in SHOWN), "last", "best"]
    return (
        "# Masks that share a crop, crops that take turns: what they do to the result\n\n"
        "Written by `benchmarks/masks_and_crops.py`: Phase 2 of LiteMedSAM, roi=on, batches of four images, on "
        f"{LIMITS['train']} training images of BUS-BRA (fold 0). Mean Dice of the refined masks of {LIMITS['val']} "
        "validation images, one simulated coarse mask each, the same ones for all; the coarse masks themselves have "
        f"{coarse:.4f}. How much faster masks are seen that share a crop, and epochs with crops that are kept, stands "
        "in [performance.md](performance.md).\n\n"
        + table(header, rows)
        + "\n\nThe best epochs of the trainings with eight masks a crop lie within "
        + f"{max(best) - min(best):.4f} of each other.\n"
    )


def main() -> None:
    """Train what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    rows, coarse = [], 0.0
    for setting in SETTINGS:
        for seed in options.seeds:
            directory = train(options.data_root, setting, seed)
            coarse = float(read_csv(directory / "metrics.csv")[0]["val/coarse/dice"])
            rows.append(row(setting, seed, directory))
    write_atomically(ROOT / "docs" / "masks_and_crops.md", page(rows, coarse).encode())


if __name__ == "__main__":
    main()
