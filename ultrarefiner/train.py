"""The entrypoint: `python -m ultrarefiner.train phase=e2e roi=on fold=0`.

Composes one experiment from conf/, then hands it to `runs.experiment.run`, which plans, checks and trains it. Whatever
needs torch is imported there, so that `--help`, `--cfg job` and completion are quick.
"""

from omegaconf import DictConfig

from ultrarefiner import cli, extras

GROUPS = {
    "phase": "what is trained",
    "model": "which two networks: a preset of the next two",
    "model/coarse": "the coarse network alone",
    "model/sam": "the Segment Anything model alone",
    "dataset": "on which images",
    "roi": "where SAM looks",
    "prompt_style": "what SAM is told",
    "gate": "how far SAM may move the coarse mask",
    "protection": "what shields the coarse network in phase=e2e (follows roi)",
    "logger": "where metrics go besides the run directory; several: logger=[wandb,tensorboard]",
    "trainer": "how the machine is used",
    "hydra/launcher": "where the jobs of a sweep (-m) run",
}

INTRODUCTION = """\
Train a coarse network and a Segment Anything model that redraws its masks.

  python -m ultrarefiner.train [group=option ...] [key=value ...]
  python -m ultrarefiner.train phase=e2e roi=on fold=0
  python -m ultrarefiner.train dataset=busbra data_root=~/BUSBRA model=lite
  python -m ultrarefiner.train -m fold=0,1,2,3,4 protection=none,roi_on     a sweep
  python -m ultrarefiner.train +experiments=NAME                            a prepared experiment

The run directory follows from the configuration: the same command resumes or shows what is there."""

VALUES = """\
Values
  fold=0              which fold of the dataset's partition is tested, from 0
  seed=0              of weights, order, augmentation and simulated masks
  data_root=PATH      where the dataset lies
  output_root=outputs where results go
  allow_seen=false    true: weights given by path may have seen test cases; every table then says so
  upstream=build      train the earlier phases that are missing; require: refuse and say how to build them
  phase.epochs=N      and every other key of `--cfg job`

Flags
  --cfg job           print the composed configuration
  --multirun, -m      run every combination of comma-separated values
  --config-dir DIR    a folder with options of your own, laid out like conf/
  --hydra-help        Hydra's own flags"""


def help_text() -> str:
    """The help page: groups and options with the first comment line of their files."""
    return cli.help_page(INTRODUCTION, {**GROUPS, "+experiments": "prepared experiments"}, VALUES)


def _train(cfg: DictConfig) -> str:
    names = " · ".join(str(cfg[group].name) for group in ("phase", "dataset", "model"))
    print(f"{names} · fold {cfg.fold} · seed {cfg.seed}: loading", flush=True)  # what follows imports torch, and reads
    extras.import_lightning()
    from ultrarefiner.runs.experiment import run
    from ultrarefiner.runs.launch import processes

    with processes(cfg):
        return str(run(cfg))


def main() -> None:
    """Console script `ultrarefiner-train`."""
    cli.launch(_train, "train", help_text)


if __name__ == "__main__":
    main()
