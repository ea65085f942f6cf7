"""The diagrams of an evaluation: every case and every bin is in them, in the right place and colour."""

import numpy as np
import pytest

from ultrarefiner.results import charts, drawing
from ultrarefiner.results.calibration import Reliability


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures as they are when they are written."""
    written: list = []
    save = drawing.save
    monkeypatch.setattr(charts, "save", lambda drawn, out: written.append(drawn) or save(drawn, out))
    return written


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_scatter_counts_better_and_worse_and_draws_each_case(tmp_path, figures):
    coarse = [0.80, 0.80, 0.80, 0.90, float("nan"), 0.85]
    refined = [0.90, 0.75, 0.805, 0.95, 0.5, float("nan")]
    charts.scatter(coarse, refined, tmp_path / "s.png")
    (axes,) = figures[0].axes
    assert labels(axes) == ["within 0.01: 1 (25%)", "better: 2 (50%)", "worse: 1 (25%)"]
    drawn = [tuple(map(float, xy)) for group in axes.collections for xy in group.get_offsets()]
    assert drawn == [(0.8, 0.805), (0.8, 0.9), (0.9, 0.95), (0.8, 0.75)]
    assert axes.get_xlim() == axes.get_ylim() == (0.7, 1.0)
    assert axes.get_title() == "4 cases"


def test_a_missed_lesion_is_on_the_border_and_does_not_squeeze_the_others(tmp_path, figures):
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0.8, 0.95, 200)
    refined = coarse.copy()
    refined[7] = 0.0
    charts.scatter(coarse, refined, tmp_path / "s.png")
    (axes,) = figures[0].axes
    assert axes.get_ylim() == (0.8, 1.0) and axes.get_title() == "200 cases; 1 below 0.8 on the border"
    (worse,) = axes.collections[2].get_offsets()
    assert list(worse) == [coarse[7], 0.8]


def test_reliability_shows_the_bins(tmp_path, figures):
    rng = np.random.default_rng(2)
    prob = rng.random((200, 200))
    found = Reliability(5)
    found.add(prob, rng.random(prob.shape) < prob**2)
    charts.reliability({"refined": found.result(), "nothing": Reliability().result()}, tmp_path / "r.png")
    above, below = figures[0].axes
    perfect, line = above.lines
    assert list(perfect.get_xdata()) == [0, 1]
    result = found.result()
    assert list(line.get_xdata()) == result.confidence and list(line.get_ydata()) == result.frequency
    assert labels(above) == ["perfect", f"refined: ECE {result.ece:.4f}"]
    values, edges, _ = below.patches[0].get_data()
    assert list(values) == [count / prob.size for count in result.counts]
    assert list(edges) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_nothing_to_show_is_a_picture_that_says_so(tmp_path, figures):
    charts.scatter([], [], tmp_path / "s.png")
    charts.scatter([float("nan")], [0.5], tmp_path / "d.png")
    charts.reliability({"coarse": Reliability().result()}, tmp_path / "r.png")
    assert [drawn.texts[0].get_text() for drawn in figures] == ["no cases", "no cases", "no pixels"]
    assert len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_single_case_can_be_drawn(tmp_path, value):
    charts.scatter([value], [value], tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1000
