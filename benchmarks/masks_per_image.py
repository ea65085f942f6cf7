"""What masks that share a crop (`phase.masks_per_image`) do to the result of Phase 2, on BUS-BRA.

    python benchmarks/masks_per_image.py --data-root ~/BUSBRA [--seeds 0 1]     # 10 minutes a seed on two cores

Trains LiteMedSAM with roi=on on a part of BUS-BRA's fold 0: eight masks an image, one mask an image for as many epochs
(the same images), and one mask an image for twice the epochs (about the same time). Each is judged as Phase 2 judges
itself, one simulated coarse mask for each test image, the same ones for all. Interrupted, the same command goes on.
Writes docs/masks_per_image.md; the runs stay in build/masks_per_image.
"""

import argparse
import csv
import json
from pathlib import Path

from measure import configuration
from page import table

from ultrarefiner.files import write_atomically
from ultrarefiner.results.statistics import over_cases
from ultrarefiner.runs.experiment import run

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"train": 64, "val": 8, "test": 80}
SETTINGS = {
    "K=8, 2 epochs": (8, 2),
    "K=1, 2 epochs (the same images)": (1, 2),
    "K=1, 4 epochs (about the same time)": (1, 4),
}
Rows = list[dict[str, str]]


def train(data_root: Path, masks: int, epochs: int, seed: int) -> Path:
    """The run directory of a setting."""
    limits = [f"dataset.limit.{part}={count}" for part, count in LIMITS.items()]
    options = ["dataset=busbra", "model=lite", "roi=on", "phase=sam", f"data_root={data_root}", f"seed={seed}"]
    options += [f"phase.masks_per_image={masks}", f"phase.epochs={epochs}", *limits]
    return run(configuration(*options, f"output_root={ROOT / 'build' / 'masks_per_image'}"))


def cases(directory: Path) -> Rows:
    """The rows of cases.csv."""
    with (directory / "cases.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def page(found: dict[str, list[Rows]], steps: dict[str, int], seeds: list[int]) -> str:
    """docs/masks_per_image.md."""
    first = next(iter(found.values()))
    coarse = over_cases([row for rows in first for row in rows], "coarse_dice")
    rows = [["(the simulated masks themselves)", "", "", f"{coarse.mean:.4f}", "", "", ""]]
    for name, runs in found.items():
        cells = [name, str(steps[name]), str(4 * SETTINGS[name][0] * steps[name])]
        for metric, digits in (("refined_dice", 4), ("refined_hd95", 1)):
            values = over_cases([row for rows in runs for row in rows], metric)
            pairs = [
                {**row, metric: str(float(row[metric]) - float(other[metric]))}
                for own, others in zip(runs, first, strict=True)
                for row, other in zip(own, others, strict=True)
            ]
            gap = over_cases(pairs, metric)
            change = f"{gap.mean:+.{digits}f} ({gap.low:+.{digits}f} to {gap.high:+.{digits}f})"
            cells += [f"{values.mean:.{digits}f}", "" if runs is first else change]
        rows.append(cells)
    header = ["", "steps", "masks seen", "Dice", "against the first", "HD95 px", "against the first"]
    return (
        "# Masks that share a crop: what they do to the result\n\n"
        "Written by `benchmarks/masks_per_image.py`: Phase 2 of LiteMedSAM, roi=on, batches of four images, on "
        f"{LIMITS['train']} training images of BUS-BRA (fold 0), judged on {LIMITS['test']} test images with a "
        f"simulated coarse mask each; seed {', '.join(map(str, seeds))}. Behind each difference "
        "its 95 % interval (bootstrap over patients). These are the first minutes of a training: whether the "
        "difference lasts over a long one was not measured. How much faster masks are seen stands in "
        "[performance.md](performance.md).\n\n" + table(header, rows) + "\n"
    )


def main() -> None:
    """Train what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    directories = {
        (name, seed): train(options.data_root, *setting, seed)
        for seed in options.seeds
        for name, setting in SETTINGS.items()
    }
    found = {name: [cases(directories[name, seed]) for seed in options.seeds] for name in SETTINGS}
    summaries = {
        name: json.loads((directories[name, options.seeds[0]] / "summary.json").read_text()) for name in SETTINGS
    }
    steps = {name: summary["last_step"] for name, summary in summaries.items()}
    write_atomically(ROOT / "docs" / "masks_per_image.md", page(found, steps, options.seeds).encode())


if __name__ == "__main__":
    main()
