"""Do simulated coarse masks look like a network's own? On real predictions of BUS-BRA.

    python benchmarks/likeness.py --data ~/BUSBRA --coarse MAPS

MAPS is a folder of ID.npy, the probability maps that a coarse network trained on fold 0 predicts for images of its
validation part, which it has not seen. The simulator is fitted to every second patient, as `phase.softness=fit
phase.bins=fit` does with out-of-fold predictions; the table compares masks of the other patients. Writes
docs/likeness.md.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from page import table
from real_cases import predicted_examples
from scipy.ndimage import distance_transform_edt

from ultrarefiner.data.failures import FailureSimulator, fit_bins
from ultrarefiner.data.failures.softness import Softness, dice_of
from ultrarefiner.data.folds import make_split
from ultrarefiner.data.readers import BusBra
from ultrarefiner.files import write_atomically
from ultrarefiner.refine.prompts import soft_box
from ultrarefiner.refine.roi import LesionRoi

PAGE = Path(__file__).resolve().parents[1] / "docs" / "likeness.md"
MASKS = 5  # simulated masks of each lesion
Pair = tuple[Float[np.ndarray, "C C"], Bool[np.ndarray, "C C"]]

COLUMNS = ("Dice", "ROI area", "prompt box", "mass outside", "background logit", "its brightest 1 %")


def looks(pairs: Iterable[Pair]) -> Float[np.ndarray, "N Q"]:
    """What Phase 2 sees of each (probability, lesion), in the order of `COLUMNS`; areas in its lesion's box."""
    found = []
    for prob, mask in pairs:
        rows, columns = np.nonzero(mask)
        tight = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) / mask.size
        tensor = torch.from_numpy(np.ascontiguousarray(prob, dtype=np.float32))[None, None]
        roi, box = (((b[2] - b[0]) * (b[3] - b[1])).item() for b in (LesionRoi().boxes(tensor)[0], soft_box(tensor)[0]))
        predicted = prob >= 0.5
        far = distance_transform_edt(~(mask | predicted)) > len(mask) / 10
        sure = np.clip(prob[far], 1e-7, 1 - 1e-7)
        logit = np.log(sure / (1 - sure))
        outside = prob[~mask].sum() / mask.sum()
        background = (np.median(logit), np.quantile(logit, 0.99)) if far.any() else (np.nan, np.nan)
        found.append((dice_of(predicted, mask), roi / tight, box / tight, outside, *background))
    return np.array(found)


def row(name: str, pairs: Iterable[Pair]) -> list[str]:
    """Median and quartiles of each quantity."""
    low, middle, high = np.nanquantile(looks(pairs), [0.25, 0.5, 0.75], axis=0)
    return [name, *(f"{m:.2f} ({a:.2f} to {b:.2f})" for a, m, b in zip(low, middle, high, strict=True))]


def simulated(simulator: FailureSimulator, masks: list[np.ndarray]) -> Iterable[Pair]:
    return ((simulator(masks[seed % len(masks)], seed), masks[seed % len(masks)]) for seed in range(MASKS * len(masks)))


PAGE_TEXT = """# Simulated coarse masks against real ones

Written by `benchmarks/likeness.py`. Real: what a U-Net on EfficientNet-Lite0, trained on BUS-BRA's fold 0, predicts for
{shown} images of {patients} patients of that fold's validation part. Simulated: {each} masks of each of these lesions.
The fitted simulator (`phase.softness=fit phase.bins=fit`) was fitted to predictions of {others} other patients of that
part. Median, and quartiles in brackets; areas in those of the lesion's own box, "mass outside" in areas of the lesion.

{table}

Phase 2 meets Phase 3's masks best where the masks are real (`phase.real_ratio`, `phase.masks`); where they are
simulated, fit the simulator.
"""


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="BUS-BRA")
    parser.add_argument("--coarse", type=Path, required=True, help="a folder of ID.npy")
    options = parser.parse_args()
    reader = BusBra(options.data)
    cases = predicted_examples(reader, make_split(reader.cases(), 0).val, options.coarse)
    patients = list(dict.fromkeys(case.case.patient for case in cases))
    fitting = set(patients[::2])
    pairs = {
        known: [
            (case.coarse[0, 0].numpy(), case.coarse_mask[0, 0].numpy() > 0.5)
            for case in cases
            if (case.case.patient in fitting) == known
        ]
        for known in (True, False)
    }
    masks = [mask for _, mask in pairs[False]]
    fitted = FailureSimulator(softness=Softness.fit(pairs[True]), bins=fit_bins(pairs[True]))
    bins_only = FailureSimulator(bins=fit_bins(pairs[True]))
    rows = [
        row("real", pairs[False]),
        row("simulated, the seed's bins and our softness (default)", simulated(FailureSimulator(), masks)),
        row("simulated, bins fitted", simulated(bins_only, masks)),
        row("simulated, bins and softness fitted", simulated(fitted, masks)),
    ]
    text = PAGE_TEXT.format(
        shown=len(masks),
        patients=len(patients) - len(fitting),
        others=len(fitting),
        each=MASKS,
        table=table(["masks", *COLUMNS], rows),
    )
    print(text)
    write_atomically(PAGE, text.encode())


if __name__ == "__main__":
    main()
