"""A few images of one's own: does training on them start better from the pair that ships, or from LiteMedSAM?

    python benchmarks/tuned.py SHIPPED FRESH --data-root ~/BUSI --output docs/results/busi-tuned.csv

SHIPPED and FRESH are the folders (`output_root`) of two trainings over all folds:

    common="phase=e2e model=lite dataset=busi roi=off gate=mean fold=0,1,2,3,4 -m
            model.schedule.sam.epochs=8 model.schedule.e2e.epochs=4"
    python -m ultrarefiner.train $common model.schedule.coarse.epochs=12 \
        model.coarse_weights=shipped model.sam.checkpoint=shipped output_root=SHIPPED
    python -m ultrarefiner.train $common model.schedule.coarse.epochs=60 output_root=FRESH

Each case is measured in the fold that validates it, so every image (but those held out for testing) once, with the
weights after the last epoch of Phase 3. The validation cases chose the epoch of Phases 1 and 2, so all figures are a
little too good; those of FRESH more so, as it chose among more epochs.
"""

import argparse
from pathlib import Path
from typing import Any

from page import means

from ultrarefiner.data.readers import Busi
from ultrarefiner.files import read_csv, write_csv
from ultrarefiner.results.metrics import overlap, surface
from ultrarefiner.results.safety import Safety
from ultrarefiner.segmenter import Segmenter


def main() -> None:
    """Measure, write the cases, print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shipped", type=Path)
    parser.add_argument("fresh", type=Path)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("tuned.csv"))
    args = parser.parse_args()
    reader = Busi(args.data_root.expanduser())
    cases = {case.id: case for case in reader.cases()}
    as_it_is = Segmenter.load("shipped", "cpu", safety=Safety.none())
    rows: list[dict[str, Any]] = []
    for fold in range(5):
        pairs = {"": as_it_is}
        for name in ("shipped", "fresh"):
            (run,) = getattr(args, name).glob(f"busi/lite/e2e*/fold{fold}-*")
            pairs[f"{name}_"] = Segmenter.load(run / "checkpoints" / "last.ckpt", "cpu", safety=Safety.none())
        for found in read_csv(run / "folds.csv"):
            if found["part"] != "val":
                continue
            case = cases[found["id"]]
            image, truth = reader.read(case)
            row: dict[str, Any] = {"id": case.id, "patient": case.patient, "dataset": "busi", "label": case.label}
            row["lesion_px"] = int(truth.sum())
            for name, pair in pairs.items():
                drawn = pair(image)
                for which, mask in (("coarse", drawn.coarse), ("refined", drawn.mask)):
                    row[f"{name}{which}_dice"] = overlap(mask, truth)["dice"]
                    row[f"{name}{which}_hd95"] = surface(mask, truth)["hd95"]
            rows.append(row)
    write_csv(args.output, rows)
    print(means(rows))


if __name__ == "__main__":
    main()
