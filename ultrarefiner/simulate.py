"""Simulated coarse masks as files: `python -m ultrarefiner.simulate dataset=busbra data_root=~/BUSBRA fold=0`.

Whatever needs torch is imported where it is used, so that `--help`, `--cfg job` and completion are quick.
"""

from omegaconf import DictConfig

from ultrarefiner import cli

INTRODUCTION = """\
Write coarse masks that fail as networks do, for a look, for other programs, or for Phase 2 to train on.

  python -m ultrarefiner.simulate dataset=busbra data_root=~/BUSBRA fold=0 samples=10000 output=masks
  python -m ultrarefiner.train phase=sam dataset=busbra data_root=~/BUSBRA fold=0 model=lite phase.masks=masks

They are of the training cases of one fold, so that no test case is among what Phase 2 learns from. Training needs no
such files: it makes masks of its own, new ones in every epoch."""

VALUES = """\
Values
  data_root=PATH         where the dataset lies
  output=masks           the folder for them: PNG files of 16 bits, a table masks.csv, a contact sheet
  samples=1000           how many, of the part's cases in turn
  fold=0                 0, 1, ...; which cases are its training cases, as in training
  part=train             train, val or test
  seed=0                 of the simulation
  simulator.bins=[[0.7,0.95,1.0]]  Dice from, to, weight; + before keys that --cfg job does not show
  output_root=outputs    the cache goes into its folder cache/; the same as for training
  --cfg job              print the composed configuration
  --config-dir DIR       a folder with options of your own, laid out like conf/"""


def help_text() -> str:
    """The help page."""
    groups = {"dataset": "which images", "model": "whose coarse size the masks have"}
    return cli.help_page(INTRODUCTION, groups, VALUES)


def _simulate(cfg: DictConfig) -> None:
    from pathlib import Path

    from ultrarefiner.data.failures.files import write_failures
    from ultrarefiner.runs.assemble import build_fold
    from ultrarefiner.runs.build import build

    simulator = build(cfg.simulator, "simulator")
    cases = build_fold(cfg, cfg.model.coarse_size, cfg.seed).dataset(cfg.part)
    folder = Path(cfg.output)
    write_failures(cases, simulator, cfg.part, cfg.samples, folder)
    print(f"{cfg.samples} simulated coarse masks of {len(cases)} cases ({cfg.part}, fold {cfg.fold})\n  {folder}/")


def main() -> None:
    """Console script `ultrarefiner-simulate`."""
    cli.launch(_simulate, "simulate", help_text)


if __name__ == "__main__":
    main()
