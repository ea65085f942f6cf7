"""Phantoms: reproducible, plausible as anatomy, and their speckle is what theory says of a scanner's."""

import hashlib
import subprocess
import sys

import cv2
import numpy as np
import pytest

from ultrarefiner.data import phantom
from ultrarefiner.data.phantom import DEPTHS, FIELD_MM, LINES, Phantoms, acquire, is_malignant, make_phantom
from ultrarefiner.errors import UserError

SERIES = 60


@pytest.fixture(scope="module")
def series() -> list[tuple[np.ndarray, np.ndarray]]:
    return [make_phantom(index, seed=11) for index in range(SERIES)]


@pytest.fixture(scope="module")
def speckle() -> np.ndarray:
    """The envelope of a homogeneous medium."""
    homogeneous = np.zeros((DEPTHS, LINES), np.float32)
    return acquire(homogeneous, homogeneous + 1, homogeneous, focus_mm=20.0, rng=np.random.default_rng(5))


# -- reproducibility


def digest(index: int, seed: int) -> str:
    image, mask = make_phantom(index, seed, 128)
    return hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest()


def test_same_phantom_in_another_process():
    program = (
        "import hashlib; from ultrarefiner.data.phantom import make_phantom; i, m = make_phantom(7, 3, 128);"
        "print(hashlib.sha256(i.tobytes() + m.tobytes()).hexdigest())"
    )
    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.strip() == digest(7, 3)


def test_order_of_drawing_does_not_matter():
    forwards = [digest(index, 0) for index in range(4)]
    assert forwards == [digest(index, 0) for index in reversed(range(4))][::-1]


def test_every_index_and_seed_gives_another_phantom():
    assert len({digest(index, seed) for index in range(4) for seed in range(4)}) == 16


@pytest.mark.parametrize("size", [96, 128, 224, 256, 512])
def test_size_changes_the_sampling_and_not_the_anatomy(size):
    image, mask = make_phantom(4, seed=1, size=size)
    reference_image, reference_mask = make_phantom(4, seed=1, size=384)
    assert image.shape == mask.shape == (size, size)
    assert image.dtype == np.uint8 and mask.dtype == np.bool_
    assert mask.mean() == pytest.approx(reference_mask.mean(), rel=0.05)

    def small(picture):
        return cv2.resize(picture.astype(np.float32), (32, 32), interpolation=cv2.INTER_AREA)

    assert np.abs(small(mask) - small(reference_mask)).mean() < 0.005
    assert np.corrcoef(small(image).ravel(), small(reference_image).ravel())[0, 1] > 0.97


# -- the lesion


def test_mask_is_one_lesion_inside_the_frame(series):
    for _, mask in series:
        assert cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] == 2
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        width = np.flatnonzero(mask.any(0))
        assert 0.04 <= (width[-1] - width[0] + 1) / mask.shape[1] <= 0.36
        assert 0.0005 < mask.mean() < 0.15


def test_the_mask_is_the_outline_and_not_a_threshold():
    ellipse = phantom.Lesion((20.0, 15.0), np.full(2048, 5.0, np.float32))
    for size in (96, 256):
        along = (np.arange(size) + 0.5) * FIELD_MM / size
        disc = np.hypot(along[None, :] - 20.0, along[:, None] - 15.0) <= 5.0
        assert (ellipse.mask(size) != disc).sum() <= 4  # float32 against float64 right on the edge
    assert ellipse.height_mm == pytest.approx(10.0, abs=1e-3)


def surround(mask: np.ndarray) -> np.ndarray:
    """A ring of 4 mm around a lesion, a little away from its edge."""
    side = mask.shape[0] / FIELD_MM
    near, far = (cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (int(r * side) * 2 + 1,) * 2) for r in (1.0, 5.0))
    grown = mask.astype(np.uint8)
    return (cv2.dilate(grown, far) - cv2.dilate(grown, near)).astype(bool)


def test_most_lesions_are_darker_than_their_surround_but_not_all_by_much(series):
    # An image is linear in dB: 255 grey levels are 50 to 60 dB.
    contrast_db = np.array([(image[surround(mask)].mean() - image[mask].mean()) / 255 * 55 for image, mask in series])
    assert (contrast_db > 2).mean() > 0.9
    assert np.percentile(contrast_db, 20) < 9 < 13 < np.percentile(contrast_db, 80)


def test_shadow_behind_malignant_and_enhancement_behind_benign_lesions(series):
    behind_db: dict[bool, list[float]] = {True: [], False: []}
    for index, (image, mask) in enumerate(series):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        width, depth = len(columns), slice(rows[-1] + 4, min(rows[-1] + 60, 250))
        if width < 20 or depth.stop - depth.start < 20:
            continue
        middle = image[depth, columns[width // 4] : columns[3 * width // 4]].mean()
        beside = np.concatenate(
            [image[depth, max(columns[0] - width, 0) : columns[0]], image[depth, columns[-1] : columns[-1] + width]], 1
        ).mean()
        behind_db[is_malignant(index, 11)].append((middle - beside) / 255 * 55)
    malignant, benign = np.array(behind_db[True]), np.array(behind_db[False])
    assert len(malignant) > 10 and len(benign) > 10
    assert np.mean(malignant) < -3 and (malignant < 0).mean() > 0.8
    assert np.mean(benign) > 1.5 and (benign > 0).mean() > 0.8


# -- the scanner


def test_speckle_is_fully_developed(speckle):
    envelope = speckle[60:300].astype(np.float64)
    assert envelope.mean() / envelope.std() == pytest.approx(1.913, abs=0.06)  # Rayleigh: √(π / (4 − π))
    assert (envelope**2).mean() == pytest.approx(1.0, abs=0.06)


def test_sparse_scatterers_give_grainier_speckle():
    homogeneous = np.zeros((DEPTHS, LINES), np.float32)
    envelope = acquire(homogeneous, homogeneous + 0.1, homogeneous, 20.0, np.random.default_rng(5))[60:300]
    assert envelope.mean() / envelope.std() < 1.75
    assert (envelope**2).mean() == pytest.approx(1.0, abs=0.15)


def correlation_length_mm(envelope: np.ndarray, axis: int) -> float:
    """Lag at which the autocorrelation of the intensity falls to a half."""
    intensity = np.moveaxis(envelope.astype(np.float64) ** 2, axis, 0)
    intensity -= intensity.mean()
    lags = [(intensity[lag:] * intensity[: len(intensity) - lag]).mean() for lag in range(20)]
    step = FIELD_MM / (DEPTHS, LINES)[axis]
    return float(np.interp(-0.5, -np.array(lags) / lags[0], np.arange(20))) * step


def test_speckle_has_the_size_of_the_point_spread_function(speckle):
    focal = speckle[170:214]
    # Intensity of a Gaussian-filtered Gaussian field: autocorrelation exp(−lag² / (2σ²)), with σ that of the kernel.
    half = np.sqrt(2 * np.log(2))
    axial, lateral = (correlation_length_mm(focal, axis) for axis in (0, 1))
    assert axial == pytest.approx(half * phantom.AXIAL_SIGMA_MM, rel=0.15)
    assert lateral == pytest.approx(half * phantom.LATERAL_SIGMA_MM, rel=0.15)
    assert axial < lateral


def test_the_beam_widens_away_from_the_focus(speckle):
    focal, deep = speckle[170:214], speckle[340:384]
    assert correlation_length_mm(deep, 1) > 1.4 * correlation_length_mm(focal, 1)
    assert correlation_length_mm(deep, 0) == pytest.approx(correlation_length_mm(focal, 0), rel=0.15)


def test_attenuation_and_echo_are_in_decibels():
    homogeneous = np.zeros((DEPTHS, LINES), np.float32)
    attenuation = homogeneous.copy()
    attenuation[96:192, :128] = 1.0  # 10 mm at 1 dB/mm above the left half
    envelope = acquire(homogeneous, homogeneous + 1, attenuation, 20.0, np.random.default_rng(0))
    shadow, free = envelope[210:300, :100], envelope[210:300, 156:]
    assert 10 * np.log10((free**2).mean() / (shadow**2).mean()) == pytest.approx(10.0, abs=0.7)

    bright = acquire(homogeneous + 6, homogeneous + 1, homogeneous, 20.0, np.random.default_rng(0))
    assert 10 * np.log10((bright[60:300] ** 2).mean()) == pytest.approx(6.0, abs=0.3)


# -- the data set


def test_reader_lists_two_views_of_each_patient():
    reader = Phantoms(cases=7, seed=2, size=96)
    cases = reader.cases()
    assert [case.id for case in cases][:2] == ["phantom_0000", "phantom_0001"]
    assert [case.patient for case in cases] == [f"patient_{k:04d}" for k in (0, 0, 1, 1, 2, 2, 3)]
    assert cases == reader.cases() and len({case.key for case in cases}) == 7
    assert cases[0].label == cases[1].label and {case.label for case in cases} <= {"benign", "malignant"}
    assert all(case.files == () and case.dataset == "phantom" for case in cases)
    image, mask = reader.read(cases[5])
    expected_image, expected_mask = make_phantom(5, 2, 96)
    assert (image == expected_image).all() and (mask == expected_mask).all()


def test_both_labels_occur_in_their_share():
    labels = [case.label for case in Phantoms(cases=400, seed=0).cases()]
    assert 0.3 < labels.count("malignant") / len(labels) < 0.5


def test_views_of_a_patient_resemble_each_other_more_than_other_patients(series):
    grey = np.array([image.mean(1)[::8] for image, _ in series]).astype(float)  # brightness along the depth
    views = np.abs(grey[0::2] - grey[1::2]).mean()
    strangers = np.abs(grey[0::2] - np.roll(grey[1::2], 1, axis=0)).mean()
    assert views < 0.85 * strangers


@pytest.mark.parametrize("wrong", [{"cases": 0}, {"seed": -1}, {"size": 8}])
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        Phantoms(**wrong)
