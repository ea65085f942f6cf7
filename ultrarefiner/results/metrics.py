"""What is measured of a mask, at the native size of its image."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from ultrarefiner.files import number

METRICS = ("dice", "iou", "hd95", "assd")
TOLERANCES_PX = (1, 2, 3, 5, 10)
TOLERANCES_MM = (0.25, 0.5, 1, 2)

Mask = Bool[np.ndarray, "H W"]


def native_mask(logits: Float[Tensor, "1 h w"], shape: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """A mask of the image's own size: the logits resampled, then cut at 0 (probability 0.5)."""
    frame = F.interpolate(logits[None].float(), size=shape, mode="bilinear", align_corners=False)
    return (frame[0, 0] > 0).cpu().numpy()


def scores(
    pred: Mask,
    truth: Mask,
    spacing: tuple[float, float] | None = None,
    tolerances: Sequence[float] = TOLERANCES_PX,
    tolerances_mm: Sequence[float] = TOLERANCES_MM,
) -> dict[str, float]:
    """Everything that is measured of one mask.

    Empty masks as Metrics Reloaded (Maier-Hein et al. 2024) advises: where both masks are empty nothing is defined and
    all is NaN, which no mean counts; where one of them is, overlaps and NSD are 0 and distances the image's diagonal.

    Args:
        pred, truth: of one image.
        spacing: (row, column) in mm, where it is known.
        tolerances, tolerances_mm: of the NSD, in px and in mm.

    Returns:
        "px" (area of pred), "dice", "iou", "precision", "recall", "boundary_iou" in [0, 1], "hd95" and "assd" in px,
        "nsd_2px" … in [0, 1]; with a spacing also "hd95_mm", "assd_mm", "nsd_1mm" ….
    """
    row = {"px": float(pred.sum())} | _areas(pred, truth, math.nan) | {"boundary_iou": boundary_iou(pred, truth)}
    row |= _boundaries(pred, truth, (1.0, 1.0), {f"nsd_{t:g}px": t for t in tolerances}, math.nan)
    if spacing is not None:
        in_mm = _boundaries(pred, truth, spacing, {f"nsd_{t:g}mm": t for t in tolerances_mm}, math.nan)
        row |= {name if name.startswith("nsd") else f"{name}_mm": value for name, value in in_mm.items()}
    return row


def overlap(pred: Mask, truth: Mask) -> dict[str, float]:
    """Dice and IoU in [0, 1]; both are 1 when both masks are empty."""
    found = _areas(pred, truth, 1.0)
    return {name: found[name] for name in ("dice", "iou")}


def surface(pred: Mask, truth: Mask) -> dict[str, float]:
    """HD95 (the larger of both directed 95th percentiles) and ASSD, in pixels of the image.

    Both are 0 when both masks are empty. When one of them is, no distance is defined, and leaving the case out would
    reward a network for missing the lesion: the image's diagonal is taken, the largest distance there can be.
    """
    return _boundaries(pred, truth, (1.0, 1.0), {}, 0.0)


def boundary_iou(pred: Mask, truth: Mask, ratio: float = 0.02) -> float:
    """IoU of the bands inside both outlines, of a width of ``ratio`` × the diagonal (Cheng et al., CVPR 2021)."""
    width = max(1, round(ratio * math.hypot(*truth.shape)))
    one, other = (_rim(mask, np.ones((3, 3), np.uint8), width) for mask in (pred, truth))
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else math.nan


class Distances(NamedTuple):
    """From each boundary pixel of one mask to the nearest of the other: HD95, ASSD and any NSD come of one search."""

    to_truth: Float[np.ndarray, " n"]
    to_pred: Float[np.ndarray, " m"]

    def hd95(self) -> float:
        """The larger of both directed 95th percentiles."""
        return float(max(np.percentile(way, 95) for way in self))

    def assd(self) -> float:
        """The mean over the pixels of both boundaries."""
        return float(np.concatenate(self).mean())

    def nsd(self, tolerance: float) -> float:
        """The share of both boundaries that lies within a tolerance of the other (Nikolov et al. 2018)."""
        return float((np.concatenate(self) <= tolerance * (1 + 1e-9)).mean())  # 3 × 0.1 mm lies within 0.3 mm


def distances(pred: Mask, truth: Mask, spacing: tuple[float, float] = (1.0, 1.0)) -> Distances:
    """The distances between the boundaries of two masks, neither of them empty, in the unit of ``spacing``.

    A pixel is on the boundary if one of its four neighbours, or the outside of the image, is not in the mask.
    """
    from scipy.spatial import KDTree

    one, other = (np.argwhere(_rim(mask, _CROSS)) * np.asarray(spacing, dtype=float) for mask in (pred, truth))
    # Each tree is asked once: large leaves are quicker.
    return Distances(KDTree(other, leafsize=32).query(one)[0], KDTree(one, leafsize=32).query(other)[0])


def mean_scores(rows: Iterable[Mapping[str, Any]], which: str) -> dict[str, float]:
    """The mean of each metric of `which` ("coarse" or "refined") over the cases; empty where none was measured."""
    rows = list(rows)
    return {m: _mean(rows, f"{which}_{m}") for m in METRICS if rows and f"{which}_{m}" in rows[0]}


def summarise(rows: Iterable[Mapping[str, Any]], which: str) -> dict[str, dict[str, float]]:
    """Images with a lesion and normal ones, apart: a mean over both would reward an empty mask.

    Args:
        rows: of cases, also as they are read from a CSV file: "lesion_px", the area of the truth, and `scores` of the
            mask under names such as "refined_dice".
        which: "coarse", "refined" …

    Returns:
        "lesion": "cases", how many were "missed" (an empty mask), and the mean of each metric.
        "normal": "cases", how many were "clean" (an empty mask), and the share of "false_positive".
    """
    rows = list(rows)
    lesion = [row for row in rows if number(row["lesion_px"]) > 0]
    normal = [row for row in rows if number(row["lesion_px"]) == 0]
    missed, clean = (sum(number(row[f"{which}_px"]) == 0 for row in some) for some in (lesion, normal))
    names = [name for name in (rows[0] if rows else ()) if name.startswith(f"{which}_") and name != f"{which}_px"]
    means = {name.removeprefix(f"{which}_"): _mean(lesion, name) for name in names}
    return {
        "lesion": {"cases": len(lesion), "missed": missed, **means},
        "normal": {
            "cases": len(normal),
            "clean": clean,
            "false_positive": 1 - clean / len(normal) if normal else math.nan,
        },
    }


def _areas(pred: Mask, truth: Mask, both_empty: float) -> dict[str, float]:
    common, found, there = int((pred & truth).sum()), int(pred.sum()), int(truth.sum())
    empty = 0.0 if found or there else both_empty

    def ratio(part: int, whole: int) -> float:
        return part / whole if whole else empty

    return {
        "dice": ratio(2 * common, found + there),
        "iou": ratio(common, found + there - common),
        "precision": ratio(common, found),
        "recall": ratio(common, there),
    }


def _boundaries(
    pred: Mask, truth: Mask, spacing: tuple[float, float], tolerances: dict[str, float], both_empty: float
) -> dict[str, float]:
    found, there = bool(pred.any()), bool(truth.any())
    if not (found or there):
        return dict.fromkeys(("hd95", "assd", *tolerances), both_empty)
    if not (found and there):
        worst = math.hypot(truth.shape[0] * spacing[0], truth.shape[1] * spacing[1])
        return {"hd95": worst, "assd": worst} | dict.fromkeys(tolerances, 0.0)
    between = distances(pred, truth, spacing)
    return {"hd95": between.hd95(), "assd": between.assd()} | {n: between.nsd(t) for n, t in tolerances.items()}


_CROSS = np.array([(0, 1, 0), (1, 1, 1), (0, 1, 0)], np.uint8)


def _rim(mask: Mask, kernel: UInt8[np.ndarray, "3 3"], width: int = 1) -> Mask:
    """The pixels of a mask from which the outside, or the border of the image, is ``width`` steps of a kernel away."""
    import cv2

    inner = cv2.erode(mask.astype(np.uint8), kernel, iterations=width, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(mask & (inner == 0))


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean over the cases for which the value is defined."""
    values = np.array([number(row[name]) for row in rows])
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan
