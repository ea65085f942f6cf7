"""From the configuration of `evaluate` to a finished folder: which images, which masks, and have they been seen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from omegaconf import DictConfig

from ultrarefiner.data.cache import shown
from ultrarefiner.data.cases import PARTS, Case
from ultrarefiner.data.datamodule import DataModule
from ultrarefiner.data.folds import Split
from ultrarefiner.data.mask_files import NamedMasks
from ultrarefiner.data.seen import Seen
from ultrarefiner.errors import UserError
from ultrarefiner.files import sha256
from ultrarefiner.models.sam_families import FAMILIES
from ultrarefiner.precision import AUTO
from ultrarefiner.results import report
from ultrarefiner.results.assessment import LINES, Assessment, Drawn, read_lines
from ultrarefiner.results.safety import Safety
from ultrarefiner.runs import checkpoints, provenance
from ultrarefiner.runs.assemble import build_fold
from ultrarefiner.runs.build import plain
from ultrarefiner.runs.start import require_unseen
from ultrarefiner.segmenter import Segmenter, checkpoint_file, content_hash

FRAME = 224
"""Side of the frames in the cache where no checkpoint says another, px; nothing is measured on them."""


def assess(cfg: DictConfig) -> tuple[dict[str, Any], Path]:
    """Measure what is not measured yet, and sum it up.

    Returns:
        The content of summary.json, and the folder it lies in.

    Raises:
        UserError: a mistake in the configuration, the data or the masks, or the checkpoint has seen the images.
    """
    if cfg.checkpoint is None and cfg.predictions is None:
        raise UserError("give checkpoint=RUN_OR_FILE, predictions=FOLDER with masks, or both to refine these masks")
    segmenter, file, said = None, None, {}
    pipeline = {"lesions": cfg.lesions, "tta": plain(cfg.tta), "safety": plain(cfg.safety)}
    if cfg.checkpoint is not None:
        file = checkpoint_file(cfg.checkpoint)
        said = checkpoints.said_of(file)
    cfg.fold = cfg.fold if cfg.fold is not None else said["config"].get("fold", 0) if said else 0
    folder = _folder(cfg, file)
    if file is not None:
        precision = cfg.precision
        if precision == AUTO and (folder / LINES).is_file():  # measured anew it may be another
            precision = read_lines(folder / LINES)[0].get("precision", precision)
        options = pipeline | {"safety": Safety(**pipeline["safety"]), "precision": precision}
        segmenter = Segmenter.load(cfg.checkpoint, cfg.device, **options)
        pipeline["precision"] = segmenter.precision
        if segmenter.cascade.coarse is None and cfg.predictions is None:
            raise UserError(f"{file} has no coarse network (phase=sam): give predictions=FOLDER, masks to refine")
    data = build_fold(cfg, segmenter.coarse_size if segmenter else FRAME)
    parts = PARTS if cfg.split == "all" else (cfg.split,)
    cases = [case for part in parts for case in data.split.part(part)]
    if not cases:
        raise UserError(f"{data.reader.name} has no {cfg.split} cases in fold={cfg.fold}: give another split")
    seen = _seen(cfg, data, parts, segmenter, said)
    tool = None if cfg.predictions is None else _tool(cfg, data, cases)
    settings = {
        "checkpoint": None if file is None else content_hash(file),
        "predictions": None if tool is None else str(tool.folder.resolve()),
        "data": data.store.fingerprint,
        **(pipeline if segmenter else {}),
    }
    measured = {name: plain(cfg[name]) for name in ("tolerances", "tolerances_mm", "spacing")}
    assessment = Assessment(folder, settings, **measured, keep_pictures=cfg.pictures)
    # The data's fingerprint knows nothing of what else the table says, such as the size of a pixel.
    marks = {
        case.key: (sha256(tool.parts["test"][case.key][0]) if tool else "") + (repr(case.about) if case.about else "")
        for case in cases
    }
    todo = [case for case in cases if not assessment.has(case, marks[case.key])]
    batches = [todo[start : start + cfg.batch_size] for start in range(0, len(todo), cfg.batch_size)]
    draw = Artist(segmenter, tool)
    for some in shown(batches, len(batches), "Measuring"):
        images, truths = map(list, zip(*map(data.reader.read, some), strict=True))
        for case, image, truth, drawn in zip(some, images, truths, draw(some, images), strict=True):
            assessment.add(case, image, truth, drawn, marks[case.key])
    about = {
        "title": f"{cfg.predictions or file} on {data.reader.name} ({cfg.split}, fold {cfg.fold})",
        "checkpoint": None if file is None else str(file),
        **{name: cfg[name] for name in ("predictions", "fold", "split", "data_root")},
        "dataset": cfg.dataset.name,
        "seen": seen,
        "settings": assessment.settings,
        "trained": said.get("config"),
        "trained_on": said.get("ultrarefiner", {}).get("data"),
        "environment": provenance.environment(),
    }
    content = assessment.finish(cases, about, lambda case: data.reader.read(case)[0])
    report.write_markdown(folder, content)
    return content, folder


class Artist:
    """Draws the masks that are measured.

    Args:
        segmenter: None where a tool's masks are measured as they are.
        tool: masks that take the coarse network's place.
    """

    def __init__(self, segmenter: Segmenter | None, tool: NamedMasks | None) -> None:
        self.segmenter, self.tool = segmenter, tool

    def __call__(self, cases: Sequence[Case], images: Sequence[UInt8[np.ndarray, "_ _"]]) -> list[Drawn]:
        """The masks of some cases."""
        drawn = [Drawn({}, {}, {}) for _ in cases]
        given = None
        if self.tool is not None:
            given = [self.tool.native(case, image.shape) for case, image in zip(cases, images, strict=True)]
            for one, prob in zip(drawn, given, strict=True):
                one.masks["coarse"] = prob > 0.5
                if ((prob > 0) & (prob < 1)).any():
                    one.probs["coarse"] = prob
        if self.segmenter is None:
            return drawn
        redraws = self.segmenter.cascade.refiner is not None
        for one, found in zip(drawn, self.segmenter.batch(images, given), strict=True):
            one.masks.setdefault("coarse", found.coarse)
            if self.tool is None:
                one.probs["coarse"] = found.coarse_probability
            if redraws:
                one.probs["accepted"] = found.probability
                one.masks["refined"] = found.coarse if found.refined is None else found.refined
                one.masks["accepted"] = found.mask
                one.about.update(predicted_iou=found.iou, uncertainty=found.uncertainty, rejected=found.reason)
        return drawn


def _tool(cfg: DictConfig, data: DataModule, cases: Sequence[Case]) -> NamedMasks:
    """The masks of these cases in a folder."""
    folder = Path(cfg.predictions).expanduser()
    if not folder.is_dir():
        raise UserError(f"predictions={folder} is no folder: give the one that holds the masks")
    tool = NamedMasks(folder, key="predictions")
    tool.check(Split((), (), tuple(cases)), data.coarse_size, data.sizes)
    return tool


def _folder(cfg: DictConfig, file: Path | None) -> Path:
    if cfg.output is not None:
        return Path(cfg.output).expanduser()
    if cfg.predictions is None and file is not None and file.parent.name == "checkpoints":
        return file.parent.parent / "evaluation" / f"{cfg.dataset.name}-fold{cfg.fold}-{cfg.split}"
    raise UserError("say where the results go: output=FOLDER")


def _seen(
    cfg: DictConfig, data: DataModule, parts: Sequence[str], segmenter: Segmenter | None, said: dict[str, Any]
) -> dict[str, Any] | None:
    """The images that the checkpoint knows, of its own training and of a publisher's, for every table."""
    if segmenter is None or not said:
        return None
    seen = Seen.of_lists(said["seen"])
    known = require_unseen(data, parts, f"checkpoint={cfg.checkpoint}", seen, cfg.allow_seen)
    sam = said["config"]["model"]["sam"]
    from_publisher = segmenter.cascade.refiner is not None and not sam.get("random_init")
    published = FAMILIES[sam["family"]].trained_on if from_publisher and sam.get("family") in FAMILIES else ()
    known += [case for part in parts for case in data.split.part(part) if case.dataset in published]
    found = {case.key: case for case in known}
    return {"test_cases": len(found), "first": next(iter(found.values())).id} if found else None
