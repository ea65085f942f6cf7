"""Simulated coarse masks: their Dice, their shapes, their softness, and the lesions that are hard to fail on."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import cv2
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_layouts import SHARED
from ultrarefiner.data.failures import BINS, FailureSimulator, fit_bins, simulate_failure
from ultrarefiner.data.failures.shapes import KINDS, signed_distance
from ultrarefiner.data.failures.softness import QUANTILES, Softness, measure_softness
from ultrarefiner.errors import UserError


def dice(prob: np.ndarray, mask: np.ndarray) -> float:
    predicted = prob >= 0.5
    return 2 * (predicted & mask).sum() / (predicted.sum() + mask.sum())


def ellipse(shape=(224, 224), centre=(112, 112), axes=(48, 30), angle=20.0) -> np.ndarray:
    """Filled ellipse, (x, y) centre and half axes in px."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    u, v = (x - centre[0]) * c + (y - centre[1]) * s, (y - centre[1]) * c - (x - centre[0]) * s
    return (u / axes[0]) ** 2 + (v / axes[1]) ** 2 <= 1


def blob(seed: int, size: int = 224) -> np.ndarray:
    """A random ragged ellipse of any size, anywhere, at least five pixels large."""
    rng = np.random.default_rng(seed)
    axes = size * np.exp(rng.uniform(math.log(0.015), math.log(0.35), 2))
    base = ellipse((size, size), rng.uniform(0.1, 0.9, 2) * size, axes, rng.uniform(0, 180))
    wave = cv2.resize(rng.normal(size=(9, 9)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    ragged = signed_distance(base) + 0.2 * axes.min() * wave > 0
    return ragged if ragged.sum() >= 5 else ellipse((size, size), (size / 2, size / 2), (3, 3))


def components(mask: np.ndarray) -> int:
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1


def hole_count(mask: np.ndarray) -> int:
    return components(np.pad(~mask, 1, constant_values=True)) - 1


def only(kind: str, low: float = 0.7, high: float = 0.8) -> FailureSimulator:
    return FailureSimulator(bins=[[low, high, 1.0]], kinds={kind: 1.0}, wobble=0.0)


def shares(found: np.ndarray) -> list[float]:
    """Percent of the Dice values in each default bin."""
    edges = [(low, high + 1e-9 if high == 0.99 else high) for low, high, _ in BINS]
    return [100 * float(np.mean((found >= low) & (found < high))) for low, high in edges]


def assert_bins(found: np.ndarray) -> None:
    assert found.min() >= 0.6 and found.max() <= 0.99
    for share, (_, _, weight) in zip(shares(found), BINS, strict=True):
        assert abs(share - 100 * weight) < 1


# The Dice


@pytest.fixture
def unchecked():
    """Without the checks of types, which cost more than the masks; the other tests have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_bins_are_met_over_5000_random_lesions():
    masks = [blob(seed) for seed in range(500)]
    assert_bins(np.array([dice(simulate_failure(masks[seed % 500], seed), masks[seed % 500]) for seed in range(5000)]))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_bins_are_met_over_5000_masks_of_bus_bra():
    files = sorted((SHARED / "BUSBRA" / "Masks").glob("*.png"))
    if not files:
        pytest.skip(f"no BUS-BRA masks under {SHARED}")
    masks = [cv2.resize(cv2.imread(str(f), 0), (224, 224), interpolation=cv2.INTER_AREA) > 127 for f in files]
    found = [dice(simulate_failure(masks[seed % len(masks)], seed), masks[seed % len(masks)]) for seed in range(5000)]
    assert_bins(np.array(found))


def test_bins_are_met_over_consecutive_seeds_from_any_base():
    simulator = FailureSimulator()
    for base in (0, 12345, 2**62 + 7):
        drawn = np.array([simulator._bin(base + step)[0] for step in range(5000)])
        for low, _, weight in BINS:
            assert abs(np.mean(drawn == low) - weight) < 0.002


def test_bins_of_scattered_seeds_follow_the_weights():
    rng = np.random.default_rng(0)
    simulator = FailureSimulator()
    drawn = np.array([simulator._bin(int(seed))[0] for seed in rng.integers(2**63, size=20000)])
    for low, _, weight in BINS:
        assert abs(np.mean(drawn == low) - weight) < 0.015


@settings(max_examples=60, deadline=None)
@given(lesion=st.integers(0, 10**6), seed=st.integers(0, 2**64 - 1))
def test_any_lesion_gets_a_soft_imperfect_mask_of_the_wanted_dice(lesion: int, seed: int):
    mask = blob(lesion, 128)
    before = mask.copy()
    failure = FailureSimulator().simulate(mask, seed)
    assert failure.prob.shape == mask.shape and failure.prob.dtype == np.float32
    assert failure.prob.min() > 0 and failure.prob.max() <= 1
    assert np.unique(failure.prob).size > 100 or mask.sum() < 50
    reached = dice(failure.prob, mask)
    assert reached == pytest.approx(failure.dice)
    assert 0.6 <= reached <= 0.99
    assert abs(reached - failure.target) <= max(0.002, 2 / mask.sum())
    assert np.array_equal(mask, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", BINS)
def test_every_kind_meets_every_bin(kind: str, row):
    simulator = FailureSimulator(bins=[row], kinds={kind: 1.0})
    for seed in range(6):
        mask = blob(seed)
        assert row[0] <= dice(simulator(mask, seed), mask) <= row[1]


# Determinism


def test_same_seed_same_mask_and_other_seed_other_mask():
    mask = ellipse()
    assert np.array_equal(simulate_failure(mask, 7), simulate_failure(mask, 7))
    assert not np.array_equal(simulate_failure(mask, 7), simulate_failure(mask, 8))


def test_identical_in_another_process():
    code = (
        "import hashlib, numpy as np; from ultrarefiner.data.failures import simulate_failure as f;"
        "y, x = np.ogrid[:96, :96]; m = (x - 50) ** 2 + 2 * (y - 40) ** 2 < 500;"
        "print(hashlib.sha256(b''.join(f(m, s).tobytes() for s in range(12))).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    y, x = np.ogrid[:96, :96]
    mask = (x - 50) ** 2 + 2 * (y - 40) ** 2 < 500
    here = hashlib.sha256(b"".join(simulate_failure(mask, seed).tobytes() for seed in range(12))).hexdigest()
    assert here == other


# What each kind is called after


def both_ways(prob: np.ndarray, mask: np.ndarray) -> tuple[int, int]:
    """Pixels added and pixels taken away."""
    predicted = prob >= 0.5
    return int((predicted & ~mask).sum()), int((mask & ~predicted).sum())


@pytest.mark.parametrize("seed", range(8))
class TestKinds:
    mask = ellipse()

    def predicted(self, kind: str, seed: int, low: float = 0.7, high: float = 0.8) -> np.ndarray:
        return only(kind, low, high)(self.mask, seed) >= 0.5

    def test_offset_goes_one_way(self, seed):
        added, taken = both_ways(only("offset")(self.mask, seed), self.mask)
        assert min(added, taken) < 0.05 * max(added, taken)

    def test_boundary_goes_both_ways(self, seed):
        added, taken = both_ways(only("boundary")(self.mask, seed), self.mask)
        assert added > 0 and taken > 0

    def test_local_leaves_most_of_the_edge_where_it_is(self, seed):
        predicted = self.predicted("local", seed, 0.9, 0.95)
        edge = np.abs(signed_distance(self.mask)) < 1
        kept = np.abs(signed_distance(predicted))[edge] < 1.5
        assert kept.mean() > 0.15 and np.abs(signed_distance(predicted))[edge].max() > 3

    def test_chunk_only_takes_one_piece_away(self, seed):
        predicted = self.predicted("chunk", seed)
        assert not (predicted & ~self.mask).any()
        missing = cv2.morphologyEx((self.mask & ~predicted).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3)))
        assert components(missing) == 1

    def test_holes_are_inside(self, seed):
        predicted = self.predicted("holes", seed, 0.85, 0.9)
        assert hole_count(predicted) >= 1
        assert not (predicted & ~self.mask).any()
        filled = self.mask & (signed_distance(self.mask) < 1.5)
        assert predicted[filled].all()

    def test_fragments_are_several(self, seed):
        predicted = self.predicted("fragments", seed, 0.62, 0.7)
        assert components(predicted) >= 2
        assert not (predicted & ~self.mask).any()

    def test_islands_lie_apart_and_the_lesion_is_whole(self, seed):
        predicted = self.predicted("islands", seed, 0.8, 0.9)
        assert predicted[self.mask].all()
        assert components(predicted) >= 2
        near = signed_distance(self.mask) > -2
        assert not (predicted & near & ~self.mask).any()

    def test_bridge_joins_something_thin_to_the_lesion(self, seed):
        predicted = self.predicted("bridge", seed, 0.8, 0.9)
        assert predicted[self.mask].all()
        labels = cv2.connectedComponents(predicted.astype(np.uint8))[1]
        joined = (labels == labels[112, 112]) & ~self.mask
        assert joined.sum() > 0.7 * (predicted & ~self.mask).sum()  # one with the lesion …
        away = -signed_distance(self.mask)
        widths = [int((joined & (away >= d) & (away < d + 1)).sum()) for d in range(1, 9)]
        across = 2 * math.sqrt(joined.sum() / math.pi)
        assert 0 < min(widths) < 0.6 * across  # … by a neck thinner than what it leads to

    def test_shift_is_a_translation(self, seed):
        predicted = self.predicted("shift", seed)
        assert abs(int(predicted.sum()) - int(self.mask.sum())) < 0.03 * self.mask.sum()
        (y0, x0), (y1, x1) = (np.argwhere(m).mean(0) for m in (self.mask, predicted))
        back = np.roll(predicted, (round(y0 - y1), round(x0 - x1)), (0, 1))
        assert dice(back, self.mask) > 0.93
        assert math.hypot(y1 - y0, x1 - x0) > 5

    def test_near_empty_is_a_small_unsure_core(self, seed):
        mask = ellipse(axes=(13, 9))
        failure = FailureSimulator(bins=[[0.6, 0.8, 1]], kinds={"near_empty": 1}, wobble=0.0).simulate(mask, seed)
        assert 0.6 <= failure.dice < 0.67
        assert (failure.prob >= 0.5).sum() < 0.55 * mask.sum()
        assert failure.prob.max() < 0.95


def test_kinds_depend_on_the_lesion():
    simulator = FailureSimulator()
    small, large = ellipse(axes=(12, 9)), ellipse(axes=(70, 50))
    kinds = [[simulator.simulate(mask, seed).kind for seed in range(300)] for mask in (small, large)]
    assert "near_empty" in kinds[0] and "near_empty" not in kinds[1]
    assert kinds[1].count("holes") > kinds[0].count("holes")
    assert kinds[0].count("islands") > kinds[1].count("islands")
    assert set(kinds[0]) | set(kinds[1]) == set(KINDS)


# Lesions that are hard to fail on


@pytest.mark.parametrize("pixels", range(1, 13))
def test_a_handful_of_pixels(pixels: int):
    mask = np.zeros((64, 64), bool)
    mask.flat[32 * 64 + 30 + 64 * (np.arange(pixels) // 4) + np.arange(pixels) % 4] = True
    for seed in range(40):
        failure = FailureSimulator().simulate(mask, seed)
        assert 0.6 <= dice(failure.prob, mask) <= 0.99
        if pixels == 1:
            assert failure.dice == pytest.approx(2 / 3)
        if pixels >= 5:
            assert any(low <= failure.target <= high and low <= failure.dice <= high for low, high, _ in BINS)


def test_an_empty_mask_stays_below_one_half():
    probs = [simulate_failure(np.zeros((50, 70), bool), seed) for seed in range(40)]
    assert all(p.dtype == np.float32 and p.shape == (50, 70) and p.min() > 0 and p.max() < 0.5 for p in probs)
    assert any(p.max() > 0.1 for p in probs) and any(p.max() < 0.1 for p in probs)


@pytest.mark.parametrize("shape", [(224, 224), (16, 16), (5, 9)])
def test_a_full_mask_fails_too(shape):
    mask = np.ones(shape, bool)
    for seed in range(20):
        prob = simulate_failure(mask, seed)
        assert np.isfinite(prob).all() and 0.6 <= dice(prob, mask) <= 0.99


def test_an_image_of_one_pixel_has_nothing_to_fail_on():
    assert simulate_failure(np.ones((1, 1), bool), 3)[0, 0] >= 0.5
    assert simulate_failure(np.zeros((1, 1), bool), 3)[0, 0] < 0.5


@pytest.mark.parametrize("shape", [(16, 16), (40, 200), (200, 40), (333, 517)])
def test_tiny_and_oblong_images(shape):
    mask = ellipse(shape, (shape[1] / 2, shape[0] / 2), (max(shape[1] / 6, 2), max(shape[0] / 6, 2)), 0)
    for seed in range(30):
        prob = simulate_failure(mask, seed)
        assert prob.shape == shape and 0.6 <= dice(prob, mask) <= 0.99


@pytest.mark.parametrize("centre", [(0, 112), (223, 0), (112, 223)])
def test_lesions_on_the_border(centre):
    mask = ellipse(centre=centre)
    for seed in range(40):
        assert 0.6 <= dice(simulate_failure(mask, seed), mask) <= 0.99


def test_two_lesions():
    mask = ellipse(centre=(60, 60), axes=(25, 18)) | ellipse(centre=(170, 150), axes=(20, 20))
    for seed in range(40):
        assert 0.6 <= dice(simulate_failure(mask, seed), mask) <= 0.99


# Softness


def rise(prob: np.ndarray, centre: float) -> float:
    """Distance (px) between 0.9 and 0.1 along the radii of a disc, the median over radii; read off the profile.

    The logit is what is interpolated between pixels: it is straight there, the probability is not.
    """
    logit = np.log(prob / (1 - prob))
    widths = []
    for angle in np.linspace(0, 2 * math.pi, 72, endpoint=False):
        r = np.arange(0, 0.45 * len(prob), 0.05, dtype=np.float32)
        x, y = (centre + r * math.cos(angle)).astype(np.float32), (centre + r * math.sin(angle)).astype(np.float32)
        profile = cv2.remap(logit, x[None], y[None], cv2.INTER_LINEAR)[0]
        if (profile > math.log(9)).any():
            inner = r[np.flatnonzero(profile > math.log(9))[-1]]
            widths.append(r[np.flatnonzero((profile < -math.log(9)) & (r > inner))[0]] - inner)
    return float(np.median(widths))


@pytest.mark.parametrize("width", [3.0, 5.0, 8.0])
def test_the_edge_is_as_wide_as_drawn(width: float):
    softness = {"width": width, "width_spread": 0.0, "width_trend": 0.0, "level_spread": 0.0}
    simulator = FailureSimulator(bins=[[0.97, 0.98, 1]], kinds={"offset": 1}, softness=softness, wobble=0.0)
    mask = ellipse(centre=(111.5, 111.5), axes=(60, 60))
    measured = [rise(simulator(mask, seed), 111.5) for seed in range(10)]
    assert np.median(measured) == pytest.approx(width, rel=0.12)


def test_edge_width_scales_with_the_image():
    softness = {"width": 4.0, "width_spread": 0.0, "width_trend": 0.0, "level_spread": 0.0}
    simulator = FailureSimulator(bins=[[0.97, 0.98, 1]], kinds={"offset": 1}, softness=softness, wobble=0.0)
    mask = ellipse((448, 448), (223.5, 223.5), (80, 80))
    assert np.median([rise(simulator(mask, s), 223.5) for s in range(6)]) == pytest.approx(8.0, rel=0.12)


def test_the_level_set_is_the_solved_one():
    mask = blob(3)
    softness = [{"width": width, "width_spread": 0.0} for width in (1.0, 12.0)]
    sharp, soft = (FailureSimulator(softness=s)(mask, 5) for s in softness)
    assert np.array_equal(sharp >= 0.5, soft >= 0.5)


def test_fit_recovers_what_was_simulated():
    wanted = Softness(width=6.0, width_spread=0.3, width_trend=1.5, inside=5.0, outside=6.0, level_spread=0.15)
    simulator = FailureSimulator(softness=wanted)
    masks = [blob(seed) for seed in range(400)]
    masks = [mask for mask in masks if mask.sum() > 800]
    found = Softness.fit((simulator(mask, seed), mask) for seed, mask in enumerate(masks))
    assert found.width == pytest.approx(wanted.width, rel=0.12)
    assert found.width_spread == pytest.approx(wanted.width_spread, abs=0.1)
    assert found.width_trend == pytest.approx(wanted.width_trend, abs=0.6)
    assert found.inside == pytest.approx(wanted.inside, rel=0.15)
    assert found.outside == pytest.approx(wanted.outside, rel=0.15)
    assert found.level_spread == pytest.approx(wanted.level_spread, abs=0.08)


def test_fit_recovers_the_background():
    """Median and faint spots, of each image and over all of them."""
    rows = [
        (-14, -13.5, -13, -12, base, -10, -8, -6, tail, tail + 1)
        for base, tail in ((-11, -5), (-11.5, -3), (-10.5, -2))
    ]
    simulator = FailureSimulator(softness={"background": rows, "width": 4.0})
    masks = [mask for seed in range(160) if 800 < (mask := blob(seed)).sum() < 8000]
    found = Softness.fit((simulator(mask, seed), mask) for seed, mask in enumerate(masks))
    assert len(found.background) == 64
    background = np.array(found.background)
    middle, faint = background[:, QUANTILES.index(0.5)], background[:, QUANTILES.index(0.99)]
    assert np.median(middle) == pytest.approx(-11, abs=0.4) and np.ptp(middle) < 2.5
    for quantile, tail in ((0.15, -5), (0.5, -3), (0.85, -2)):
        assert np.quantile(faint, quantile) == pytest.approx(tail, abs=0.8)
    again = FailureSimulator(softness=vars(found))  # as it comes through a configuration
    np.testing.assert_array_equal(again(masks[0], 3), FailureSimulator(softness=found)(masks[0], 3))
    assert (again(masks[0], 3) >= 0.5).sum() == (FailureSimulator()(masks[0], 3) >= 0.5).sum()  # the outline stays


def test_bins_follow_the_dice_of_real_predictions():
    rng = np.random.default_rng(0)
    mask = ellipse()
    rows, _ = np.nonzero(mask)
    cuts = rng.beta(6, 1.5, 300)
    pairs = [(mask * (np.arange(len(mask))[:, None] <= np.quantile(rows, cut)), mask) for cut in cuts]
    dice = np.array([2 * (p & mask).sum() / (p.sum() + mask.sum()) for p, _ in pairs])
    simulator = FailureSimulator(bins=fit_bins([(prediction.astype(np.float32), mask) for prediction, mask in pairs]))
    found = [simulator.simulate(mask, seed).dice for seed in range(1000)]
    wanted = np.clip(np.quantile(dice, [0.1, 0.25, 0.5, 0.75, 0.9]), 0, 0.99)
    np.testing.assert_allclose(np.quantile(found, [0.1, 0.25, 0.5, 0.75, 0.9]), wanted, atol=0.025)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_bins_of_predictions_that_are_all_alike(share: float):
    """All missed, all half, all perfect: the bins stay what the simulator takes."""
    mask = ellipse()
    prediction = mask & (np.cumsum(mask).reshape(mask.shape) <= share * mask.sum())
    prediction = prediction.astype(np.float32)
    bins = fit_bins([(prediction, mask)] * 12)
    simulator = FailureSimulator(bins=bins)
    expected = np.clip(2 * share / (1 + share), 0.02, 0.99)
    assert simulator.simulate(mask, 3).dice == pytest.approx(expected, abs=0.06)
    with pytest.raises(UserError, match="9 predictions"):
        fit_bins([(prediction, mask)] * 9)


def test_measured_width_of_an_exact_sigmoid():
    y, x = np.ogrid[:224, :224]
    distance = 50 - np.hypot(x - 110.3, y - 115.6)
    for w in (0.6, 1.0, 2.0):
        prob = 1 / (1 + np.exp(-distance / w))
        found = measure_softness(prob.astype(np.float32), distance > 0)
        assert found.width == pytest.approx(2 * math.log(9) * w, rel=0.03)
        assert found.dice == 1


def test_measuring_passes_over_predictions_without_an_edge():
    mask, blank = ellipse(), np.zeros((224, 224))
    assert measure_softness(blank, mask) is None
    assert measure_softness(blank + 0.9, mask) is None
    assert measure_softness(mask.astype(np.float32), blank > 0) is None
    with pytest.raises(UserError, match="at least 10"):
        Softness.fit([(blank, mask)] * 20)


# What a user may get wrong


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"bins": [[0.9, 0.8, 1]]}, "0.9, 0.8"),
        ({"bins": [[0.9, 1.0, 1]]}, "1.0"),
        ({"bins": [[0.6, 0.9]]}, "0.6, 0.9"),
        ({"bins": [[0.6, 0.9, 0]]}, "weight above 0"),
        ({"bins": []}, "weight above 0"),
        ({"kinds": {"hole": 1}}, "'hole'"),
        ({"kinds": {"holes": -1}}, "kinds.holes"),
        ({"kinds": {"holes": 0}}, "weight above 0"),
        ({"softness": {"widht": 1}}, "'widht'"),
        ({"softness": {"width": 0}}, "softness.width"),
        ({"softness": {"width_spread": -1}}, "softness.width_spread"),
        ({"wobble": 2}, "wobble"),
    ],
)
def test_wrong_settings_are_named(arguments, named):
    with pytest.raises(UserError, match=named):
        FailureSimulator(**arguments)


@pytest.mark.parametrize("mask", [np.zeros((1, 8, 8), bool), np.zeros((0, 8), bool), np.full((8, 8), 255)])
def test_wrong_masks_are_refused(mask):
    with pytest.raises(UserError, match="mask"):
        simulate_failure(mask, 0)


def test_a_negative_seed_is_refused():
    with pytest.raises(UserError, match="-1"):
        simulate_failure(ellipse(), -1)


def test_masks_of_zeros_and_ones_are_taken():
    assert np.array_equal(simulate_failure(ellipse().astype(np.uint8), 4), simulate_failure(ellipse(), 4))


def test_built_by_hydra():
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    node = OmegaConf.create(
        {
            "_target_": "ultrarefiner.data.failures.FailureSimulator",
            "bins": [[0.9, 0.99, 0.5], [0.6, 0.8, 0.5]],
            "kinds": {"islands": 1.0, "chunk": 2.0},
            "softness": {"width": 3.0},
        }
    )
    failure = instantiate(node).simulate(ellipse(), 1)
    assert failure.kind in ("islands", "chunk")
