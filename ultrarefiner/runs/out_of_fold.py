"""Real coarse predictions for Phase 2, each by a network that was never trained on the case.

The training cases of the fold are cut into `phase.parts` parts by patient. For each part a coarse network is trained as
in Phase 1 on the other parts, and predicts that one. It knows neither the part nor the fold's test cases; the fold's
validation cases choose its checkpoint, as in every phase. So what Phase 2 sees of a case, whether as the softness and
Dice of its simulated masks or as a mask of its own, is what a coarse network makes of a case that is new to it.

With `phase.early_epochs` the networks see all training cases, and stop so early that they are about as good on these as
Phase 1's own network is on new ones (docs/results.md): that costs a fraction of it. Phase 1's network then predicts the
validation and test cases.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch.utils.data import DataLoader, Subset

from ultrarefiner.data.dataset import Cases, collate
from ultrarefiner.data.failures import fit_bins
from ultrarefiner.data.failures.softness import Softness, dice_of
from ultrarefiner.data.predictions import Predictions
from ultrarefiner.ranks import agreed, rank
from ultrarefiner.runs import checkpoints
from ultrarefiner.runs.assemble import build_phase
from ultrarefiner.runs.build import build, plain
from ultrarefiner.runs.plan import FIT, Run, wants_fit


def add_predictions(run: Run) -> None:
    """Give the data of Phase 2 what `phase.softness`, `phase.bins` and `phase.real_ratio` ask for, if they do.

    Raises:
        UserError: too few predictions have an edge to measure.
    """
    if not run.predictors:
        return
    predictions = run.predictions
    for predictor in run.predictors:
        missing = agreed(run.unpredicted(predictor))
        if missing and rank() == 0:
            _predict(predictor, missing, predictions, run.version(predictor))
    agreed(None)  # the first process has written them
    if run.cfg.phase.real_ratio > 0:
        run.data.predictions = predictions
        if run.cfg.phase.early_epochs and rank() == 0:
            known, new = (_dice(run.data.dataset(part), predictions) for part in ("train", "val"))
            print(f"  coarse Dice, stopped early, training cases: {known:.3f}; Phase 1, validation cases: {new:.3f}")
    fitted: dict[str, Any] = {}
    pairs = list(_pairs(run.data.dataset("train"), predictions)) if wants_fit(run.cfg.phase) else []
    if run.cfg.phase.softness == FIT:
        fitted["softness"] = asdict(Softness.fit(pairs))
    if run.cfg.phase.bins == FIT:
        fitted["bins"] = fit_bins(pairs)
    if fitted:
        run.data.simulator = build(plain(run.cfg.phase.failures) | fitted, "phase.failures")


def _predict(predictor: Run, missing: dict[str, list[int]], predictions: Predictions, version: int = 0) -> None:
    phase = build_phase(predictor.cfg, predictor.kind, {})
    phase.load_state_dict(checkpoints.best(predictor.directory)["state_dict"])
    on_gpu = predictor.cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    phase.to("cuda" if on_gpu else "cpu")
    for part, positions in missing.items():
        cases = Subset(predictor.data.dataset(part), positions)
        for batch in DataLoader(cases, predictor.cfg.phase.batch_size, collate_fn=collate):
            logits = phase.predict(batch)["coarse"].float().cpu().numpy()
            for index, logit in zip(batch["index"], logits, strict=True):
                predictions.save(predictor.data.split.part(part)[int(index)], logit[0], version)


def _dice(cases: Cases, predictions: Predictions) -> float:
    return float(np.mean([dice_of(prob > 0.5, mask) for prob, mask in _pairs(cases, predictions) if mask.any()]))


def _pairs(
    cases: Cases, predictions: Predictions
) -> Iterator[tuple[Float[np.ndarray, "C C"], Bool[np.ndarray, "C C"]]]:
    for case in cases.cases:
        mask = cases.source.coarse.mask(cases.source.positions[case.key])
        yield predictions.load(case, len(mask)), mask
