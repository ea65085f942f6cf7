"""Tables: every cell comes out as the text that it is, for programs, spreadsheets, terminals, Markdown and LaTeX."""

import csv
import io
import json
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.cells import cell_len

from ultrarefiner.errors import UserError
from ultrarefiner.files import csv_text, read_csv, write_csv
from ultrarefiner.results import tables
from ultrarefiner.results.tables import Column, latex, markdown, one_line, terminal

HOSTILE = [
    "=cmd|' /C calc'!A0",
    "@SUM(1+1)",
    "+1+cmd",
    "-2+3",
    "\t=1",
    "\n=1",
    "'=1",
    "''@x",
    "＝1+1",
    "[/red]",
    "[bold]x",
    "<script>alert(1)</script>",
    "a|b",
    "a&b #1 50% $x$ _y_ ~z^ {q} \\end{tabular}",
    "[x](http://a.b)",
    "![x](y)",
    "http://a.b www.a.b @me",
    "`code`",
    "&lt;",
    "a,b;c\"d'e",
    "two\nlines",
    "\x1b[31mred",
    "病例 7",
    "x" * 200,
    "-",
    "*",
    "",
]
TEXTS = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
ROWS = st.lists(st.fixed_dictionaries({"id": TEXTS, "dice": st.floats(0, 1), "n": st.integers()}), max_size=4)


# -- CSV


@given(st.lists(st.dictionaries(TEXTS, TEXTS, min_size=1), min_size=1, max_size=4))
@settings(deadline=None)
def test_programs_read_what_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    write_csv(path, rows)
    columns = {name for row in rows for name in row}
    assert read_csv(path) == [{name: row.get(name, "") for name in columns} for row in rows]


@given(TEXTS)
@settings(deadline=None)
def test_no_spreadsheet_runs_a_cell_and_the_documented_expression_undoes_it(text):
    ((header,), (cell,)) = csv.reader(io.StringIO(csv_text([{text: text}]), newline=""))
    assert header == cell
    if re.match(r"[=+\-@\t\r\n＝＋－＠]", cell):
        float(cell)
    documented = re.search(r're\.sub\((r".*"), "", cell\)', csv_text.__doc__)[1]
    assert re.sub(documented[2:-1], "", cell) == text


def test_numbers_stay_numbers_and_what_is_not_defined_is_blank():
    row = {"a": -0.5, "b": 1e-20, "c": float("nan"), "d": None, "e": "-1.5", "f": 3, "g": "+2e3"}
    assert csv_text([row]) == "a,b,c,d,e,f,g\r\n-0.5,1e-20,,,-1.5,3,+2e3\r\n"


def test_columns_are_those_of_all_rows(tmp_path):
    write_csv(tmp_path / "t.csv", [{"id": 1}, {"id": 2, "dice": 0.5}])
    assert (tmp_path / "t.csv").read_bytes() == b"id,dice\r\n1,\r\n2,0.5\r\n"
    write_csv(tmp_path / "t.csv", [])
    assert read_csv(tmp_path / "t.csv") == []


def test_a_name_that_is_no_valid_text_can_be_written(tmp_path):
    write_csv(tmp_path / "t.csv", [{"id": "a\udcff"}])
    assert read_csv(tmp_path / "t.csv") == [{"id": "a\\udcff"}]


@pytest.mark.parametrize("content", [b"", b"id,dice\r\n1,0.5\r\n2", b'id\r\n"a', b"\xff\xfe", b"id\r\n1,2\r\n"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "cases.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"cases\.csv is damaged or was cut off"):
        read_csv(tmp_path / "cases.csv")
    with pytest.raises(UserError, match=r"other\.csv cannot be read: No such file"):
        read_csv(tmp_path / "other.csv")


# -- terminal


@given(ROWS, TEXTS, st.integers(40, 120))
@settings(deadline=None, max_examples=200)
def test_a_table_fits_and_shows_every_number_whole(rows, title, width):
    shown = terminal(rows, title=title, width=width)
    assert all(cell_len(line) <= width for line in shown.split("\n"))
    for row in rows:
        assert len(str(row["n"])) > 20 or str(row["n"]) in shown
        assert f"{row['dice']:.4g}" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("text", HOSTILE)
def test_a_terminal_shows_a_text_as_it_is(text):
    as_cell, as_header, as_title = (
        "".join(terminal(rows, title=title).split())
        for rows, title in (([{"a": text}], ""), ([{text: ""}], ""), ([{"a": 1}], text))
    )
    expected = "".join(one_line(text).split())
    assert expected in as_cell and expected in as_header and as_title.startswith(expected)


def test_columns_choose_order_header_and_style():
    rows = [{"a": 1.23456, "b": "x", "c": 3}, {"a": float("nan"), "c": None}]
    shown = terminal(rows, (Column("b", "name"), Column("a", "value", ".1f")), "title")
    assert [line.split() for line in shown.split("\n") if "─" not in line] == [
        ["title"],
        ["name", "value"],
        ["x", "1.2"],
        ["-"],
    ]


def test_what_does_not_fit_becomes_a_block_for_each_row():
    rows = [{f"metric number {i}": i + 0.123456 for i in range(8)} | {"mask": mask} for mask in ("coarse", "refined")]
    shown = terminal(rows, width=40)
    assert re.findall(r"metric number 7 +7\.123\n", shown) and shown.count("metric number 3") == 2
    assert terminal(rows, width=200).count("metric number 3") == 1


# -- Markdown and LaTeX


@given(ROWS)
@settings(deadline=None)
def test_markdown_renders_to_the_text(rows):
    found = []
    columns = [Column(name, name) for name in ("id", "dice", "n")]
    parser = MarkdownIt("commonmark").enable("table")
    for token in parser.parse(markdown([*rows, {"id": "last", "dice": 0.0, "n": 0}], columns)):
        if token.type == "tr_open":
            row = []
            found.append(row)
        elif token.type == "inline":
            assert {child.type for child in token.children} <= {"text", "text_special"}
            row.append("".join(child.content for child in token.children))
    expected = [[one_line(row["id"]), f"{row['dice']:.4g}", str(row["n"])] for row in rows]
    assert found == [["id", "dice", "n"], *expected, ["last", "0", "0"]]


def test_markdown_makes_no_link_of_a_bare_address():
    assert markdown([{"id": "http://a.b www.a.b @me"}]).endswith(r"http\://a.b www\.a.b \@me |")


@given(ROWS)
@settings(deadline=None)
def test_latex_keeps_every_text(rows):
    r"""Read back by TeX's rules: `\name{}` and `\x` are one letter, a group is its content."""
    names = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textless": "<", "textgreater": ">"}
    names |= {"textbar": "|", "symbol": '"'}
    lines = latex(rows, (Column("id", "id"),)).split("\n")
    assert lines[:4] == [rf"\begin{{tabular}}{{{lines[0][16]}}}", r"\toprule", r"id \\", r"\midrule"]
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    for row, line in zip(rows, lines[4:-2], strict=True):
        cell = line.removesuffix(r" \\").removeprefix("$-$")
        assert not re.search(r"(?<!\\)[&%#$_~^]", cell) and not cell.startswith(("[", "*"))
        read = re.sub(r"\\([a-z]+)\{\d*\}|\\(.)|\{(.)\}", lambda m: names[m[1]] if m[1] else m[2] or m[3], cell)
        original = one_line(row["id"])
        assert read == (original[1:] if line.startswith("$-$") else original)


def test_latex_writes_a_minus():
    assert "a & $-$0.5 " in latex([{"id": "a", "change": -0.5}])


@given(st.text(string.printable))
def test_one_line_is_one_line(text):
    assert "\n" not in one_line(text) and len(one_line(text, 10)) <= 10


# -- the table of a run


def test_summary_of_a_run(tmp_path, capsys):
    scores = {"dice": 0.81234, "iou": 0.7, "hd95": 12.345, "assd": 3.0}
    content = {
        "title": "e2e · [/red] · fold 0",
        "baseline": {"test": {"coarse": scores}, "val": {"refined": {"dice": 0.8}}},
        "test": {"coarse": scores, "refined": {}},
        "differences": {
            "refined - coarse": {"mean": -0.0123, "low": -0.02, "high": 0, "p": 0.034, "worse": 0.25, "better": 0}
        },
        "seen": {"test_cases": 3, "first": "[/red]"},
        "val": {"refined": {"dice": 0.7999}},
        "last_step": 4,
        "normal": {"cases": 2, "clean": {"coarse": 1, "refined": 2}},
        "data": {"test": {"cases": 7}},
        "config": {"dataset": {"limit": {"test": 7}}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(content))
    (tmp_path / "cases.csv").touch()
    tables.summary(tmp_path, finished_before=True)
    shown = capsys.readouterr().out
    assert "exists already" in shown and "e2e · [/red] · fold 0: 7 test cases (dataset.limit.test=7)" in shown
    assert re.search(r"coarse \(Phase 1\) +0\.8123 +0\.7000 +12\.3[45] +3\.00\n", shown)
    assert (
        "2 of them are normal images, which no number above counts: coarse mask empty in 1, refined mask empty" in shown
    )
    assert "Validation cases are refined no better than before: Dice 0.7999, before 0.8000." in shown
    assert "seen 3 of the test cases before, such as [/red]." in shown
    assert re.search(r"refined - coarse +-0\.0123 \[-0\.0200, \+0\.0000\] +0\.034 +25% +0%\n", shown)
    assert "\nrefined  " not in shown and f"{tmp_path}/\n  cases.csv     every test case\n" in shown

    content["val"]["refined"]["dice"] = 0.8001
    (tmp_path / "summary.json").write_text(json.dumps(content))
    tables.summary(tmp_path, finished_before=True)
    assert "refined no better" not in capsys.readouterr().out
