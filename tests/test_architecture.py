"""The house of docs/architecture.md: imports point one way, rooms stay small."""

import ast
import tokenize
from pathlib import Path

import pytest

import ultrarefiner

PACKAGE = Path(ultrarefiner.__file__).parent
FILES = {
    ".".join(("ultrarefiner", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
COMMANDS = {"train", "prepare", "simulate", "predict", "evaluate", "report", "export", "demo"}
GROUND = {"errors", "files", "ranks", "settings", "config", "extras", "precision"}
"""What every room may use."""
MAY_USE = {
    "ground": set(),
    "refine": set(),
    "data": {"ground"},
    "models": {"ground", "refine"},
    "results": {"ground", "data"},
    "phases": {"ground", "refine", "models", "data", "results"},
    "cli": {"ground"},  # how a command is started: Hydra, help and errors
    "runs": {"ground", "refine", "models", "data", "results", "phases", "cli"},
    "segmenter": {"ground", "refine", "models", "data", "results", "phases", "runs"},
    "assess": {"ground", "refine", "models", "data", "results", "phases", "runs", "segmenter"},
    "explore": {"ground", "refine", "models", "data", "results", "phases", "runs", "segmenter"},
    "explore_page": {"ground", "data", "results", "explore"},
    "commands": {"ground", "refine", "models", "data", "results", "phases", "runs", "cli", "segmenter", "assess"}
    | {"explore", "explore_page"},
}
"""Which rooms each room may import, besides itself."""


def room(module: str) -> str:
    """The room of a module: a folder of the package, or what its file is for."""
    name = module.split(".")[1]
    return "ground" if name in GROUND else "commands" if name in COMMANDS else name


def imports(module: str) -> set[str]:
    """The modules of the package that a module names in its imports, wherever in the file they stand."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            whole = [f"{node.module}.{name.name}" for name in node.names]
            found |= {name if name in FILES else str(node.module) for name in whole}
    return {name for name in found if name in FILES and name not in (module, "ultrarefiner")}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The ways that lead back to where they began, each once."""
    found: list[list[str]] = []
    over: set[str] = set()

    def go(path: list[str]) -> None:
        for following in sorted(arrows[path[-1]]):
            if following in path:
                found.append([*path[path.index(following) :], following])
            elif following not in over:
                go([*path, following])
        over.add(path[-1])

    for start in arrows:
        if start not in over:
            go([start])
    return found


def lines_of_code(path: Path) -> int:
    """Lines that hold something other than comments, docstrings and white space."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    nothing = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
        tokenize.ENCODING,
    }
    code: set[int] = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in nothing:
                code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - texts)


MODULES = [module for module in FILES if module != "ultrarefiner"]


def test_every_room_has_its_place():
    """A new file at the top is a command, belongs to the ground, or says in MAY_USE what it may import."""
    assert {room(module) for module in MODULES} <= set(MAY_USE)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    wrong = {name for name in imports(module) if room(name) not in MAY_USE[room(module)] | {room(module)}}
    assert not wrong, f"{module} is in {room(module)}, which may not import {', '.join(sorted(wrong))}"


def test_commands_do_not_import_each_other():
    for module in MODULES:
        if room(module) != "ground":
            assert not {name for name in imports(module) if room(name) == "commands"}, module


def test_no_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]
    assert not circles({module: imports(module) for module in FILES if module != "ultrarefiner"})


def test_files_and_commands_are_small():
    for module in MODULES:
        lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{module} has {lines} lines"
        if room(module) == "commands":
            assert lines_of_code(FILES[module]) < 80, module


def test_the_package_is_small():
    # The goal for everything that is planned was 8500. It was 12 430 before bfloat16, turns of crops and int8 came,
    # 12 460 before sentences for flags and lists, and the names for screen readers; 12 509 before means of networks;
    # 12 600 before networks that are stopped early; 12 660 before mends of the report, readers and shared batch norms.
    assert sum(lines_of_code(path) for path in FILES.values()) < 12_950


def test_lines_are_counted_as_people_do(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(
        '"""One\n\ntwo."""\n\n# a comment\nx = """a\nb"""  # and one behind\n\n\ndef f():\n    """Say."""\n'
    )
    assert lines_of_code(path) == 3
