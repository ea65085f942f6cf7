"""Which prompts a SAM that was not fine-tuned likes best: Dice on BUSI, or on training patients of BUS-BRA.

    python benchmarks/prompts.py --data-root ~/BUSI [--coarse MAPS] [--family litemedsam] [--checkpoint FILE] [--roi on]
    python benchmarks/prompts.py --data-root ~/BUSBRA --dataset busbra [--cases 24]

Prints a Markdown table: each row a choice of prompts, each column where SAM looks (as model=lite does) and which mask
the prompts are computed from: the true one, a simulated coarse one, or one of MAPS, a folder of ID.npy with the
probability maps of a coarse network. Dice at native resolution, the mean over the cases.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import torch
from measure import configuration
from page import table
from real_cases import Example, busi_examples, examples, predicted_examples
from torch import Tensor, nn

from ultrarefiner.data.readers import BusBra, Busi
from ultrarefiner.models.sam import load_sam
from ultrarefiner.refine.prompts import DirectMaskPrompt, DistanceMaskPrompt, GaussianMaskPrompt, Prompts
from ultrarefiner.refine.refiner import Refiner
from ultrarefiner.results import metrics
from ultrarefiner.runs.build import build_option

MASKS = {"–": None, "direct": DirectMaskPrompt(), "gaussian": GaussianMaskPrompt(), "distance": DistanceMaskPrompt()}
POINTS = {"–": (False, False), "centre": (True, False), "centre, background": (True, True)}
GOOD = (0.8, 0.95)
"""Dice of BUSI's simulated coarse masks: those of a coarse network that is worth refining."""

Choice = tuple[str, str, str, str]
Column = tuple[str, str]


class OnceEncoded(Refiner):
    """A refiner that encodes the same crop once for many prompts."""

    known: tuple[Tensor, Tensor] | None = None

    def encode(self, image: Tensor, boxes: Tensor) -> Tensor:
        if self.known is None or not torch.equal(self.known[0], boxes):
            self.known = (boxes, super().encode(image, boxes))
        return self.known[1]


def variants() -> dict[Choice, Prompts]:
    """(k of the box, mask prompt, points, temperature) → prompts; those of one temperature follow each other."""
    choices = [*product((2.0, 2.1, 2.2, 2.3, 2.5), ("direct", "–"), ("–",), (0.5,))]
    choices += [(2.2, "gaussian", "–", 0.5), (2.2, "distance", "–", 0.5), (2.2, "–", "centre", 0.5)]
    choices += [(2.2, "direct", "centre", 0.5), (2.2, "direct", "centre, background", 0.5)]
    choices += [(None, "direct", "–", 0.5), (None, "direct", "centre", 0.5)]
    choices += [(2.2, "direct", "–", 0.25), (2.2, "direct", "–", 1.0), (2.5, "direct", "centre, background", 1.0)]
    return {
        (str(k or "–"), mask, points, f"{temperature:g}"): Prompts(
            MASKS[mask], True, *POINTS[points], box=k is not None, box_k=k or 2.5, temperature=temperature
        )
        for k, mask, points, temperature in choices
    }


def roi_of(name: str, temperature: float) -> nn.Module:
    """Where model=lite looks, when it looks at a map of this temperature."""
    cfg = configuration("model=lite", f"roi={name}", f"prompt_style.temperature={temperature}")
    found: nn.Module = build_option(cfg, "roi")
    return found


def dice(logits: Tensor, truth: np.ndarray) -> float:
    return metrics.overlap(metrics.native_mask(logits[0], truth.shape), truth)["dice"]


@torch.no_grad()
def measure(
    family: str, checkpoint: Path | None, sources: dict[str, list[Example]], rois: list[str]
) -> dict[Choice, dict[Column, list[float]]]:
    """Dice of each case, by prompts and by (roi, source)."""
    sam, choices = load_sam(family, checkpoint), variants()
    places = {(name, p.temperature): roi_of(name, p.temperature) for name in rois for p in choices.values()}
    found: dict[Choice, dict[Column, list[float]]] = {key: {} for key in choices}
    for (source, cases), roi in product(sources.items(), rois):
        for case in cases:
            refiner = OnceEncoded(sam, places[roi, 1.0], Prompts())
            for key, prompts in choices.items():
                refiner.prompts, refiner.roi = prompts, places[roi, prompts.temperature]
                logits = refiner(case.image, case.coarse, aspect=case.aspect).logits
                found[key].setdefault((roi, source), []).append(dice(logits, case.native_mask))
        print(f"  roi={roi}, {source}: done", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--dataset", choices=["busi", "busbra"], default="busi")
    parser.add_argument("--coarse", type=Path, help="a folder of ID.npy")
    parser.add_argument("--family", default="litemedsam")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--cases", type=int, default=24, help="of BUS-BRA; of BUSI all")
    parser.add_argument("--roi", choices=["off", "on"], action="append", help="only this one")
    options = parser.parse_args()
    reader = Busi(options.data_root) if options.dataset == "busi" else BusBra(options.data_root)
    made = busi_examples(reader, *GOOD) if options.dataset == "busi" else examples(options.data_root, options.cases)
    sources = {"true": [case._replace(coarse=case.coarse_mask) for case in made], "simulated": made}
    if options.coarse:
        sources["predicted"] = predicted_examples(reader, [case.case for case in made], options.coarse)
    rois = options.roi or ["off", "on"]
    found = measure(options.family, options.checkpoint, sources, rois)
    for source, cases in sources.items():
        scores = [dice(torch.logit(case.coarse, 1e-6), case.native_mask) for case in cases]
        print(f"{source}: {len(cases)} masks, Dice {np.mean(scores):.3f}, median {np.median(scores):.3f}")
    columns = [*product(rois, sources)]
    header = ["k of the box", "mask prompt", "points", "temperature", *(f"roi={roi}, {name}" for roi, name in columns)]
    print(f"{options.family}\n")
    print(table(header, [[*key, *(f"{np.mean(scores[c]):.3f}" for c in columns)] for key, scores in found.items()]))


if __name__ == "__main__":
    main()
