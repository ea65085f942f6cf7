"""A look at a dataset before training: `python -m ultrarefiner.prepare dataset=busbra data_root=~/BUSBRA`.

Whatever needs torch is imported where it is used, so that `--help`, `--cfg job` and completion are quick.
"""

from omegaconf import DictConfig

from ultrarefiner import cli
from ultrarefiner.errors import UserError

INTRODUCTION = """\
Check a dataset, say what is in it, and build the cache that training reads.

  python -m ultrarefiner.prepare dataset=NAME data_root=PATH
  python -m ultrarefiner.prepare dataset=busbra data_root=~/BUSBRA
  python -m ultrarefiner.prepare dataset=combined dataset.members=[busi,busbra] data_root=~/data
  python -m ultrarefiner.prepare weights=[medsam,r50_vit_b16]     fetch published weights ahead

Training does the same by itself; here you see what it finds. The exit status is 1 where files have to be corrected."""

VALUES = """\
Values
  data_root=PATH         where the dataset lies
  output_root=outputs    the cache goes into its folder cache/; the same as for training
  weights=[NAME]         publishers' files to fetch, for machines without a connection; see docs/models.md
  --cfg job              print the composed configuration
  --config-dir DIR       a folder with options of your own, laid out like conf/"""


def help_text() -> str:
    """The help page."""
    groups = {"dataset": "which images", "model": "whose image sizes are cached"}
    return cli.help_page(INTRODUCTION, groups, VALUES)


def _prepare(cfg: DictConfig) -> None:
    from ultrarefiner.data.inspect import inspect_dataset
    from ultrarefiner.models.weights import fetch
    from ultrarefiner.runs.assemble import build_store

    for name in cfg.weights:
        print(fetch(name))
    if cfg.weights and cfg.dataset.name == "phantom":  # no dataset was asked for
        return
    store = build_store(cfg)
    report = inspect_dataset(store.reader, store.cache_dir, (cfg.model.coarse_size, cfg.model.image_size), store.salt)
    print(report)
    if not report.usable:
        raise UserError(f"{len(report.errors)} files of {store.reader.name} have to be corrected (see above).")


def main() -> None:
    """Console script `ultrarefiner-prepare`."""
    cli.launch(_prepare, "prepare", help_text)


if __name__ == "__main__":
    main()
