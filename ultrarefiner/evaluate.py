"""How good masks are: `python -m ultrarefiner.evaluate checkpoint=RUN dataset=busbra data_root=~/BUSBRA`.

Whatever needs torch is imported where it is used, so that `--help`, `--cfg job` and completion are quick.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from ultrarefiner import cli
from ultrarefiner.config import DatasetConfig
from ultrarefiner.results.safety import Safety
from ultrarefiner.settings import PREDICTING, setting

GROUPS = {"dataset": "which images", "safety": "which redrawn masks are rejected"}

INTRODUCTION = """\
Measure the masks of a checkpoint, or of any other tool, against those of a data set.

  python -m ultrarefiner.evaluate checkpoint=RUN_OR_FILE dataset=busbra data_root=~/BUSBRA
  python -m ultrarefiner.evaluate checkpoint=RUN_OR_FILE dataset=busi data_root=~/BUSI split=all   another data set
  python -m ultrarefiner.evaluate predictions=nnunet/ dataset=busbra data_root=~/BUSBRA output=nnunet_test
  python -m ultrarefiner.evaluate predictions=nnunet/ checkpoint=RUN_OR_FILE …   refine them, and measure both

The same command goes on where it was interrupted. `python -m ultrarefiner.report` shows what came out."""

VALUES = """\
Values
  checkpoint=PATH        a run's directory, its checkpoints/best.ckpt, or shipped: the pair that ships
  predictions=DIR        masks or probability maps, each called as its case, of any tool (nnU-Net's folder as it is)
  data_root=PATH         where the dataset lies
  fold=N                 whose split; the checkpoint's own if not given
  split=test             test, val, train or all
  output=DIR             cases.csv, summary.json, tables.md, pictures; in the checkpoint's run if not given
  allow_seen=true        measure images that the checkpoint has seen; every table then says so
  spacing=0.08           mm per px, where the data set does not say it: distances and NSD in mm too
  dataset.limit.test=20  at most so many cases
  device=auto            cpu, cuda or mps
  precision=auto         bf16-mixed where it is faster here, else 32-true, or one of both
  --cfg job              print the composed configuration and all other keys"""


@dataclass
class EvaluateConfig:
    """How good masks are; conf/evaluate.yaml says what the keys mean."""

    dataset: DatasetConfig = MISSING
    data_root: str | None = None
    output_root: str = "outputs"
    checkpoint: str | None = None
    predictions: str | None = None
    fold: int | None = setting(None, at_least=0)
    split: str = setting("test", one_of=("test", "val", "train", "all"))
    output: str | None = None
    allow_seen: bool = False
    spacing: float | None = setting(None, above=0)
    tolerances: list[float] = setting(above=0)
    tolerances_mm: list[float] = setting(above=0)
    lesions: str = setting("together", one_of=("together", "each"))
    tta: Any = None
    safety: Safety = field(default_factory=Safety)
    batch_size: int = setting(4, at_least=1)
    device: str = "auto"
    precision: str = setting("auto", one_of=PREDICTING)
    pictures: bool = True


def help_text() -> str:
    """The help page."""
    return cli.help_page(INTRODUCTION, GROUPS, VALUES)


def _evaluate(cfg: DictConfig) -> None:
    from ultrarefiner.assess import assess
    from ultrarefiner.results import gathered, tables

    content, folder = assess(cfg)
    who = ", refined by ".join(str(one) for one in (cfg.predictions, cfg.checkpoint) if one is not None)
    part = "all parts" if cfg.split == "all" else f"{cfg.split}, fold {cfg.fold}"
    print(f"{who} on {cfg.dataset.name}, {part}: {content['cases']} cases")
    rows = [
        {"mask": name, "missed": mask["lesion"]["missed"]}
        | {column.key: mask["lesion"][column.key] for column in tables.COLUMNS}
        for name, mask in content["masks"].items()
    ]
    print(tables.terminal(rows, (tables.Column("mask", "mask"), *tables.COLUMNS, tables.Column("missed", "missed"))))
    if content["differences"]:
        print(tables.terminal([tables.difference(*change) for change in content["differences"].items()]))
    if content["seen"]:
        print(f"Not a fair test: {gathered.unfair(content['seen'])}")
    print(f"{folder}/\n  tables.md     all of it\n  cases.csv     every case")


def main() -> None:
    """Console script `ultrarefiner-evaluate`."""
    ConfigStore.instance().store(name="schema_evaluate", node=EvaluateConfig)
    cli.quote_paths("checkpoint", "predictions", "data_root", "output", "output_root")
    cli.launch(_evaluate, "evaluate", help_text)


if __name__ == "__main__":
    main()
