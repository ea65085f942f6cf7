"""What a finished run looks like on the terminal."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ultrarefiner.data.cases import PARTS

COLUMNS = (("dice", "Dice", ".4f"), ("iou", "IoU", ".4f"), ("hd95", "HD95 (px)", ".2f"), ("assd", "ASSD (px)", ".2f"))
FILES = (
    ("cases.csv", "every test case"),
    ("overlays.png", "worst, median and best cases"),
    ("curves.png", "training curves"),
    ("checkpoints", "best and last weights"),
)


def beginning(title: str, data: dict[str, Any], directory: Path) -> None:
    """Say what is about to be trained, on what, and where it goes."""
    parts = ", ".join(f"{part} {data[part]['cases']} ({data[part]['patients']} patients)" for part in PARTS)
    print(f"{title}\n  {parts}\n  {directory}/")
    if data["left_out"]:
        first = data["left_out"][0]
        print(f"  {len(data['left_out'])} left out, the first: {first}")


def summary(directory: Path, finished_before: bool) -> None:
    """Print the table of a run (baseline, coarse, refined on the test cases) and where everything lies."""
    content: dict[str, Any] = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    cases, limit = content["data"]["test"]["cases"], content["config"]["dataset"]["limit"]["test"]
    console = Console(highlight=False, soft_wrap=True)
    if finished_before:
        console.print(
            "This result exists already; nothing was trained. Another seed or setting gets its own directory."
        )
    subset = "" if limit is None else f" (dataset.limit.test={limit})"
    table = Table(title=f"{content['title']}: {cases} test cases{subset}", title_justify="left")
    table.add_column("mask")
    for _, header, _ in COLUMNS:
        table.add_column(header, justify="right")
    before = (content["baseline"] or {}).get("test", {})
    scores = {"coarse (Phase 1)": before.get("coarse"), "refined (Phase 2)": before.get("refined"), **content["test"]}
    for name, values in scores.items():
        if values:
            table.add_row(name, *(format(values[key], style) for key, _, style in COLUMNS))
    console.print(table)
    if content["seen"]:
        count, first = content["seen"]["test_cases"], content["seen"]["first"]
        note = f"Not a fair test: the weights have seen {count} of the test cases (allow_seen=true), such as {first}."
        console.print(note, markup=False)
    console.print(f"{directory}/", markup=False)
    for name, what in FILES:
        if (directory / name).exists():
            console.print(f"  {name:<14}{what}", markup=False)
