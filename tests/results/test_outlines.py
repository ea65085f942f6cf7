"""Outlines: the mask comes back from its text, and a text that is no outline is none."""

import cv2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ultrarefiner.results import outlines


def blobs(seed: int, height: int, width: int) -> np.ndarray:
    """Several lesions, some with holes, some on the border."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(height, width)), 2)
    return noise > 0.1


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(16, 70), st.integers(16, 70))
def test_the_mask_comes_back_from_its_outlines(seed, height, width):
    mask = blobs(seed, height, width)
    path = outlines.path_of(mask)
    assert outlines.PATH.fullmatch(path)
    found = outlines.mask_of(path, width, height)
    assert found.shape == mask.shape and found[mask].all()
    # OpenCV draws the pixels around a hole with it: what is added lies beside the mask.
    assert not (found & ~ndimage.binary_dilation(mask, np.ones((3, 3)))).any()


def test_corners_are_pixel_centres():
    mask = np.zeros((20, 30), bool)
    mask[4:9, 10:21] = True
    assert sorted(outlines.path_of(mask).strip("MZ").split("L")) == ["10 4", "10 8", "20 4", "20 8"]
    assert outlines.path_of(np.zeros((5, 5), bool)) == "" and not outlines.mask_of("", 5, 4).any()


def test_anything_else_is_no_outline():
    for text in ("M1 2L3 4", "M1 2Z<script>", "url(x)", "M-1 2Z", "M1 2L 3 4Z"):
        assert not outlines.PATH.fullmatch(text)


def test_pictures_are_small_and_keep_their_shape(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (300, 900), dtype=np.uint8)
    outlines.write_jpeg(image, 400, tmp_path / "a.jpg")
    assert cv2.imread(str(tmp_path / "a.jpg")).shape == (133, 400, 3)
    outlines.write_jpeg(image[:10, :20], 400, tmp_path / "b.jpg")
    assert cv2.imread(str(tmp_path / "b.jpg")).shape == (10, 20, 3)
