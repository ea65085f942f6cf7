"""From the configuration of `evaluate` to a finished folder: which images, which masks, and have they been seen."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from omegaconf import DictConfig

from ultrarefiner.data.cache import shown
from ultrarefiner.data.cases import PARTS, Case
from ultrarefiner.data.datamodule import DataModule
from ultrarefiner.data.seen import Seen
from ultrarefiner.data.tool_masks import ToolMasks
from ultrarefiner.errors import UserError
from ultrarefiner.files import sha256
from ultrarefiner.models.cascade import Cascade
from ultrarefiner.results.assessment import Assessment, Drawn
from ultrarefiner.runs import checkpoints, provenance
from ultrarefiner.runs.build import build_fold, plain
from ultrarefiner.runs.start import require_unseen
from ultrarefiner.segmenter import Segmenter

FRAME = 224
"""Side of the frames in the cache where no checkpoint says another, px; nothing is measured on them."""


class Artist:
    """Draws the masks that are measured.

    Args:
        segmenter: None where a tool's masks are measured as they are.
        tool: masks that take the coarse network's place.
    """

    def __init__(self, segmenter: Segmenter | None, tool: ToolMasks | None) -> None:
        self.segmenter, self.tool, self.coarse_alone = segmenter, tool, None
        if segmenter is not None and tool is None and segmenter.cascade.refiner is not None:
            # The pipeline tells the coarse mask but not its probabilities; the coarse network is the cheap part of it.
            alone = Cascade(segmenter.cascade.coarse)
            self.coarse_alone = Segmenter(alone, segmenter.image_size, segmenter.coarse_size, str(segmenter.device))

    def __call__(self, cases: list[Case], images: list[UInt8[np.ndarray, "H W"]]) -> list[Drawn]:
        """The masks of some cases."""
        given = None
        if self.tool is not None:
            given = [self.tool.read(case, image.shape) for case, image in zip(cases, images, strict=True)]
        drawn: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [({}, {}, {}) for _ in cases]
        for (masks, probs, _), prob in zip(drawn, given or (), strict=False):
            masks["coarse"] = prob > 0.5
            if ((prob > 0) & (prob < 1)).any():
                probs["coarse"] = prob
        if self.segmenter is not None:
            for (masks, probs, about), found in zip(drawn, self.segmenter.batch(images, given), strict=True):
                masks.setdefault("coarse", found.coarse)
                if found.iou is None:
                    probs["coarse"] = found.probability
                else:
                    masks["refined"] = found.mask
                    probs["refined"] = found.probability
                    about |= {"predicted_iou": found.iou, "uncertainty": found.uncertainty}
        if self.coarse_alone is not None:
            for (_, probs, _), found in zip(drawn, self.coarse_alone.batch(images), strict=True):
                probs["coarse"] = found.probability
        return [Drawn(*one) for one in drawn]


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
    if cfg.checkpoint is not None:
        segmenter = Segmenter.load(cfg.checkpoint, cfg.device)
        path = Path(cfg.checkpoint).expanduser()
        file = path / "checkpoints" / checkpoints.BEST if path.is_dir() else path
        said = checkpoints.said_of(file)
        if segmenter.cascade.coarse is None and cfg.predictions is None:
            raise UserError(
                f"{file} has no coarse network (phase=sam): give predictions=FOLDER, coarse masks to refine"
            )
    cfg.fold = cfg.fold if cfg.fold is not None else said["config"].get("fold", 0) if said else 0
    folder = _folder(cfg, file)
    data = build_fold(cfg, segmenter.coarse_size if segmenter else FRAME)
    parts = PARTS if cfg.split == "all" else (cfg.split,)
    cases = [case for part in parts for case in data.split.part(part)]
    if not cases:
        raise UserError(f"{data.reader.name} has no {cfg.split} cases in fold={cfg.fold}: give another split")
    seen = _seen(cfg, data, parts, segmenter, said)
    tool = None if cfg.predictions is None else ToolMasks(cfg.predictions, cases)
    settings = {
        "checkpoint": None if file is None else sha256(file),
        "predictions": None if tool is None else str(tool.folder.resolve()),
        "data": data.store.fingerprint,
    }
    measured = {name: plain(cfg[name]) for name in ("tolerances", "tolerances_mm", "spacing")}
    assessment = Assessment(folder, settings, **measured, keep_pictures=cfg.pictures)
    marks = {case.key: sha256(tool.paths[case.key]) if tool else "" for case in cases}
    todo = [case for case in cases if not assessment.has(case, marks[case.key])]
    artist = Artist(segmenter, tool)
    for start in shown(range(0, len(todo), cfg.batch_size), -(-len(todo) // cfg.batch_size), "Measuring"):
        some = todo[start : start + cfg.batch_size]
        images, truths = map(list, zip(*map(data.reader.read, some), strict=True))
        for case, image, truth, drawn in zip(some, images, truths, artist(some, images), strict=True):
            assessment.add(case, image, truth, drawn, marks[case.key])
    about = {
        "title": f"{cfg.predictions or file} on {data.reader.name} ({cfg.split}, fold {cfg.fold})",
        "checkpoint": None if file is None else str(file),
        "predictions": cfg.predictions,
        "dataset": data.reader.name,
        "fold": cfg.fold,
        "split": cfg.split,
        "seen": seen,
        "settings": assessment.settings,
        "trained": said.get("config"),
        "environment": provenance.environment(),
        "config": plain(cfg),
    }
    return assessment.finish(cases, about, lambda case: data.reader.read(case)[0]), folder


def _folder(cfg: DictConfig, file: Path | None) -> Path:
    if cfg.output is not None:
        return Path(cfg.output).expanduser()
    if cfg.predictions is None and file is not None and file.parent.name == "checkpoints":
        return file.parent.parent / "evaluation" / f"{cfg.dataset.name}-fold{cfg.fold}-{cfg.split}"
    raise UserError("say where the results go: output=FOLDER")


def _seen(
    cfg: DictConfig, data: DataModule, parts: tuple[str, ...], segmenter: Segmenter | None, said: dict[str, Any]
) -> dict[str, Any] | None:
    """The images that the checkpoint knows, its own training's and a publisher's, for every table."""
    if segmenter is None:
        return None
    seen = Seen.of_lists(said["seen"]) if said else Seen()
    known = require_unseen(data, parts, f"checkpoint={cfg.checkpoint}", seen, cfg.allow_seen)
    refiner = segmenter.cascade.refiner
    published = getattr(refiner.sam, "trained_on", ()) if refiner is not None else ()
    known += [case for part in parts for case in data.split.part(part) if case.dataset in published]
    found = {case.key: case for case in known}
    return {"cases": len(found), "first": next(iter(found.values())).id} if found else None
