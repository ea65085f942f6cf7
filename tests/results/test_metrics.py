"""Metrics of a mask against MONAI, scipy and their definitions; what empty masks count as."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import binary_erosion, distance_transform_cdt, distance_transform_edt, gaussian_filter

from data_layouts import needs_busbra
from ultrarefiner.results import metrics

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:monai")

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))
PAIRS = SHAPES.flatmap(lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape)))
SPACINGS = st.tuples(st.floats(0.05, 3), st.floats(0.05, 3))


def blobs(seed: int, shape: tuple[int, int] = (90, 70)) -> np.ndarray:
    """Smooth regions, some of them on the border."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 6)
    return noise > np.quantile(noise, 0.7)


def of_monai(pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, float], tolerances: list[float]) -> dict:
    y_pred, y = (torch.from_numpy(mask)[None, None] for mask in (pred, truth))
    more = {"include_background": True, "spacing": spacing}
    return {
        "hd95": float(compute_hausdorff_distance(y_pred, y, percentile=95, **more)),
        "assd": float(compute_average_surface_distance(y_pred, y, symmetric=True, **more)),
        "nsd": [float(compute_surface_dice(y_pred, y, [t], **more)) for t in tolerances],
    }


@pytest.mark.parametrize("seed", range(12))
def test_distances_equal_monai_in_px_and_mm(seed):
    pred, truth = blobs(seed), blobs(seed + 100)
    spacing, px, mm = (0.11, 0.07), [0, 1, 2.5, 10], [0.2, 0.55]
    found = metrics.scores(pred, truth, spacing, px, mm)
    for suffix, unit, step, tolerances in (("", "px", (1.0, 1.0), px), ("_mm", "mm", spacing, mm)):
        expected = of_monai(pred, truth, step, tolerances)
        assert found[f"hd95{suffix}"] == pytest.approx(expected["hd95"], rel=1e-6)
        assert found[f"assd{suffix}"] == pytest.approx(expected["assd"], rel=1e-6)
        assert [found[f"nsd_{t:g}{unit}"] for t in tolerances] == pytest.approx(expected["nsd"], rel=1e-6)
    assert metrics.surface(pred, truth) == {name: found[name] for name in ("hd95", "assd")}


@given(PAIRS, SPACINGS)
@settings(max_examples=300, deadline=None)
def test_distances_of_any_masks_equal_scipys_distance_transform(pair, spacing):
    pred, truth = pair
    if not (pred.any() and truth.any()):
        return
    edges = [mask & ~binary_erosion(mask) for mask in pair]
    there = distance_transform_edt(~edges[1], sampling=spacing)[edges[0]]
    back = distance_transform_edt(~edges[0], sampling=spacing)[edges[1]]
    found = metrics.distances(pred, truth, spacing)
    assert found.to_truth == pytest.approx(there, abs=1e-9) and found.to_pred == pytest.approx(back, abs=1e-9)
    assert found.hd95() == pytest.approx(max(np.quantile(there, 0.95), np.quantile(back, 0.95)))
    assert found.assd() == pytest.approx((there.sum() + back.sum()) / (there.size + back.size))


@given(PAIRS)
@settings(max_examples=200, deadline=None)
def test_overlaps_equal_their_definition(pair):
    pred, truth = pair
    found = metrics.scores(pred, truth)
    tp, fp, fn = (float(m.sum()) for m in (pred & truth, pred & ~truth, truth & ~pred))
    with np.errstate(invalid="ignore"):
        expected = {
            "dice": np.divide(2 * tp, 2 * tp + fp + fn),
            "iou": np.divide(tp, tp + fp + fn),
            "precision": np.divide(tp, tp + fp) if pred.any() or not truth.any() else 0,
            "recall": np.divide(tp, tp + fn) if truth.any() or not pred.any() else 0,
        }
    assert {name: found[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert found["px"] == pred.sum()
    if pred.any() or truth.any():
        assert metrics.overlap(pred, truth) == {name: found[name] for name in ("dice", "iou")}


@given(PAIRS, st.floats(0.01, 0.2))
@settings(max_examples=200, deadline=None)
def test_boundary_iou_counts_the_band_within_a_chessboard_distance(pair, ratio):
    width = max(1, round(ratio * math.hypot(*pair[0].shape)))
    bands = []
    for mask in pair:
        depth = distance_transform_cdt(np.pad(mask, 1), "chessboard")[1:-1, 1:-1]  # steps to the nearest outside
        bands.append(mask & (depth <= width))
    either = (bands[0] | bands[1]).sum()
    expected = (bands[0] & bands[1]).sum() / either if either else math.nan
    assert metrics.boundary_iou(*pair, ratio) == pytest.approx(expected, nan_ok=True)


def test_a_distance_of_exactly_the_tolerance_lies_within_it():
    truth = np.zeros((20, 20), bool)
    truth[5:10, 5:10] = True
    found = metrics.scores(np.roll(truth, 3, 1), truth, (0.1, 0.1), (3,), (0.3,))
    assert found["nsd_3px"] == found["nsd_0.3mm"] == 1.0  # 3 × 0.1 is a little more than 0.3


def test_spacing_is_row_and_column():
    truth = np.zeros((40, 60), bool)
    truth[10:20, 10:20] = True
    down, right = (metrics.scores(np.roll(truth, 4, axis), truth, (0.5, 0.25)) for axis in (0, 1))
    assert down["hd95"] == right["hd95"] == 4.0
    assert (down["hd95_mm"], right["hd95_mm"]) == (2.0, 1.0)


def test_both_empty_is_not_defined_and_one_empty_is_the_worst():
    nothing, lesion = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
    lesion[10:15, 10:15] = True
    neither = metrics.scores(nothing, nothing, (0.1, 0.2))
    assert neither.pop("px") == 0 and all(map(math.isnan, neither.values()))
    for pred, truth in ((nothing, lesion), (lesion, nothing)):
        found = metrics.scores(pred, truth, (0.1, 0.2))
        assert found.pop("px") == pred.sum()
        worst = {"hd95": 50.0, "assd": 50.0, "hd95_mm": math.hypot(3, 8), "assd_mm": math.hypot(3, 8)}
        assert {name: found.pop(name) for name in worst} == pytest.approx(worst)
        assert set(found.values()) == {0.0} and neither.keys() == found.keys() | worst.keys()


def test_an_empty_predictor_is_not_rewarded_for_normal_images():
    nothing, lesion = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
    lesion[10:15, 10:15] = True
    rows = [
        {"lesion_px": truth.sum()} | {f"refined_{name}": value for name, value in metrics.scores(pred, truth).items()}
        for pred, truth in [
            (nothing, lesion),
            (lesion, lesion),
            (nothing, nothing),
            (nothing, nothing),
            (lesion, nothing),
        ]
    ]
    found = metrics.summarise(rows, "refined")
    assert (found["lesion"]["cases"], found["lesion"]["missed"], found["lesion"]["dice"]) == (2, 1, 0.5)
    assert found["lesion"]["hd95"] == 25.0 and "px" not in found["lesion"]
    assert found["normal"] == {"cases": 3, "clean": 2, "false_positive": pytest.approx(1 / 3)}
    as_read = [{name: "" if math.isnan(value) else str(value) for name, value in row.items()} for row in rows]
    assert metrics.summarise(as_read, "refined") == found
    assert metrics.summarise([], "refined")["lesion"] == {"cases": 0, "missed": 0}
    assert metrics.mean_scores(rows, "refined")["dice"] == pytest.approx(1 / 3)  # of three, the others are NaN


@needs_busbra
def test_real_lesions_equal_monai(shared_data):
    import cv2

    for path in sorted((shared_data / "BUSBRA" / "Masks").glob("*.png"))[::150]:
        truth = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 0
        pred = gaussian_filter(np.roll(truth, 5, 1).astype(float), 6) > 0.4
        found, expected = metrics.scores(pred, truth), of_monai(pred, truth, (1, 1), list(metrics.TOLERANCES_PX))
        assert [found["hd95"], found["assd"]] == pytest.approx([expected["hd95"], expected["assd"]], rel=1e-6)
        assert [found[f"nsd_{t}px"] for t in metrics.TOLERANCES_PX] == pytest.approx(expected["nsd"], rel=1e-6)
