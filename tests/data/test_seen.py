"""A network's test images are not among those it has seen: by content, whatever the file is called."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from ultrarefiner.data.duplicates import signature
from ultrarefiner.data.index import Entry, Index
from ultrarefiner.data.readers import BusBra
from ultrarefiner.data.seen import Seen, marks_of


def index_of(images: list[np.ndarray], names: str = "abcdefgh") -> Index:
    entries = [Entry("d", name, name * 64, (), *image.shape, 1, "") for image, name in zip(images, names, strict=False)]
    return Index("mark", tuple(entries), np.stack([signature(image) for image in images]))


def marks(images: list[np.ndarray], names: str = "abcdefgh") -> list[str]:
    return marks_of(index_of(images, names), range(len(images)))


@pytest.fixture(scope="module")
def pictures(shared_data) -> list[np.ndarray]:
    """One image each of eight patients."""
    reader = BusBra(shared_data / "BUSBRA")
    first = {case.patient: case for case in reversed(reader.cases())}
    return [reader.read(case)[0] for case in list(first.values())[:8]]


def jpeg(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))


CHANGES = {
    "another format": jpeg,
    "another size": lambda image: cv2.resize(image, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA),
    "brighter": lambda image: np.clip(image * 1.2 + 10, 0, 255).astype(np.uint8),
    "cut by 1 %": lambda image: np.ascontiguousarray(
        image[image.shape[0] // 100 : -(image.shape[0] // 100), image.shape[1] // 100 : -(image.shape[1] // 100)]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_near_duplicates_count_as_seen(pictures, change):
    seen = Seen(trained=frozenset(marks(pictures[:4])))
    tested = [CHANGES[change](image) for image in pictures]
    assert seen.among(marks(tested, "stuvwxyz")) == [0, 1, 2, 3]


def test_other_patients_do_not(shared_data):
    """All of BUS-BRA: no image of a patient is taken for one of another patient."""
    reader = BusBra(shared_data / "BUSBRA")
    cases = reader.cases()[:400]
    images = [reader.read(case)[0] for case in cases]
    found = marks_of(
        Index(
            "m",
            tuple(Entry("d", c.id, f"{i:064x}"[::-1], (), 1, 1, 1, "") for i, c in enumerate(cases)),
            np.stack([signature(image) for image in images]),
        ),
        range(len(cases)),
    )
    patients = [case.patient for case in cases]
    half = sorted(set(patients))[::2]
    trained = Seen(trained=frozenset(m for m, p in zip(found, patients, strict=True) if p in half))
    assert trained.among([m for m, p in zip(found, patients, strict=True) if p not in half]) == []


def test_the_same_file_counts_whatever_its_picture():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (64, 64), np.uint8) for _ in range(2)]
    seen = Seen(chosen=frozenset(marks(images[:1], "a")))
    assert seen.among(marks(images[1:], "a")) == [0]
    assert Seen().among(marks(images)) == [] and seen.among([]) == []


def test_marks_survive_a_file_and_add_up():
    one, other = Seen(frozenset({"a-00"}), frozenset({"b-00"})), Seen(frozenset({"c-00"}))
    both = one | other
    assert Seen.of_lists(both.as_lists()) == both == Seen(frozenset({"a-00", "c-00"}), frozenset({"b-00"}))
    assert both.without(["c-00", "b-00"]) == Seen(frozenset({"a-00"}))
