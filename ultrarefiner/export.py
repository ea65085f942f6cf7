"""A trained pair for others: `python -m ultrarefiner.export checkpoint=outputs/busbra/lite/e2e-… output=pair`.

Whatever needs torch is imported where it is used, so that `--help`, `--cfg job` and completion are quick.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from ultrarefiner import cli

INTRODUCTION = """\
Put the networks of a finished run into a folder that works anywhere, and that a model hub takes as it is.

  python -m ultrarefiner.export checkpoint=outputs/busbra/lite/e2e-… output=pair
  python -m ultrarefiner.predict checkpoint=pair images=scans output=predictions

The folder has the weights as .safetensors, which say how their networks are built and what they have seen, and a
README.md that is a model card: data, folds, figures, licences, intended use and limits. With format=[onnx] or
format=[export] the whole pipeline lies beside them as one file that runs without this package."""

VALUES = """\
Values
  checkpoint=PATH        the directory of a finished run, a folder of this command, or shipped
  output=DIR             a new folder
  format=[safetensors]   beside the weights: onnx writes model.onnx, export model.pt2 (torch.export), for any batch;
                         int8 writes model.int8.onnx too, the fastest on a processor
  coarse=[DIR,...]       further runs, whose coarse networks are averaged with this one's: of other seeds or folds, say
  mirrored=true          coarse networks also see the mirrored image: one more pass of them, none of SAM
  share=0.5              of SAM's logits in the final ones, in place of the gate of the training: less harms fewer masks
  bits=16                of each weight: 32, 16, or 8; what that changes, tests/test_export.py bounds
  --cfg job              print the composed configuration"""


@dataclass
class ExportConfig:
    """A folder with a trained pair."""

    checkpoint: str | None = None
    output: str | None = None
    coarse: list[str] = field(default_factory=list)
    mirrored: bool = False
    share: float | None = None
    bits: int = 16
    format: list[str] = field(default_factory=lambda: ["safetensors"])


def help_text() -> str:
    """The help page."""
    return cli.help_page(INTRODUCTION, {}, VALUES)


def _export(cfg: DictConfig) -> None:
    from ultrarefiner.errors import UserError

    for key in ("checkpoint", "output"):
        if cfg[key] is None:
            raise UserError(f"{key}=PATH is missing; see --help")
    if unknown := set(cfg.format) - {"safetensors", "onnx", "int8", "export"}:
        raise UserError(f"format must be of safetensors, onnx, int8, export, got {', '.join(sorted(unknown))}")
    from ultrarefiner.extras import imported

    for package in ("onnx", "onnxscript", "onnxruntime") if {"onnx", "int8"} & set(cfg.format) else ():
        imported(package, package, "onnx")  # before anything is written
    from ultrarefiner.runs.checkpoints import located
    from ultrarefiner.runs.pack import pack

    run, *others = (located(path) for path in (cfg.checkpoint, *cfg.coarse))
    output = Path(cfg.output).expanduser()
    more = (lambda folder: _graphs(folder, cfg.format)), others, cfg.mirrored, cfg.share
    for path in pack(run, output, cfg.bits, *more):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


def _graphs(folder: Path, formats: Sequence[str]) -> list[Path]:
    """The pipeline whose weights lie in a folder, as one file of each format."""
    if not {"onnx", "int8", "export"} & set(formats):
        return []
    from ultrarefiner.files import INT8, ONNX, PROGRAM
    from ultrarefiner.models import graph
    from ultrarefiner.segmenter import Segmenter

    segmenter = Segmenter.load(folder, "cpu")
    program = graph.trace(segmenter.cascade, segmenter.coarse_size, segmenter.image_size)
    written = []
    if "export" in formats:
        written.append(folder / PROGRAM)
        graph.write_program(program, written[-1])
    if {"onnx", "int8"} & set(formats):
        written.append(folder / ONNX)
        graph.write_onnx(program, written[-1])
    if "int8" in formats:
        written.append(folder / INT8)
        graph.write_int8(folder / ONNX, written[-1])
    return written


def main() -> None:
    """Console script `ultrarefiner-export`."""
    ConfigStore.instance().store(name="schema_export", node=ExportConfig)
    cli.quote_paths("checkpoint", "output")
    cli.launch(_export, "export", help_text)


if __name__ == "__main__":
    main()
