"""A trained pair for others: `python -m ultrarefiner.export checkpoint=outputs/busbra/lite/e2e-… output=pair`.

Whatever needs torch is imported where it is used, so that `--help`, `--cfg job` and completion are quick.
"""

from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from ultrarefiner import cli

INTRODUCTION = """\
Put the networks of a finished run into a folder that works anywhere, and that a model hub takes as it is.

  python -m ultrarefiner.export checkpoint=outputs/busbra/lite/e2e-… output=pair
  python -m ultrarefiner.predict checkpoint=pair images=scans output=predictions

The folder has the weights as .safetensors, which say how their networks are built and what they have seen, and a
README.md that is a model card: data, folds, figures, licences, intended use and limits."""

VALUES = """\
Values
  checkpoint=PATH        the directory of a finished run
  output=DIR             a new folder
  half=true              weights of 16 bits: half the size; what that changes, tests/test_export.py bounds
  --cfg job              print the composed configuration"""


@dataclass
class ExportConfig:
    """A folder with a trained pair."""

    checkpoint: str | None = None
    output: str | None = None
    half: bool = True


def help_text() -> str:
    """The help page."""
    return cli.help_page(INTRODUCTION, {}, VALUES)


def _export(cfg: DictConfig) -> None:
    from ultrarefiner.errors import UserError
    from ultrarefiner.runs.pack import pack

    for key in ("checkpoint", "output"):
        if cfg[key] is None:
            raise UserError(f"{key}=PATH is missing; see --help")
    output = Path(cfg.output).expanduser()
    for path in pack(Path(cfg.checkpoint).expanduser(), output, cfg.half):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """Console script `ultrarefiner-export`."""
    ConfigStore.instance().store(name="schema_export", node=ExportConfig)
    cli.quote_paths("checkpoint", "output")
    cli.launch(_export, "export", help_text)


if __name__ == "__main__":
    main()
