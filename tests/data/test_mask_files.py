"""Masks of other tools by the cases' names: formats, what their numbers mean, and what cannot be trusted."""

import json
import logging

import cv2
import nibabel
import numpy as np
import pytest

from conftest import MICRO, compose
from data_layouts import write_busbra
from ultrarefiner.data.images import map_to_square
from ultrarefiner.data.mask_maps import coarse_map, read_map
from ultrarefiner.errors import UserError
from ultrarefiner.phases.sam import SamPhase
from ultrarefiner.runs.assemble import build_data
from ultrarefiner.runs.experiment import run
from ultrarefiner.runs.plan import plan

PROB = np.linspace(0, 1, 48 * 60, dtype=np.float32).reshape(48, 60) ** 2  # not symmetric: rows and columns show
LESION = (PROB > 0.5).astype(np.uint8)
WRITERS = {
    "labels.png": (LESION, lambda p: cv2.imwrite(str(p), LESION), 1),
    "mask.png": (LESION, lambda p: cv2.imwrite(str(p), 255 * LESION), 255),
    "coloured.png": (LESION, lambda p: cv2.imwrite(str(p), np.dstack([0 * LESION, 255 * LESION, 0 * LESION])), 255),
    "grey.png": (PROB, lambda p: cv2.imwrite(str(p), np.round(255 * PROB).astype(np.uint8)), 255),
    "deep.png": (PROB, lambda p: cv2.imwrite(str(p), np.round(65535 * PROB).astype(np.uint16)), 65535),
    "float.tif": (PROB, lambda p: cv2.imwrite(str(p), PROB), 1),
    "prob.npy": (PROB, lambda p: np.save(p, PROB), 1),
    "prob.npz": (PROB, lambda p: np.savez_compressed(p, probability=PROB), 1),
    "classes.npz": (PROB, lambda p: np.savez(p, softmax=np.stack([1 - PROB, 0.7 * PROB, 0.3 * PROB])), 1),
    "nnunet.npz": (PROB, lambda p: np.savez(p, probabilities=np.stack([1 - PROB, PROB])[:, None]), 1),
    "nnunet.nii.gz": (LESION, lambda p: nibabel.save(nibabel.Nifti1Image(LESION.T[..., None], np.eye(4)), p), 1),
    "prob.nii": (PROB, lambda p: nibabel.save(nibabel.Nifti1Image(PROB.T, np.eye(4)), p), 1),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_numbers(name, tmp_path):
    expected, write, largest = WRITERS[name]
    write(tmp_path / name)
    np.testing.assert_allclose(read_map(tmp_path / name) / largest, expected, atol=0.5 / 255 + 1e-6)


UNREADABLE = {
    "cut.png": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20)), "cannot be read as .png"),
    "cut.nii.gz": (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(20)), r"cannot be read as .nii.gz"),
    "no.nii": (lambda p: p.write_bytes(b"x" * 400), r"cannot be read as .nii"),
    "cut.npz": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(20)), "cannot be read as .npz"),
    "code.npy": (lambda p: np.save(p, np.array([print], dtype=object)), "cannot be read as .npy"),
    "two.npz": (lambda p: np.savez(p, a=PROB, b=PROB), r"2 arrays \(a, b\)"),
    "volume.npy": (lambda p: np.save(p, np.zeros((3, 4, 5, 6))), r"\(4, 5, 6\) numbers"),
    "logits.npy": (lambda p: np.save(p, PROB - 0.5), "negative"),
    "nan.npy": (lambda p: np.save(p, PROB * np.nan), "not finite"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_mask_is_one_sentence(name, tmp_path):
    write, sentence = UNREADABLE[name]
    write(tmp_path / name)
    with pytest.raises(UserError, match=sentence) as raised:
        read_map(tmp_path / name)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def busbra(root, *more):
    small = ["model.image_size=64", "model.coarse_size=32"]
    return compose(
        *("dataset=busbra", f"data_root={root}", f"output_root={root.parent}/out", "phase=sam", "model/coarse=files"),
        *(f"phase.masks={root.parent}/masks", *small, *more),
        micro=False,
    )


@pytest.fixture
def masks(tmp_path):
    """A data set, and a mask of each of its cases by a tool that shifts every lesion by two pixels."""
    root = write_busbra(tmp_path / "data")
    folder = tmp_path / "masks" / "fold_0" / "validation"
    folder.mkdir(parents=True)
    for path in (root / "Masks").iterdir():
        lesion = np.roll(cv2.imread(str(path), 0), 2, axis=1)
        cv2.imwrite(str(folder / path.name.replace("mask_", "bus_")), lesion // 255)  # 0 and 1, as nnU-Net
    (tmp_path / "masks" / "dataset.json").write_text("{}")
    cv2.imwrite(str(tmp_path / "masks" / "progress.png"), np.zeros((5, 5)))
    return root, folder


def test_each_part_takes_the_masks_of_its_cases(masks, caplog):
    root, folder = masks
    cv2.imwrite(str(folder / "0001-stray.png"), np.ones((48, 60)))
    data = build_data(busbra(root, "dataset.augment=null"), SamPhase)
    with caplog.at_level(logging.WARNING):
        data.prepare_data()
    assert "Each mask must be of a network that has not seen the case" in caplog.text
    for part in ("train", "val", "test"):
        items = data.dataset(part)
        for index, case in enumerate(data.split.part(part)):
            own = cv2.imread(str(folder / f"{case.id}.png"), 0).astype(np.float32)
            np.testing.assert_array_equal(items[index]["prob"][0].numpy(), coarse_map(own, 32))
    # nnU-Net's probabilities beside its masks are worth more
    first = data.split.train[0]
    np.savez(folder / f"{first.id}.npz", probabilities=np.stack([1 - PROB, PROB])[:, None])
    again = build_data(busbra(root, "dataset.augment=null"), SamPhase)
    np.testing.assert_allclose(again.dataset("train")[0]["prob"][0].numpy(), map_to_square(PROB, 32), atol=1e-6)


def test_a_tool_that_has_seen_the_training_cases_is_suspected(masks, caplog):
    root, folder = masks
    for case in build_data(busbra(root), SamPhase).split.train:
        truth = cv2.imread(str(root / "Masks" / f"{case.id.replace('bus_', 'mask_')}.png"), 0)
        cv2.imwrite(str(folder / f"{case.id}.png"), truth // 255)
    with caplog.at_level(logging.WARNING):
        build_data(busbra(root), SamPhase).prepare_data()
    assert "Dice 1.000 on training and 0." in caplog.text and "seems to have seen the training cases" in caplog.text


def _first(folder):
    return sorted(folder.glob("bus_*.png"))[3]


def _all(change):
    def apply(folder):
        for path in folder.glob("bus_*.png"):
            cv2.imwrite(str(path), change(cv2.imread(str(path), 0)))

    return apply


def _copy(folder):
    (folder.parent / _first(folder).name).write_bytes(_first(folder).read_bytes())


MISTAKES = {
    "missing": (lambda f: _first(f).unlink(), r"no mask for 1 of the \d+ cases of part \w+, the first is bus_0002-r"),
    "another size": (lambda f: cv2.imwrite(str(_first(f)), np.ones((48, 61))), r"61 × 48 px, not 32 × 32 .* 60 × 48"),
    "damaged": (lambda f: _first(f).write_bytes(b"x"), r"bus_0002-r.png cannot be read"),
    "twice": (_copy, r"bus_0002-r.* are both of bus_0002-r"),
    "constant": (_all(np.zeros_like), r"all \d+ masks of part train are empty"),
    "labels of more": (_all(lambda m: m * 3), "largest number in all masks is 3"),
    "nothing": (
        lambda f: [p.unlink() for p in f.parent.parent.rglob("*.png")],
        r"phase\.masks=.* no masks\.csv and no",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_is_refused_before_training(mistake, masks):
    root, folder = masks
    change, sentence = MISTAKES[mistake]
    change(folder)
    with pytest.raises(UserError, match=sentence) as raised:
        build_data(busbra(root), SamPhase).prepare_data()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["phase=e2e"], r"phase=e2e trains a coarse network, and no gradient reaches another tool's masks"),
        (["phase=coarse"], "phase=coarse trains a coarse network"),
        (["phase=sam", "phase.real_ratio=0.5"], "phase=sam with phase.softness, bins or real_ratio trains a coarse"),
        (["phase=sam"], r"model/coarse=files needs phase\.masks=FOLDER"),
    ],
)
def test_what_needs_a_network_says_so(given, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        plan(compose(f"output_root={tmp_path}", "model/coarse=files", *given))


def test_a_table_must_be_complete_where_there_is_no_network(masks):
    root, folder = masks
    split = build_data(busbra(root), SamPhase).split
    rows = ["file,dataset,id,part"]
    for part in ("train", "val", "test"):
        rows += [f"fold_0/validation/{case.id}.png,busbra,{case.id},{part}" for case in split.part(part)]
    table = folder.parent.parent / "masks.csv"
    table.write_text("\n".join(rows))
    data = build_data(busbra(root), SamPhase)
    assert data.dataset("test")[0]["prob"].max() == pytest.approx(1 / 255)  # with a table the largest value is 1
    table.write_text("\n".join(row for row in rows if not row.endswith("test")))
    with pytest.raises(UserError, match=r"no mask for 8 of the 8 cases of part test"):
        build_data(busbra(root), SamPhase).prepare_data()


@pytest.mark.slow
def test_phase_two_without_phase_one(masks):
    root, folder = masks
    runs = plan(busbra(root))
    assert len(runs) == 1
    directory = run(busbra(root, "phase.epochs=1", "model=tiny", *MICRO[-1:]))
    summary = json.loads((directory / "summary.json").read_text())
    assert 0.5 < summary["test"]["coarse"]["dice"] < 0.9  # of the shifted masks
    _all(lambda mask: np.roll(mask, 1, axis=0))(folder)
    assert plan(busbra(root))[0].directory != runs[0].directory


@pytest.mark.parametrize("shape", [(224, 224), (300, 480)])
def test_a_hard_mask_becomes_as_soft_as_a_network_and_keeps_its_outline(shape):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    disc = (rows - shape[0] / 2) ** 2 + (columns - shape[1] / 2) ** 2 < (min(shape) / 4) ** 2
    prob = coarse_map(disc.astype(np.float32), 224)
    hard = map_to_square(disc.astype(np.float32), 224)
    assert np.array_equal(prob > 0.5, hard > 0.5) or np.mean((prob > 0.5) != (hard > 0.5)) < 1e-3
    assert 0 < prob.min() < 0.01 and 0.98 < prob.max() < 0.995  # as sure as a network far from the edge
    # along the middle row, the edge rises from 0.1 to 0.9 over the usual width (4 px of a frame of 224)
    rise = np.count_nonzero((prob[112] > 0.1) & (prob[112] < 0.9)) / 2 * max(shape) / shape[1]
    assert 3 <= rise <= 5
    empty = np.zeros(shape, np.float32)
    assert not coarse_map(empty, 224).any()
    given = np.linspace(0, 1, 224 * 224, dtype=np.float32).reshape(224, 224)
    assert coarse_map(given, 224) is given
