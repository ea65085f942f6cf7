"""What refinement did on real patients: docs/results.md and its picture, from the cases kept under docs/results/.

    python benchmarks/results.py        (make results)

Each CSV there has a row for each test case: id, patient, dataset, label, lesion_px, and Dice and HD95 (px, native size)
of every method, under `METHODS`' names. Nothing in the page is typed by hand but its sentences.
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
    "zero_shot": "LiteMedSAM as it is, full frame padded",
    "zero_shot_mean": "the same, mean of both logits",
    "phase2": "after Phase 2, mean of both logits",
    "coarse_e2e": "coarse network after Phase 3",
    "phase3": "after Phase 3, mean of both logits",
    "encoder": "Phase 2 again from there, with the encoder's last stage, mean of both logits (**what ships**)",
}
SHIPPED = "encoder"
Rows = list[dict[str, Any]]


def method_table(rows: Rows) -> str:
    """A row for each method: means, and the paired difference to the coarse network."""
    found = []
    coarse = statistics.values(rows, "coarse_dice")
    for name, title in METHODS.items():
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
    """The shipped masks against the coarse ones, by class and by size of the lesion."""
    sizes = np.array([number(row["lesion_px"]) for row in rows])
    small, large = np.quantile(sizes, (1 / 3, 2 / 3))
    groups = {label: [row for row in rows if row["label"] == label] for label in sorted({r["label"] for r in rows})}
    groups |= {
        "smallest third": [r for r, size in zip(rows, sizes, strict=True) if size <= small],
        "middle third": [r for r, size in zip(rows, sizes, strict=True) if small < size <= large],
        "largest third": [r for r, size in zip(rows, sizes, strict=True) if size > large],
    }
    found = []
    for name, some in groups.items():
        before, after = (statistics.values(some, f"{which}_dice") for which in ("coarse", SHIPPED))
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
    busi: Rows = [dict(row) for row in read_csv(DOCS / "results" / "busi-sample.csv")]
    picture = DOCS / "results" / "scatter.png"
    dice = [[number(row[f"{which}_dice"]) for row in rows] for which in ("coarse", SHIPPED)]
    charts.scatter(np.array(dice[0]), np.array(dice[1]), picture)
    patients = len({row["patient"] for row in rows})
    text = Path(__file__).with_name("results_page.md").read_text(encoding="utf-8")
    tables_of = {"methods": method_table(rows), "groups": group_table(rows), "busi": method_table(busi)}
    filled = text.format(
        cases=len(rows), patients=patients, busi_cases=len(busi), cite=CITATIONS["busbra"], **tables_of
    )
    write_atomically(DOCS / "results.md", filled.encode())
    print(DOCS / "results.md")


if __name__ == "__main__":
    main()
