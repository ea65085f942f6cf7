"""How large lesions are and where, against shapes whose measures are known and against a plain search."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from ultrarefiner.results.measures import describe, diameters, measure, numbered, outline, separate


def ellipse(a: float, b: float, degrees: float, size: int = 300) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size / 2
    t = math.radians(degrees)
    return ((x * np.cos(t) + y * np.sin(t)) / a) ** 2 + ((y * np.cos(t) - x * np.sin(t)) / b) ** 2 <= 1


@pytest.mark.parametrize(("a", "b"), [(60, 30), (100, 12), (40, 39)])
@pytest.mark.parametrize("degrees", [0, 20, 45, 90, 137])
def test_an_ellipse(a, b, degrees):
    found = measure(ellipse(a, b, degrees))
    assert found["area"] == pytest.approx(math.pi * a * b, rel=0.01)
    assert found["longest"] == pytest.approx(2 * a, abs=1.5)
    assert found["perpendicular"] == pytest.approx(2 * b, abs=3)  # the axis of a near circle turns easily
    assert found["centre_x"] == pytest.approx(150.5, abs=0.1) and found["centre_y"] == pytest.approx(150.5, abs=0.1)


def test_in_mm_a_pixel_need_not_be_square():
    """A circle in mm, of pixels that are twice as high as wide."""
    y, x = np.mgrid[:200, :400]
    circle = ((x - 200) * 0.1) ** 2 + ((y - 100) * 0.2) ** 2 <= 12**2
    found = measure(circle, (0.2, 0.1))
    assert found["longest"] == pytest.approx(24, abs=0.3) and found["perpendicular"] == pytest.approx(24, abs=0.3)
    assert found["area"] == pytest.approx(math.pi * 144, rel=0.01)
    assert (found["centre_x"], found["centre_y"]) == pytest.approx((20.05, 20.1))
    assert measure(circle)["longest"] > 200


def test_from_edge_to_edge():
    mask = np.zeros((5, 6), bool)
    mask[2, 3] = True
    expected = {"area": 1, "longest": 1, "perpendicular": 1, "centre_x": 3.5, "centre_y": 2.5}
    assert measure(mask) == pytest.approx({**expected, "x1": 3, "y1": 2, "x2": 4, "y2": 3})
    mask[2] = True
    assert measure(mask)["longest"] == 6 and measure(mask)["perpendicular"] == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_the_outline_and_its_diameter_of_any_pixels(seed, count):
    rng = np.random.default_rng(seed)
    mask = np.zeros((30, 40), bool)
    mask[rng.integers(0, 30, count), rng.integers(0, 40, count)] = True
    y, x = np.nonzero(mask)
    corners = np.concatenate([np.stack([x + dx, y + dy], 1) for dx, dy in ((0, 0.5), (1, 0.5), (0.5, 0), (0.5, 1))])
    hull = outline(mask)
    assert ConvexHull(hull).volume == pytest.approx(ConvexHull(corners).volume)
    assert diameters(hull)[0] == pytest.approx(pdist(corners).max())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 20))
def test_the_perpendicular_is_the_longest_line_across(seed, count):
    points = np.random.default_rng(seed).random((count, 2))
    hull = points[ConvexHull(points).vertices]
    longest, perpendicular = diameters(hull)
    distances = np.linalg.norm(hull[:, None] - hull, axis=-1)
    start, end = np.unravel_index(distances.argmax(), distances.shape)
    along = (hull[end] - hull[start]) / longest
    aside = np.array([-along[1], along[0]])
    best = 0.0
    for place in np.linspace(0, longest, 4001)[1:-1]:
        hits = []
        for one, other in zip(hull, np.roll(hull, -1, axis=0), strict=True):
            u, v = (one - hull[start]) @ along - place, (other - hull[start]) @ along - place
            if u * v <= 0 and u != v:
                hits.append((one + u / (u - v) * (other - one)) @ aside)
        best = max(best, max(hits) - min(hits))
    assert best == pytest.approx(perpendicular, abs=2e-3) and best <= perpendicular + 1e-9


def test_lesions_apart_the_largest_first():
    mask = np.zeros((20, 20), bool)
    mask[2:4, 2:4], mask[10:15, 11:16], mask[4, 4] = True, True, True  # the last touches the first by a corner
    large, small = separate(mask)
    assert large.mask.all() and (large.top, large.left, large.mask.shape) == (10, 11, (5, 5))
    assert small.mask.sum() == 5 and (small.top, small.left) == (2, 2) and large.centre == (13.5, 12.5)
    labels, count = numbered(mask)
    assert count == 2 and np.array_equal(labels > 0, mask) and labels[12, 12] == 1 and labels[4, 4] == 2
    for lesion, number in ((large, 1), (small, 2)):
        assert measure(lesion, (0.3, 0.2)) == pytest.approx(measure(labels == number, (0.3, 0.2)))
    assert separate(np.zeros((3, 3), bool)) == []


def test_many_specks_take_little_memory_and_time():
    mask = np.zeros((1500, 1500), bool)
    mask[::3, ::3] = True
    assert len(separate(mask)) == 250_000


def test_cells_of_a_table():
    mask = np.zeros((20, 20), bool)
    mask[10:15, 10:14] = True
    (lesion,) = separate(mask)
    cells = describe(lesion, (0.5, 0.25), area=30)
    assert cells["area_px2"] == "30" and cells["area_mm2"] == "3.75"
    assert cells["x1_px"] == "10" and cells["y2_mm"] == "7.5"
    assert cells["longest_mm"] == "2.61"  # from the middle of one edge to that of another
    unknown = describe(lesion, None)
    assert unknown["area_px2"] == "20" and unknown["area_mm2"] == unknown["x1_mm"] == ""
    assert list(unknown) == list(cells) == list(describe(None, None)) and not any(describe(None, (1.0, 1.0)).values())
