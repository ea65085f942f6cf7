"""What is measured of lesions: how many there are, how large, and where."""

import math

import numpy as np
from jaxtyping import Bool, Float

Mask = Bool[np.ndarray, "H W"]
EIGHT = np.ones((3, 3), int)
"""Pixels that touch by a corner are one lesion."""


def separate(mask: Mask) -> list[Mask]:
    """The lesions of a mask, the largest first; pixels that touch by a corner are one lesion."""
    from scipy.ndimage import label

    labels, count = label(mask, EIGHT)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return [labels == number + 1 for number in np.argsort(-areas, kind="stable")]


def measure(mask: Mask, spacing: tuple[float, float] = (1.0, 1.0)) -> dict[str, float]:
    """The size and the place of one lesion, in the unit of ``spacing``.

    Lengths go from edge to edge, so a single pixel is 1 long; 0 is the left and the top edge of the image.

    Args:
        mask: the lesion; not empty.
        spacing: (row, column): the height and width of a pixel.

    Returns:
        "area"; "longest", the largest distance between two points of its outline; "perpendicular", the longest line
        across the lesion's convex hull at a right angle to that one; "centre_x", "centre_y", of its area; "x1", "y1",
        "x2", "y2", its box.
    """
    down, across = spacing
    rows, columns = np.nonzero(mask)
    longest, perpendicular = diameters(outline(mask) * (across, down))
    return {
        "area": len(rows) * down * across,
        "longest": longest,
        "perpendicular": perpendicular,
        "centre_x": (float(columns.mean()) + 0.5) * across,
        "centre_y": (float(rows.mean()) + 0.5) * down,
        "x1": float(columns.min()) * across,
        "y1": float(rows.min()) * down,
        "x2": float(columns.max() + 1) * across,
        "y2": float(rows.max() + 1) * down,
    }


def describe(lesion: Mask | None, spacing: tuple[float, float] | None, area: int = 0) -> dict[str, str]:
    """`measure` in px and in mm, as the cells of a table: "longest_px", "longest_mm", …; blank where it is not known.

    Args:
        lesion: one lesion; None where there is none.
        spacing: (row, column) in mm, where it is known.
        area: of all lesions, px, in place of this one's.
    """
    in_px = _NOTHING if lesion is None else measure(lesion)
    in_mm = _NOTHING if lesion is None or spacing is None else measure(lesion, spacing)
    if area and lesion is not None:
        in_px = in_px | {"area": float(area)}
        in_mm = in_mm | {"area": area * math.prod(spacing)} if spacing else in_mm
    names = {name: (f"{name}_px2" if name == "area" else f"{name}_px") for name in _NOTHING}
    cells: dict[str, str] = {names[name]: _cell(value) for name, value in in_px.items()}
    return cells | {names[name].replace("px", "mm"): _cell(value) for name, value in in_mm.items()}


def outline(mask: Mask) -> Float[np.ndarray, "n 2"]:
    """The convex hull of a mask as (x, y) in px: the middles of those edges of its pixels that lie outermost."""
    import cv2

    points = cv2.findNonZero(mask.astype(np.uint8)).reshape(-1, 2)
    hull = cv2.convexHull(points).reshape(-1, 2).astype(float) + 0.5
    middles = (hull[:, None] + np.array([(-0.5, 0), (0.5, 0), (0, -0.5), (0, 0.5)])).reshape(-1, 2)
    return np.asarray(cv2.convexHull(middles.astype(np.float32)).reshape(-1, 2), dtype=float)


def diameters(hull: Float[np.ndarray, "n 2"]) -> tuple[float, float]:
    """The longest diameter of a convex polygon, and the longest line in it at a right angle to that."""
    between = hull[:, None] - hull[None]
    lengths = np.hypot(between[..., 0], between[..., 1])
    start, end = np.unravel_index(lengths.argmax(), lengths.shape)
    longest = float(lengths[start, end])
    u, v = (hull[end] - hull[start]) / longest
    along, aside = ((hull - hull[start]) @ np.array([[u, -v], [v, u]])).T
    # Both chains from end to end, as functions of the way along the diameter; between corners the width is linear.
    widths = np.zeros(len(hull))
    for sign in (1, -1):
        chain = np.flatnonzero((sign * aside >= 0) | np.isin(np.arange(len(hull)), (start, end)))
        chain = chain[np.lexsort((sign * aside[chain], along[chain]))]
        widths += sign * np.interp(along, along[chain], aside[chain])
    return longest, float(widths.max())


_NOTHING = dict.fromkeys(("area", "longest", "perpendicular", "centre_x", "centre_y", "x1", "y1", "x2", "y2"), math.nan)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{round(value, 3):.12g}"
