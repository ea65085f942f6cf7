"""Folds: official where they exist, else drawn; nothing crosses a border."""

import hashlib
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn

from data_layouts import SHARED, disc, needs_busbra, needs_busi, save, texture, write_busbra, write_busi, write_folder
from ultrarefiner.data import duplicates
from ultrarefiner.data.cases import PARTS, Case
from ultrarefiner.data.datamodule import DataModule
from ultrarefiner.data.duplicates import MAX_HAMMING, MIN_CORRELATION, components, near_duplicates, signature
from ultrarefiner.data.folds import Limits, Split, leaks, limit_split, make_split, save_split
from ultrarefiner.data.images import load_image
from ultrarefiner.data.readers import BusBra, Busi, Combined, Folder, Udiat
from ultrarefiner.data.store import Store
from ultrarefiner.errors import UserError


def ids(split: Split, part: str) -> set[str]:
    return {case.id for case in split.part(part)}


def module(reader, tmp_path, **options) -> DataModule:
    options = {"fold": 0, "seed": 0, "batch_size": 4, "image_size": 64, "coarse_size": 32, **options}
    return DataModule(Store(reader, tmp_path / "cache"), **options)


@cache
def look(path: Path, changed: int) -> np.ndarray:
    return signature(load_image(path)).ravel() / np.float32(255)


def assert_apart(split: Split) -> None:
    """Patients, files and look of the parts differ; written apart from the program's own proof."""
    for number, one in enumerate(PARTS):
        for other in PARTS[number + 1 :]:
            a, b = split.part(one), split.part(other)
            assert not {(x.dataset, x.patient) for x in a if x.patient} & {(x.dataset, x.patient) for x in b}
            if a and b and a[0].image:
                assert not {hashlib.md5(x.image.read_bytes()).digest() for x in a} & {
                    hashlib.md5(x.image.read_bytes()).digest() for x in b
                }
                rows = [[look(x.image, x.image.stat().st_mtime_ns) for x in part] for part in (a, b)]
                correlation = np.corrcoef(np.concatenate(rows))[: len(a), len(a) :]
                assert correlation.max() < 0.95


def make_cases(count: int, dataset: str = "d", views: int = 1, roles=()) -> list[Case]:
    return [
        Case(
            f"c{i:03d}",
            dataset,
            patient=str(i // views),
            label=("benign", "malignant")[i // views % 3 == 0],
            roles=roles,
        )
        for i in range(count)
    ]


def test_official_test_part_is_kept_and_patients_are_whole(tmp_path):
    cases = BusBra(write_busbra(tmp_path)).cases()
    tested = Counter()
    for fold in range(5):
        split = make_split(cases, fold, 5)
        assert ids(split, "test") == {case.id for case in cases if int(case.patient) % 5 == fold}
        assert sum(len(split.part(part)) for part in PARTS) == len(cases) and not split.left_out
        assert split.moved > 0 and split.val
        assert_apart(split)
        for part in ("train", "val"):  # only torn patients were moved
            for case in split.part(part):
                siblings = {other.roles[fold] for other in cases if other.patient == case.patient}
                assert case.roles[fold] == part or len(siblings) == 2
        tested.update(ids(split, "test"))
    assert set(tested.values()) == {1} and len(tested) == len(cases)


def test_drawn_folds_cover_everything_once():
    cases = make_cases(101, views=2)
    test = None
    validated = Counter()
    for fold in range(5):
        split = make_split(cases, fold, 5, seed=3)
        test = test or ids(split, "test")
        assert ids(split, "test") == test  # the same for every fold
        assert_apart(split)
        assert len(split.train) + len(split.val) + len(split.test) == 101
        validated.update(ids(split, "val"))
    assert set(validated.values()) == {1} and set(validated) == {case.id for case in cases} - test
    assert len(test) == pytest.approx(20, abs=2)


def test_drawn_folds_are_stratified_by_class_and_size():
    cases = make_cases(300)
    shares = [(i * 7919 % 300) / 300 for i in range(300)]
    of = dict(zip((case.id for case in cases), shares, strict=True))
    for fold in range(5):
        split = make_split(cases, fold, 5, lesion_shares=shares)
        for part in PARTS:
            malignant = np.mean([case.label == "malignant" for case in split.part(part)])
            small = np.mean([of[case.id] < 1 / 3 for case in split.part(part)])
            assert malignant == pytest.approx(1 / 3, abs=0.07) and small == pytest.approx(1 / 3, abs=0.08)


def test_the_seed_and_nothing_else_decides():
    cases = make_cases(60, views=2)
    once, again = make_split(cases, 1, 5, seed=0), make_split(cases[::-1], 1, 5, seed=0)
    assert all(ids(once, part) == ids(again, part) for part in PARTS)
    assert ids(once, "test") != ids(make_split(cases, 1, 5, seed=1), "test")


@pytest.mark.parametrize("fold", [-1, 5, 7])
def test_fold_outside_the_partition(tmp_path, fold):
    cases = BusBra(write_busbra(tmp_path)).cases()
    with pytest.raises(UserError, match=f"fold={fold} is outside the 5-fold partition of busbra: choose 0…4"):
        make_split(cases, fold, 5)


def test_number_of_folds_has_to_be_the_publishers(tmp_path):
    cases = BusBra(write_busbra(tmp_path)).cases()
    with pytest.raises(UserError, match="has 5 folds"):
        make_split(cases, 0, 10)
    with pytest.raises(UserError, match="2 or more"):
        make_split(make_cases(20), 0, 1)
    own = BusBra(tmp_path, official=0).cases()
    assert make_split(own, 7, 8).val


def test_ten_official_folds(tmp_path):
    write_busbra(tmp_path, folds=10)
    assert len(BusBra(tmp_path, official=10).cases()[0].roles) == 10
    with pytest.raises(UserError, match="official=7"):
        BusBra(tmp_path, official=7)


def test_fewer_patients_than_folds():
    with pytest.raises(UserError, match=r"d has 5 patients .*fewer than the 6"):
        make_split(make_cases(10, views=2), 0, 5)
    assert make_split(make_cases(12, views=2), 0, 5).val  # six are just enough
    for fold in range(5):
        assert all(make_split(make_cases(12, views=2), fold, 5).part(part) for part in PARTS)


def test_near_duplicates_are_found_and_others_are_not():
    images = [texture(number, 300, 240) for number in range(30)]
    brighter = np.clip(images[4] * 1.2 + 10, 0, 255).astype(np.uint8)
    cropped = images[9][4:-2, 3:-5]
    noisy = np.clip(images[2] + np.random.default_rng(0).normal(0, 12, images[2].shape), 0, 255).astype(np.uint8)
    flat = np.full((240, 300), 80, np.uint8)
    found = near_duplicates(np.stack([signature(i) for i in [*images, brighter, cropped, noisy, flat, flat]]))
    assert {(pair.first, pair.second) for pair in found} == {(4, 30), (9, 31), (2, 32)}
    assert near_duplicates(np.zeros((0, 64, 64), np.uint8)) == []


def exhaustive(signatures: np.ndarray) -> set[tuple[int, int]]:
    """Every pair compared in full, in float64, by definitions written apart from the program's."""
    flat = signatures.reshape(len(signatures), -1).astype(np.float64)
    structured = flat.std(axis=1) > 0
    with np.errstate(invalid="ignore"):
        alike = np.corrcoef(flat) >= MIN_CORRELATION
    low = dctn(signatures.astype(np.float64), axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(flat), -1)[:, 1:]
    bits = low > np.median(low, axis=1, keepdims=True)
    differing = (bits[:, None] != bits[None]).sum(axis=2)
    found = np.argwhere(np.triu(alike & (differing <= MAX_HAMMING) & structured & structured[:, None], 1))
    return {(int(a), int(b)) for a, b in found}


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_are_those_of_an_exhaustive_search(seed, monkeypatch):
    """Images at all distances from each other, blocks that end within them, and flat ones."""
    rng = np.random.default_rng(seed)
    originals = np.stack([signature(texture(100 * seed + number, 64, 64)) for number in range(25)]).astype(np.float64)
    noise = rng.normal(size=(150, 64, 64))
    noise[::2] = [cv2.GaussianBlur(one, (0, 0), 6) * 15 for one in noise[::2]]
    changed = originals[rng.integers(0, 25, 150)] + noise * rng.uniform(0, 60, (150, 1, 1))
    thumbnails = np.clip(np.concatenate([originals, changed, np.full((3, 64, 64), 80.0)]), 0, 255).astype(np.uint8)
    expected = exhaustive(thumbnails)
    assert len(expected) > 100
    for block in (2048, 50, 1):
        monkeypatch.setattr(duplicates, "_BLOCK", block)
        found = near_duplicates(thumbnails)
        assert [(pair.first, pair.second) for pair in found] == sorted(expected)
    for pair in found[:50]:
        correlation = np.corrcoef(thumbnails[pair.first].ravel(), thumbnails[pair.second].ravel())[0, 1]
        assert pair.correlation == pytest.approx(correlation, abs=1e-5)


@pytest.mark.slow
def test_near_duplicates_of_bus_bra_are_those_of_an_exhaustive_search(shared_data, monkeypatch):
    """As they are, and at limits that many pairs of its patients' views reach."""
    thumbnails = np.stack(
        [signature(load_image(path)) for path in sorted((shared_data / "BUSBRA" / "Images").iterdir())]
    )
    assert len(thumbnails) == 1517
    copies = np.clip(thumbnails[:200] * 0.8 + 20, 0, 255).astype(np.uint8)
    assert {(p.first, p.second) for p in near_duplicates(thumbnails)} == exhaustive(thumbnails)
    both = np.concatenate([thumbnails, copies])
    assert {(p.first, p.second) for p in near_duplicates(both)} >= {(i, 1517 + i) for i in range(200)}
    for module_ in (duplicates, sys.modules[__name__]):
        monkeypatch.setattr(module_, "MIN_CORRELATION", 0.75)
    looser = {(p.first, p.second) for p in near_duplicates(thumbnails)}
    assert looser == exhaustive(thumbnails) and len(looser) > 100


def test_components():
    assert components(6, [(4, 5), (0, 2), (5, 2)]) == [0, 1, 0, 3, 0, 0]
    assert components(3, []) == [0, 1, 2] and components(0, []) == []


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_components_are_named_by_their_first_member(drawn):
    count, links = drawn
    reachable = np.eye(count, dtype=bool)
    for one, other in links:
        reachable[one, other] = reachable[other, one] = True
    for _ in range(count):
        reachable = (reachable.astype(int) @ reachable) > 0
    assert components(count, links) == reachable.argmax(axis=1).tolist()


def test_duplicates_stay_together(tmp_path):
    root = write_folder(tmp_path / "data", 24)
    for number in range(6):  # three frames of each of six lesions, one of them the same file
        save(root / "images" / f"again_{number}.png", np.clip(texture(number) * 0.9 + 8, 0, 255).astype(np.uint8))
        save(root / "images" / f"once_more_{number}.png", texture(number))
        for stem in ("again", "once_more"):
            save(root / "masks" / f"{stem}_{number}.png", disc(number))
    for fold in range(3):
        data = module(Folder(root), tmp_path, fold=fold, folds=3)
        assert_apart(data.split)
        place = {case.id: part for part in PARTS for case in data.split.part(part)}
        for number in range(6):
            assert len({place[f"{stem}_{number}"] for stem in ("case", "again", "once_more")}) == 1


def test_leaks_are_found(tmp_path):
    root = write_folder(tmp_path / "data", 4)
    save(root / "images" / "case_1.png", texture(0))  # the same file as case_0
    save(root / "images" / "case_2.png", np.clip(texture(0) * 0.9 + 8, 0, 255).astype(np.uint8))
    cases = [
        Case(case.id, "d", patient="p" if case.id in ("case_0", "case_3") else None, image=case.image, masks=case.masks)
        for case in Folder(root).cases()
    ]
    index = module(Folder(root), tmp_path)._opened[0]
    found = leaks(Split(train=(cases[0],), val=(cases[1], cases[2]), test=(cases[3],)), cases, index)
    assert any("the same file" in line and "case_1" in line for line in found)
    assert any("near-duplicates" in line and "case_2" in line for line in found)
    assert any("patient p" in line and "case_3" in line for line in found)
    assert leaks(Split(train=tuple(cases), val=(), test=()), cases, index) == []


def test_what_resembles_a_test_image_is_left_out(tmp_path):
    """Two data sets share a frame: the official test set keeps it, the other loses it."""
    busbra = BusBra(write_busbra(tmp_path / "b"))
    own = write_folder(tmp_path / "f")
    for name in ("images", "masks"):
        for path in (own / name).iterdir():
            path.rename(path.with_name(path.name.replace("case_", "own_")))
    for number in range(6):
        save(own / "images" / f"own_{number}.png", texture(100 + number))
    tested = next(case for case in busbra.cases() if case.roles[0] == "test")
    (own / "images" / "own_2.png").write_bytes(tested.image.read_bytes())
    data = module(Combined([busbra, Folder(own)]), tmp_path, test_fraction=0.0)
    assert tested.id in ids(data.split, "test")
    assert "own_2" not in ids(data.split, "train") | ids(data.split, "val") | ids(data.split, "test")
    assert [exclusion.what for exclusion in data.split.left_out] == ["own_2"]
    assert_apart(data.split)


def test_limits_take_whole_patients(tmp_path):
    cases = make_cases(100, views=2)
    split = make_split(cases, 0, 5)
    groups = {case.key: case.patient for case in cases}
    short = limit_split(split, {"train": 11, "val": 4, "test": None}, groups, seed=0)
    assert len(short.train) == 10 and len(short.val) == 4 and short.test == split.test
    patients = Counter(case.patient for case in short.train)
    assert set(patients.values()) == {2}
    assert (
        short == limit_split(split, Limits(11, 4), groups, seed=0) != limit_split(split, Limits(11, 4), groups, seed=1)
    )
    assert len(limit_split(split, Limits(train=1), groups, seed=0).train) == 2  # a first patient is not torn
    with pytest.raises(UserError, match=r"limit\.val=0"):
        limit_split(split, Limits(val=0), groups, seed=0)


def test_combined_takes_each_members_own_folds(tmp_path):
    reader = Combined([BusBra(write_busbra(tmp_path / "b")), Busi(write_busi(tmp_path / "i", 6))])
    for case in Busi(tmp_path / "i").cases():  # other pictures than in b
        number = 200 + int(hashlib.md5(case.id.encode()).hexdigest()[:6], 16)
        save(case.image, texture(number), "RGB")
    split = module(reader, tmp_path, include_normal=True).split
    alone = make_split(BusBra(tmp_path / "b").cases(), 0, 5)
    assert {case.id for case in split.test if case.dataset == "busbra"} == ids(alone, "test")
    assert {case.dataset for case in split.val} == {"busbra", "busi"}


def test_udiat_is_for_testing_only(tmp_path):
    for number in range(3):
        save(tmp_path / "original" / f"{number}.png", texture(number))
        save(tmp_path / "GT" / f"{number}.png", disc(number))
    data = module(Udiat(tmp_path), tmp_path)
    assert len(data.split.test) == 3 and not data.split.train
    data.setup("test")
    with pytest.raises(UserError, match="testing only"):
        data.setup("fit")


def test_save_split(tmp_path):
    save_split(make_split(make_cases(60), 0, 5), tmp_path / "split.csv")
    lines = (tmp_path / "split.csv").read_text().splitlines()
    assert lines[0] == "part,dataset,id,patient,label" and len(lines) == 61


@needs_busbra
@pytest.mark.slow
def test_shared_busbra_has_no_leak(tmp_path):
    tested = Counter()
    for fold in range(5):
        data = module(BusBra(SHARED), tmp_path, fold=fold)
        assert_apart(data.split)
        tested.update(ids(data.split, "test"))
        assert 200 <= len(data.split.val) <= 270 and not data.split.left_out
    assert len(tested) == 1517 and set(tested.values()) == {1}


@needs_busi
def test_shared_busi_groups_its_repeated_frames(tmp_path):
    place = {}
    data = module(Busi(SHARED / "BUSI_sample"), tmp_path, folds=3, include_normal=True)
    assert_apart(data.split)
    for part in PARTS:
        place |= {case.id: part for case in data.split.part(part)}
    assert len(place) == 30
    assert len({place[f"malignant ({number})"] for number in (4, 5, 6, 7, 8, 9)}) == 1
