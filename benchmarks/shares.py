"""How far SAM should move the coarse mask, on validation patients.

    python benchmarks/shares.py --data-root ~/BUSBRA [--checkpoint shipped] [--fold 0] [--images 1000]

Redraws every image once, and mixes SAM's logits with the coarse ones in several shares. Prints a Markdown table: mean
Dice and HD95 of the mixed masks, and the share of images made worse and better than the coarse mask by more than 0.01.
"""

import numpy as np
from page import table
from safety import POINT, opened

from ultrarefiner.refine.gate import NoGate
from ultrarefiner.results.metrics import scores

SHARES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.65, 1.0)


def logit(probability: np.ndarray) -> np.ndarray:
    """In float64, finite."""
    clear = np.clip(probability.astype(float), 1e-7, 1 - 1e-7)
    return np.log(clear) - np.log1p(-clear)


def main() -> None:
    reader, segmenter, cases = opened(__doc__)
    segmenter.cascade.gate = NoGate()
    found: dict[float, list[tuple[float, float]]] = {share: [] for share in SHARES}
    for case in cases:
        image, truth = reader.read(case)
        drawn = segmenter(image)
        coarse, sam = logit(drawn.coarse_probability), logit(drawn.probability)
        for share, those in found.items():
            one = scores(coarse + share * (sam - coarse) > 0, truth)
            those.append((one["dice"], one["hd95"]))
    dice = {share: np.array(those)[:, 0] for share, those in found.items()}
    rows = []
    for share, those in found.items():
        gain = dice[share] - dice[0.0]
        means = np.mean(those, 0)
        worse, better = np.mean(gain < -POINT), np.mean(gain > POINT)
        rows.append([f"{share:g}", f"{means[0]:.4f}", f"{means[1]:.1f}", f"{worse:.1%}", f"{better:.1%}"])
    print(table(["share of SAM", "Dice", "HD95 (px)", "worse by 0.01", "better"], rows))


if __name__ == "__main__":
    main()
