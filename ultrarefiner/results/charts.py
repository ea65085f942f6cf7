"""Diagrams of an evaluation: is the probability right, and what did refinement change. Data in, a PNG file out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultrarefiner.results.calibration import Calibration
from ultrarefiner.results.drawing import BLUE, GREY, ORANGE, VERMILION, figure, notice, save, style
from ultrarefiner.results.statistics import MARGIN

Values = Sequence[float] | NDArray[Any]


def reliability(named: dict[str, Calibration], out: Path) -> None:
    """How often pixels of a probability are lesion, against that probability; below it how many pixels there are.

    Args:
        named: of each mask, such as "coarse" and "refined".
        out: the PNG to write.
    """
    named = {name: found for name, found in named.items() if found.pixels}
    if not named:
        return save(notice(figure(4.2, 4.2), "no pixels"), out)
    drawn = figure(4.6, 5.2, layout="constrained")
    above, below = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfect")
    for (name, found), colour in zip(named.items(), (ORANGE, BLUE, VERMILION, GREY), strict=False):
        label = f"{name}: ECE {found.ece:.4f}"
        above.plot(
            found.confidence, found.frequency, color=colour, marker="o", markersize=4, linewidth=1.6, label=label
        )
        edges = np.linspace(0, 1, len(found.counts) + 1)
        below.stairs(np.asarray(found.counts) / found.pixels, edges, color=colour, linewidth=1.6)
    below.set(yscale="log", xlim=(0, 1))
    above.set(ylim=(0, 1))
    style(above, "reliability", "", "share that is lesion")
    style(below, "", "predicted probability of lesion", "share of pixels")
    return save(drawn, out)


def scatter(coarse: Values, refined: Values, out: Path, margin: float = MARGIN) -> None:
    """The refined Dice of each case against its coarse Dice; above the diagonal it got better.

    Args:
        coarse, refined: Dice of the same cases; where one is NaN, the case is left out.
        out: the PNG to write.
        margin: a case whose Dice changed by more is called better or worse.
    """
    pairs = np.array([coarse, refined], dtype=float)
    x, y = pairs[:, np.isfinite(pairs).all(0)]
    if not x.size:
        return save(notice(figure(4.2, 4.2), "no cases"), out)
    drawn = figure(4.6, 4.8, layout="constrained")
    axes = drawn.subplots()
    # A missed lesion has Dice 0; all others would share a corner of the picture with it in the frame.
    lowest = min(0.9, math.floor(10 * np.quantile(np.minimum(x, y), 0.02)) / 10)
    below = int(((x < lowest) | (y < lowest)).sum())
    axes.plot([lowest, 1], [lowest, 1], color=GREY, linewidth=1)
    better, worse = y - x > margin, x - y > margin
    kinds = (
        (f"within {margin:g}", ~(better | worse), GREY, "o"),
        ("better", better, BLUE, "^"),
        ("worse", worse, VERMILION, "v"),
    )
    for name, which, colour, marker in kinds:
        left, up = np.maximum((x[which], y[which]), lowest)
        label = f"{name}: {which.sum()} ({which.mean():.0%})"
        axes.scatter(left, up, s=16, c=colour, marker=marker, alpha=0.7, linewidths=0, label=label, clip_on=False)
    axes.set(xlim=(lowest, 1), ylim=(lowest, 1), aspect="equal")
    note = f"; {below} below {lowest:g} on the border" if below else ""
    style(axes, f"{len(x)} cases{note}", "coarse Dice", "refined Dice")
    return save(drawn, out)
