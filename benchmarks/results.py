"""What refinement did on real patients: docs/results.md and its picture, from the cases kept under docs/results/.

    python benchmarks/results.py        (make results)

Each CSV there has a row for each case: id, patient, dataset, label, lesion_px, perhaps device, and Dice and HD95 (px,
native size) of every method, under `METHODS`' names; that of the validation cases also has precision, recall and the
number of parts that touch no lesion of the coarse masks that ship. Nothing in the page is typed by hand but its
sentences.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ultrarefiner.files import number, read_csv, write_atomically
from ultrarefiner.results import charts, statistics
from ultrarefiner.results.card import CITATIONS

DOCS = Path(__file__).resolve().parents[1] / "docs"
METHODS = {
    "coarse": "coarse network (Phase 1)",
    "coarse_tta": "coarse network, mean with the mirrored image",
    "coarse_long": "coarse network trained twice as long (24 epochs)",
    "zero_shot": "LiteMedSAM as it is, full frame padded",
    "zero_shot_mean": "the same, mean of both logits",
    "seed_phase2": "SAM after Phase 2 with the original's settings, on the coarse network after our Phase 3",
    "seed_coarse": "that coarse network after one epoch of Phase 3 with the original's settings",
    "seed": "the same, refined by the SAM of that Phase 3",
    "phase2": "after Phase 2, mean of both logits",
    "coarse_e2e": "coarse network after Phase 3",
    "coarse_e2e_tta": "the same, mean with the mirrored image",
    "phase3": "after Phase 3, mean of both logits",
    "encoder": "Phase 2 again from there, with the encoder's last stage, mean of both logits",
    "encoder_tta": "the same, with `tta=flips`",
    "two": "two coarse networks (after Phase 3; of 24 epochs), mean of their logits",
    "two_refined": "that mean, refined by the SAM of the encoder's last stage",
    "three": "three coarse networks (and one that sees 320 px), mean of their logits",
    "three_refined": "that mean, refined by the same SAM",
    "pair_coarse": "two coarse networks (after Phase 3; the one of 320 px), both on 224 px, mean of their logits",
    "pair_before": "that mean, refined by the same SAM",
    "pair": "that mean, refined by the SAM of the encoder's last eight blocks (what shipped before)",
    "mirrored_coarse": "those two networks, which also see the mirrored image, mean of their logits",
    "mirrored": "that mean, refined by the same SAM",
    "share": "the same with a share of SAM's logits of 0.3 in place of one half (**what ships**)",
}
VIEWS = {
    "coarse": "one coarse network, after Phase 3",
    "coarse_tta": "the same with `tta=flips`",
    "encoder": "refined by SAM after Phase 2 with the encoder's last stage",
    "encoder_tta": "the same with `tta=flips`",
    "two": "two coarse networks, as above",
    "two_refined": "that mean, refined by that SAM",
    "three": "three coarse networks, as above",
    "three_refined": "that mean, refined by that SAM",
    "pair_coarse": "the two that ship, on 224 px",
    "pair_before": "that mean, refined by that SAM",
    "soup": "refined by the mean of the weights of that SAM and the next one",
    "pair": "refined by the SAM of the encoder's last eight blocks (what shipped before)",
    "mirrored_coarse": "the two that ship, which also see the mirrored image",
    "mirrored": "that mean, refined by the SAM of the encoder's last eight blocks",
    "share": "the same with a share of SAM's logits of 0.3 in place of one half (**what ships**)",
}
"""Of the validation cases."""
TUNED = {
    "coarse": "one coarse network, as it ships",
    "refined": "refined by the SAM of the encoder's last stage, as it is",
    "shipped_coarse": "coarse network, trained from the pair that ships",
    "shipped_refined": "that pair, refined",
    "fresh_coarse": "coarse network, trained from ImageNet's weights",
    "fresh_refined": "that pair, trained from LiteMedSAM, refined",
}
"""Of a few images of another data set, in five folds."""
SECOND = {
    "coarse": "coarse network (Phase 1)",
    "phase2": "refined, after two epochs of Phase 2",
    "mirrored_coarse": "coarse network, which also sees the mirrored image",
    "mirrored": "that mean, refined by the same SAM",
    "share": "the same with a share of SAM's logits of 0.3 in place of one half",
    "coarse_e2e": "coarse network after one epoch of Phase 3",
    "phase3": "refined, after that Phase 3",
}
"""Of the test cases of another fold."""
SHIPPED, ITS_COARSE = "share", "mirrored_coarse"
WORST, EXTENT = 100, 0.1
"""So many validation cases are looked at; so much recall and precision differ where a mask has the wrong extent."""
Rows = list[dict[str, Any]]


def method_table(rows: Rows, titles: dict[str, str] = METHODS) -> str:
    """A row for each method: means, and the paired difference to the coarse network."""
    found = []
    coarse = statistics.values(rows, "coarse_dice")
    for name, title in titles.items():
        if f"{name}_dice" not in rows[0]:
            continue
        change = statistics.paired(coarse, statistics.values(rows, f"{name}_dice"))
        row = {
            "masks": title,
            "Dice": f"{statistics.over_cases(rows, f'{name}_dice', intervals=False).mean:.4f}",
            "HD95 (px)": f"{statistics.over_cases(rows, f'{name}_hd95', intervals=False).mean:.2f}",
        }
        if name != "coarse":
            row |= {
                "Dice − coarse [95 %]": f"{change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}]",
                "p": f"{change.p:.1g}",
                "worse / better by 0.01": f"{change.worse:.0%} / {change.better:.0%}",
            }
        found.append(row)
    return _markdown(found)


def group_table(rows: Rows) -> str:
    """The shipped masks against those of Phase 1, by class, by size of the lesion and by device."""
    sizes = np.array([number(row["lesion_px"]) for row in rows])
    small, large = np.quantile(sizes, (1 / 3, 2 / 3))
    groups = {label: [row for row in rows if row["label"] == label] for label in sorted({r["label"] for r in rows})}
    groups |= {
        "smallest third": [r for r, size in zip(rows, sizes, strict=True) if size <= small],
        "middle third": [r for r, size in zip(rows, sizes, strict=True) if small < size <= large],
        "largest third": [r for r, size in zip(rows, sizes, strict=True) if size > large],
    }
    groups |= {name: [row for row in rows if row["device"] == name] for name in sorted({r["device"] for r in rows})}
    return _groups(groups, "coarse")


def kind(row: dict[str, Any]) -> str:
    """What is wrong with a coarse mask, as far as numbers tell."""
    precision, recall = (number(row[f"{ITS_COARSE}_{what}"]) for what in ("precision", "recall"))
    if number(row[f"{ITS_COARSE}_false"]) > 0:
        return "a second part, beside the lesion"
    if recall - precision > EXTENT:
        return "too large"
    return "too small" if precision - recall > EXTENT else "about as large, ragged or shifted"


def kind_table(rows: Rows) -> str:
    """The worst coarse masks by what is wrong with them, and all others."""
    ranked = sorted(rows, key=lambda row: number(row[f"{ITS_COARSE}_dice"]))
    worst = ranked[:WORST]
    groups = {name: [row for row in worst if kind(row) == name] for name in sorted({kind(row) for row in worst})}
    groups = dict(sorted(groups.items(), key=lambda one: -len(one[1])))
    groups |= {f"the {WORST} worst": worst, f"the other {len(ranked) - WORST}": ranked[WORST:]}
    return _groups(groups, ITS_COARSE)


def _groups(groups: dict[str, Rows], coarse: str) -> str:
    found = []
    for name, some in groups.items():
        before, after = (statistics.values(some, f"{which}_dice") for which in (coarse, SHIPPED))
        change = statistics.paired(before, after)
        found.append(
            {
                "group": name,
                "images": str(change.cases),
                "coarse": f"{np.mean([v.value for v in before.values()]):.4f}",
                "refined": f"{np.mean([v.value for v in after.values()]):.4f}",
                "difference [95 %]": f"{change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}]",
                "worse / better by 0.01": f"{change.worse:.0%} / {change.better:.0%}",
            }
        )
    return _markdown(found)


def _markdown(rows: Iterable[dict[str, str]]) -> str:
    rows = list(rows)
    header = list(dict.fromkeys(name for row in rows for name in row))
    lines = [header, ["---"] * len(header), *([row.get(name, "") for name in header] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Write the page."""
    rows: Rows = [dict(row) for row in read_csv(DOCS / "results" / "busbra-fold0.csv")]
    val: Rows = [dict(row) for row in read_csv(DOCS / "results" / "busbra-fold0-val.csv")]
    busi: Rows = [dict(row) for row in read_csv(DOCS / "results" / "busi-sample.csv")]
    tuned: Rows = [dict(row) for row in read_csv(DOCS / "results" / "busi-tuned.csv")]
    second: Rows = [dict(row) for row in read_csv(DOCS / "results" / "busbra-fold1.csv")]
    start = statistics.paired(*(statistics.values(tuned, f"{one}_refined_dice") for one in ("fresh", "shipped")))
    picture = DOCS / "results" / "scatter.png"
    dice = [[number(row[f"{which}_dice"]) for row in rows] for which in ("coarse", SHIPPED)]
    charts.scatter(np.array(dice[0]), np.array(dice[1]), picture)
    patients = len({row["patient"] for row in rows})
    text = Path(__file__).with_name("results_page.md").read_text(encoding="utf-8")
    tables_of = {"methods": method_table(rows), "groups": group_table(rows), "busi": method_table(busi)}
    tables_of |= {"views": method_table(val, VIEWS), "kinds": kind_table(val), "tuned": method_table(tuned, TUNED)}
    tables_of["second"] = method_table(second, SECOND)
    tables_of["start"] = f"{start.mean:+.4f} [{start.low:+.4f}, {start.high:+.4f}], p = {start.p:.1g}"
    tables_of["sides"] = f"{start.better:.0%} of the images better by more than 0.01, {start.worse:.0%} worse"
    counts = {
        "cases": len(rows),
        "patients": patients,
        "val_cases": len(val),
        "busi_cases": len(busi),
        "tuned_cases": len(tuned),
        "second_cases": len(second),
        "second_patients": len({row["patient"] for row in second}),
        "second_shared": len({row["id"] for row in second} & {row["id"] for row in val}),
    }
    filled = text.format(**counts, cite=CITATIONS["busbra"], **tables_of)
    write_atomically(DOCS / "results.md", filled.encode())
    print(DOCS / "results.md")


if __name__ == "__main__":
    main()
