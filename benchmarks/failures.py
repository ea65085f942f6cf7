"""Simulated coarse masks: how fast, how well the Dice bins are met, and what they look like.

    python benchmarks/failures.py                                   # on phantoms
    python benchmarks/failures.py --masks path/to/BUSBRA/Masks      # on masks of one's own
    python benchmarks/failures.py --picture docs/failures.png       # draw the contact sheet instead (phantoms only)
    python benchmarks/failures.py --picture out.png --real RUN      # with real errors on top: the directory of a run of
                                                                    # phase=sam phase.real_ratio=0.3 on phantoms

Speed is CPU time of one thread; another busy process on the same core still slows it, so the best of the chunks of 100
masks is printed too.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float
from omegaconf import OmegaConf

from ultrarefiner.data.failures import BINS, FailureSimulator
from ultrarefiner.data.failures.shapes import KINDS
from ultrarefiner.data.failures.softness import dice_of
from ultrarefiner.data.phantom import make_phantom
from ultrarefiner.data.predictions import Predictions
from ultrarefiner.phases.sam import SamPhase
from ultrarefiner.runs.assemble import build_data

SIDE = 224  # px
TARGETS = (0.95, 0.85, 0.75, 0.63)

Mask = Bool[np.ndarray, "H W"]


def phantom_masks(count: int) -> list[Mask]:
    return [small(make_phantom(index, seed=0)[1].astype(np.uint8)) for index in range(count)]


def folder_masks(folder: Path) -> list[Mask]:
    masks = [
        small((cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127).astype(np.uint8)) for path in folder.glob("*.png")
    ]
    if not masks:
        raise SystemExit(f"error: {folder} has no PNG masks.")
    return masks


def small(mask: np.ndarray) -> Mask:
    return cv2.resize(mask.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA) > 0.5


def measure(masks: list[Mask], count: int) -> dict[str, float]:
    """Prints speed, realised bins and kinds over `count` simulated masks with consecutive seeds; returns the speed."""
    cv2.setNumThreads(1)
    simulator = FailureSimulator()
    simulator(masks[0], 0)
    seconds, found, kinds = [], [], Counter()
    for seed in range(count):
        mask = masks[seed % len(masks)]
        start = time.process_time()
        failure = simulator.simulate(mask, seed)
        seconds.append(time.process_time() - start)
        found.append(dice_of(failure.prob >= 0.5, mask))
        kinds[failure.kind] += 1
    chunks = [sum(seconds[i : i + 100]) for i in range(0, count - 99, 100)]
    print(f"{count} masks of {len(masks)} lesions at {SIDE}×{SIDE}")
    speed = {"masks_per_second": count / sum(seconds), "best": 100 / min(chunks)}
    print(f"speed      {speed['masks_per_second']:.0f} masks/s a core (best chunk {speed['best']:.0f})")
    dice = np.array(found)
    for low, high, weight in BINS:
        share = np.mean((dice >= low) & ((dice < high) | (high == BINS[0][1])))
        print(f"Dice {low:.2f}–{high:.2f}  {100 * share:.2f} %  (wanted {100 * weight:.0f} %)")
    print(f"Dice from {dice.min():.3f} to {dice.max():.3f}")
    print("kinds      " + ", ".join(f"{kind} {100 * number / count:.1f} %" for kind, number in kinds.most_common()))
    return speed


def draw(path: Path, real: Path | None) -> None:
    """A sheet of kinds × wanted Dice; green is the lesion, red the 0.5 level set, grey the probability."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    masks = sorted(phantom_masks(40), key=np.count_nonzero)
    chosen = [masks[20], masks[38]]  # a small lesion and a large one
    rows = [("real", real_examples(real))] if real else []
    for number, kind in enumerate(KINDS):
        panels = []
        for target in TARGETS:
            simulator = FailureSimulator(bins=[[target - 0.01, target + 0.01, 1.0]], kinds={kind: 1.0})
            panels += [(simulator(mask, 100 * number + len(panels) + i), mask) for i, mask in enumerate(chosen)]
        rows.append((kind.replace("_", "\n"), panels))
    columns = len(chosen) * len(TARGETS)
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.5 * columns + 0.6, 1.55 * len(rows)), squeeze=False)
    for (name, panels), line in zip(rows, axes, strict=True):
        line[0].set_ylabel(name, fontsize=10)
        for axis, (prob, mask) in zip(line, panels, strict=True):
            axis.imshow(prob, cmap="gray", vmin=0, vmax=1)
            axis.contour(mask, [0.5], colors="#35c759", linewidths=0.9)
            axis.contour(prob, [0.5], colors="#ff453a", linewidths=0.9)
            axis.text(6, 214, f"{dice_of(prob >= 0.5, mask):.2f}", color="white", fontsize=8)
            axis.set(xticks=[], yticks=[])
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=90)


def real_examples(run: Path) -> list[tuple[Float[np.ndarray, "H W"], Mask]]:
    """The out-of-fold predictions of a run whose Dice comes nearest to each column's."""
    cfg = OmegaConf.load(run / "config.yaml")
    predictions, cases = Predictions(run / "predictions"), build_data(cfg, SamPhase).dataset("train")
    pairs = []
    for case in cases.cases:
        mask = cases.source.coarse.mask(cases.source.positions[case.key]).astype(np.float32)
        prob = cv2.resize(predictions.load(case, len(mask)), (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
        pairs.append((prob, cv2.resize(mask, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR) > 0.5))
    dice = np.array([dice_of(prob >= 0.5, mask) for prob, mask in pairs])
    chosen: list[int] = []
    for target in np.repeat(TARGETS, 2):
        chosen.append(next(int(i) for i in np.argsort(np.abs(dice - target)) if int(i) not in chosen))
    return [pairs[i] for i in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=Path, help="folder of PNG masks; phantoms without it")
    parser.add_argument("--count", type=int, default=5000, help="how many masks to simulate")
    parser.add_argument("--picture", type=Path, help="draw the contact sheet to this file instead")
    parser.add_argument("--real", type=Path, help="directory of a finished run with real predictions")
    arguments = parser.parse_args()
    if arguments.picture:
        draw(arguments.picture, arguments.real)
    else:
        measure(folder_masks(arguments.masks) if arguments.masks else phantom_masks(300), arguments.count)


if __name__ == "__main__":
    main()
