"""What came out of several runs: `python -m ultrarefiner.report runs=outputs output=report`.

Whatever needs torch is imported where it is used, so that `--help`, `--cfg job` and completion are quick.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from ultrarefiner import cli
from ultrarefiner.settings import setting

INTRODUCTION = """\
Compare runs: a page that needs no network (index.html), and its tables as CSV, Markdown and LaTeX.

  python -m ultrarefiner.report list runs=outputs              which runs there are, how far, how good
  python -m ultrarefiner.report runs=outputs output=report     the page

A run that `python -m ultrarefiner.evaluate checkpoint=RUN …` has measured is shown with its images: galleries, a
scatter whose points open the case, lesions found, calibration. Give the folder around several runs to compare them."""

VALUES = """\
Values
  runs=outputs      a folder that holds runs, at any depth
  output=report     where index.html and the tables go
  title=TEXT        of the page
  pictures=300      at most so many images in the page
  gallery=6         cases of each kind in the galleries
  --cfg job         print the composed configuration"""


@dataclass
class ReportConfig:
    """What came out of several runs; conf/report.yaml says what the keys mean."""

    runs: str = "outputs"
    output: str = "report"
    list: bool = False
    title: str = "UltraRefiner"
    pictures: int = setting(300, at_least=0)
    gallery: int = setting(6, at_least=1)


def help_text() -> str:
    """The help page."""
    return cli.help_page(INTRODUCTION, {}, VALUES)


def _report(cfg: DictConfig) -> None:
    from ultrarefiner.results import tables
    from ultrarefiner.results.found import listed, runs_in, status_counts

    folder, out = Path(cfg.runs).expanduser(), Path(cfg.output).expanduser()
    if cfg.list:
        runs = runs_in(folder)
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000  # a line for each run, for grep
        if runs:
            print(tables.terminal(listed(runs, folder), width=width))
        print(f"{status_counts(runs) or 'no runs'} in {folder}")
        return
    from ultrarefiner.results.report import write

    groups = write(folder, out, cfg.title, cfg.pictures, cfg.gallery)
    print(f"{len(groups)} results of {folder}\n  {out / 'index.html'}")


def main() -> None:
    """Console script `ultrarefiner-report`."""
    if sys.argv[1:2] == ["list"]:
        sys.argv[1] = "list=true"
    ConfigStore.instance().store(name="schema_report", node=ReportConfig)
    cli.quote_paths("runs", "output", "title")
    cli.launch(_report, "report", help_text)


if __name__ == "__main__":
    main()
