"""Every case of a part, measured at its native size."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from ultrarefiner.phases.phase import Phase
from ultrarefiner.ranks import gather
from ultrarefiner.results import metrics

Draw = Callable[[dict[str, Any]], dict[str, torch.Tensor]]


@torch.inference_mode()
def predict(phase: Phase, batch: dict[str, Any], draw: Draw | None = None) -> list[dict[str, Bool[np.ndarray, "H W"]]]:
    """The native masks of each case of a batch: "truth", and what the phase draws ("coarse", "refined")."""
    phase.eval()
    on_device = {k: _like(phase, v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    masks = (draw or phase.masks)(on_device)
    return [
        {"truth": truth} | {which: metrics.native_mask(logits[i], truth.shape) for which, logits in masks.items()}
        for i, truth in enumerate(batch["native_mask"])
    ]


def _like(phase: Phase, x: torch.Tensor) -> torch.Tensor:
    """A tensor where the phase is, in its precision (trainer.precision=64-true)."""
    weight = next(phase.parameters())
    return x.to(weight) if x.is_floating_point() else x.to(weight.device)


def evaluate(phase: Phase, loader: Iterable[dict[str, Any]], draw: Draw | None = None) -> list[dict[str, Any]]:
    """One row for each case, in order: its index, and every metric of every mask, such as "refined_hd95" (image px).

    Args:
        phase: with the weights to judge.
        loader: batches of an evaluation part.
        draw: batch -> logits by name; `phase.masks` if not given.
    """
    rows: list[dict[str, Any]] = []
    for batch in loader:
        for index, masks in zip(batch["index"], predict(phase, batch, draw), strict=True):
            row: dict[str, Any] = {"index": int(index)}
            for which in ("coarse", "refined"):
                if which in masks:
                    scores = metrics.overlap(masks[which], masks["truth"])
                    scores |= metrics.surface(masks[which], masks["truth"])
                    row |= {f"{which}_{name}": value for name, value in scores.items()}
            rows.append(row)
    return sorted(gather(rows), key=lambda row: row["index"])
