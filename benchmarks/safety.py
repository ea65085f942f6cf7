"""What the rules of `safety` would cost and save, on validation patients.

    python benchmarks/safety.py --data-root ~/BUSBRA [--checkpoint shipped] [--fold 0] [--images 1000]

Redraws every image once without any rule, then asks each rule. Prints a Markdown table: the share of redrawn masks that
are accepted, the mean Dice − coarse Dice where rejected ones keep the coarse mask, and the share of images made worse
and better by more than 0.01.
"""

import argparse
from pathlib import Path

import numpy as np
from page import table
from real_cases import spread

from ultrarefiner.data.cases import Case
from ultrarefiner.data.folds import make_split
from ultrarefiner.data.readers import BusBra
from ultrarefiner.results.metrics import overlap
from ultrarefiner.results.safety import Safety
from ultrarefiner.segmenter import Segmenter

NONE = Safety.none()
RULES = {
    "none": NONE,
    "the defaults": Safety(),
    **{f"`min_dice={least}`": Safety(min_dice=least) for least in (0.8, 0.9, 0.95, 0.97)},
    "`min_area=0.9 max_area=1.1`": Safety(min_area=0.9, max_area=1.1),
    "`min_area=0.8 max_area=1.25`": Safety(min_area=0.8, max_area=1.25),
    **{f"`new_lesions={more}`": Safety(new_lesions=more) for more in (0, 1)},
    **{f"`band={width}`": Safety(band=width) for width in (0.1, 0.2)},
    **{f"`min_iou={least}`": Safety(min_iou=least) for least in (0.75, 0.8, 0.85)},
}
POINT = 0.01


def opened(description: str | None) -> tuple[BusBra, Segmenter, list[Case]]:
    """What the command line names: the images, the pair without any rule, and the validation cases."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--checkpoint", default="shipped")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--images", type=int, default=1000)
    chosen = parser.parse_args()
    reader, segmenter = BusBra(chosen.data_root), Segmenter.load(chosen.checkpoint, "cpu", safety=NONE)
    cases = make_split(reader.cases(), chosen.fold).val
    return reader, segmenter, spread(cases, min(chosen.images, len(cases)))


def main() -> None:
    reader, segmenter, cases = opened(__doc__)
    gains: list[float] = []
    accepted: dict[str, list[bool]] = {rule: [] for rule in RULES}
    for case in cases:
        image, truth = reader.read(case)
        found = segmenter(image)
        gains.append(overlap(found.mask, truth)["dice"] - overlap(found.coarse, truth)["dice"])
        for name, rule in RULES.items():
            accepted[name].append(not rule.reasons(found.coarse, found.mask, found.iou))
    rows = []
    for name, those in accepted.items():
        gain = np.where(those, gains, 0.0)
        shares = (np.mean(those), np.mean(gain < -POINT), np.mean(gain > POINT))
        whole, worse, better = (f"{share:.1%}" for share in shares)
        rows.append([name, whole, f"{gain.mean():+.4f}", worse, better])
    print(table(["rule", "accepted", "Dice", "worse by 0.01", "better"], rows))


if __name__ == "__main__":
    main()
