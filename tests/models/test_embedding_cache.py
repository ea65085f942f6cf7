"""Image embeddings on disk: equal to the plain path to float16, never stale, whole or absent, within their limit."""

import csv
import logging
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import get_class
from torch import Tensor

import type_checks
from conftest import compose
from ultrarefiner.errors import UserError
from ultrarefiner.models.embedding_cache import EmbeddingCache
from ultrarefiner.models.sam import Sam, load_sam
from ultrarefiner.phases.sam import SamPhase
from ultrarefiner.runs import assemble
from ultrarefiner.runs.experiment import run

CACHED = ["phase=sam", "roi=off", "phase.augment=false", "model.train.image_encoder=false"]
ENTRY = 64 * 16 * 16 * 2 + 128 + 4  # bytes: float16, the header of numpy's files, the CRC


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 128, 128, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "embeddings"


def cached_sam(folder: Path, limit_gb: float = 1.0, seed: int = 0) -> tuple[Sam, list[int]]:
    """A SAM with a cache, and the sizes of the batches that its encoder has met."""
    sam, met = load_sam("tiny", seed=seed), []
    sam.embeddings = EmbeddingCache(folder, limit_gb)
    sam.image_encoder.register_forward_pre_hook(lambda _, inputs: met.append(len(inputs[0])))
    return sam, met


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"))


def test_it_equals_the_plain_path_to_float16(folder):
    """Embedding: half a unit in the last place of float16 (2⁻¹¹). Masks and gradients after it: 1e-3 of the largest."""
    found = []
    for sam in (load_sam("tiny"), cached_sam(folder)[0]):
        embedding = sam.encode(images(3))
        box = torch.tensor([[0.2, 0.3, 0.6, 0.8]]).repeat(3, 1)
        logits, iou = sam.decode(embedding, boxes=box)
        (logits.tanh().mean() + iou.mean()).backward()
        gradients = [p.grad for p in sam.mask_decoder.parameters()]
        found.append([embedding.detach(), logits.detach(), iou.detach(), *gradients])
    plain, cached = found
    assert cached[0].dtype == torch.float32
    assert not torch.equal(cached[0], plain[0])
    assert ((cached[0] - plain[0]).abs() <= 2**-11 * plain[0].abs() + 1e-6).all()
    for a, b in zip(plain[1:], cached[1:], strict=True):
        assert (a - b).norm() <= 1e-3 * a.norm() + 1e-7


def test_what_was_met_before_is_not_encoded_again(folder):
    sam, met = cached_sam(folder)
    first = sam.encode(images(4))
    assert met == [1, 1, 1, 1]
    assert torch.equal(sam.encode(images(4)), first) and len(met) == 4
    again, met = cached_sam(folder)  # as a later process would
    with torch.inference_mode():
        assert torch.equal(again.encode(images(4)[[2, 0]]), first[[2, 0]]) and not met


def test_an_embedding_does_not_depend_on_what_is_there(folder):
    sam, _ = cached_sam(folder)
    sam.encode(images(4)[1:3])
    empty, _ = cached_sam(folder.with_name("other"))
    full, _ = cached_sam(folder.with_name("full"), limit_gb=0)
    assert torch.equal(sam.encode(images(4)), empty.encode(images(4)))
    assert torch.equal(full.encode(images(4)), empty.encode(images(4))) and not entries(full.embeddings.folder)


def test_whatever_changes_the_embedding_is_encoded_anew(folder):
    sam, met = cached_sam(folder)
    image = images(1)
    sam.encode(image)
    nearly = image.clone()
    nearly[0, 0, 5, 5] += 1e-6
    sam.encode(nearly)
    assert len(met) == 2
    with torch.no_grad():
        sam.image_encoder.pos_embed.add_(1.0)
    other = load_sam("tiny", seed=1).state_dict()
    for count, change in enumerate(
        (
            lambda: None,  # the weights were written to above
            lambda: sam.load_state_dict(other),
            lambda: setattr(sam, "family", "medsam"),  # another way to normalise
        )
    ):
        change()
        expected = sam._encode(image).detach()
        before = len(met)
        torch.testing.assert_close(sam.encode(image), expected, atol=1e-3, rtol=1e-3)
        sam.encode(image)
        assert len(met) == before + 1, count
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sam.encode(image)
    assert len(met) == before + 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_noticed_and_replaced(folder, damage, caplog):
    sam, met = cached_sam(folder)
    first = sam.encode(images(1))
    (path,) = entries(folder)
    whole = path.read_bytes()
    assert len(whole) == ENTRY
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    harm = {"truncated": whole[:-100], "flipped": bytes(flipped), "empty": b"", "foreign": b"hello"}
    path.write_bytes(harm[damage])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sam.encode(images(1)), first)
    assert len(met) == 2 and "damaged" in caplog.text and path.read_bytes() == whole


def test_the_limit_holds_and_other_encoders_make_room(folder, caplog):
    sam, met = cached_sam(folder, limit_gb=3.5 * ENTRY / 1e9)
    with caplog.at_level(logging.WARNING):
        sam.encode(images(5))
        assert len(entries(folder)) == 3 and len(met) == 5
        sam.encode(images(5))
    assert len(met) == 7 and caplog.text.count("trainer.embeddings_gb") == 1
    other, _ = cached_sam(folder, limit_gb=3.5 * ENTRY / 1e9, seed=1)
    other.encode(images(2))
    rooms = sorted(len(list(room.iterdir())) for room in folder.iterdir())
    assert rooms == [1, 2] and len(list((folder / other.embeddings._encoder[1]).iterdir())) == 2


def test_a_disk_that_is_full_costs_time_and_not_the_run(folder, monkeypatch, caplog):
    sam, _ = cached_sam(folder)

    def full(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(sam.encode(images(2)), load_sam("tiny").encode(images(2)), atol=1e-3, rtol=1e-3)
    assert "disk" in caplog.text and not entries(folder)


def test_what_float16_cannot_hold_is_refused(folder):
    sam, _ = cached_sam(folder)
    with torch.no_grad():
        sam.image_encoder.neck[3].bias.fill_(1e6)
    with pytest.raises(UserError, match="float16"):
        sam.encode(images(1))


def _encode_all(folder: Path) -> Tensor:
    torch.set_num_threads(1)
    sam, _ = cached_sam(folder)
    return sam.encode(images(12)).detach()


@pytest.mark.slow
def test_two_processes_share_a_folder(folder, monkeypatch):
    monkeypatch.setenv(type_checks.SWITCH, "0")  # which take longer to import than this takes
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        found = list(processes.map(_encode_all, [folder, folder]))
    assert torch.equal(*found) and len(entries(folder)) == 12
    assert {path.stat().st_size for path in entries(folder)} == {ENTRY}


def test_training_reads_what_it_wrote_and_a_warm_cache_changes_nothing(tmp_path):
    cold, warm = tmp_path / "cold", tmp_path / "warm"
    two_epochs = ["phase.epochs=2", "phase.batch_size=4"]
    options = [*CACHED, "phase.crops=1", *two_epochs]
    first = run(compose(f"output_root={cold}", *options))
    files = entries(cold / "cache" / "embeddings")
    assert len(files) == 20  # train 12, val 4, test 4: each once
    shutil.copytree(cold / "cache", warm / "cache")
    before = {path.name: path.stat().st_mtime_ns for path in entries(warm / "cache" / "embeddings")}
    second = run(compose(f"output_root={warm}", *options))
    assert {p.name: p.stat().st_mtime_ns for p in entries(warm / "cache" / "embeddings")} == before
    tables = [list(csv.DictReader((directory / "metrics.csv").open())) for directory in (first, second)]
    assert first.name == second.name
    losses = [[row["train/loss"] for row in table] for table in tables]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    plain = run(compose(f"output_root={cold}", *CACHED, *two_epochs))
    assert plain != first  # it rounds, so it is part of what defines the result
    expected = [float(row["train/loss"]) for row in csv.DictReader((plain / "metrics.csv").open())]
    assert [float(loss) for loss in losses[0]] == pytest.approx(expected, abs=2e-3)


BANK = [*CACHED[:1], CACHED[-1], "roi=on", "phase.masks_per_image=4", "phase.batch_size=4"]


def test_crops_take_turns(tmp_path):
    """Of three epochs the third shows the first one's images and boxes again, with coarse masks of its own."""
    cfg = compose(f"output_root={tmp_path}", *BANK, "phase.crops=2")
    data = assemble.build_data(cfg, SamPhase)
    cases = data.dataset("train", augment=data.augment)
    first, second, third = (cases[epoch, 5] for epoch in range(3))
    for name in ("image", "mask", "coarse_mask", "where", "margins"):
        assert torch.equal(third[name], first[name]), name
        assert not torch.equal(second[name], first[name]), name
    assert torch.equal(first["where"], first["prob"]) and not torch.equal(third["prob"], first["prob"])
    assert "where" not in data.dataset("val")[0]
    new = assemble.build_data(compose(f"output_root={tmp_path}", *BANK), SamPhase)
    anew = new.dataset("train", augment=new.augment)[2, 5]
    assert not torch.equal(anew["image"], third["image"]) and anew["prob"].shape == third["prob"].shape


@pytest.mark.parametrize("crops", [1, 2])
def test_a_crop_that_comes_again_is_not_encoded_again(tmp_path, monkeypatch, crops):
    """Whatever the order of the cases and the batch they come in: the crop is the same to the bit."""
    met: list[int] = []
    encode = Sam._encode
    monkeypatch.setattr(Sam, "_encode", lambda sam, image: (met.append(len(image)), encode(sam, image))[1])
    directory = run(compose(f"output_root={tmp_path}", *BANK, f"phase.crops={crops}", "phase.epochs=5"))
    assert len(entries(tmp_path / "cache" / "embeddings")) == sum(met) == 12 * crops + 4 + 4  # train, val, test
    losses = [float(row["train/loss"]) for row in csv.DictReader((directory / "metrics.csv").open())]
    assert len(set(losses)) == 5  # other masks in each epoch


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.train.image_encoder=true"], "image encoder is trained"),
        (["model.lora.rank=2"], "model.lora.rank=0"),
        (["phase=e2e"], "the crop follows the coarse network, which changes; set roi=off"),
    ],
)
def test_it_is_refused_where_it_cannot_pay(overrides, reason):
    cfg = compose(*BANK[:3], "phase.crops=3", *overrides)
    with pytest.raises(UserError, match=f"phase.crops=3 is of no use here: .*{reason}"):
        assemble.build_phase(cfg, get_class(cfg.phase._target_), {})


def test_phase_3_shows_whole_frames_in_turns(tmp_path):
    """With roi=off the frame is the crop, also where it is augmented and the coarse network moves."""
    cfg = compose(f"output_root={tmp_path}", "phase=e2e", "roi=off", CACHED[-1], "phase.crops=2", "phase.batch_size=4")
    data = assemble.build_data(cfg, get_class(cfg.phase._target_))
    cases = data.dataset("train", augment=data.augment)
    first, second, third = (cases[epoch, 5]["image"] for epoch in range(3))
    assert torch.equal(first, third) and not torch.equal(first, second)
    assert "where" not in cases[0, 5]
    assert assemble.build_phase(cfg, get_class(cfg.phase._target_), {}).cascade.refiner.sam.embeddings is not None
