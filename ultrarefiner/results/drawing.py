"""What all pictures share: colours, figures without a display, and PNG files that are whole or not there."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarefiner.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers; see also Wong, Nature Methods 8, 441 (2011).
GREEN, ORANGE, BLUE, VERMILION, GREY = "#009E73", "#E69F00", "#56B4E9", "#D55E00", "#777777"
COLOURS = {"truth": GREEN, "coarse": ORANGE, "refined": BLUE, "lr/coarse": ORANGE, "lr/sam": BLUE}
DPI = 110


def figure(width: float, height: float, **more: Any) -> Figure:
    """A figure of a size in inches, which no global state of matplotlib knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", **more)


def notice(drawn: Figure, text: str) -> Figure:
    """A figure that only says why there is nothing to see."""
    drawn.text(0.5, 0.5, text, ha="center", va="center", color=GREY)
    return drawn


def style(axes: Axes, title: str, x: str, y: str = "") -> None:
    """The look of every diagram: a light grid, no frame, a legend where lines have names."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def save(drawn: Figure, out: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that matplotlib's own font lacks shows boxes; that is no reason for alarm.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        drawn.savefig(picture, format="png")
    write_atomically(Path(out), picture.getvalue())
