"""What the page of a report shows beside its tables: cases, galleries, charts, and where everything comes from."""

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultrarefiner.config import Config
from ultrarefiner.data.cases import people
from ultrarefiner.files import number, read_csv
from ultrarefiner.results import assessment, outlines, pictures, statistics
from ultrarefiner.results.found import OVER_RUNS, Found, differing
from ultrarefiner.results.gathered import Group, Result, unfair
from ultrarefiner.settings import comparable

Row = dict[str, Any]


def content(folder: Path, runs: Sequence[Found], groups: Sequence[Group], most: int, gallery: int) -> Row:
    """Everything, as plain data for the template.

    Args:
        folder: below which the runs lie.
        runs: all of them.
        groups: what was measured.
        most: pictures that the page holds; the cases of the galleries come first.
        gallery: cases of each kind.
    """
    cases: list[Row] = []
    symbols: list[Row] = []
    shown = []
    for group in groups:
        mine = []
        for result in group.results:
            for row in result.rows:
                mine.append(_case(len(cases), row, group, result))
                symbols += _symbols(len(cases), row, result)
                cases.append(mine[-1])
        shown.append(_shown(group, mine, {symbol["case"] for symbol in symbols}, gallery))
    chosen = {case["index"] for group in shown for some in group["galleries"].values() for case in some}
    finished = [run for run in runs if run.counts]
    flat = [comparable(run.config, Config) for run in finished]
    curves = {run: run.directory / "curves.png" for run in runs}
    return {
        "folder": folder,
        "groups": shown,
        "cases": cases,
        "images": _images(symbols, chosen, most),
        "symbols": symbols,
        "outlined": list(dict.fromkeys(name for symbol in symbols for name in symbol["outlines"])),
        "runs": [(run, embedded(path) if path.is_file() else None) for run, path in curves.items()],
        "finished": finished,
        "differing": [
            (key, [settings.get(key, "–") for settings in flat]) for key in differing(flat) if key not in OVER_RUNS
        ],
        "charts": _charts(groups, finished),
    }


def _case(index: int, row: Row, group: Group, result: Result) -> Row:
    about = {name: row[name] for name in ("dataset", "patient", *group.columns) if row.get(name)}
    where = result.run.config if result.run is not None else result.about
    return {
        "index": index,
        "id": row["id"],
        "about": about | {name: where[name] for name in OVER_RUNS if name in where},
        "setting": group.setting,
        "dice": {mask: _or_none(row.get(f"{mask}_dice")) for mask in group.masks},
        "hd95": {mask: _or_none(row.get(f"{mask}_hd95")) for mask in group.masks},
        "rejected": row.get("rejected", ""),
    }


def _or_none(cell: Any) -> float | None:
    value = number(cell)
    return None if math.isnan(value) else value


def _symbols(index: int, row: Row, result: Result) -> list[Row]:
    """The outlines of a case where an evaluation has kept them, and where its picture lies."""
    record = result.records.get((row["dataset"], row["id"]))
    if record is None or result.folder is None:
        return []
    drawn = {name: path for name, path in record["outlines"].items() if outlines.PATH.fullmatch(path)}
    picture = result.folder / assessment.PICTURES / assessment.picture_name(row["dataset"], row["id"])
    width, height = map(int, record["size"])
    return [{"case": index, "width": width, "height": height, "outlines": drawn, "picture": picture}]


def _images(symbols: Sequence[Row], chosen: set[int], most: int) -> list[Row]:
    """The pictures that the page holds, each once; from now on a symbol's "picture" is the number of one, or None."""
    held: dict[str, Row] = {}
    for symbol in sorted(symbols, key=lambda symbol: symbol["case"] not in chosen):
        path = symbol["picture"]
        if path.name not in held and len(held) < most and path.is_file():
            size = {"width": symbol["width"], "height": symbol["height"]}
            held[path.name] = {"number": len(held), "data": embedded(path)} | size
        symbol["picture"] = held[path.name]["number"] if path.name in held else None
    return list(held.values())


def _shown(group: Group, cases: Sequence[Row], drawn: set[int], gallery: int) -> Row:
    """A group's scatter, and galleries of those of its cases that are drawn."""
    last = group.last
    measured = [case for case in cases if case["dice"][last] is not None]
    both = [case for case in measured if case["dice"].get("coarse") is not None and last != "coarse"]
    found = {}
    changed = [case for case in both if case["index"] in drawn]
    if changed:
        before, after = ([case["dice"][mask] for case in changed] for mask in ("coarse", last))
        found["Most improved"] = [changed[i] for i in pictures.pick_most_harmed(after, before, gallery)]
        found["Most damaged"] = [changed[i] for i in pictures.pick_most_harmed(before, after, gallery)]
    seen = [case for case in measured if case["index"] in drawn]
    found["Worst"] = sorted(seen, key=lambda case: case["dice"][last])[:gallery]
    lowest = min((min(case["dice"]["coarse"], case["dice"][last]) for case in both), default=0.0)
    sheets = [result.run.directory / "overlays.png" for result in group.results if result.run and not result.folder]
    return {
        "group": group,
        "by": list(statistics.breakdowns(group.rows, group.columns)),
        "unfair": [unfair(result.about["seen"]) for result in group.results if result.about.get("seen")],
        "people": people([(row["dataset"], row.get("patient")) for row in group.rows]),
        "dice": statistics.over_cases(group.rows, f"{last}_dice"),
        "change": statistics.change(group.rows, "coarse_dice", f"{last}_dice") if both else None,
        "cases": cases,
        "galleries": {title: some for title, some in found.items() if some},
        "scatter": [{"case": case, "better": _better(case, last)} for case in both],
        "lowest": math.floor(lowest * 10) / 10,
        "sheets": [embedded(path) for path in sheets[:1] if path.is_file()],
    }


def _better(case: Row, last: str) -> str:
    change = case["dice"][last] - case["dice"]["coarse"]
    return "better" if change > statistics.MARGIN else "worse" if change < -statistics.MARGIN else "same"


def embedded(path: Path) -> str:
    """A picture's file as an address that holds it."""
    kind = "png" if path.suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _charts(groups: Sequence[Group], finished: Sequence[Found]) -> list[Row]:
    """Lines: name → points."""
    sure, tolerance, training = [], [], []
    for group in groups:
        name = f"{group.setting}, {group.data}"
        found = assessment.calibrations([record for result in group.results for record in result.records.values()])
        for mask in (mask for mask in group.masks if mask in found):
            points = list(zip(found[mask].confidence, found[mask].frequency, strict=True))
            sure.append((f"{name}: {mask}, ECE {found[mask].ece:.4f}", points))
        for mask in group.masks:
            start = f"{mask}_nsd_"
            columns = [key for key in group.rows[0] if key.startswith(start) and key.endswith("px")]
            means = [statistics.over_cases(group.rows, key, intervals=False).mean for key in columns]
            at = [float(key[len(start) : -2]) for key in columns]
            tolerance.append((f"{name}: {mask}", list(zip(at, means, strict=True))))
    for run in finished:
        path = run.directory / "metrics.csv"
        rows = read_csv(path) if path.is_file() else []
        for mask in ("coarse", "refined"):
            name = f"{run.setting}, fold {run.config['fold']}, seed {run.config['seed']}: {mask}"
            dice = [(number(row["epoch"]) + 1, number(row.get(f"val/{mask}/dice"))) for row in rows]
            training.append((name, dice))
    every = (
        ("Validation Dice while training", "epoch", "validation Dice", training),
        ("Normalised surface Dice (NSD) against the tolerance", "tolerance (px)", "NSD", tolerance),
        ("Reliability", "predicted probability of lesion", "share that is lesion", sure),
    )
    return [chart for title, x, y, lines in every if (chart := _chart(title, x, y, lines))]


def _chart(title: str, x: str, y: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> Row | None:
    """A chart of shares, whose axis of y ends at 1; None without a point."""
    from matplotlib.ticker import MaxNLocator

    series = [
        {"name": name, "points": sorted(p for p in points if not any(map(math.isnan, p)))} for name, points in lines
    ]
    series = [one for one in series if one["points"]]
    if not series:
        return None
    xs, ys = zip(*(point for one in series for point in one["points"]), strict=True)
    square = title == "Reliability"
    low, high = (0.0, 1.0) if square else (min(xs), max(max(xs), min(xs) + 1))
    bottom = 0.0 if square else min(0.9, math.floor(min(ys) * 10) / 10)

    def ticks(start: float, end: float) -> list[float]:
        return [float(tick) for tick in MaxNLocator(6, min_n_ticks=3).tick_values(start, end) if start <= tick <= end]

    about = {"title": title, "x": x, "y": y, "series": series, "range": (low, high, bottom, 1.0), "diagonal": square}
    return about | {"x_ticks": ticks(low, high), "y_ticks": ticks(bottom, 1.0)}
