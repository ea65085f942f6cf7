"""What never exists: three masks at the frame's size, activations of a frozen encoder, relative positions of N × N."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ultrarefiner.models.sam import load_sam
from ultrarefiner.refine.prompts import DirectMaskPrompt, Prompts
from ultrarefiner.refine.refiner import Refiner, select
from ultrarefiner.refine.roi import FullFrame, LesionRoi, paste

SIDE = 768  # of the frame: large against the small SAM's 128, so that frame-sized tensors stand out


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not (leaf.storage_offset() or 0 in leaf.stride()):
                self.numbers = max(self.numbers, leaf.numel())
        return result


def case() -> tuple[Tensor, Tensor]:
    image = torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    prob = torch.zeros(1, 1, 64, 64)
    prob[..., 20:40, 25:50] = 0.9
    return image, prob.requires_grad_()


def resample_first(masks: Tensor, iou: Tensor, boxes: Tensor) -> Tensor:
    """The naive order: three masks in the frame, and then a choice of one."""
    return select(paste(masks, boxes, SIDE), iou)


@pytest.mark.parametrize("roi", [LesionRoi(), FullFrame()])
def test_no_three_masks_at_the_size_of_the_frame(roi):
    refiner = Refiner(load_sam("tiny"), roi, Prompts(DirectMaskPrompt()))
    image, prob = case()
    with Largest() as largest:
        refined = refiner(image, prob)
        refined.logits.mean().backward()
    assert SIDE**2 <= largest.numbers <= 2 * SIDE**2  # the pair of coordinates that grid_sample takes
    with Largest() as naive:
        resample_first(refined.masks.detach(), refined.iou.detach(), refined.boxes.detach())
    assert naive.numbers >= 3 * SIDE**2


def test_one_mask_resampled_equals_three_resampled():
    """Forward, and gradients to masks, IoUs and boxes: 1e-4 of the largest."""
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(2, 3, 64, 64, generator=generator),
        torch.rand(2, 3, generator=generator),
        torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 1.0, 0.5]]),
    ]
    found = []
    for order in (lambda masks, iou, boxes: paste(select(masks, iou), boxes, SIDE), resample_first):
        moving = [x.clone().requires_grad_() for x in inputs]
        logits = order(*moving)
        logits.tanh().sum().backward()
        found.append([logits.detach(), *(x.grad for x in moving)])
    for ours, naive in zip(*found, strict=True):
        assert (ours - naive).abs().max() <= 1e-4 * naive.abs().max()


def kept_by(encoder: nn.Module, image: Tensor) -> int:
    """Numbers that autograd keeps for the way back, parameters apart."""
    kept: dict[int, int] = {}
    own = {p.data_ptr() for p in encoder.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encoder(image).sum()
    return sum(kept.values())


def test_what_the_encoder_keeps_for_the_way_back():
    sam = load_sam("tiny")
    image = torch.rand(1, 3, 128, 128)
    assert kept_by(sam.image_encoder, image) == 0
    whole = kept_by(sam.image_encoder, image.requires_grad_())
    sam.image_encoder.checkpointing = True
    assert 0 < kept_by(sam.image_encoder, image) < whole / 3


def test_global_attention_has_no_scores_of_all_pairs():
    """An encoder of 48×48 tokens: without and with gradients nothing as large as heads × N × N."""
    from ultrarefiner.models.sam_families import build_vit_sam

    encoder = build_vit_sam(48, 1, 3, (0,), image_size=768, channels=32, decoder_heads=4, decoder_mlp=64)[0]
    pairs = 3 * (48 * 48) ** 2
    for gradient in (False, True):
        with Largest() as largest, torch.set_grad_enabled(gradient):
            out = encoder(torch.rand(1, 3, 768, 768))
            if gradient:
                out.sum().backward()
        assert largest.numbers < pairs / 2, gradient
