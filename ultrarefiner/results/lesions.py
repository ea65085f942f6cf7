"""Lesion by lesion: which were found, how well, and what was found where there is none."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool


class Lesions(NamedTuple):
    """The lesions of one image.

    Attributes:
        dice: of each lesion of the truth, with the lesion that was matched to it; 0 where it was missed.
        false_positives: lesions of the prediction that match none.
    """

    dice: tuple[float, ...]
    false_positives: int


def match(pred: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"], iou: float = 0.1) -> Lesions:
    """Match lesions one to one, so that the sum of their IoU is largest; pixels that touch by a corner are one lesion.

    Args:
        pred, truth: of one image.
        iou: a lesion is found if its IoU with the lesion matched to it is larger than this, in [0, 1).
    """
    from scipy.ndimage import label
    from scipy.optimize import linear_sum_assignment

    (found, n_found), (there, n_there) = (label(mask, np.ones((3, 3))) for mask in (pred, truth))
    # common[i, j]: the pixels of lesion i of the truth and j of the prediction; 0 is the background of either.
    pairs = there.ravel().astype(np.int64) * (n_found + 1) + found.ravel()
    common = np.bincount(pairs, minlength=(n_there + 1) * (n_found + 1)).reshape(n_there + 1, n_found + 1)
    areas = common.sum(1)[1:, None] + common.sum(0)[None, 1:]
    common = common[1:, 1:]
    overlap = common / (areas - common)
    overlap[overlap <= iou] = 0
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    dice = np.zeros(n_there)
    dice[rows] = np.where(overlap[rows, columns] > 0, 2 * common[rows, columns] / areas[rows, columns], 0)
    return Lesions(tuple(dice.tolist()), n_found - int((dice > 0).sum()))


def summarise(images: Iterable[Lesions]) -> dict[str, float]:
    """Over all images, normal ones included.

    Returns:
        "images", "lesions", "found"; "detection_rate", the share of lesions found; "false_positives" and
        "false_positives_per_image"; "dice", the mean over lesions, 0 for a missed one, and "dice_found" over those that
        were found. NaN where nothing was counted.
    """
    images = list(images)
    dice = np.array([value for image in images for value in image.dice])
    found, false = dice[dice > 0], sum(image.false_positives for image in images)
    return {
        "images": len(images),
        "lesions": len(dice),
        "found": len(found),
        "detection_rate": len(found) / len(dice) if len(dice) else math.nan,
        "false_positives": false,
        "false_positives_per_image": false / len(images) if images else math.nan,
        "dice": float(dice.mean()) if len(dice) else math.nan,
        "dice_found": float(found.mean()) if len(found) else math.nan,
    }
