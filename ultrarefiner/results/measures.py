"""What is measured of lesions: how many there are, how large, and where."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

MEASURES = ("area", "longest", "perpendicular", "centre_x", "centre_y", "x1", "y1", "x2", "y2")

Mask = Bool[np.ndarray, "H W"]


class Lesion(NamedTuple):
    """One lesion of an image: its box, cut out, and where that lies, px."""

    mask: Mask
    top: int
    left: int

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of its area, px; 0 is the left and the top edge of the image."""
        rows, columns = np.nonzero(self.mask)
        return float(columns.mean()) + self.left + 0.5, float(rows.mean()) + self.top + 0.5


def numbered(mask: Mask) -> tuple[Int[np.ndarray, "H W"], int]:
    """The number of the lesion that each pixel belongs to, 1 the largest, 0 none; and how many there are.

    Pixels that touch by a corner are one lesion.
    """
    from scipy.ndimage import label

    labels, count = label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    ranks = np.zeros(count + 1, int)
    ranks[1 + np.argsort(-areas, kind="stable")] = np.arange(1, count + 1)
    return ranks[labels], count


def separate(mask: Mask) -> list[Lesion]:
    """The lesions of a mask, the largest first; see `numbered`."""
    from scipy.ndimage import find_objects

    labels, _ = numbered(mask)
    boxes = enumerate(find_objects(labels), 1)
    return [Lesion(labels[box] == number, box[0].start, box[1].start) for number, box in boxes]


def measure(lesion: Lesion | Mask, spacing: tuple[float, float] = (1.0, 1.0)) -> dict[str, float]:
    """The size and the place of one lesion, in the unit of ``spacing``.

    Lengths go from edge to edge, so a single pixel is 1 long; 0 is the left and the top edge of the image.

    Args:
        lesion: it, or a mask of the whole image that is not empty.
        spacing: (row, column): the height and width of a pixel.

    Returns:
        "area"; "longest", the largest distance between two points of its outline; "perpendicular", the longest line
        across the lesion's convex hull at a right angle to that one; "centre_x", "centre_y", of its area; "x1", "y1",
        "x2", "y2", its box.
    """
    mask, top, left = lesion if isinstance(lesion, Lesion) else (lesion, 0, 0)
    rows, columns = np.nonzero(mask)
    corners = np.add([(columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)], (left, top))
    places = np.array([Lesion(mask, top, left).centre, *corners]) * spacing[::-1]
    values = (len(rows) * math.prod(spacing), *diameters(outline(mask) * spacing[::-1]), *places.ravel().tolist())
    return dict(zip(MEASURES, values, strict=True))


def describe(lesion: Lesion | None, spacing: tuple[float, float] | None, area: int = 0) -> dict[str, str]:
    """`measure` in px and in mm, as the cells of a table: "longest_px", "longest_mm", …; blank where it is not known.

    Args:
        lesion: one lesion; None where there is none.
        spacing: (row, column) in mm, where it is known.
        area: of all lesions, px, in place of this one's.
    """
    cells = {}
    for unit, pixel in (("px", (1.0, 1.0)), ("mm", spacing)):
        values = {} if lesion is None or pixel is None else measure(lesion, pixel)
        if values and pixel and area:
            values["area"] = area * math.prod(pixel)
        for name in MEASURES:
            cells[f"{name}_{unit}{'2' * (name == 'area')}"] = f"{round(values[name], 3):.12g}" if values else ""
    return cells


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
