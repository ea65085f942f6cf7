"""Every case of a part, measured at its native size."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from ultrarefiner.ranks import gather
from ultrarefiner.results import metrics

Rows = list[dict[str, Any]]
MASKS = ("coarse", "refined")
Predict = Callable[[dict[str, Any]], dict[str, Tensor]]
"""Batch → the logits (B,1,·,·) of each mask: "coarse", "refined"."""


def native_masks(predict: Predict, batch: dict[str, Any]) -> list[dict[str, Bool[np.ndarray, "H W"]]]:
    """The native masks of each case of a batch: "truth", and what is predicted ("coarse", "refined")."""
    masks = predict(batch)
    return [
        {"truth": truth} | {which: metrics.native_mask(logits[i], truth.shape) for which, logits in masks.items()}
        for i, truth in enumerate(batch["native_mask"])
    ]


def evaluate(predict: Predict, loader: Iterable[dict[str, Any]]) -> Rows:
    """One row for each case, in order.

    Its index, the area of its lesion ("lesion_px", 0 in a normal image), and of every mask its area, such as
    "refined_px", and every metric, such as "refined_hd95" (image px). In a normal image these are NaN, which no mean
    counts: an empty mask would be a Dice of 1 there.

    Args:
        predict: see `Predict`.
        loader: batches of an evaluation part.
    """
    rows: Rows = []
    for batch in loader:
        for index, masks in zip(batch["index"], native_masks(predict, batch), strict=True):
            row: dict[str, Any] = {"index": int(index), "lesion_px": int(masks["truth"].sum())}
            for which in MASKS:
                if which in masks:
                    scores = dict.fromkeys(metrics.METRICS, math.nan)
                    if row["lesion_px"]:
                        scores = metrics.overlap(masks[which], masks["truth"])
                        scores |= metrics.surface(masks[which], masks["truth"])
                    row[f"{which}_px"] = int(masks[which].sum())
                    row |= {f"{which}_{name}": value for name, value in scores.items()}
            rows.append(row)
    return sorted(gather(rows), key=lambda row: row["index"])
