"""Calibration against plain numpy over all pixels at once."""

import json

import numpy as np
import pytest

from ultrarefiner.results.calibration import Reliability


def cases(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shapes = rng.integers(5, 40, (count, 2))
    return [(rng.random(s).astype(np.float32) ** 2, rng.random(s) < 0.3) for s in map(tuple, shapes)]


@pytest.mark.parametrize("bins", [15, 7])
def test_equals_all_pixels_at_once(bins):
    added, together = Reliability(bins), cases(9)
    for prob, truth in together:
        added.add(prob, truth)
    p = np.concatenate([prob.ravel() for prob, _ in together]).astype(float)
    y = np.concatenate([truth.ravel() for _, truth in together])
    ece = 0.0
    for k in range(bins):
        inside = (p >= k / bins) & ((p < (k + 1) / bins) | (k == bins - 1))
        assert added.result().counts[k] == inside.sum()
        assert added.result().confidence[k] == pytest.approx(p[inside].mean())
        assert added.result().frequency[k] == pytest.approx(y[inside].mean())
        ece += inside.mean() * abs(p[inside].mean() - y[inside].mean())
    found = added.result()
    assert found.pixels == p.size and found.ece == pytest.approx(ece)
    assert found.brier == pytest.approx(((p - y) ** 2).mean())


def test_a_calibrated_map_has_no_error_and_an_overconfident_one_has():
    rng = np.random.default_rng(1)
    prob = rng.random((800, 800))
    truth = rng.random(prob.shape) < prob
    for transform, low, high in ((lambda p: p, 0, 0.005), (lambda p: (p > 0.5) * 1.0, 0.24, 0.26)):
        found = Reliability()
        found.add(transform(prob), truth)
        assert low <= found.result().ece <= high


def test_empty_bins_and_no_case_are_nan():
    assert np.isnan([Reliability().result().ece, Reliability().result().brier]).all()
    found = Reliability(2)
    found.add(np.array([[0.0, 1.0]]), np.array([[False, True]]))
    assert found.result() == (2, 0.0, 0.0, [0.0, 1.0], [0.0, 1.0], [1, 1])
    found = Reliability(4)
    found.add(np.array([[1.0]]), np.array([[True]]))
    assert np.isnan(found.result().confidence[:3]).all() and found.result().counts == [0, 0, 0, 1]


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_what_is_no_probability_is_refused(value):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Reliability().add(np.array([[0.5, value]]), np.zeros((1, 2), bool))
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        Reliability().add(np.array([[0.5, 0.5]]), np.zeros((2, 1), bool))


def test_memory_does_not_grow():
    found = Reliability()
    sizes = []
    for prob, truth in cases(20):
        found.add(prob, truth)
        sizes.append(sum(np.asarray(value).nbytes for value in vars(found).values()))
    assert len(set(sizes)) == 1


def test_sums_of_parts_are_the_whole():
    rng = np.random.default_rng(3)
    maps = [rng.random((5, n)).astype(np.float32) for n in (4, 9, 2)]
    truths = [rng.random(one.shape) < one for one in maps]
    whole, parts = Reliability(), Reliability()
    for prob, truth in zip(maps, truths, strict=True):
        whole.add(prob, truth)
        one = Reliability()
        one.add(prob, truth)
        parts.add_sums(json.loads(json.dumps(one.sums())))
    np.testing.assert_allclose(np.hstack(parts.result()), np.hstack(whole.result()), rtol=1e-12)
