"""Losses and metrics against MONAI, torchvision and formulas in numpy."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt

from ultrarefiner.phases import losses
from ultrarefiner.phases.coarse import coarse_terms
from ultrarefiner.refine.roi import FullFrame, paste
from ultrarefiner.results import metrics


def masks(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 1, 20, 20, generator=generator)
    return logits, (torch.rand(3, 1, 20, 20, generator=generator) > 0.6).float()


def test_soft_dice_equals_monai():
    from monai.losses import DiceLoss

    logits, target = masks()
    reference = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0)(logits, target)
    torch.testing.assert_close(losses.soft_dice_loss(logits.sigmoid(), target), reference)


def test_focal_equals_torchvision():
    from torchvision.ops import sigmoid_focal_loss

    logits, target = masks()
    reference = sigmoid_focal_loss(logits, target, alpha=-1, gamma=2.0, reduction="mean")
    torch.testing.assert_close(losses.focal(losses.pixel_bce(logits, target)), reference)


def test_cross_entropy_of_two_classes_is_bce_of_their_difference():
    logits, target = masks()
    two = torch.cat([torch.zeros_like(logits), logits], 1)
    torch.testing.assert_close(losses.cross_entropy(two, target), losses.bce(logits, target))


def test_the_coarse_loss_takes_16_bit_logits_as_the_numbers_that_they_are():
    """A false pixel of which the network is sure still has a gradient; in bfloat16 its probability rounds to 1."""
    logits = torch.zeros(1, 2, 8, 8, dtype=torch.bfloat16)
    logits[:, 1] = torch.linspace(-12, 12, 64).view(8, 8)
    target, found = torch.zeros(1, 1, 8, 8), []
    for given in (logits.requires_grad_(), logits.detach().float().requires_grad_()):
        loss = coarse_terms(given, target, 0.0, 1.0)["loss"]
        loss.backward()
        found.append((loss, given.grad.float()))
    assert torch.equal(found[0][0], found[1][0]) and (found[0][1] != 0).all()
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0.01, atol=0)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_losses_of_empty_and_full_masks_are_finite_with_finite_gradients(fill):
    logits = torch.full((2, 1, 16, 16), -30.0, requires_grad=True)
    target = torch.full((2, 1, 16, 16), fill)
    loss = (
        losses.bce(logits, target)
        + losses.soft_dice_loss(logits.sigmoid(), target)
        + losses.focal(losses.pixel_bce(logits, target))
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    if fill == 0:
        assert loss < 1e-6


def test_change_penalty_weighs_by_the_quality_of_the_coarse_mask():
    target = torch.zeros(2, 1, 20, 20)
    target[:, :, :10] = 1
    coarse = target.clone()
    coarse[1, :, 2:10] = 0  # Dice 2·40/(200+40) = 1/3: too poor to be worth keeping
    refined = torch.full((2, 1, 20, 20), 0.5)
    both = losses.change_penalty(refined, coarse, target)
    assert both == pytest.approx(0.5 / 2)  # the first weighs 1 and changed by 0.5 everywhere, the second weighs 0
    half = coarse.clone()
    half[0, :, 7:10] = 0  # Dice 2·140/(200+140) = 0.8235
    weight = (2 * 140 / 340 - 0.6) / 0.4
    expected = weight * (refined[0] - half[0]).abs().mean() / 2
    torch.testing.assert_close(losses.change_penalty(refined, half, target), expected)


def test_a_refiner_that_changes_nothing_pays_no_change_penalty():
    coarse = torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    same = paste(coarse, FullFrame().boxes(coarse), 40)
    assert losses.change_penalty(same, coarse, (coarse > 0.5).float()) == pytest.approx(0, abs=1e-6)


def test_iou_head_loss_compares_with_the_true_iou_in_the_box():
    target = torch.zeros(1, 1, 32, 32)
    target[..., :16] = 1
    drawn = torch.full((1, 2, 32, 32), -1.0)
    drawn[0, 0, :, :16] = 1  # IoU 1
    drawn[0, 1, :, :8] = 1  # IoU 0.5
    boxes = FullFrame().boxes(target)
    predicted = torch.tensor([[0.9, 0.9]], requires_grad=True)
    loss = losses.iou_head_loss(drawn, predicted, target, boxes)
    assert loss.item() == pytest.approx((0.1**2 + 0.4**2) / 2)
    loss.backward()
    torch.testing.assert_close(predicted.grad, torch.tensor([[-0.1, 0.4]]))


# ------------------------------------------------------------------------------------------------- metrics


def disc(cx: float, cy: float, r: float, shape: tuple[int, int] = (60, 80)) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (x - cx) ** 2 + (y - cy) ** 2 <= r**2


def test_overlap_is_dice_and_iou():
    a, b = disc(30, 30, 10), disc(35, 30, 10)
    scores = metrics.overlap(a, b)
    assert scores["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert scores["iou"] == pytest.approx((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize(("shift", "radius"), [((5, 0), 10), ((0, 7), 12), ((3, -4), 8)])
def test_surface_distances_equal_their_definition(shift, radius):
    truth, pred = disc(30, 30, 10), disc(30 + shift[0], 30 + shift[1], radius)
    edges = [m & ~binary_erosion(m) for m in (pred, truth)]
    there = distance_transform_edt(~edges[1])[edges[0]]
    back = distance_transform_edt(~edges[0])[edges[1]]
    scores = metrics.surface(pred, truth)
    assert scores["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=1e-4)
    assert scores["assd"] == pytest.approx((there.sum() + back.sum()) / (len(there) + len(back)), abs=1e-4)


def test_empty_masks_are_defined_and_a_missed_lesion_is_not_rewarded():
    nothing, lesion = np.zeros((30, 40), bool), disc(20, 15, 5, (30, 40))
    assert metrics.overlap(nothing, nothing) == {"dice": 1.0, "iou": 1.0}
    assert metrics.surface(nothing, nothing) == {"hd95": 0.0, "assd": 0.0}
    for pred, truth in ((nothing, lesion), (lesion, nothing)):
        assert metrics.overlap(pred, truth) == {"dice": 0.0, "iou": 0.0}
        assert metrics.surface(pred, truth) == {"hd95": 50.0, "assd": 50.0}


def test_native_masks_have_the_size_of_the_image_and_no_shift():
    logits = torch.full((1, 64, 64), -5.0)
    logits[:, 16:32, 8:24] = 5
    mask = metrics.native_mask(logits, (320, 640))
    rows, columns = np.where(mask)
    assert mask.shape == (320, 640)
    assert (rows.min(), rows.max() + 1) == (80, 160) and (columns.min(), columns.max() + 1) == (80, 240)


def test_mean_scores_skip_what_was_not_measured():
    rows = [dict.fromkeys((f"coarse_{m}" for m in metrics.METRICS), v) for v in (1.0, 3.0)]
    assert metrics.mean_scores(rows, "coarse")["hd95"] == 2.0
    assert metrics.mean_scores(rows, "refined") == {} and metrics.mean_scores([], "coarse") == {}
    assert not math.isnan(metrics.mean_scores(rows, "coarse")["dice"])
