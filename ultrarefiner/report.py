"""What came out of several runs: `python -m ultrarefiner.report runs=outputs output=report`.

Whatever needs torch is imported where it is used, so that `--help`, `--cfg job` and completion are quick.
"""

import shutil
import sys
from pathlib import Path

from omegaconf import DictConfig

from ultrarefiner import cli

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


def help_text() -> str:
    """The help page."""
    return cli.help_page(INTRODUCTION, {}, VALUES)


def _report(cfg: DictConfig) -> None:
    from ultrarefiner.results import tables
    from ultrarefiner.results.found import listed, runs_in, status_counts

    folder, out = Path(cfg.runs).expanduser(), Path(cfg.output).expanduser()
    if cfg.list:
        runs = runs_in(folder)
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
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
    cli.launch(_report, "report", help_text)


if __name__ == "__main__":
    main()
