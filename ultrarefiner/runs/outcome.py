"""What a run leaves behind beside its checkpoints: networks to use elsewhere, tables, pictures and a summary."""

import json
import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from ultrarefiner.data.dataset import collate
from ultrarefiner.data.seen import Seen
from ultrarefiner.errors import UserError
from ultrarefiner.files import save, write_csv, write_json
from ultrarefiner.models.lora import merge_lora
from ultrarefiner.models.weights import SAFETENSORS, write_state_dict
from ultrarefiner.phases.phase import Phase
from ultrarefiner.results import pictures, statistics
from ultrarefiner.results.evaluation import MASKS, Rows, native_masks
from ultrarefiner.results.metrics import mean_scores
from ultrarefiner.runs import checkpoints, provenance, tracking
from ultrarefiner.runs.build import plain
from ultrarefiner.runs.plan import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """All that is known when a run has been measured.

    Attributes:
        run: what was run.
        phase: with its best weights.
        results: the rows of `evaluate` for "val" and "test".
        baseline: the same before training, in a phase that is compared with them; else empty.
        seen: the images that its weights know, its own and those of all that they started from.
        steps: the first and the last step, counted from the first phase that it builds on.
        best_epoch: the one whose weights were kept, from 0.
        epochs: how many there were.
    """

    run: Run
    phase: Phase
    results: dict[str, Rows]
    baseline: dict[str, Rows]
    seen: Seen
    steps: tuple[int, int]
    best_epoch: int
    epochs: int

    def write(self, loggers: list[Logger], step: int) -> None:
        """Write everything but the summary, and give the loggers what they take; `step` is counted in this phase."""
        folder = self.run.directory / "checkpoints"
        _save_networks(self.phase, folder)
        write_csv(self.run.directory / "cases.csv", self.cases)
        tracking.log_pictures(loggers, self._draw(), step)
        tracking.log_checkpoint(loggers, folder / checkpoints.BEST, self.run.title)
        for logger in loggers:
            logger.log_metrics(_flat_scores(self.summary), step)

    def finish(self, history: dict[str, Any]) -> None:
        """Write the summary, the last of all: a directory with a summary is a finished run."""
        write_json(self.run.directory / "summary.json", self.summary | {"run": history})

    @cached_property
    def cases(self) -> list[dict[str, Any]]:
        """The rows of cases.csv."""
        return _cases(self.run, self.results["test"], self.baseline.get("test"))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What was measured, on what, with what."""
        return {
            "title": self.run.title,
            "baseline": {part: _scores(rows) for part, rows in self.baseline.items()} or None,
            **{part: _scores(rows) for part, rows in self.results.items()},
            "normal": _normal(self.results["test"]),
            "differences": _differences(self.cases),
            "best_epoch": self.best_epoch,
            "epochs": self.epochs,
            "first_step": self.steps[0],
            "last_step": self.steps[1],
            "seen": self._seen(),
            "data": self.run.data.describe(),
            "environment": provenance.environment(),
            "config": plain(self.run.cfg),
        }

    def _seen(self) -> dict[str, Any] | None:
        """How many test cases the weights knew before, ours and a publisher's, and the first; see `allow_seen`."""
        refiner = self.phase.cascade.refiner
        published = getattr(refiner.sam, "trained_on", ()) if refiner is not None else ()
        known = {case.key: case for case in self.run.data.known("test", self.seen)}
        known |= {case.key: case for case in self.run.data.split.test if case.dataset in published}
        return {"test_cases": len(known), "first": next(iter(known.values())).id} if known else None

    def _draw(self) -> dict[str, Path]:
        """The curves of the training, and a sheet of test cases."""
        data, directory, phase, rows = self.run.data, self.run.directory, self.phase, self.results["test"]
        drawn = {"curves": directory / "curves.png", "overlays": directory / "overlays.png"}
        baseline = {name: scores["dice"] for name, scores in _scores(self.baseline.get("val", [])).items()}
        freeze = self.run.cfg.protection.freeze_epochs if self.baseline else 0
        pictures.curves(directory / "metrics.csv", drawn["curves"], baseline, self.best_epoch, freeze)
        test = data.dataset("test", native=True)
        sheet, labels = [], []
        for position, label in pictures.worth_a_look(rows, phase.judged_by):
            index = rows[position]["index"]
            masks = native_masks(phase.predict, collate([test[index]]))[0]
            case = data.split.test[index]
            try:
                image, _ = data.reader.read(case)
            except UserError as error:  # all else is in the cache, and hours of training are not lost for a picture
                log.warning("%s is not among the overlays: %s", case.id, error)
                continue
            caption = "  ".join(f"{w} {rows[position][f'{w}_dice']:.3f}" for w in MASKS if w in masks)
            labels.append(label)
            sheet.append((case.id, image, masks["truth"], masks.get("coarse"), masks.get("refined"), f"Dice {caption}"))
        pictures.overlay_sheet(sheet, drawn["overlays"], labels)
        return drawn


def _save_networks(phase: Phase, folder: Path) -> None:
    """The best weights of each network under its publisher's own names, for us and for other programs.

    The .safetensors file also says what the network is; see `checkpoints.said_of`.
    """
    cascade = phase.cascade
    networks = {"coarse": cascade.coarse, "sam": None if cascade.refiner is None else cascade.refiner.sam}
    if cascade.gate is not None and cascade.gate.state_dict():  # trained with SAM, and no part of its file
        save(cascade.gate.state_dict(), folder / f"best_sam{checkpoints.GATE}")
    for name, network in networks.items():
        if network is not None:
            state = merge_lora(network) if name == "sam" else network.state_dict()  # the publisher knows no LoRA
            said = {key: json.dumps(value) for key, value in phase.carried.items()}
            said["licence"] = str(getattr(network, "licence", "unknown"))
            for ending in (".pth", SAFETENSORS):
                write_state_dict(state, folder / f"best_{name}{ending}", said)


def _cases(run: Run, rows: Rows, baseline: Rows | None) -> list[dict[str, Any]]:
    """A row for each test case: who it is, and every metric of every mask."""
    found = []
    for position, row in enumerate(rows):
        case = run.data.split.test[row["index"]]
        about = {"id": case.id, "patient": case.patient, "dataset": case.dataset, "label": case.label}
        scores = {} if baseline is None else baseline[position]
        before = {f"baseline_{name}": value for name, value in scores.items() if name.startswith(MASKS)}
        found.append({name: value for name, value in (about | row | before).items() if name != "index"})
    return found


def _differences(cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Paired differences of Dice over the test cases: what refining adds, and what end-to-end training added."""
    known = set(cases[0]) if cases else set()
    pairs = {"refined - coarse": ("coarse_dice", "refined_dice")}
    pairs |= {f"{mask} - baseline_{mask}": (f"baseline_{mask}_dice", f"{mask}_dice") for mask in MASKS}
    return {
        name: statistics.paired(statistics.values(cases, before), statistics.values(cases, after))._asdict()
        for name, (before, after) in pairs.items()
        if {before, after} <= known
    }


def _scores(rows: Rows) -> dict[str, dict[str, float]]:
    """mask → metric → mean over the cases."""
    return {which: scores for which in MASKS if (scores := mean_scores(rows, which))}


def _normal(rows: Rows) -> dict[str, Any] | None:
    """How many test images show no lesion, and in how many of them each mask is empty as well; None if all show one."""
    normal = [row for row in rows if not row["lesion_px"]]
    if not normal:
        return None
    clean = {which: sum(not row[f"{which}_px"] for row in normal) for which in MASKS if f"{which}_px" in rows[0]}
    return {"cases": len(normal), "clean": clean}


def _flat_scores(summary: dict[str, Any]) -> dict[str, float]:
    return {
        f"best/{part}/{which}/{name}": value
        for part in ("val", "test")
        for which, values in summary[part].items()
        for name, value in values.items()
        if math.isfinite(value)
    }
