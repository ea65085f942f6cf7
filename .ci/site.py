"""What mkdocs adds to docs/: the pages beside it, and one page for each room of the package, from its docstrings."""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

HOME = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "ultrarefiner/shipped/README.md": "model_card.md",
}
ROOMS = {"ultrarefiner": "The package", "refine": "", "models": "", "data": "", "phases": "", "runs": "", "results": ""}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=_beside((HOME / source).read_text(encoding="utf-8"))))
    for room, title in ROOMS.items():
        files.append(File.generated(config, f"api/{room}.md", content=_api(room, title or f"ultrarefiner.{room}")))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links to pages beside docs/ find them."""
    for source, target in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({target}")
    return markdown


def _beside(text: str) -> str:
    """A page that lay beside docs/, with its links as they are inside."""
    text = re.sub(r"\]\(docs/", "](", text)
    for source, target in PAGES.items():
        text = text.replace(f"]({source}", f"]({target}")
    return text


def _api(room: str, title: str) -> str:
    folder = HOME / "ultrarefiner" / ("" if room == "ultrarefiner" else room)
    modules = sorted(folder.glob("*.py") if room == "ultrarefiner" else folder.rglob("*.py"))
    introduction = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    blocks = [f"# {title}", introduction.partition("\n\n")[0]]
    for module in modules:
        name = ".".join(module.relative_to(HOME).with_suffix("").parts)
        if not name.endswith("__init__"):
            blocks.append(f"::: {name}")
    return "\n\n".join(blocks) + "\n"
