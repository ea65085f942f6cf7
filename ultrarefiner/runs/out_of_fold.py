"""Real coarse predictions for Phase 2, each by a network that was never trained on the case.

The training cases of the fold are cut into `phase.parts` parts by patient. For each part a coarse network is trained as
in Phase 1 on the other parts, and predicts that one. It knows neither the part nor the fold's test cases; the fold's
validation cases choose its checkpoint, as in every phase. So what Phase 2 sees of a case, whether as the softness of
its simulated masks or as a mask of its own, is what a coarse network makes of a case that is new to it.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from omegaconf import DictConfig, open_dict
from torch.utils.data import DataLoader, Subset

from ultrarefiner.data.datamodule import DataModule
from ultrarefiner.data.dataset import Cases, collate
from ultrarefiner.data.failures.softness import Softness
from ultrarefiner.data.predictions import Predictions
from ultrarefiner.files import load
from ultrarefiner.phases.coarse import CoarsePhase
from ultrarefiner.ranks import agreed, rank
from ultrarefiner.runs import checkpoints
from ultrarefiner.runs.build import build, build_data, build_phase, plain
from ultrarefiner.runs.start import FIT, earlier_phase, require_run, wants_predictions


def add_predictions(
    cfg: DictConfig, data: DataModule, directory: Path, run: Callable[[DictConfig, bool], Path]
) -> None:
    """Give the data of Phase 2 what `phase.softness` and `phase.real_ratio` ask for; nothing where they do not.

    Args:
        cfg: the composed configuration.
        data: of the run.
        directory: of the run; the predictions are kept in its folder predictions/.
        run: runs an experiment, or finds it finished, and returns its directory.

    Raises:
        UserError: with `upstream=require`, a network is missing; too few predictions have an edge to measure.
    """
    if not wants_predictions(cfg.phase):
        return
    predictions = Predictions(directory / "predictions", cfg.phase.real_ratio)
    for part in range(cfg.phase.parts):
        _predict_part(_earlier(cfg, part), predictions, run)
    if cfg.phase.real_ratio > 0:
        data.predictions = predictions
    if cfg.phase.softness == FIT:
        softness = Softness.fit(_pairs(data.dataset("train"), predictions))
        data.simulator = build(plain(cfg.phase.failures) | {"softness": asdict(softness)}, "phase.failures")


def _earlier(cfg: DictConfig, part: int) -> DictConfig:
    earlier = earlier_phase(cfg, "coarse")
    with open_dict(earlier):
        earlier.dataset.without = [part, cfg.phase.parts]
    return earlier


def _predict_part(cfg: DictConfig, predictions: Predictions, run: Callable[[DictConfig, bool], Path]) -> None:
    data = build_data(cfg, CoarsePhase)
    missing = agreed([i for i, case in enumerate(data.split.held) if not predictions.path(case).is_file()])
    if not missing:  # a run that was interrupted later
        return
    if cfg.upstream == "require":
        require_run(cfg, "coarse")
    best = run(cfg, True) / "checkpoints" / checkpoints.BEST
    if rank() == 0:
        _predict(cfg, data, missing, load(best)["state_dict"], predictions)
    agreed(None)  # the first process has written them


def _predict(
    cfg: DictConfig, data: DataModule, missing: list[int], weights: dict[str, torch.Tensor], predictions: Predictions
) -> None:
    phase = build_phase(cfg, CoarsePhase, {})
    phase.load_state_dict(weights)
    on_gpu = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    phase.to("cuda" if on_gpu else "cpu").eval()
    held = Subset(data.dataset("held"), missing)
    for batch in DataLoader(held, cfg.phase.batch_size, collate_fn=collate):
        with torch.inference_mode():
            image = {"coarse_image": batch["coarse_image"].to(phase.device)}
            logits = phase.masks(image)["coarse"].float().cpu().numpy()
        for index, logit in zip(batch["index"], logits, strict=True):
            predictions.save(data.split.held[int(index)], logit[0])


def _pairs(
    cases: Cases, predictions: Predictions
) -> Iterator[tuple[Float[np.ndarray, "C C"], Bool[np.ndarray, "C C"]]]:
    for case in cases.cases:
        mask = cases.source.coarse.mask(cases.source.positions[case.key])
        yield predictions.load(case, len(mask)), mask
