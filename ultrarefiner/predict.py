"""Lesion masks of new images: `python -m ultrarefiner.predict images=scans output=masks checkpoint=outputs/...`.

Whatever needs torch is imported where it is used, so that `--help`, `--cfg job` and completion are quick.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ultrarefiner import cli
from ultrarefiner.results.safety import Safety
from ultrarefiner.settings import PREDICTING, setting

INTRODUCTION = """\
Segment images with a trained pair of networks, or refine the masks of another tool.

  python -m ultrarefiner.predict images=scans output=predictions        with the pair that ships
  python -m ultrarefiner.predict images=scans output=predictions checkpoint=outputs/busbra/lite/e2e-…
  python -m ultrarefiner.predict images=scans masks=masks_of_another_tool output=refined checkpoint=…

PNG, JPEG, TIFF, BMP and DICOM, in a folder and all below it, or a single file. The output has masks/, probabilities/
(16 bits), overlays/ (coarse mask orange, refined one blue), predictions.csv and lesions.csv. The same command continues
after an interruption. Files that cannot be read are named at the end, with exit status 1."""

VALUES = """\
Values
  images=PATH            a folder of images, or one image
  output=predictions     a new folder for the results
  checkpoint=PATH        a run's directory, one of its checkpoints, or a folder of ultrarefiner.export
  masks=PATH             coarse masks with the names of their images, in place of the coarse network's
  lesions=together       each: redraw each lesion of an image by itself
  tta=[flips,scales]     mean over mirrored and zoomed views, or one of them; none by default
  spacing=0.1            mm per pixel, or [0.1,0.12]: height and width, of images that do not say it
  extras=[probabilities,overlays]  what is written beside masks and tables
  dicom=true             of DICOM images a segmentation (SEG) and a measurement report (SR) as well
  precision=auto         bf16-mixed where it is faster here, else 32-true, or one of both
  batch_size=1, device=auto, backend=torch   (onnx: the file of export format=[onnx], with onnxruntime on the processor)
  safety.KEY=VALUE       as --cfg job prints them; null switches a rule off
  --cfg job              print the composed configuration"""


@dataclass
class PredictConfig:
    """Masks of new images."""

    images: str | None = None
    output: str = "predictions"
    checkpoint: str | None = None
    masks: str | None = None
    lesions: str = setting("together", one_of=("together", "each"))
    tta: Any = None
    spacing: Any = None
    extras: list[str] = field(default_factory=lambda: ["probabilities", "overlays"])
    dicom: bool = False
    batch_size: int = setting(1, at_least=1)
    device: str = "auto"
    precision: str = setting("auto", one_of=PREDICTING)
    backend: str = setting("torch", one_of=("torch", "onnx"))
    safety: Safety = field(default_factory=Safety)


def help_text() -> str:
    """The help page."""
    return cli.help_page(INTRODUCTION, {"safety": "which redrawn masks are rejected"}, VALUES)


def _predict(cfg: DictConfig) -> None:
    from pathlib import Path

    from ultrarefiner.data.scans import CoarseMasks, find_scans
    from ultrarefiner.results.dicom_objects import check_installed, write_objects
    from ultrarefiner.results.prediction import Predictions, alone_in, finish, predict, progress, settled

    warnings.filterwarnings("ignore", module=r"PIL|pydicom|highdicom")  # what is wrong with a file is said at the end
    check_installed(cfg.dicom)
    plain: Any = settled(OmegaConf.to_container(cfg), output := Path(cfg.output).expanduser())
    found = find_scans(cfg.images, output)
    masks = None if cfg.masks is None else CoarseMasks(cfg.masks, cfg.images)
    print(f"{len(found.scans)} images in {cfg.images}, {found.others} other files left alone", flush=True)

    from ultrarefiner.segmenter import Segmenter, checkpoint_file, content_hash

    options = {key: plain[key] for key in ("lesions", "tta", "precision")} | {"safety": Safety(**plain["safety"])}
    segmenter = Segmenter.load(cfg.checkpoint, cfg.device, cfg.backend, **options)
    settings = {key: plain[key] for key in ("lesions", "tta", "spacing", "safety")}
    settings |= {"precision": segmenter.precision, "coarse": "network" if masks is None else "masks"}
    settings["checkpoint"] = content_hash(checkpoint_file(cfg.checkpoint, cfg.backend))
    with alone_in(output), progress(sum(scan.frames for scan in found.scans)) as step:
        results = Predictions(output, settings, plain["spacing"], cfg.extras)
        problems = found.problems + predict(segmenter.batch, found.scans, results, cfg.batch_size, masks, step)
        others = write_objects(found.scans, results, settings, problems) if cfg.dicom else 0
    finish(results, problems, others)


def main() -> None:
    """Console script `ultrarefiner-predict`."""
    ConfigStore.instance().store(name="schema_predict", node=PredictConfig)
    cli.quote_paths("images", "output", "checkpoint", "masks")
    cli.launch(_predict, "predict", help_text)


if __name__ == "__main__":
    main()
