"""Which redrawn masks are rejected, and what is said of it."""

import numpy as np
import pytest

from ultrarefiner.results.safety import NO_LESION, Safety


def disc(x: float, y: float, radius: float, size: int = 100) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


COARSE = disc(50, 50, 20)
NOTHING = np.zeros((100, 100), bool)


def rules(**chosen) -> Safety:
    return Safety(**{**vars(Safety.none()), **chosen})


@pytest.mark.parametrize(
    ("chosen", "refined", "iou", "reason"),
    [
        ({"min_iou": 0.8}, COARSE, 0.79, "predicted IoU 0.79 is below 0.8"),
        ({"min_iou": 0.8}, COARSE, float("nan"), "predicted IoU nan is below 0.8"),
        ({"min_iou": 0.8}, COARSE, 0.8, None),
        ({"min_iou": 0.8}, COARSE, None, None),
        ({"min_dice": 0.7}, disc(70, 50, 20), 1.0, "Dice with the coarse mask 0.39 is below 0.7"),
        ({"min_dice": 0.7}, disc(52, 50, 20), 1.0, None),
        ({"min_dice": 0.1}, NOTHING, 1.0, "Dice with the coarse mask 0.00 is below 0.1"),
        ({"min_area": 0.5}, disc(50, 50, 14), 1.0, "area 0.49 of the coarse mask's is below 0.5"),
        ({"min_area": 0.5}, disc(50, 50, 15), 1.0, None),
        ({"max_area": 2.0}, disc(50, 50, 29), 1.0, "area 2.[01][0-9] of the coarse mask's is above 2"),
        ({"max_area": 2.0}, disc(50, 50, 28), 1.0, None),
        ({"new_lesions": 0}, COARSE | disc(90, 90, 3), 1.0, "1 parts more than the coarse mask are above 0"),
        ({"new_lesions": 1}, COARSE | disc(90, 90, 3), 1.0, None),
        ({"band": 0.2}, disc(50, 50, 29), 1.0, "a change at 0.2[0-9] diameters from the coarse outline is above 0.2"),
        ({"band": 0.2}, disc(50, 50, 27), 1.0, None),
        ({"band": 0.2}, disc(50, 50, 11), 1.0, "a change at 0.2[0-9] diameters from the coarse outline is above 0.2"),
        ({"band": 0.2}, disc(50, 50, 13), 1.0, None),
        ({"band": 0.2}, COARSE, 1.0, None),
    ],
)  # fmt: skip
def test_each_rule(chosen, refined, iou, reason):
    import re

    found = rules(**chosen).reasons(COARSE, refined, iou)
    assert found == [] if reason is None else len(found) == 1 and re.fullmatch(reason, found[0])
    assert Safety.none().reasons(COARSE, refined, iou) == []


def test_an_image_without_a_lesion_keeps_none():
    assert Safety().reasons(NOTHING, COARSE, 1.0) == [NO_LESION]
    assert Safety.none().reasons(NOTHING, COARSE, 1.0) == []


def test_all_reasons_are_said():
    found = Safety(min_iou=0.9, new_lesions=0, band=0.1).reasons(COARSE, disc(80, 80, 4) | disc(20, 20, 4), 0.1)
    assert len(found) == 5  # not too large


def test_the_defaults_accept_a_refinement_and_a_border_counts_as_an_outline():
    for refined in (COARSE, disc(53, 48, 22), disc(50, 50, 15)):
        assert Safety().reasons(COARSE, refined, 0.2) == []
    whole = np.ones((100, 100), bool)
    assert rules(band=0.02).reasons(whole, np.pad(whole[1:-1, 1:-1], 1), 1.0) == []
