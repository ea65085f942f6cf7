"""Which prompts a SAM that was not fine-tuned likes best: Dice on BUS-BRA's training patients.

    python benchmarks/prompts.py --data-root ~/BUSBRA [--family litemedsam] [--checkpoint FILE] [--cases 24] [--roi on]

Prints a Markdown table: each row a choice of prompts, each column where SAM looks and which mask the prompts are
computed from, the true one or a simulated coarse one. Dice at native resolution, the mean over the cases.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import torch
from busbra_cases import Example, examples
from torch import Tensor

from ultrarefiner.models.sam import load_sam
from ultrarefiner.refine.prompts import DirectMaskPrompt, DistanceMaskPrompt, GaussianMaskPrompt, Prompts
from ultrarefiner.refine.refiner import Refiner
from ultrarefiner.refine.roi import FullFrame, LesionRoi
from ultrarefiner.results import metrics

MASKS = {"–": None, "direct": DirectMaskPrompt(), "gaussian": GaussianMaskPrompt(), "distance": DistanceMaskPrompt()}
POINTS = {"–": (False, False), "centre": (True, False), "centre, background": (True, True)}
ROIS = {"off": FullFrame(), "on": LesionRoi()}
SOURCES = ("true", "simulated")


class OnceEncoded(Refiner):
    """A refiner whose embedding is computed once for many prompts."""

    embedding: Tensor

    def encode(self, image: Tensor, boxes: Tensor) -> Tensor:
        return self.embedding


def variants() -> dict[tuple[str, str, str, str], Prompts]:
    """(k of the box, mask prompt, points, temperature) → prompts."""
    choices = [*product((2.0, 2.2, 2.5), ("direct",), ("–",), (1.0, 0.5, 0.25))]
    choices += [(2.2, "–", "–", 1.0), (2.2, "–", "–", 0.5), (2.2, "gaussian", "–", 0.5), (2.2, "distance", "–", 0.5)]
    choices += [(2.2, "–", "centre", 0.5), (2.2, "direct", "centre", 0.5), (2.2, "direct", "centre, background", 0.5)]
    choices += [(None, "direct", "–", 0.5), (None, "direct", "centre", 0.5)]
    return {
        (str(k or "–"), mask, points, f"{temperature:g}"): Prompts(
            MASKS[mask], True, *POINTS[points], box=k is not None, box_k=k or 2.5, temperature=temperature
        )
        for k, mask, points, temperature in choices
    }


def dice(logits: Tensor, truth: np.ndarray) -> float:
    return metrics.overlap(metrics.native_mask(logits[0], truth.shape), truth)["dice"]


@torch.no_grad()
def measure(
    family: str, checkpoint: Path | None, cases: list[Example], rois: list[str]
) -> dict[tuple, dict[tuple, list[float]]]:
    """Dice of each case, by prompts and by (roi, source)."""
    sam, choices = load_sam(family, checkpoint), variants()
    found: dict[tuple, dict[tuple, list[float]]] = {key: {} for key in choices}
    for case, roi, source in product(cases, rois, SOURCES):
        prob = case.coarse if source == "simulated" else case.coarse_mask
        refiner = OnceEncoded(sam, ROIS[roi], Prompts())
        refiner.embedding = Refiner.encode(refiner, case.image, ROIS[roi].boxes(prob))
        for key, prompts in choices.items():
            refiner.prompts = prompts
            logits = refiner(case.image, prob).logits
            found[key].setdefault((roi, source), []).append(dice(logits, case.native_mask))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--family", default="litemedsam")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--roi", choices=ROIS, action="append", help="only this one")
    options = parser.parse_args()
    cases = examples(options.data_root, options.cases)
    coarse = np.mean([dice(torch.logit(case.coarse, 1e-6), case.native_mask) for case in cases])
    rois = options.roi or [*ROIS]
    columns = [*product(rois, SOURCES)]
    print(f"{options.family}, {len(cases)} patients, Dice of the simulated coarse masks {coarse:.3f}\n")
    print("| k of the box | mask prompt | points | temperature |", end="")
    print("".join(f" roi={roi}, {source} |" for roi, source in columns))
    print("|---|---|---|---|" + "---|" * len(columns))
    for key, scores in measure(options.family, options.checkpoint, cases, rois).items():
        print(f"| {' | '.join(key)} |" + "".join(f" {np.mean(scores[c]):.3f} |" for c in columns))


if __name__ == "__main__":
    main()
