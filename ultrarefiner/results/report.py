"""Several runs as one page that needs no network, and as tables: what came out, is it better, where does it fail."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultrarefiner.errors import UserError
from ultrarefiner.files import read_csv, write_atomically, write_csv
from ultrarefiner.results import assessment, lesions, page, statistics, tables
from ultrarefiner.results.gathered import Group, Result, gather, unfair

CHANGES = (
    ("coarse", "refined"),
    ("coarse", "accepted"),
    ("baseline_coarse", "coarse"),
    ("baseline_refined", "refined"),
)
COMPARED = {"dice": "Dice", "hd95": "HD95 (px)", "nsd_2px": "NSD at 2 px"}
GENERATOR = b'<meta name="generator" content="ultrarefiner.report">'
"""By what the page of a report is known."""
MAIN = {"iou": "IoU", "hd95": "HD95 (px)", "assd": "ASSD (px)"}

Row = dict[str, Any]


class Table(NamedTuple):
    """A table as numbers for programs, and as it is shown."""

    name: str
    caption: str
    rows: list[Row]
    shown: list[Row]


def tables_of(groups: Sequence[Group]) -> list[Table]:
    """All tables that have a row, with all columns in all of their rows."""
    made = [part(groups) for part in (over_folds, further, changes, between, by_group, found_lesions)]
    columns = {table.name: dict.fromkeys(name for row in table.shown for name in row) for table in made}
    return [
        table._replace(shown=[dict.fromkeys(columns[table.name]) | row for row in table.shown])
        for table in made
        if table.rows
    ]


def over_folds(groups: Sequence[Group]) -> Table:
    """Each setting and mask: the mean and spread over its runs, and over all cases."""
    rows, shown = [], []
    for group in groups:
        for mask in group.masks:
            over = {
                m: statistics.over_runs([r.rows for r in group.results], f"{mask}_{m}") for m in group.metrics(mask)
            }
            who = {"setting": group.setting, "tested on": group.data, "mask": mask}
            rows += [{**who, "metric": metric} | found for metric, found in over.items()]
            dice = over["dice"]
            shown.append(
                who
                | {"runs": dice["runs"], "cases": dice["cases"], "Dice": tables.plus_minus(dice, 4)}
                | {"of all cases [95 %]": "{case_mean:.4f} [{case_low:.4f}, {case_high:.4f}]".format(**dice)}
                | {"median": f"{dice['case_median']:.4f}"}
                | {name: tables.plus_minus(over[m], 2 if "px" in name else 4) for m, name in MAIN.items() if m in over}
            )
    return Table("settings", "Settings over folds: mean ± standard deviation of the runs", rows, shown)


def further(groups: Sequence[Group]) -> Table:
    """What only an evaluation measures, over all cases."""
    rows = []
    for group in groups:
        for mask in group.masks:
            names = [metric for metric in group.metrics(mask) if metric not in ("dice", *MAIN)]
            means = {name: statistics.over_cases(group.rows, f"{mask}_{name}", intervals=False).mean for name in names}
            if means:
                who = {"setting": group.setting, "tested on": group.data, "mask": mask}
                rows.append(who | {name.replace("_", " "): mean for name, mean in means.items()})
    return Table("metrics", "Further metrics: means over all cases", rows, rows)


def changes(groups: Sequence[Group]) -> Table:
    """What refining, rejecting and training end to end changed, in each setting."""
    named = [
        ({"setting": g.setting, "tested on": g.data, "metric": name, "change": f"{after} − {before}"},
         statistics.change(g.rows, f"{before}_{metric}", f"{after}_{metric}"))
        for g in groups
        for before, after in CHANGES
        for metric, name in COMPARED.items()
        if {f"{before}_{metric}", f"{after}_{metric}"} <= set(g.rows[0])
    ]  # fmt: skip
    return _compared("changes", "What refining changed, case by case", named)


def between(groups: Sequence[Group]) -> Table:
    """Each pair of settings that were tested on the same cases: the Dice of their final masks."""
    found = {id(g): statistics.values(g.rows, f"{g.last}_dice") for g in groups}
    named = []
    for i, one in enumerate(groups):
        for other in groups[i + 1 :]:
            paired = statistics.paired(found[id(one)], found[id(other)])
            if one.data == other.data and paired.cases and not (one.simulated or other.simulated):
                about = {"setting": f"{other.setting} ({other.last})", "minus": f"{one.setting} ({one.last})"}
                named.append((about | {"tested on": one.data}, paired))
    return _compared("comparisons", "One setting against another: Dice of their final masks", named)


def _compared(name: str, caption: str, named: Sequence[tuple[Row, statistics.Paired]]) -> Table:
    corrected = statistics.holm([paired.p for _, paired in named])
    rows = [who | paired._asdict() | {"p_holm": p} for (who, paired), p in zip(named, corrected, strict=True)]
    shown = [
        who
        | {
            "mean [95 %]": f"{paired.mean:+.4f} [{paired.low:+.4f}, {paired.high:+.4f}]",
            "median": f"{paired.median:+.4f}",
        }
        | {"p": f"{paired.p:.2g}", "p (Holm)": f"{p:.2g}"}
        | {"worse": f"{paired.worse:.0%}", "better": f"{paired.better:.0%}"}
        | {"cases": paired.cases, "patients": paired.patients}
        for (who, paired), p in zip(named, corrected, strict=True)
    ]
    return Table(name, caption, rows, shown)


def by_group(groups: Sequence[Group]) -> Table:
    """Dice by size of the lesion, class, device, and whatever else the cases tell."""
    rows, shown = [], []
    for group in groups:
        for column, found in statistics.breakdowns(group.rows, group.columns).items():
            for name, some in found.items():
                who = {"setting": group.setting, "tested on": group.data, "by": column, "group": name}
                over = {mask: statistics.over_cases(some, f"{mask}_dice") for mask in group.masks}
                rows += [{**who, "mask": mask} | value._asdict() for mask, value in over.items()]
                shown.append(
                    who
                    | {"cases": over[group.last].cases}
                    | {m: tables.with_interval(v._asdict()) for m, v in over.items()}
                )
    return Table("breakdown", "Dice by size of the lesion, class, device and data set [95 %]", rows, shown)


def found_lesions(groups: Sequence[Group]) -> Table:
    """Lesions found, false alarms and calibration, of what was evaluated."""
    rows = []
    for group in groups:
        sure = assessment.calibrations([record for result in group.results for record in result.records.values()])
        for mask in group.masks:
            measured = [row for row in group.rows if row.get(f"lesions_{mask}_false", "") != ""]
            if measured:
                single = _each_once(measured, mask)
                more = (
                    {"ECE": sure[mask].ece, "Brier": sure[mask].brier} if mask in sure else {"ECE": None, "Brier": None}
                )
                rows.append({"setting": group.setting, "tested on": group.data, "mask": mask} | single | more)
    shown = [{name.replace("_", " "): value for name, value in row.items()} for row in rows]
    return Table("lesions", "Lesion by lesion, and calibration over all pixels", rows, shown)


def _each_once(rows: Sequence[Row], mask: str) -> Row:
    """`lesions.summarise`, where a case that several runs have tested counts once, with its mean."""
    times = Counter((row["dataset"], row["id"]) for row in rows)
    each = math.lcm(*times.values())  # so often every case is shown, however many runs have it
    shown = [row for row in rows for _ in range(each // times[row["dataset"], row["id"]])]
    found = lesions.summarise(assessment.lesions_of(row, mask) for row in shown)
    counts = {name: found[name] / each for name in ("images", "lesions", "found", "false_positives")}
    return found | {name: int(count) if count.is_integer() else count for name, count in counts.items()}


def write(folder: Path, out: Path, title: str, most_pictures: int, gallery: int) -> list[Group]:
    """Write index.html and the tables.

    Args:
        folder: below which the runs lie.
        out: where it goes.
        title: of the page.
        most_pictures: that the page holds.
        gallery: cases of each kind.

    Raises:
        UserError: see `gather`; or the folder holds something else, or cannot be written.
    """
    import jinja2

    runs, groups = gather(folder)
    made = tables_of(groups)
    _claim(out)
    for table in made:
        write_csv(out / f"{table.name}.csv", table.rows)
        write_atomically(out / f"{table.name}.md", f"{tables.markdown(table.shown)}\n".encode())
        write_atomically(out / f"{table.name}.tex", f"{tables.latex(table.shown)}\n".encode())
    who = ({"setting": g.setting, "tested_on": g.data} | row for g in groups for row in g.rows)
    write_csv(out / "cases.csv", who)
    content = page.content(folder, runs, groups, most_pictures, gallery)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    # What an older version did not write is left blank.
    options: dict[str, Any] = {"autoescape": True, "undefined": jinja2.ChainableUndefined, "trim_blocks": True}
    environment = jinja2.Environment(loader=loader, **options)
    environment.filters["patients"] = tables.patients
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    html = environment.get_template("report.html").render(title=title, tables=made, **content)
    write_atomically(out / "index.html", html.encode("utf-8", "backslashreplace"))
    return groups


def _claim(out: Path) -> None:
    """Make a folder that of a report, which may be written over; any other's cases.csv must not be."""
    page = out / "index.html"
    ours = page.is_file() and GENERATOR in page.read_bytes()
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise UserError(f"output={out} holds something else: give a new folder")
    if not ours:
        write_atomically(page, b"<!doctype html>" + GENERATOR + b"This report is being written.")


def write_markdown(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the tables of one evaluation into its folder, from its cases.csv and what its summary.json says."""
    result = Result(about["title"], about["dataset"], read_csv(folder / "cases.csv"), about, None, folder)
    parts = [f"# {tables.one_line(about['title'])}"]
    if about["seen"]:
        parts.append(f"**Not a fair test:** {tables.markdown_text(unfair(about['seen']))}")
    for table in tables_of([Group(result.setting, result.data, [result])]):
        rows = [
            {name: cell for name, cell in row.items() if name not in ("setting", "tested on")} for row in table.shown
        ]
        parts.append(f"## {table.caption}\n\n{tables.markdown(rows)}")
    write_atomically(folder / "tables.md", "\n\n".join([*parts, ""]).encode())
