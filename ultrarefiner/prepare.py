"""A look at a dataset before training: `python -m ultrarefiner.prepare dataset=busbra data_root=~/BUSBRA`.

Whatever needs torch is imported where it is used, so that `--help`, `--cfg job` and completion are quick.
"""

from omegaconf import DictConfig

from ultrarefiner import cli
from ultrarefiner.errors import UserError

GROUPS = {
    "dataset": "which images",
    "model": "whose image sizes are cached",
}

INTRODUCTION = """\
Check a dataset, say what is in it, and build the cache that training reads.

  python -m ultrarefiner.prepare dataset=NAME data_root=PATH
  python -m ultrarefiner.prepare dataset=busbra data_root=~/BUSBRA
  python -m ultrarefiner.prepare dataset=combined dataset.members=[busi,busbra] data_root=~/data
  python -m ultrarefiner.prepare dataset=busbra data_root=~/BUSBRA failures=1000 failures_out=masks

Training does the same by itself; here you see what it finds. The exit status is 1 where files have to be corrected."""

VALUES = """\
Values
  data_root=PATH         where the dataset lies
  output_root=outputs    the cache goes into its folder cache/; the same as for training
  failures=N             write N simulated coarse masks: PNG files of 16 bits, a table, a contact sheet
  failures_out=failures  the folder for them
  seed=0                 of the simulated masks
  --cfg job              print the composed configuration
  --config-dir DIR       a folder with options of your own, laid out like conf/"""


def help_text() -> str:
    """The help page."""
    return cli.help_page(INTRODUCTION, GROUPS, VALUES)


def _prepare(cfg: DictConfig) -> None:
    from pathlib import Path

    from ultrarefiner.data.cache import open_cache
    from ultrarefiner.data.failures.files import write_failures
    from ultrarefiner.data.inspect import inspect_dataset
    from ultrarefiner.runs.build import build

    if cfg.failures < 0:
        raise UserError(f"failures={cfg.failures} is no number of masks: give 0 or more.")
    simulator = build(cfg.simulator, "simulator")
    reader = build(cfg.dataset.reader, "dataset.reader")
    cache_dir = Path(cfg.output_root).expanduser() / "cache"
    sizes = (cfg.model.coarse_size, cfg.model.image_size)
    report = inspect_dataset(reader, cache_dir, sizes)
    print(report)
    if not report.usable:
        raise UserError(f"{len(report.errors)} files of {reader.name} have to be corrected (see above).")
    if cfg.failures:
        index, frames = open_cache(reader, sizes, cache_dir)
        cases = [
            (position, case)
            for position, (case, entry) in enumerate(zip(reader.cases(), index.entries, strict=True))
            if entry.lesion_px and not entry.fault
        ]
        folder = Path(cfg.failures_out)
        write_failures(cases, frames[cfg.model.coarse_size], simulator, cfg.failures, cfg.seed, folder)
        print(f"Simulated coarse masks ({cfg.failures})\n  {folder}/")


def main() -> None:
    """Console script `ultrarefiner-prepare`."""
    cli.launch(_prepare, "prepare", help_text)


if __name__ == "__main__":
    main()
