"""The pictures of a run: its curves, a sheet of cases with what was drawn on them, and the same for a single image.

Pure functions from data to a PNG file or an array. They make matplotlib figures directly and touch no global state of
it, so they may be called from a training loop, from several threads, or where there is no display.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Num, UInt8, UInt16

from ultrarefiner.files import number
from ultrarefiner.results.drawing import COLOURS, GREEN, GREY, figure, notice, save, style
from ultrarefiner.results.tables import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_PANEL, _GAP, _LINE, _MARGIN = 2.2, 0.06, 0.27, 0.36  # inches: a panel's width, between panels, a line of text, left

Series = tuple[list[float], list[float]]
Mask = Bool[np.ndarray, "H W"]


class Overlay(NamedTuple):
    """A row of `overlay_sheet`; a plain tuple of the same six does as well."""

    title: str
    image: Num[np.ndarray, "H W"]  # 8 bit, or a float in [0, 1]
    truth: Mask
    coarse: Mask | None
    refined: Mask | None
    caption: str


def curves(
    metrics_csv: Path,
    out: Path,
    baseline: Mapping[str, float] = MappingProxyType({}),
    best_epoch: int | None = None,
    freeze_epochs: int = 0,
) -> None:
    """Draw the loss, the validation Dice and the learning rates of a run against the epoch; the first epoch is 1.

    Args:
        metrics_csv: as Lightning's CSVLogger writes it: columns epoch (from 0), train/loss, val/loss, val/coarse/dice,
            val/refined/dice, lr…, with blanks where a row has nothing to say. A panel without data is left out.
        out: the PNG to write.
        baseline: Dice of the masks ("coarse", "refined") before end-to-end training, drawn as horizontal lines.
        best_epoch: whose weights were kept, counted from 0 as in summary.json; -1 for none.
        freeze_epochs: in how many epochs, from the first, a network did not move.
    """
    columns = _read_columns(Path(metrics_csv))
    dice = {name: columns.get(f"val/{name}/dice") for name in ("coarse", "refined")}
    panels: dict[str, dict[str, Series]] = {
        "loss": {name: columns[name] for name in ("train/loss", "val/loss") if name in columns},
        "validation Dice": {name: series for name, series in dice.items() if series},
        "learning rate": {name: series for name, series in columns.items() if name.startswith("lr")},
    }
    panels = {title: series for title, series in panels.items() if series}

    width, height = max(4.2 * len(panels), 4.2), 3.2
    drawn = figure(width, height)
    # Margins in inches that every number fits into: to measure what is drawn takes as long as to draw it.
    drawn.subplots_adjust(0.65 / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.3 / height, wspace=0.8 / 3.4)
    if not panels:
        return save(notice(drawn, "no metrics yet"), out)
    for axes, (title, lines) in zip(np.atleast_1d(drawn.subplots(1, len(panels))), panels.items(), strict=True):
        others = cycle((GREY, "black", GREEN))
        for name, (epochs, values) in lines.items():
            colour = COLOURS.get(name) or next(others)
            axes.plot(epochs, values, color=colour, label=name, linewidth=1.6, marker="o", markersize=2.5)
        for name, value in baseline.items() if title == "validation Dice" else ():
            if math.isfinite(value):
                label = f"{name} before {value:.3f}"
                axes.axhline(value, color=COLOURS[name], linewidth=1.2, linestyle="--", label=label)
        _mark_epochs(axes, max(max(epochs) for epochs, _ in lines.values()), best_epoch, freeze_epochs)
        style(axes, title, "epoch")
        if title == "learning rate" and max(max(values) for _, values in lines.values()) > 0:
            axes.set_yscale("log", nonpositive="mask")
    return save(drawn, out)


def overlay(
    image: Num[np.ndarray, "H W *rgb"], coarse: Mask | None, refined: Mask | None, truth: Mask | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """The image in RGB with the outlines of masks on it, at its own size, in the colours of `COLOURS`.

    The line runs over the outermost pixels of the mask, refined over coarse over truth.

    Args:
        image: grey (H,W) or RGB (H,W,3); 8 bit, or a float in [0, 1].
        coarse, refined, truth: masks of its size; None or empty draws nothing.
    """
    import cv2

    pixels = image if image.dtype == np.uint8 else np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    canvas = np.ascontiguousarray(np.dstack([pixels] * 3) if pixels.ndim == 2 else pixels.copy())
    width = max(1, round(math.hypot(*image.shape[:2]) / 600))
    for name, mask in (("truth", truth), ("coarse", coarse), ("refined", refined)):
        if mask is not None:
            outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
            colour = tuple(int(COLOURS[name][k : k + 2], 16) for k in (1, 3, 5))
            cv2.polylines(canvas, outlines, True, colour, width, cv2.LINE_AA)
            for dot in (line[0, 0] for line in outlines if len(line) == 1):  # a single pixel, of which no line is made
                cv2.circle(canvas, [int(at) for at in dot], width, colour, -1, cv2.LINE_AA)
    return canvas


def png(pixels: UInt8[np.ndarray, "H W *rgb"] | UInt16[np.ndarray, "H W"]) -> bytes:
    """A picture, grey or RGB, as the content of a PNG file."""
    import cv2

    done, content = cv2.imencode(".png", pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    assert done
    return content.tobytes()


def overlay_sheet(rows: Sequence[Overlay | tuple[Any, ...]], out: Path, labels: Sequence[str] | None = None) -> None:
    """Draw cases one below the other, each as image | truth | coarse | refined, with contours over the image.

    The truth is drawn thinly under each prediction as well. A column that no row has a mask for is left out.

    Args:
        rows: the cases, see `Overlay`; the caption stands at the right, above the images.
        out: the PNG to write.
        labels: what each row shows; if not given, worst, median and best, in the order of `pick_worst_median_best`.
    """
    cases = [Overlay(*row) for row in rows]
    if not cases:
        return save(notice(figure(4.2, 1.0), "no cases"), out)
    drawn_ones = [name for name in ("coarse", "refined") if any(getattr(case, name) is not None for case in cases)]
    names = ["image", "truth", *drawn_ones]
    heights = [_PANEL * min(max(c.image.shape[0] / c.image.shape[1], 0.3), 2.0) for c in cases]
    width = _MARGIN + len(names) * (_PANEL + _GAP)
    height = _LINE + sum(heights) + len(cases) * (_LINE + _GAP)
    drawn = figure(width, height)
    axes = drawn.add_axes((0, 0, 1, 1))  # one for all panels, in inches: each would cost as much as an image
    axes.set_axis_off()

    def write(x: float, y: float, text: str, **look: Any) -> None:
        drawn.text(x / width, 1 - y / height, one_line(text, 56), parse_math=False, **look)

    for column, name in enumerate(names):
        x = _MARGIN + column * (_PANEL + _GAP) + _PANEL / 2
        write(x, _LINE / 2, name, color=COLOURS.get(name, "black"), ha="center", va="center", weight="bold", size=10)
    top = _LINE
    for case, label, tall in zip(cases, labels or rank_labels(len(cases)), heights, strict=True):
        write(_MARGIN, top + _LINE - 0.05, case.title, ha="left", va="bottom", size=8)
        write(width - _GAP, top + _LINE - 0.05, case.caption, ha="right", va="bottom", size=8, color="#444444")
        top += _LINE
        write(_MARGIN / 2, top + tall / 2, label, rotation=90, ha="center", va="center", color=GREY, size=9)
        for column, name in enumerate(names):
            _draw_panel(axes, case, name, _MARGIN + column * (_PANEL + _GAP), top, tall)
        top += tall + _GAP
    axes.set(xlim=(0, width), ylim=(height, 0))
    return save(drawn, out)


def pick_worst_median_best(values: Sequence[float], n_each: int) -> list[int]:
    """Indices of the n_each lowest, the n_each around the median and the n_each highest values, in ascending order.

    Values that are not finite have no rank and are left out. Where there are fewer than 3 · n_each, it is all of them.
    """
    numbers = np.asarray(values, dtype=float)
    ranked = [int(index) for index in np.argsort(numbers, kind="stable") if np.isfinite(numbers[index])]
    if len(ranked) <= 3 * n_each:
        return ranked
    middle = (len(ranked) - n_each) // 2
    return ranked[:n_each] + ranked[middle : middle + n_each] + ranked[-n_each:]


def pick_most_harmed(before: Sequence[float], after: Sequence[float], n: int) -> list[int]:
    """Indices of at most n cases whose value fell, those that fell most first."""
    change = np.subtract(after, before)
    return [int(index) for index in np.argsort(change, kind="stable")[:n] if change[index] < 0]


def rank_labels(count: int) -> list[str]:
    """What the rows that `pick_worst_median_best` chose are called."""
    outer = (count + 1) // 3
    return ["worst"] * outer + ["median"] * (count - 2 * outer) + ["best"] * outer


def worth_a_look(rows: Sequence[Mapping[str, Any]], judged_by: str) -> list[tuple[int, str]]:
    """The positions of two cases of each kind, and of which: worst, median and best Dice of a mask, and harmed most."""
    picked = pick_worst_median_best([row[f"{judged_by}_dice"] for row in rows], 2)
    chosen = list(zip(picked, rank_labels(len(picked)), strict=True))
    if rows and {"coarse_dice", "refined_dice"} <= rows[0].keys():
        before, after = ([row[f"{mask}_dice"] for row in rows] for mask in ("coarse", "refined"))
        chosen += [(i, "harmed most") for i in pick_most_harmed(before, after, 2) if i not in picked]
    return chosen


def _read_columns(path: Path) -> dict[str, Series]:
    """Of every column with a finite number in it: the epochs from 1 and the values, without the blanks."""
    columns: dict[str, Series] = {}
    with path.open(newline="") as file:
        for position, row in enumerate(csv.DictReader(file)):
            epoch = number(row.get("epoch"))
            for name, text in row.items():
                value = number(text)
                if isinstance(name, str) and name not in ("epoch", "step") and math.isfinite(value):
                    epochs, values = columns.setdefault(name, ([], []))
                    epochs.append((epoch if math.isfinite(epoch) else position) + 1)
                    values.append(value)
    return columns


def _draw_panel(axes: Axes, case: Overlay, name: str, left: float, top: float, tall: float) -> None:
    white = 255 if case.image.dtype == np.uint8 else 1
    place = (left, left + _PANEL, top + tall, top)
    panel = axes.imshow(case.image, cmap="gray", vmin=0, vmax=white, aspect="auto", extent=place)
    mask = None if name == "image" else getattr(case, name)
    if mask is None:
        if name != "image":
            axes.text(left + _PANEL / 2, top + tall / 2, "none", ha="center", va="center", color="white", size=8)
        return
    if name != "truth":
        _draw_contour(panel, case.truth, GREEN, 0.9)
    _draw_contour(panel, mask, COLOURS[name], 1.4)


def _draw_contour(panel: AxesImage, mask: Mask, colour: str, width: float) -> None:
    # A frame of background closes the contour of what touches the border.
    padded = np.pad(np.asarray(mask, dtype=np.float32), 1)
    if padded.any():
        from matplotlib.patches import Rectangle

        left, right, bottom, top = panel.get_extent()
        x = left + (np.arange(-1, mask.shape[1] + 1) + 0.5) * (right - left) / mask.shape[1]
        y = top + (np.arange(-1, mask.shape[0] + 1) + 0.5) * (bottom - top) / mask.shape[0]
        lines = panel.axes.contour(x, y, padded, levels=[0.5], colors=[colour], linewidths=width)
        lines.set_clip_path(Rectangle((left, top), right - left, bottom - top, transform=panel.axes.transData))


def _mark_epochs(axes: Axes, last: float, best: int | None, frozen: int) -> None:
    """The axis of the epochs, from 1 also where there is only one; on it the frozen ones and the best."""
    from matplotlib.ticker import MaxNLocator

    if 0 < frozen < last:
        axes.axvspan(0.5, frozen + 0.5, color=GREY, alpha=0.15, linewidth=0, label=f"frozen until epoch {frozen}")
    if best is not None and 0 <= best < last:
        axes.axvline(best + 1, color=GREY, linewidth=1.2, linestyle=":", label=f"best epoch {best + 1}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, last + 0.5)
