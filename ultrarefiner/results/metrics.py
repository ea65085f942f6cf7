"""What is measured of a mask, at the native size of its image."""

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

METRICS = ("dice", "iou", "hd95", "assd")


def native_mask(logits: Float[Tensor, "1 h w"], shape: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """A mask of the image's own size: the logits resampled, then cut at 0 (probability 0.5)."""
    frame = F.interpolate(logits[None].float(), size=shape, mode="bilinear", align_corners=False)
    return (frame[0, 0] > 0).cpu().numpy()


def overlap(pred: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> dict[str, float]:
    """Dice and IoU in [0, 1]; both are 1 when both masks are empty."""
    common, total = int((pred & truth).sum()), int(pred.sum()) + int(truth.sum())
    if total == 0:
        return {"dice": 1.0, "iou": 1.0}
    return {"dice": 2 * common / total, "iou": common / (total - common)}


def surface(pred: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> dict[str, float]:
    """HD95 (the larger of both directed 95th percentiles) and ASSD, in pixels of the image.

    Both are 0 when both masks are empty. When one of them is, no distance is defined, and leaving the case out would
    reward a network for missing the lesion: the image's diagonal is taken, the largest distance there can be.
    """
    if not pred.any() or not truth.any():
        worst = 0.0 if not pred.any() and not truth.any() else math.hypot(*truth.shape)
        return {"hd95": worst, "assd": worst}
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    y_pred, y = (torch.from_numpy(mask)[None, None] for mask in (pred, truth))
    hd95 = compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95)
    assd = compute_average_surface_distance(y_pred, y, include_background=True, symmetric=True)
    return {"hd95": float(hd95), "assd": float(assd)}


def mean_scores(rows: Iterable[dict], which: str) -> dict[str, float]:
    """The mean of each metric of `which` ("coarse" or "refined") over the cases; empty where none was measured."""
    rows = list(rows)
    return {m: float(np.mean([r[f"{which}_{m}"] for r in rows])) for m in METRICS if rows and f"{which}_{m}" in rows[0]}
