"""Lesions matched one to one, against trying every matching."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import label

from ultrarefiner.results import lesions
from ultrarefiner.results.lesions import Lesions

BOX = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 8), st.integers(1, 8))


def draw(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((28, 28), bool)
    for y, x, height, width in boxes:
        mask[y : y + height, x : x + width] = True
    return mask


def split(mask: np.ndarray) -> list[np.ndarray]:
    marks, count = label(mask, np.ones((3, 3)))
    return [marks == i for i in range(1, count + 1)]


@given(st.lists(BOX, max_size=4), st.lists(BOX, max_size=4), st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=300, deadline=None)
def test_matching_is_the_best_of_all(found, there, threshold):
    pred, truth = draw(*found), draw(*there)
    ours, theirs = split(pred), split(truth)
    iou = np.array([[(t & p).sum() / (t | p).sum() for p in ours] for t in theirs]).reshape(len(theirs), len(ours))
    iou[iou <= threshold] = 0
    short, long = sorted(iou.shape)
    wide = iou if iou.shape[0] <= iou.shape[1] else iou.T
    best = max(sum(wide[i, j] for i, j in enumerate(order)) for order in permutations(range(long), short))
    result = lesions.match(pred, truth, threshold)
    hits = [d / (2 - d) for d in result.dice if d]  # IoU from Dice
    assert len(result.dice) == len(theirs) and sum(hits) == pytest.approx(best)
    assert all(hit > threshold - 1e-12 for hit in hits)
    assert result.false_positives == len(ours) - len(hits)


def test_one_blob_over_two_lesions_finds_one():
    truth = draw((2, 2, 6, 6), (2, 12, 6, 6))
    result = lesions.match(draw((2, 2, 6, 16)), truth)
    assert sorted(result.dice)[0] == 0 and max(result.dice) == pytest.approx(2 * 36 / (36 + 96))
    assert result.false_positives == 0


def test_pixels_that_touch_by_a_corner_are_one_lesion():
    mask = draw((2, 2, 3, 3), (5, 5, 3, 3))
    assert lesions.match(mask, mask) == Lesions((1.0,), 0)


@given(arrays(bool, (9, 9)))
@settings(deadline=None)
def test_a_mask_finds_itself_and_nothing_else(mask):
    result = lesions.match(mask, mask)
    assert set(result.dice) <= {1.0} and result.false_positives == 0 and len(result.dice) == len(split(mask))


def test_over_images():
    found = lesions.summarise([Lesions((0.9, 0.0), 1), Lesions((0.8,), 0), Lesions((), 2), Lesions((), 0)])
    assert found["images"] == 4 and found["lesions"] == 3 and found["found"] == 2
    assert found["detection_rate"] == pytest.approx(2 / 3)
    assert found["false_positives"] == 3 and found["false_positives_per_image"] == 0.75
    assert found["dice"] == pytest.approx(1.7 / 3) and found["dice_found"] == pytest.approx(0.85)
    assert np.isnan(lesions.summarise([])["detection_rate"])
    assert np.isnan(lesions.summarise([Lesions((), 2)])["dice"])
