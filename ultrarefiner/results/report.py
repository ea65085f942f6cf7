"""Several runs as one page that needs no network, and as tables: what came out, is it better, where does it fail."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultrarefiner.files import write_atomically, write_csv
from ultrarefiner.results import assessment, lesions, page, statistics, tables
from ultrarefiner.results.gathered import Group, gather

CHANGES = (
    ("coarse", "refined"),
    ("coarse", "accepted"),
    ("baseline_coarse", "coarse"),
    ("baseline_refined", "refined"),
)
COMPARED = ("dice", "hd95", "nsd_2px")
NAMES = {"dice": "Dice", "iou": "IoU", "hd95": "HD95 (px)", "assd": "ASSD (px)", "nsd_2px": "NSD at 2 px"}
NAMES |= {"boundary_iou": "boundary IoU"}

Row = dict[str, Any]


class Table(NamedTuple):
    """A table as numbers for programs, and as it is shown."""

    name: str
    caption: str
    rows: list[Row]
    shown: list[Row]


def over_folds(groups: Sequence[Group]) -> Table:
    """Each setting and mask: the mean and spread over its runs, and over all cases."""
    rows, shown = [], []
    for group in groups:
        for mask in group.masks:
            measured = {m: f"{mask}_{m}" for m in NAMES if f"{mask}_{m}" in group.rows[0]}
            over = {m: statistics.over_runs([r.rows for r in group.results], column) for m, column in measured.items()}
            who = {"setting": group.setting, "tested on": group.data, "mask": mask}
            rows += [{**who, "metric": metric} | found for metric, found in over.items()]
            dice = over["dice"]
            shown.append(
                who
                | {"runs": dice["runs"], "cases": dice["cases"], "Dice": _plus_minus(dice, 4)}
                | {"of all cases [95 %]": "{case_mean:.4f} [{case_low:.4f}, {case_high:.4f}]".format(**dice)}
                | {"median": f"{dice['case_median']:.4f}"}
                | {
                    NAMES[m]: _plus_minus(found, 2 if "(px)" in NAMES[m] else 4)
                    for m, found in over.items()
                    if m != "dice"
                }
            )
    return Table("settings", "Settings over folds: mean ± standard deviation of the runs", rows, shown)


def changes(groups: Sequence[Group]) -> Table:
    """What refining, rejecting and training end to end changed, in each setting."""
    named = [
        ({"setting": g.setting, "tested on": g.data, "metric": NAMES[metric], "change": f"{after} − {before}"},
         statistics.change(g.rows, f"{before}_{metric}", f"{after}_{metric}"))
        for g in groups
        for before, after in CHANGES
        for metric in COMPARED
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
                single = lesions.summarise(assessment.lesions_of(row, mask) for row in measured)
                more = (
                    {"ECE": sure[mask].ece, "Brier": sure[mask].brier} if mask in sure else {"ECE": None, "Brier": None}
                )
                rows.append({"setting": group.setting, "tested on": group.data, "mask": mask} | single | more)
    shown = [{name.replace("_", " "): value for name, value in row.items()} for row in rows]
    return Table("lesions", "Lesion by lesion, and calibration over all pixels", rows, shown)


def write(folder: Path, out: Path, title: str, most_pictures: int, gallery: int) -> list[Group]:
    """Write index.html and the tables.

    Args:
        folder: below which the runs lie.
        out: where it goes.
        title: of the page.
        most_pictures: that the page holds.
        gallery: cases of each kind.

    Raises:
        UserError: see `gather`; or the folder cannot be written.
    """
    import jinja2

    runs, groups = gather(folder)
    made = [_even(part(groups)) for part in (over_folds, changes, between, by_group, found_lesions)]
    for table in made:
        if table.rows:
            write_csv(out / f"{table.name}.csv", table.rows)
            write_atomically(out / f"{table.name}.md", f"{tables.markdown(table.shown)}\n".encode())
            write_atomically(out / f"{table.name}.tex", f"{tables.latex(table.shown)}\n".encode())
    who = ({"setting": g.setting, "tested_on": g.data} | row for g in groups for row in g.rows)
    write_csv(out / "cases.csv", who)
    content = page.content(folder, runs, groups, most_pictures, gallery)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    html = environment.get_template("report.html").render(title=title, tables=made, **content)
    write_atomically(out / "index.html", html.encode("utf-8", "backslashreplace"))
    return groups


def _even(table: Table) -> Table:
    """The table with all columns in all rows."""
    columns = dict.fromkeys(name for row in table.shown for name in row)
    return table._replace(shown=[dict.fromkeys(columns) | row for row in table.shown])


def _plus_minus(over: dict[str, float], digits: int) -> str:
    return f"{over['mean']:.{digits}f}" + (f" ± {over['sd']:.{digits}f}" if over["runs"] > 1 else "")
