"""What SAM should be shown: frames and ROIs, on real coarse masks of BUS-BRA, without fine-tuning.

    python benchmarks/geometry.py --data ~/BUSBRA --coarse MAPS [--cases 64] [model=lite ...]

MAPS is a folder of ID.npy, the probability maps that a coarse network trained on fold 0 predicts for images of its
validation part. Each row is a geometry, with the prompts that the configuration has and the same coarse masks; scores
are at native resolution. Writes docs/geometry.md.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import configuration
from page import table
from real_cases import Example, predicted_examples

from ultrarefiner.data.folds import make_split
from ultrarefiner.data.readers import BusBra
from ultrarefiner.files import write_atomically
from ultrarefiner.models.cascade import Cascade
from ultrarefiner.phases.sam import soft_logit
from ultrarefiner.results import metrics
from ultrarefiner.results.statistics import over_cases
from ultrarefiner.runs.build import build_refiner

PAGE = Path(__file__).resolve().parents[1] / "docs" / "geometry.md"
ALONE = "gate=none"  # the refined mask without the coarse one, which shows what the geometry does
OLD = [ALONE, "roi=on", "roi.square=false", "roi.expand_ratio=0.2"]
SETTINGS: dict[str, list[str]] = {
    "the seed's geometry and prompts (`+experiments=seed`)": ["+experiments=seed"],
    "ROI of the seed: stretched, + 20 %, map as it is": [*OLD, "roi.temperature=1"],
    "the same, of the sharpened map": OLD,
    **{
        f"square ROI, + {100 * grown:.0f} %": [ALONE, "roi=on", "roi.square=true", f"roi.expand_ratio={grown}"]
        for grown in (0.2, 0.5, 0.75, 1.0, 1.5)
    },
    "full frame, stretched": [ALONE, "roi=off", "model.frame=stretch"],
    "full frame, padded": [ALONE, "roi=off", "model.frame=pad"],
    "`roi=on gate=uncertainty`": ["roi=on", "gate=uncertainty"],
    "`roi=off gate=uncertainty`": ["roi=off", "gate=uncertainty"],
    "**`roi=on` as it is by default** (`gate=mean`)": ["roi=on"],
    "**`roi=off` as it is by default** (`gate=mean`)": ["roi=off"],
}


class Scores(NamedTuple):
    """Of one mask at native size."""

    dice: float
    hd95: float


def score(logits: torch.Tensor, truth: np.ndarray) -> Scores:
    mask = metrics.native_mask(logits, truth.shape)
    return Scores(metrics.overlap(mask, truth)["dice"], metrics.surface(mask, truth)["hd95"])


@torch.no_grad()
def measure(cases: list[Example], overrides: list[str]) -> dict[str, list[Scores]]:
    """The scores of each case for each setting; settings that come to the same configuration are computed once."""
    cascades: dict[str, Cascade] = {}
    for name, setting in SETTINGS.items():
        cascades[name] = Cascade(None, *build_refiner(configuration("model=lite", *overrides, *setting), None))
    found: dict[str, list[Scores]] = {name: [] for name in SETTINGS}
    for number, case in enumerate(cases):
        known: dict[str, Scores] = {}
        for name, cascade in cascades.items():
            alike = str(_values(cascade))
            if alike not in known:
                logits = cascade.refine(case.image, soft_logit(case.coarse), aspect=case.aspect).logits[0]
                known[alike] = score(logits, case.native_mask)
            found[name].append(known[alike])
        print(f"  {number + 1}/{len(cases)} {case.case.id}", flush=True)
    return found


def _values(cascade: Cascade) -> list[str]:
    """What distinguishes a cascade from the others here: the class and the plain settings of its parts."""
    assert cascade.refiner is not None
    parts = (cascade.refiner.roi, cascade.refiner.prompts, cascade.gate)
    return [f"{type(p).__name__} { {k: v for k, v in vars(p).items() if k[0] != '_'} }" for p in parts]


def page(cases: list[Example], found: dict[str, list[Scores]]) -> str:
    """docs/geometry.md."""
    before = [score(soft_logit(case.coarse)[0], case.native_mask) for case in cases]
    rows = [["(the coarse masks themselves)", f"{mean(before)[0]:.4f}", f"{mean(before)[1]:.1f}", "", "", ""]]
    for name, scores in found.items():
        gain = [after.dice - own.dice for after, own in zip(scores, before, strict=True)]
        table_of = [
            {"dataset": case.case.dataset, "id": case.case.id, "patient": case.case.patient or "", "gain": str(value)}
            for case, value in zip(cases, gain, strict=True)
        ]
        change = over_cases(table_of, "gain")
        rows.append(
            [
                name,
                f"{mean(scores)[0]:.4f}",
                f"{mean(scores)[1]:.1f}",
                f"{change.mean:+.4f} ({change.low:+.4f} to {change.high:+.4f})",
                f"{change.median:+.4f}",
                f"{share(value < -0.01 for value in gain)} / {share(value > 0.01 for value in gain)}",
            ]
        )
    header = ["what SAM is shown", "Dice", "HD95 px", "change of Dice", "median", "worse / better by 0.01"]
    patients = len({case.case.patient for case in cases})
    return PAGE_TEXT.format(cases=len(cases), patients=patients, table=table(header, rows))


def mean(scores: list[Scores]) -> list[float]:
    return np.mean(scores, axis=0).tolist()


def share(found: Any) -> str:
    return f"{100 * np.mean(list(found)):.0f} %"


PAGE_TEXT = """# What SAM is shown

Written by `benchmarks/geometry.py`: LiteMedSAM as it was published redraws real coarse masks, those that a U-Net on
EfficientNet-Lite0 (trained on BUS-BRA's fold 0) predicts for {cases} images of {patients} patients of that fold's
validation part. Nothing was fine-tuned, so a row shows what the geometry alone does to a mask; the last four mix the
coarse mask in again. All rows but that of the seed have the prompts of `model=lite`. Behind each change stands its 95 %
interval (bootstrap over patients).

{table}
"""


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="BUS-BRA")
    parser.add_argument("--coarse", type=Path, required=True, help="a folder of ID.npy")
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("overrides", nargs="*", help="of the configuration, as for ultrarefiner.train")
    options = parser.parse_args()
    reader = BusBra(options.data)
    cases = predicted_examples(reader, make_split(reader.cases(), 0).val, options.coarse, options.cases)
    text = page(cases, measure(cases, options.overrides))
    print(text)
    write_atomically(PAGE, text.encode())


if __name__ == "__main__":
    main()
