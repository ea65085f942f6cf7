"""The two pictures of a run: its curves, and a sheet of cases with what was drawn on them.

Pure functions from data to a PNG file. They make matplotlib figures directly and touch no global state of it, so they
may be called from a training loop, from several threads, or where there is no display.
"""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Num

from ultrarefiner.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers; see also Wong, Nature Methods 8, 441 (2011).
GREEN, ORANGE, BLUE, VERMILION, GREY = "#009E73", "#E69F00", "#56B4E9", "#D55E00", "#777777"
COLOURS = {"truth": GREEN, "coarse": ORANGE, "refined": BLUE, "lr/coarse": ORANGE, "lr/sam": BLUE}

_DPI = 110
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


def curves(metrics_csv: Path, out: Path, baseline: float | None = None) -> None:
    """Draw the loss, the validation Dice and the learning rates of a run against the epoch.

    Args:
        metrics_csv: as Lightning's CSVLogger writes it: columns epoch, train/loss, val/coarse/dice, val/refined/dice,
            lr…, with blanks where a row has nothing to say. A panel without data is left out.
        out: the PNG to write.
        baseline: Dice of the coarse network before it was trained end to end, drawn as a horizontal line.
    """
    columns = _read_columns(Path(metrics_csv))
    dice = {name: columns.get(f"val/{name}/dice") for name in ("coarse", "refined")}
    panels: dict[str, dict[str, Series]] = {
        "loss": {name: columns[name] for name in ("train/loss", "val/loss") if name in columns},
        "validation Dice": {name: series for name, series in dice.items() if series},
        "learning rate": {name: series for name, series in columns.items() if name.startswith("lr")},
    }
    panels = {title: series for title, series in panels.items() if series}

    figure = _figure(max(4.2 * len(panels), 4.2), 3.2, layout="constrained")
    if not panels:
        return _save(_notice(figure, "no metrics yet"), out)
    for axes, (title, lines) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        others = cycle((GREY, VERMILION, GREEN))
        for name, (epochs, values) in lines.items():
            colour = COLOURS.get(name) or next(others)
            axes.plot(epochs, values, color=colour, label=name, linewidth=1.6, marker="o", markersize=2.5)
        if title == "validation Dice" and baseline is not None and math.isfinite(baseline):
            axes.axhline(baseline, color=VERMILION, linewidth=1.2, linestyle="--", label=f"baseline {baseline:.3f}")
        _style(axes, title)
        if title == "learning rate" and max(max(values) for _, values in lines.values()) > 0:
            axes.set_yscale("log", nonpositive="mask")
    return _save(figure, out)


def overlay_sheet(rows: Sequence[Overlay | tuple], out: Path) -> None:
    """Draw cases one below the other, each as image | truth | coarse | refined, with contours over the image.

    The truth is drawn thinly under each prediction as well. Rows in the order of `pick_worst_median_best` are labelled
    worst, median and best. A column that no row has a mask for is left out.

    Args:
        rows: the cases, see `Overlay`; the caption stands at the right, above the images.
        out: the PNG to write.
    """
    cases = [Overlay(*row) for row in rows]
    if not cases:
        return _save(_notice(_figure(4.2, 1.0), "no cases"), out)
    names = [
        "image",
        "truth",
        *(name for name in ("coarse", "refined") if any(getattr(c, name) is not None for c in cases)),
    ]
    heights = [_PANEL * min(max(c.image.shape[0] / c.image.shape[1], 0.3), 2.0) for c in cases]
    width = _MARGIN + len(names) * (_PANEL + _GAP)
    height = _LINE + sum(heights) + len(cases) * (_LINE + _GAP)
    figure = _figure(width, height)

    def write(x: float, y: float, text: str, **style) -> None:
        figure.text(x / width, 1 - y / height, _one_line(text), parse_math=False, **style)

    for column, name in enumerate(names):
        x = _MARGIN + column * (_PANEL + _GAP) + _PANEL / 2
        write(x, _LINE / 2, name, color=COLOURS.get(name, "black"), ha="center", va="center", weight="bold", size=10)
    top = _LINE
    for case, label, tall in zip(cases, _labels(len(cases)), heights, strict=True):
        write(_MARGIN, top + _LINE - 0.05, case.title, ha="left", va="bottom", size=8)
        write(width - _GAP, top + _LINE - 0.05, case.caption, ha="right", va="bottom", size=8, color="#444444")
        top += _LINE
        write(_MARGIN / 2, top + tall / 2, label, rotation=90, ha="center", va="center", color=GREY, size=9)
        for column, name in enumerate(names):
            left = _MARGIN + column * (_PANEL + _GAP)
            axes = figure.add_axes((left / width, 1 - (top + tall) / height, _PANEL / width, tall / height))
            axes.set_axis_off()
            _draw_panel(axes, case, name)
        top += tall + _GAP
    return _save(figure, out)


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


def _labels(count: int) -> list[str]:
    """What the rows that `pick_worst_median_best` chose are called."""
    outer = (count + 1) // 3
    return ["worst"] * outer + ["median"] * (count - 2 * outer) + ["best"] * outer


def _read_columns(path: Path) -> dict[str, Series]:
    """Of every column with a finite number in it: the epochs and the values, without the blanks."""
    columns: dict[str, Series] = {}
    with path.open(newline="") as file:
        for position, row in enumerate(csv.DictReader(file)):
            epoch = _number(row.get("epoch"))
            for name, text in row.items():
                value = _number(text)
                if isinstance(name, str) and name not in ("epoch", "step") and math.isfinite(value):
                    epochs, values = columns.setdefault(name, ([], []))
                    epochs.append(epoch if math.isfinite(epoch) else position)
                    values.append(value)
    return columns


def _number(text: object) -> float:
    """NaN for what is no number, for instance the rest of a line that was cut off."""
    try:
        return float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _draw_panel(axes: Axes, case: Overlay, name: str) -> None:
    white = 255 if case.image.dtype == np.uint8 else 1
    axes.imshow(case.image, cmap="gray", vmin=0, vmax=white, aspect="equal")
    axes.autoscale(False)
    mask = None if name == "image" else getattr(case, name)
    if mask is None:
        if name != "image":
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color="white", size=8)
        return
    if name != "truth":
        _draw_contour(axes, case.truth, GREEN, 0.9)
    _draw_contour(axes, mask, COLOURS[name], 1.4)


def _draw_contour(axes: Axes, mask: Mask, colour: str, width: float) -> None:
    # A frame of background closes the contour of what touches the border.
    padded = np.pad(np.asarray(mask, dtype=np.float32), 1)
    if padded.any():
        y, x = (np.arange(-1, side + 1) for side in mask.shape)
        axes.contour(x, y, padded, levels=[0.5], colors=[colour], linewidths=width)


def _style(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10)
    axes.set_xlabel("epoch", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def _one_line(text: str, longest: int = 56) -> str:
    """A name as one line of bounded length: line breaks and tabs become spaces, too much is cut out of the middle."""
    line = "".join(c if c.isprintable() else " " for c in text).strip()
    half = longest // 2
    return line if len(line) <= longest else f"{line[: half - 1]}…{line[-half:]}"


def _figure(width: float, height: float, **more) -> Figure:
    """A figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, facecolor="white", **more)


def _notice(figure: Figure, text: str) -> Figure:
    figure.text(0.5, 0.5, text, ha="center", va="center", color=GREY)
    return figure


def _save(figure: Figure, out: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that matplotlib's own font lacks shows boxes; that is no reason for alarm.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        FigureCanvasAgg(figure).print_png(picture)
    write_atomically(Path(out), picture.getvalue())
