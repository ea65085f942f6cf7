"""Tables for people: rows of dicts as text for a terminal, Markdown or LaTeX; see `files.write_csv` for programs.

What stands in a cell is shown as it is, whatever a file or a setting is called: no markup or command in it works.
"""

import math
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultrarefiner.data.cases import PARTS
from ultrarefiner.errors import UserError
from ultrarefiner.files import number, read_csv, read_json

FILES = (
    ("cases.csv", "every test case"),
    ("overlays.png", "worst, median and best cases, and those harmed most"),
    ("curves.png", "training curves"),
    ("checkpoints", "best and last weights"),
)

NEEDED = ("title", "config", "data", "baseline", "val", "test", "differences", "seen", "last_step")
"""What the summary of a run must hold."""

Rows = Iterable[Mapping[str, Any]]


class Column(NamedTuple):
    """A column of a table: a key of its rows, what stands above it, and how its numbers are written."""

    key: str
    header: str
    style: str = ".4g"


COLUMNS = (
    Column("dice", "Dice", ".4f"),
    Column("iou", "IoU", ".4f"),
    Column("hd95", "HD95 (px)", ".2f"),
    Column("assd", "ASSD (px)", ".2f"),
)


def terminal(rows: Rows, columns: Sequence[Column] | None = None, title: str = "", width: int = 80) -> str:
    """A table that is at most ``width`` characters wide, without colours.

    Long texts are folded, numbers never: where the columns do not fit beside each other, each row becomes a block of
    lines.

    Args:
        rows: the table.
        columns: which, in which order; all that any row has if not given.
        title: stands above it.
        width: of the terminal.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    headers, cells, numeric = _cells(rows, columns)
    least = [max(map(cell_len, column)) for column in zip(headers, *cells, strict=True)]
    least = [size if n else min(size, 12) for size, n in zip(least, numeric, strict=True)]
    beside = sum(least) + 3 * (len(least) - 1) <= width
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    table = Table(box=box.SIMPLE_HEAD if beside else None, show_header=beside, show_edge=False, pad_edge=False)
    if beside:
        for header, n, size in zip(headers, numeric, least, strict=True):
            table.add_column(Text(header), justify="right" if n else "left", no_wrap=n, min_width=size, overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
    else:
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for row in cells:
            for header, cell in zip(headers, row, strict=True):
                table.add_row(Text(header), Text(cell))
            table.add_row()
    with console.capture() as text:
        if title:
            console.print(Text(one_line(title)))
        console.print(table)
    return "\n".join(line.rstrip() for line in text.get().rstrip().split("\n"))


def markdown(rows: Rows, columns: Sequence[Column] | None = None) -> str:
    """A table of GitHub's Markdown."""
    headers, cells, numeric = _cells(rows, columns)
    head, *body = ([markdown_text(cell) for cell in row] for row in (headers, *cells))
    lines = [head, ["--:" if n else ":--" for n in numeric], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_text(text: str) -> str:
    """A text in which no markup works."""
    return _MARKDOWN.sub(r"\\\g<0>", text)


def latex(rows: Rows, columns: Sequence[Column] | None = None) -> str:
    """A tabular for LaTeX; needs the package booktabs."""
    headers, cells, numeric = _cells(rows, columns)

    def line(row: Sequence[str]) -> str:
        return " & ".join(_LATEX_NUMBER.sub("$-$", _latex(cell)) for cell in row) + r" \\"

    body = [r"\toprule", line(headers), r"\midrule", *map(line, cells), r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{''.join('r' if n else 'l' for n in numeric)}}}", *body, r"\end{tabular}"])


def one_line(text: str, longest: int | None = None) -> str:
    """A text as one line: line breaks and control characters become spaces, too much is cut out of the middle."""
    line = "".join(c if c.isprintable() else " " for c in text).strip()
    if longest is None or len(line) <= longest:
        return line
    half = longest // 2
    return f"{line[: half - 1]}…{line[-half:]}"


def beginning(title: str, data: dict[str, Any], directory: Path) -> None:
    """Say what is about to be trained, on what, and where it goes."""
    parts = ", ".join(f"{part} {data[part]['cases']} ({patients(data[part])})" for part in PARTS)
    print(f"{title}\n  {parts}\n  {directory}/")
    if data["left_out"]:
        first = data["left_out"][0]
        print(f"  {len(data['left_out'])} left out, the first: {first}")


def patients(part: Mapping[str, Any]) -> str:
    """How many patients the cases of a part are of, as far as they are named."""
    unnamed = part.get("without_patient", 0)
    if not part["patients"]:
        return "patients not named"
    return f"{part['patients']} patients" + (f", {unnamed} cases without" if unnamed else "")


def read_result(directory: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """What a finished run left: its summary and its test cases.

    Raises:
        UserError: one of the files is not there or damaged.
    """
    content, cases = read_json(directory / "summary.json", NEEDED), read_csv(directory / "cases.csv")
    if not cases or "id" not in cases[0]:
        raise UserError(f"{directory / 'cases.csv'} has no test cases")
    return content, cases


def summary(directory: Path, finished_before: bool) -> None:
    """Print the table of a run (baseline, coarse, refined on the test cases) and where everything lies."""
    content: dict[str, Any] = read_json(directory / "summary.json", NEEDED)
    cases, limit = content["data"]["test"]["cases"], content["config"]["dataset"]["limit"]["test"]
    if finished_before:
        print("This result exists already; nothing was trained. Another seed or setting gets its own directory.")
    subset = "" if limit is None else f" (dataset.limit.test={limit})"
    before = (content["baseline"] or {}).get("test", {})
    scores = {"coarse (Phase 1)": before.get("coarse"), "refined (Phase 2)": before.get("refined"), **content["test"]}
    rows = [{"mask": name, **values} for name, values in scores.items() if values]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 80
    title = f"{content['title']}: {cases} test cases{subset}"
    print(terminal(rows, (Column("mask", "mask"), *COLUMNS), title, width))
    if normal := content.get("normal"):
        clean = ", ".join(f"{mask} mask empty in {count}" for mask, count in normal["clean"].items())
        print(f"{normal['cases']} of them are normal images, which no number above counts: {clean}")
    if content["differences"]:
        print(terminal(map(difference, *zip(*content["differences"].items(), strict=True)), width=width))
    now, was = (part.get("refined") for part in (content["val"], (content["baseline"] or {}).get("val", {})))
    if now and was and now["dice"] <= was["dice"]:
        print(f"Validation cases are refined no better than before: Dice {now['dice']:.4f}, before {was['dice']:.4f}.")
    if content["seen"]:
        count, first = content["seen"]["test_cases"], content["seen"]["first"]
        print(f"Not a fair test: the weights have seen {count} of the test cases before, such as {first}.")
    print(f"{directory}/")
    for name, what in FILES:
        if (directory / name).exists():
            print(f"  {name:<14}{what}")


def difference(name: str, change: Mapping[str, float]) -> dict[str, str]:
    """A paired difference of Dice over the test cases, for people."""
    return {
        "Dice, paired": name,
        "mean [95 %]": "{:+.4f} [{:+.4f}, {:+.4f}]".format(*(number(change[key]) for key in ("mean", "low", "high"))),
        "p": format(number(change["p"]), ".2g"),
        "worse by 0.01": format(number(change["worse"]), ".0%"),
        "better": format(number(change["better"]), ".0%"),
    }


def plus_minus(over: Mapping[str, Any], digits: int) -> str:
    """A mean over runs with its standard deviation, for people; see `statistics.over_runs`."""
    return f"{over['mean']:.{digits}f}" + (f" ± {over['sd']:.{digits}f}" if over["runs"] > 1 else "")


def with_interval(over: Mapping[str, float], digits: int = 4) -> str:
    """A mean with the interval around it, for people; see `statistics.over_cases`."""
    if not over["cases"]:
        return "-"
    return "{mean:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(**over, d=digits)


def _cells(rows: Rows, columns: Sequence[Column] | None) -> tuple[list[str], list[list[str]], list[bool]]:
    """The headers, the cells as text, and which columns hold numbers alone."""
    rows = list(rows)
    columns = columns or [Column(name, name) for name in dict.fromkeys(name for row in rows for name in row)]
    cells = [[_cell(row.get(column.key), column.style) for column in columns] for row in rows]
    filled = [[row[i] for row in cells if row[i]] for i in range(len(columns))]
    numeric = [bool(some) and all(map(_NUMBERS.fullmatch, some)) for some in filled]
    return [one_line(column.header) for column in columns], cells, numeric


def _cell(value: Any, style: str) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return format(value, style) if math.isfinite(value) else "-"
    return one_line(str(value))


_NUMBERS = re.compile(r"[-+±\d.,e%()\[\] ]+")  # also 0.89 ± 0.01 [0.85, 0.92]
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|~&$#:!@]|(?<=www)\.")  # markup, entities, mentions and what becomes a link
_LATEX_NUMBER = re.compile(r"^-(?=[\d.])")
_LATEX = {c: f"\\{c}" for c in "{}$&#_%"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\symbol{34}",
    "[": "{[}",  # at the start of a row it would be an argument of the line break before it
    "*": "{*}",  # so would this
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)
