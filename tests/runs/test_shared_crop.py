"""phase.masks_per_image: several simulated masks of a case share one encoded crop in Phase 2."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import compose
from ultrarefiner.data.dataset import failure_seed
from ultrarefiner.errors import UserError
from ultrarefiner.models.cascade import soft_logit
from ultrarefiner.phases.sam import SamPhase
from ultrarefiner.refine.refiner import select
from ultrarefiner.refine.roi import covering, crop, paste
from ultrarefiner.runs import assemble
from ultrarefiner.runs.experiment import run


def phase_of(*overrides: str) -> SamPhase:
    cfg = compose("phase=sam", "gate=hybrid", *overrides)
    return assemble.build_phase(cfg, SamPhase, {}).train()


def data_of(tmp_path, *overrides: str):
    return assemble.build_data(compose(f"output_root={tmp_path}", "phase=sam", *overrides), SamPhase)


def blobs(count: int, size: int = 64) -> Tensor:
    """Probability maps of different soft ellipses."""
    generator = torch.Generator().manual_seed(0)
    centre, radius = 0.3 + 0.4 * torch.rand(2, count, 1, 1, generator=generator), 0.1 + 0.1 * torch.rand(count, 1, 1)
    x = (torch.arange(size) + 0.5) / size
    distance = ((x[None, None] - centre[0]) ** 2 + (x[None, :, None] - centre[1]) ** 2).sqrt()
    return torch.sigmoid((radius - distance) * 40)[:, None]


def batch_of(images: int, several: int) -> dict[str, Tensor]:
    image = torch.rand(images, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    truth = (blobs(images) > 0.5).float()
    prob = blobs(images * several).view(images, several, 64, 64)
    aspect = torch.linspace(0.7, 1.4, images)
    return {"image": image, "mask": truth, "coarse_mask": truth, "prob": prob, "aspect": aspect}


def test_the_box_covers_all_of_an_image_and_grows_by_its_margins():
    boxes = torch.tensor([[0.2, 0.3, 0.5, 0.6], [0.1, 0.4, 0.4, 0.7], [0.5, 0.5, 0.9, 0.9], [0.6, 0.4, 0.8, 0.8]])
    torch.testing.assert_close(covering(boxes, 2), torch.tensor([[0.1, 0.3, 0.5, 0.7], [0.5, 0.4, 0.9, 0.9]]))
    assert torch.equal(covering(boxes, 4), boxes)
    grown = covering(boxes, 2, torch.tensor([[0.0, 0.1, 0.2, 0.3], [0.5, 0.0, 0.5, 0.0]]))
    torch.testing.assert_close(grown, torch.tensor([[0.1, 0.26, 0.58, 0.82], [0.3, 0.4, 1.0, 0.9]]))


@pytest.mark.parametrize("roi", ["on", "off"])
def test_one_mask_is_the_plain_behaviour_bit_by_bit(roi):
    stretched = ("model.frame=stretch", "model.roi.square=false")
    phase, batch = phase_of(f"roi={roi}", *stretched), batch_of(3, 1)
    refiner, prob = phase.cascade.refiner, torch.sigmoid(soft_logit(batch["prob"]))
    sam, boxes = refiner.sam, refiner.roi.boxes(prob)
    prompts = refiner.prompts(crop(prob, boxes, sam.mask_size), sam.mask_size)
    masks, iou = sam.decode(sam.encode(crop(batch["image"], boxes, sam.image_size)), *prompts)
    expected = paste(select(masks, iou, refiner.selection_temperature), boxes, 64)
    found = refiner(batch["image"], prob)
    assert torch.equal(found.logits, expected) and torch.equal(found.boxes, boxes) and torch.equal(found.iou, iou)
    state = torch.get_rng_state()
    phase.terms(batch)
    assert torch.equal(torch.get_rng_state(), state)  # and it draws no random numbers


def test_the_data_of_one_mask_are_the_plain_ones(tmp_path):
    data = data_of(tmp_path, "dataset.augment=null")
    items = data.dataset("train")
    for epoch, index in ((0, 0), (2, 5)):
        mask = items[epoch, index]["coarse_mask"][0].numpy() > 0
        expected = data.simulator(mask, failure_seed(0, epoch, index))
        assert np.array_equal(items[epoch, index]["prob"].numpy(), expected[None])


def test_several_masks_are_determined_by_seed_epoch_index_and_number(tmp_path):
    several = [data_of(tmp_path, "phase.masks_per_image=3", f"trainer.num_workers={n}") for n in (0, 2)]
    batches = [next(iter(data.train_dataloader())) for data in several]
    assert torch.equal(batches[0]["prob"], batches[1]["prob"]) and batches[0]["prob"].shape[1:] == (3, 64, 64)
    items = several[0].dataset("train", several[0].augment)
    every = [items[epoch, index]["prob"][k] for epoch in (0, 1) for index in (0, 1) for k in range(3)]
    assert all(not torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])
    assert torch.equal(items[1, 0]["prob"][2], every[8])
    for loader in (several[0].val_dataloader(), several[0].test_dataloader()):
        assert next(iter(loader))["prob"].shape[1] == 1


def test_sharing_a_crop_equals_encoding_it_for_each_mask():
    """Full frame: forward and every gradient, to rounding (1e-5 of the largest)."""
    phase, batch = phase_of("roi=off", "model.train.image_encoder=true"), batch_of(2, 3)
    refiner, prob = phase.cascade.refiner, batch["prob"].flatten(0, 1)[:, None]
    found = []
    for image in (batch["image"], batch["image"].repeat_interleave(3, dim=0)):
        moving = prob.clone().requires_grad_()
        logits = refiner(image, moving).logits
        logits.tanh().sum().backward()
        found.append([logits.detach(), moving.grad, *(p.grad for p in refiner.parameters() if p.grad is not None)])
        refiner.zero_grad()
    assert len(found[0]) == len(found[1]) > 100
    for shared, alone in zip(*found, strict=True):
        assert (shared - alone).abs().max() <= 1e-5 * alone.abs().max() + 1e-5


def test_the_crop_is_encoded_once_and_covers_every_box(monkeypatch):
    phase, batch = phase_of("roi=on"), batch_of(2, 4)
    sizes = []
    refiner = phase.cascade.refiner
    encode = refiner.sam.encode
    monkeypatch.setattr(refiner.sam, "encode", lambda x, inside: (sizes.append(len(x)), encode(x, inside))[1])
    torch.manual_seed(3)
    margins = 0.1 * torch.rand(2, 4)
    prob = batch["prob"].flatten(0, 1)[:, None]
    refined = refiner(batch["image"], prob, refiner.look(prob, batch["image"], margins))
    assert sizes == [2] and len(refined.logits) == 8
    single = refiner.roi.boxes(prob)
    assert (refined.boxes[:, :2] <= single[:, :2]).all() and (refined.boxes[:, 2:] >= single[:, 2:]).all()
    assert torch.equal(refined.boxes[::4].repeat_interleave(4, 0), refined.boxes)
    with pytest.raises(ValueError, match="multiple"):
        refiner(batch["image"], prob[:5])


def test_the_loss_is_the_mean_over_the_masks():
    """Full frame: that of the same masks, each beside its own copy of the image."""
    phase, batch = phase_of("roi=off"), batch_of(2, 3)
    together = phase.terms(batch)
    copies = {name: value.repeat_interleave(3, dim=0) for name, value in batch.items()}
    copies["prob"] = batch["prob"].flatten(0, 1)[:, None]
    for name, value in phase.terms(copies).items():
        torch.testing.assert_close(together[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_it_trains_and_is_part_of_what_defines_the_run(tmp_path):
    cfg = [f"output_root={tmp_path}", "phase=sam"]
    plain, shared = (run(compose(*cfg, f"phase.masks_per_image={k}")) for k in (1, 2))
    assert plain != shared and json.loads((shared / "summary.json").read_text())["test"]["refined"]
    with pytest.raises(UserError, match=r"phase\.masks_per_image must be 1 or more, got 0"):
        run(compose(*cfg, "phase.masks_per_image=0"))
