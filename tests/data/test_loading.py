"""Cache, augmentation, items and loaders."""

import json
import multiprocessing
import os
import pickle

import cv2
import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from data_layouts import SHARED, disc, needs_busbra, save, texture, write_busbra, write_busi, write_folder
from ultrarefiner.data.augment import Augment, Change
from ultrarefiner.data.cache import Frames, NativeMasks, cache_folder, open_cache
from ultrarefiner.data.cases import Case
from ultrarefiner.data.datamodule import DataModule, _begin_worker
from ultrarefiner.data.dataset import EpochSampler, failure_seed
from ultrarefiner.data.failures import BINS, FailureSimulator
from ultrarefiner.data.folds import Limits
from ultrarefiner.data.images import mask_to_square, to_square
from ultrarefiner.data.index import fingerprint
from ultrarefiner.data.inspect import inspect_dataset
from ultrarefiner.data.phantom import Phantoms
from ultrarefiner.data.predictions import Predictions
from ultrarefiner.data.readers import BusBra, Busi, Folder
from ultrarefiner.data.store import Store
from ultrarefiner.errors import UserError


def simulator(mask: np.ndarray, seed: int) -> np.ndarray:
    return np.where(mask, 0.9, 0.1) * np.random.default_rng(seed).uniform(0.9, 1)


def module(tmp_path, reader=None, **options) -> DataModule:
    reader = reader or BusBra(write_busbra(tmp_path / "data"))
    options = {"fold": 0, "seed": 0, "batch_size": 4, "image_size": 64, "coarse_size": 32, **options}
    return DataModule(Store(reader, tmp_path / "cache"), **options)


def stream(loader, epoch: int) -> list[tuple]:
    """What a loader gives in an epoch, comparable."""
    loader.sampler.set_epoch(epoch)
    return [
        (
            batch["id"],
            *(batch[key].sum(dtype=torch.float64).item() for key in sorted(batch) if torch.is_tensor(batch[key])),
        )
        for batch in loader
    ]


# --------------------------------------------------------------------------------------------------------------- cache


def test_cache_holds_what_the_files_hold(tmp_path):
    reader = BusBra(write_busbra(tmp_path / "data"))
    index, frames = open_cache(reader, (32, 61), tmp_path / "cache")  # 61: rows of bits are padded
    native = NativeMasks(cache_folder(reader, index.fingerprint, tmp_path / "cache"), index)
    for position, case in enumerate(reader.cases()):
        image, mask = reader.read(case)
        entry = index.entries[position]
        np.testing.assert_array_equal(native.mask(position), mask)
        assert (entry.height, entry.width, entry.lesion_px) == (*image.shape, int(mask.sum()))
        for size, frame in frames.items():
            np.testing.assert_array_equal(frame.image(position), to_square(image, size))
            np.testing.assert_array_equal(frame.mask(position), mask_to_square(mask, size))


def test_cache_is_used_again_and_extended(tmp_path, monkeypatch):
    reader = BusBra(write_busbra(tmp_path / "data"))
    reads = []
    original = BusBra.read
    monkeypatch.setattr(BusBra, "read", lambda self, case: reads.append(case.id) or original(self, case))
    open_cache(reader, (32,), tmp_path / "cache")
    assert len(reads) == 40
    open_cache(reader, (32,), tmp_path / "cache")
    assert len(reads) == 40
    open_cache(reader, (32, 48), tmp_path / "cache")
    assert len(reads) == 80


@pytest.mark.parametrize("sizes", [((17, 16),), ((16, 16), (33, 21), (19, 40)), ((61, 17), (17, 61))])
def test_native_masks_of_any_sizes(tmp_path, sizes):
    """Sizes whose number of pixels is no multiple of eight, one after the other."""
    for number, (height, width) in enumerate(sizes):
        save(tmp_path / "data" / "images" / f"{number}.png", texture(number, width, height))
        noise = np.random.default_rng(number).random((height, width)) < 0.5
        save(tmp_path / "data" / "masks" / f"{number}.png", noise * np.uint8(255))
    reader = Folder(tmp_path / "data")
    store = Store(reader, tmp_path / "cache")
    native = pickle.loads(pickle.dumps(store.native_masks(store.open((32,))[0])))
    for position, case in enumerate(reader.cases()):
        np.testing.assert_array_equal(native.mask(position), reader.read(case)[1])


def truths(data: DataModule) -> dict[str, np.ndarray]:
    batches = list(data.test_dataloader())
    return {id: mask for batch in batches for id, mask in zip(batch["id"], batch["native_mask"], strict=True)}


def test_masks_that_change_while_a_run_trains_are_not_measured(tmp_path, monkeypatch):
    """The truth is what the fingerprint was made of; another command sees other data."""
    data = module(tmp_path)
    first = truths(data)
    for case in data.split.test:
        save(case.masks[0], 255 - disc(0))
    with monkeypatch.context() as patch:
        patch.setattr(type(data.reader), "read", lambda *_: pytest.fail("a file is read"))
        again = truths(data)
    assert first.keys() == again.keys() and all(np.array_equal(first[id], again[id]) for id in first)
    later = module(tmp_path, data.reader)
    assert later.store.fingerprint != data.store.fingerprint
    changed = truths(later)
    assert not any(np.array_equal(first[id], changed[id]) for id in first)


DAMAGED = ["images-32.npy", "masks-32.npy", "frames-32.json", "index.json", "signatures.npy"]
DAMAGED += ["masks-native.bits", "masks-native.json"]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_damaged_cache_is_built_again(tmp_path, name, damage):
    reader = Folder(write_folder(tmp_path / "data"))
    index, frames = open_cache(reader, (32,), tmp_path / "cache")
    expected = frames[32].image(3), frames[32].mask(3)
    truth = reader.read(reader.cases()[3])[1]
    path = next((tmp_path / "cache").glob(f"*/{name}"))
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0x15
        path.write_bytes({"flip": content, "cut": content[:-9], "empty": b""}[damage])
    again, frames = open_cache(reader, (32,), tmp_path / "cache")
    assert again.entries == index.entries
    np.testing.assert_array_equal(again.signatures, index.signatures)
    np.testing.assert_array_equal(frames[32].image(3), expected[0])
    np.testing.assert_array_equal(frames[32].mask(3), expected[1])
    np.testing.assert_array_equal(NativeMasks(path.parent, again).mask(3), truth)


def test_killed_build_leaves_nothing(tmp_path, monkeypatch):
    reader = Folder(write_folder(tmp_path / "data"))

    def stop(self, case):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Folder, "read", stop)
        open_cache(reader, (32,), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*.npy"))
    assert open_cache(reader, (32,), tmp_path / "cache")[1][32].image(0).shape == (32, 32)


def test_fingerprint_follows_content_not_place(tmp_path):
    def mark(root) -> str:
        reader = Folder(root)
        return fingerprint(reader, reader.cases())

    one, other = write_folder(tmp_path / "one"), write_folder(tmp_path / "other")
    assert mark(one) == mark(other)
    save(other / "images" / "case_3.png", texture(99))
    assert mark(one) != mark(other)
    save(other / "images" / "case_3.png", texture(3))
    assert mark(one) == mark(other)
    save(other / "masks" / "case_3.png", disc(4))
    assert mark(one) != mark(other)
    assert len({fingerprint(r, r.cases()) for r in (Phantoms(4), Phantoms(4), Phantoms(4, seed=1), Phantoms(5))}) == 3


def test_every_byte_of_a_large_file_counts(tmp_path):
    root = write_folder(tmp_path / "data", 1)
    (root / "masks" / "case_0.png").unlink()
    large = save(root / "masks" / "case_0.bmp", np.zeros((768, 1024, 3), np.uint8))
    save(root / "images" / "case_0.png", texture(0, 1024, 768))
    reader, content = Folder(root), large.read_bytes()
    marks = {fingerprint(reader, reader.cases())}
    for position in range(1000, len(content), 70_000):
        large.write_bytes(content[:position] + b"\xff" + content[position + 1 :])
        marks.add(fingerprint(reader, reader.cases()))
    assert len(content) > 2 << 20 and len(marks) == 1 + len(range(1000, len(content), 70_000))


def test_index_names_every_file(tmp_path):
    import hashlib

    reader = Busi(write_busi(tmp_path / "data"))
    report = inspect_dataset(reader, tmp_path / "cache", (32,))
    record = json.loads(report.index.read_text())
    for case, row in zip(reader.cases(), record["cases"], strict=True):
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in case.files]
        assert [row["sha256"], *row["mask_sha256"]] == hashes


def test_frames_pickle_small(tmp_path):
    reader = Folder(write_folder(tmp_path / "data"))
    frames = open_cache(reader, (512,), tmp_path / "cache")[1][512]
    frames.image(0)
    copy = pickle.loads(pickle.dumps(frames))
    assert len(pickle.dumps(frames)) < 1000 and isinstance(copy, Frames)
    np.testing.assert_array_equal(copy.image(2), frames.image(2))


# -------------------------------------------------------------------------------------------------------- augmentation


def change(matrix=None, bend=None, tone=None, speckle=(0.0, 0.0, 0.0), attenuation=0.0) -> Change:
    matrix = np.eye(2, 3, dtype=np.float32) if matrix is None else np.asarray(matrix, np.float32)
    return Change(matrix, bend, np.arange(256, dtype=np.uint8) if tone is None else tone, speckle, attenuation)


def smooth(size: int) -> np.ndarray:
    return cv2.resize(texture(5, 24, 24), (size, size), interpolation=cv2.INTER_CUBIC)


def test_identity_changes_nothing():
    image, mask = smooth(64), disc(3, 64, 64) > 0
    for bend in (None, np.zeros((6, 6, 2), np.float32)):
        out = change(bend=bend)(image, mask)
        np.testing.assert_array_equal(out[0], image)
        np.testing.assert_array_equal(out[1], mask)


def test_geometry_in_normalised_coordinates():
    image, mask = smooth(64), disc(3, 64, 64) > 0
    mirror = change([[-1, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(mirror(image, mask)[0], image[:, ::-1])
    np.testing.assert_array_equal(mirror(image, mask)[1], mask[:, ::-1])
    shifted = change([[1, 0, 0.125], [0, 1, 0]])(image, mask)[0]
    np.testing.assert_array_equal(shifted[:, :-8], image[:, 8:])
    assert not shifted[:, -8:].any()
    turn = change([[0, 1, 0], [-1, 0, 1]])(image, mask)[0]
    np.testing.assert_array_equal(turn, np.rot90(image, -1))


def test_one_change_means_the_same_at_every_size():
    lesion = cv2.resize(disc(6), (1000, 1000)) > 127
    masks = [mask_to_square(lesion, size) for size in (224, 512)]
    images = [to_square(smooth(1024), size) for size in (224, 512)]
    augment = Augment(speckle=0, elastic=0.03, elastic_probability=1)
    for number in range(20):
        drawn = augment.draw(np.random.default_rng(number), masks[0])
        coarse, full = (drawn(image, mask) for image, mask in zip(images, masks, strict=True))
        down = mask_to_square(full[1], 224)
        assert 2 * (down & coarse[1]).sum() / (down.sum() + coarse[1].sum()) > 0.985
        difference = np.abs(to_square(full[0], 224).astype(int) - coarse[0])
        assert np.median(difference) <= 1 and difference.mean() < 2.5


def test_tone_keeps_black_black_and_attenuation_falls_with_depth():
    augment = Augment(brightness=0.3)
    for seed in range(10):
        assert augment.draw(np.random.default_rng(seed), np.zeros((8, 8), bool)).tone[0] == 0
    out = change(attenuation=0.4)(np.full((100, 100), 200, np.uint8), np.zeros((100, 100), bool))[0]
    np.testing.assert_allclose(out[:, 0], 200 * (1 - 0.4 * (np.arange(100) + 0.5) / 100), atol=1)


def test_speckle_is_the_same_noise_at_every_size():
    flat = [np.full((size, size), 100, np.uint8) for size in (224, 512)]
    small, large = (change(speckle=(0.3, 0.4, 0.7))(image, np.zeros_like(image, bool))[0] for image in flat)
    assert large.std() == pytest.approx(30, rel=0.1)
    assert np.corrcoef(to_square(large, 224).ravel(), small.ravel())[0, 1] > 0.9


def test_a_lesion_stays_in_the_frame():
    mask = np.zeros((64, 64), bool)
    mask[:4, :4] = True
    augment = Augment(rotate_deg=90, shift=0.4)
    for seed in range(50):
        assert augment.draw(np.random.default_rng(seed), mask).warp(mask.view(np.uint8) * np.uint8(255))[0].max() >= 128


# --------------------------------------------------------------------------------------------------------------- items


def test_items_are_as_promised(tmp_path):
    data = module(tmp_path, augment=Augment(), simulator=simulator)
    item = data.dataset("train", Augment())[(3, 1)]
    assert set(item) == {"image", "mask", "coarse_image", "coarse_mask", "prob", "index", "id", "aspect"}
    for key, size in (("image", 64), ("mask", 64), ("coarse_image", 32), ("coarse_mask", 32), ("prob", 32)):
        assert item[key].shape == (1, size, size) and item[key].dtype == torch.float32
        assert item[key].min() >= 0 and item[key].max() <= 1
    assert set(item["mask"].unique().tolist()) == {0.0, 1.0}
    assert item["index"] == 1 and item["id"] == data.split.train[1].id
    batch = next(iter(data.val_dataloader()))
    assert isinstance(batch["native_mask"], list)
    for id, native in zip(batch["id"], batch["native_mask"], strict=True):
        case = next(case for case in data.split.val if case.id == id)
        np.testing.assert_array_equal(native, data.reader.read(case)[1])
    assert set(module(tmp_path, data.reader, frame=False).dataset("train")[0]) == {
        "coarse_image",
        "coarse_mask",
        "index",
        "id",
        "aspect",
    }


def test_simulator_sees_the_changed_mask_and_a_seed_of_its_own(tmp_path):
    seen = []

    def spy(mask, seed):
        seen.append((mask.copy(), seed))
        return simulator(mask, seed)

    data = module(tmp_path, augment=Augment(), simulator=spy)
    item = data.dataset("train", Augment())[(2, 5)]
    np.testing.assert_array_equal(seen[0][0], item["coarse_mask"][0].numpy().astype(bool))
    seeds = {failure_seed(s, e, i) for s in range(3) for e in range(20) for i in range(50)}
    assert len(seeds) == 3000 and seen[0][1] == failure_seed(0, 2, 5)


def test_an_epoch_fills_the_dice_bins_evenly():
    lesion = disc(4, 64, 64) > 0
    failures = FailureSimulator()
    for epoch in (0, 7):
        dice = [failures.simulate(lesion, failure_seed(3, epoch, index)).dice for index in range(200)]
        shares = [np.mean([low <= d < high for d in dice]) for low, high, _ in BINS]
        np.testing.assert_allclose(shares, [weight for *_, weight in BINS], atol=0.02)


def test_the_partition_does_not_follow_the_seed(tmp_path):
    reader = Folder(write_folder(tmp_path / "data", 30))
    ids = {
        (seed, split_seed): [case.id for case in module(tmp_path, reader, seed=seed, split_seed=split_seed).split.test]
        for seed in (0, 1)
        for split_seed in (0, 1)
    }
    assert ids[0, 0] == ids[1, 0] != ids[0, 1] == ids[1, 1]


def test_real_predictions_follow_the_geometry(tmp_path):
    data = module(tmp_path, simulator=simulator)
    real = Predictions(tmp_path / "real", ratio=1.0)
    for case in data.split.train:
        real.save(case, data.dataset("train")[data.split.train.index(case)]["coarse_mask"][0].numpy() * 20 - 10)
    mixed = module(tmp_path, data.reader, simulator=simulator, predictions=real, augment=Augment())
    for index in range(5):
        item = mixed.dataset("train", Augment())[(1, index)]
        assert ((item["prob"] >= 0.5) == item["coarse_mask"].bool()).float().mean() > 0.99
    half = module(tmp_path, data.reader, simulator=simulator, predictions=Predictions(tmp_path / "real", 0.5))
    kinds = [half.dataset("train")[(epoch, 0)]["prob"].max() > 0.999 for epoch in range(60)]
    assert 15 < sum(kinds) < 45
    with pytest.raises(UserError, match="no readable prediction"):
        real.load(Case("nobody", "busbra"), 32)


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    reader = BusBra(write_busbra(tmp_path / "data"))
    streams = []
    for workers in (0, 2):
        loader = module(
            tmp_path, reader, num_workers=workers, augment=Augment(), simulator=simulator
        ).train_dataloader()
        streams.append([stream(loader, epoch) for epoch in (0, 1)])
    assert streams[0] == streams[1]
    assert streams[0][0] != streams[0][1]


def test_evaluation_is_the_same_in_every_epoch(tmp_path):
    loader = module(tmp_path, simulator=simulator).val_dataloader()
    assert stream(loader, 0) == stream(loader, 5)


# ------------------------------------------------------------------------------------------------------------- sampler


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sampler_shares_cases_out(world_size):
    for length in (7, 12, 2):
        ranks = [EpochSampler(length, 0, False, rank, world_size) for rank in range(world_size)]
        given = [pair for sampler in ranks for pair in sampler]
        assert sorted(given) == [(0, index) for index in range(length)]  # each once
        ranks = [EpochSampler(length, 0, True, rank, world_size) for rank in range(world_size)]
        for sampler in ranks:
            sampler.set_epoch(4)
        drawn = [list(sampler) for sampler in ranks]
        assert [len(pairs) for pairs in drawn] == [len(sampler) for sampler in ranks]
        indices = [index for pairs in drawn for _, index in pairs]
        assert len(set(indices)) == len(indices)
        if length >= world_size:
            assert len({len(pairs) for pairs in drawn}) == 1
        assert all(epoch == 4 for pairs in drawn for epoch, _ in pairs)


def test_order_differs_between_epochs_and_seeds():
    def order(seed, epoch):
        sampler = EpochSampler(50, seed)
        sampler.set_epoch(epoch)
        return [index for _, index in sampler]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert sorted(order(3, 3)) == list(range(50))


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_interrupted_epoch_goes_on_where_it_was(world_size):
    for rank in range(world_size):
        whole = EpochSampler(11, 3, rank=rank, world_size=world_size, epoch=2)
        rest = EpochSampler(11, 3, rank=rank, world_size=world_size, epoch=2, done=3)
        expected = list(whole)
        for _ in range(2):  # Lightning begins it more than once
            assert list(rest) == expected[3:]
        assert len(rest) == len(expected)
        for sampler in (whole, rest):
            sampler.set_epoch(3)
        assert list(rest) == list(whole) and len(list(rest)) == len(rest)


def test_last_batch(tmp_path):
    reader = BusBra(write_busbra(tmp_path / "data"))
    count = len(module(tmp_path, reader).split.train)
    sizes = [len(batch["id"]) for batch in module(tmp_path, reader, batch_size=7).train_dataloader()]
    assert sizes == [7] * (count // 7)
    only = [len(batch["id"]) for batch in module(tmp_path, reader, batch_size=count + 5).train_dataloader()]
    assert only == [count]


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple] = []

    def training_step(self, batch, _):
        self.seen.append((self.current_epoch, tuple(batch["id"]), batch["image"].sum(dtype=torch.float64).item()))
        return self.weight * batch["coarse_image"].mean()

    def validation_step(self, batch, _):
        self.log("val", float(len(batch["id"])), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, reader, epochs, resume=None, workers=0):
    torch.manual_seed(len(str(resume)))  # the global generator must not matter
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    recorder = Recorder()
    recorder.begins_at = (2, 0) if resume else (0, 0)
    data = module(tmp_path, reader, augment=Augment(), num_workers=workers)
    trainer.fit(recorder, data, ckpt_path=resume, weights_only=False if resume else None)
    return trainer, recorder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore")
def test_resumed_training_sees_what_uninterrupted_training_would(tmp_path, workers):
    reader = BusBra(write_busbra(tmp_path / "data"))
    whole = fit(tmp_path, reader, 4, workers=workers)[1].seen
    trainer, first = fit(tmp_path, reader, 2, workers=workers)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = fit(tmp_path, reader, 4, tmp_path / "half.ckpt", workers=workers)[1].seen
    assert first.seen + rest == whole
    assert {epoch for epoch, *_ in rest} == {2, 3}
    assert len(set(whole)) == len(whole)  # no batch twice


# -------------------------------------------------------------------------------------------------------------- module


def test_describe(tmp_path):
    data = module(tmp_path, Busi(write_busi(tmp_path / "data", 6)), folds=3)
    facts = data.describe()
    assert sum(facts[part]["cases"] for part in ("train", "val", "test")) == 12
    assert facts["without_lesion"] == {"cases": 6, "used": False}
    assert not any(case.label == "normal" for case in data.split.train)
    kept = module(tmp_path, data.reader, folds=3, include_normal=True)
    assert sum(kept.describe()[part]["cases"] for part in ("train", "val", "test")) == 18
    assert json.dumps(facts) and kept.store.fingerprint == data.store.fingerprint


def test_limits_shorten_the_loaders(tmp_path):
    data = module(tmp_path, limit=Limits(train=8, val=2, test=4))
    assert [len(data.split.part(part)) for part in ("train", "val", "test")] == [8, 2, 4]
    assert sum(len(batch["id"]) for batch in data.test_dataloader()) == 4


def test_phantoms_need_no_files(tmp_path):
    data = module(tmp_path, Phantoms(24, size=64), folds=3)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 1, 64, 64)
    assert next(iter(data.test_dataloader()))["native_mask"][0].shape == (64, 64)


def test_fold_is_checked_before_anything_is_read(tmp_path, monkeypatch):
    data = module(tmp_path, fold=9)
    monkeypatch.setattr(BusBra, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match="fold=9 is outside"):
        data.prepare_data()
    assert not (tmp_path / "cache").exists()


def test_cache_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="choose another output_root"):
        module(tmp_path).prepare_data()


def test_report(tmp_path):
    root = write_busi(tmp_path / "data")
    save(root / "malignant" / "malignant (9).png", texture(1), "RGB")  # benign (1) again, of another class
    save(root / "malignant" / "malignant (9)_mask.png", disc(1))
    (root / "benign" / "notes.txt").write_text("x")
    report = inspect_dataset(Busi(root), tmp_path / "cache", (32,))
    text = str(report)
    assert report.usable and "benign 4 · malignant 5 · normal 4" in text and "60 × 48 px" in text
    assert "the same file as busi malignant (9), and their classes differ (benign, malignant)" in text
    assert "benign/notes.txt: no image (.txt)" in text and "without lesion  4" in text
    (root / "benign" / "benign (2).png").write_bytes(b"")
    (root / "benign" / "benign (3).png").write_bytes(b"x")
    broken = inspect_dataset(Busi(root), tmp_path / "cache", (32,))
    assert not broken.usable and len(broken.errors) == 2 and broken.index is None and "To correct (2)" in str(broken)


@needs_busbra
@pytest.mark.slow
def test_memory_does_not_grow_over_epochs(tmp_path):
    import resource

    data = DataModule(
        Store(BusBra(SHARED), tmp_path), fold=0, seed=0, batch_size=24, augment=Augment(), limit={"train": 48}
    )
    loader = data.train_dataloader()
    peaks = []
    for epoch in range(10):
        stream(loader, epoch)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[-1] - peaks[1] < 20_000  # kB


@pytest.mark.skipif(os.name != "posix", reason="a process of Windows has no parent that it could lose")
def test_a_worker_whose_parent_is_gone_ends(monkeypatch):
    """The loader's own watch begins later, and would take whoever has adopted the worker for its parent."""
    fork = multiprocessing.get_context("fork")
    for status in (0, 1):
        worker = fork.Process(target=_begin_worker, args=(0,))
        worker.start()
        worker.join(60)
        assert worker.exitcode == status
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "fork")
        monkeypatch.setattr(os, "getppid", lambda: 1)
