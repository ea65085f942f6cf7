"""The differentiable bridge against numpy in float64, gradcheck, and the hard cases of the design."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ultrarefiner.models.cascade import Cascade
from ultrarefiner.refine.gate import HybridGate, LearnedGate, NoGate, UncertaintyGate
from ultrarefiner.refine.moments import mask_moments
from ultrarefiner.refine.prompts import (
    DirectMaskPrompt,
    DistanceMaskPrompt,
    GaussianMaskPrompt,
    Prompts,
    background_point,
    foreground_point,
    gaussian_blur,
    sharpen,
    soft_box,
)
from ultrarefiner.refine.refiner import Refiner, select
from ultrarefiner.refine.roi import BACKGROUND_LOGIT, FullFrame, LesionRoi, covering, crop, paste

MASK_PROMPTS = {
    "direct": DirectMaskPrompt(),
    "gaussian": GaussianMaskPrompt(0.05),
    "distance": DistanceMaskPrompt(0.05),
}
ROIS = {"on": LesionRoi(), "off": FullFrame()}


def ellipse(size: int, cx: float, cy: float, rx: float, ry: float) -> torch.Tensor:
    """A filled ellipse (1,1,size,size) in normalised coordinates."""
    centres = (torch.arange(size) + 0.5) / size
    inside = ((centres - cx) / rx)[None, :] ** 2 + ((centres - cy) / ry)[:, None] ** 2 <= 1
    return inside.float()[None, None]


def hard_cases(size: int = 32) -> dict[str, torch.Tensor]:
    """The maps that break careless formulas."""
    empty = torch.zeros(1, 1, size, size)
    pixel = empty.clone()
    pixel[0, 0, size // 6, 5 * size // 8] = 1
    corner_pixel = empty.clone()
    corner_pixel[0, 0, 0, 0] = 1
    two = torch.maximum(ellipse(size, 0.2, 0.3, 0.1, 0.1), ellipse(size, 0.8, 0.7, 0.1, 0.1))
    return {
        "empty": empty,
        "nearly empty": empty + 1e-9,
        "timid": empty + 1e-3,
        "pixel": pixel,
        "corner pixel": corner_pixel,
        "border": ellipse(size, 0.0, 0.5, 0.15, 0.2),
        "full": torch.ones(1, 1, size, size),
        "two": two,
    }


def random_maps(seed: int = 0, batch: int = 2, size: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 1, size, size, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- formulas


def test_moments_equal_the_weighted_statistics_of_numpy():
    prob = random_maps(size=17)
    moments = mask_moments(prob)
    for i, p in enumerate(prob[:, 0].numpy()):
        y, x = (np.mgrid[0:17, 0:17] + 0.5) / 17
        total = p.sum()
        cx, cy = (p * x).sum() / total, (p * y).sum() / total
        sx, sy = np.sqrt((p * (x - cx) ** 2).sum() / total), np.sqrt((p * (y - cy) ** 2).sum() / total)
        assert moments.mass[i].item() == pytest.approx(total, abs=1e-12)
        np.testing.assert_allclose(moments.centre[i], [cx, cy], atol=1e-12)
        np.testing.assert_allclose(moments.spread[i], [sx, sy], atol=1e-12)


def test_moments_of_a_non_square_map():
    prob = torch.zeros(1, 1, 10, 40)
    prob[0, 0, 2:4, 10:20] = 1
    moments = mask_moments(prob)
    torch.testing.assert_close(moments.centre[0], torch.tensor([15 / 40, 3 / 10]))


def test_moments_stay_in_float32_under_autocast_and_from_half_precision():
    prob = ellipse(224, 0.61, 0.42, 0.2, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mask_moments(prob)
    assert inside.centre.dtype == torch.float32
    torch.testing.assert_close(inside.centre, mask_moments(prob).centre, atol=0, rtol=0)
    assert mask_moments(prob.bfloat16()).centre.dtype == torch.float32


def test_the_box_of_a_filled_ellipse_is_tight_at_two_sigma():
    box = soft_box(ellipse(400, 0.5, 0.4, 0.2, 0.1), k=2.0)
    torch.testing.assert_close(box, torch.tensor([[0.3, 0.3, 0.7, 0.5]]), atol=2e-3, rtol=0)


@settings(deadline=None, max_examples=30)
@given(
    st.floats(0.25, 0.75), st.floats(0.25, 0.75), st.floats(0.08, 0.2), st.floats(0.08, 0.2), st.sampled_from([64, 224])
)
def test_geometry_means_the_same_at_every_resolution(cx, cy, rx, ry, size):
    here, fine = ellipse(size, cx, cy, rx, ry), ellipse(1024, cx, cy, rx, ry)
    tolerance = 1.5 / size
    torch.testing.assert_close(foreground_point(here), foreground_point(fine), atol=tolerance, rtol=0)
    torch.testing.assert_close(soft_box(here), soft_box(fine), atol=2 * tolerance, rtol=0)
    box = soft_box(fine)
    torch.testing.assert_close(background_point(here, box), background_point(fine, box), atol=2 * tolerance, rtol=0)


def test_background_point_equals_the_centroid_in_numpy():
    prob, box = random_maps(size=15), torch.tensor([[0.1, 0.2, 0.7, 0.6], [0.3, 0.0, 1.0, 0.5]], dtype=torch.float64)
    points = background_point(prob, box)
    sigmoid = lambda t: 1 / (1 + np.exp(-t / 0.01))  # noqa: E731
    for p, (x1, y1, x2, y2), point in zip(prob[:, 0].numpy(), box.numpy(), points.numpy(), strict=True):
        y, x = (np.mgrid[0:15, 0:15] + 0.5) / 15
        weight = (1 - p) * sigmoid(x - x1) * sigmoid(x2 - x) * sigmoid(y - y1) * sigmoid(y2 - y)
        np.testing.assert_allclose(point[0], [(weight * x).sum(), (weight * y).sum()] / weight.sum(), atol=1e-12)


def test_background_point_lies_in_the_background_beside_an_off_centre_lesion():
    box = torch.tensor([[0.2, 0.2, 0.8, 0.8]])
    point = background_point(ellipse(64, 0.35, 0.5, 0.15, 0.3), box)
    assert point[0, 0, 0] > 0.5


def test_direct_prompt_is_the_scaled_map_and_resizes_like_interpolate():
    prob = random_maps().float()
    torch.testing.assert_close(DirectMaskPrompt()(prob, 12), (2 * prob - 1) * 10)
    reference = F.interpolate((2 * prob - 1) * 10, size=40, mode="bilinear", align_corners=False)
    torch.testing.assert_close(DirectMaskPrompt()(prob, 40), reference)


def test_gaussian_prompt_equals_scipy():
    from scipy.ndimage import gaussian_filter

    prob = random_maps(size=40, batch=1)
    blurred = gaussian_filter(prob[0, 0].numpy(), sigma=0.05 * 40, mode="nearest", radius=6)
    np.testing.assert_allclose(GaussianMaskPrompt(0.05)(prob, 40)[0, 0], (2 * blurred - 1) * 10, atol=1e-9)


def test_distance_prompt_is_undecided_at_the_boundary_and_certain_away_from_it():
    logits = DistanceMaskPrompt(0.02)(ellipse(200, 0.5, 0.5, 0.3, 0.3), 200)[0, 0, 100]
    assert logits[100] > 9.99 and logits[5] < -9.99
    assert logits[159:161].abs().max() < 1  # the ellipse ends at column 160
    assert (logits[100:159].diff() <= 1e-4).all()


@pytest.mark.parametrize("style", MASK_PROMPTS)
def test_mask_prompts_are_the_same_under_autocast(style):
    prob = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = MASK_PROMPTS[style](prob, 64)
    assert torch.equal(found, MASK_PROMPTS[style](prob, 64))


@pytest.mark.parametrize("style", MASK_PROMPTS)
def test_mask_prompts_stay_in_range_and_keep_the_sides(style):
    logits = MASK_PROMPTS[style](ellipse(64, 0.4, 0.6, 0.2, 0.1), 128)
    assert logits.shape == (1, 1, 128, 128) and logits.min() >= -10.001 and logits.max() <= 10.001
    assert logits[0, 0, int(0.6 * 128), int(0.4 * 128)] > 5 and logits[0, 0, 5, 120] < -5


def test_sharpen_is_a_tempered_sigmoid():
    prob = random_maps()
    assert sharpen(prob, 1.0) is prob
    torch.testing.assert_close(sharpen(prob, 0.5), torch.sigmoid(torch.logit(prob) / 0.5))


@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.006, 0.001])
def test_sharpen_is_finite_at_every_temperature(temperature):
    """In float32 both powers of an undecided pixel are 0 from about T = 0.006 on."""
    values = torch.tensor([0.0, 1e-6, 0.3, 0.49, 0.5, 0.51, 0.7, 1.0])[None, None, None]
    single, double = values.clone().requires_grad_(), values.double().requires_grad_()
    sharp = sharpen(single, temperature)
    sharp.sum().backward()
    expected = torch.sigmoid(torch.logit(double) / temperature)
    expected[..., 1:-1].sum().backward()
    torch.testing.assert_close(sharp.double(), expected, rtol=1e-4, atol=1e-6)
    assert single.grad.isfinite().all()
    torch.testing.assert_close(
        single.grad[..., 1:-1].double(), double.grad[..., 1:-1], rtol=1e-3, atol=1e-6 / temperature
    )
    assert gradcheck(lambda p: sharpen(p, temperature), values[..., 2:-1].double().requires_grad_(), eps=1e-8)


def test_select_is_the_softmax_average_and_commutes_with_resampling():
    masks, iou = torch.randn(2, 3, 8, 8), torch.rand(2, 3)
    weights = torch.softmax(iou / 0.1, 1)
    torch.testing.assert_close(select(masks, iou, 0.1), torch.einsum("bk,bkhw->bhw", weights, masks)[:, None])
    up = lambda x: F.interpolate(x, size=32, mode="bilinear", align_corners=False)  # noqa: E731
    late = torch.einsum("bk,bkhw->bhw", weights, up(masks))[:, None]
    torch.testing.assert_close(up(select(masks, iou, 0.1)), late)
    one = masks[:, :1]
    torch.testing.assert_close(select(one, iou[:, :1]), one)


# ------------------------------------------------------------------------------------------------- crop and paste


def test_the_full_frame_is_an_ordinary_box():
    x = torch.randn(2, 1, 24, 24, dtype=torch.float64)
    boxes = FullFrame().boxes(x)
    assert boxes.tolist() == [[0, 0, 1, 1]] * 2
    torch.testing.assert_close(crop(x, boxes, 24), x)
    reference = F.interpolate(x, size=60, mode="bilinear", align_corners=False)
    torch.testing.assert_close(crop(x, boxes, 60), reference)
    torch.testing.assert_close(paste(x, boxes, 60), reference)


def test_crop_takes_exactly_the_pixels_of_an_aligned_box():
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    torch.testing.assert_close(crop(x, torch.tensor([[2 / 8, 1 / 8, 6 / 8, 5 / 8]]), 4), x[..., 1:5, 2:6])


def test_paste_is_background_outside_and_untouched_inside():
    logits = torch.full((1, 1, 4, 4), 7.0)
    frame = paste(logits, torch.tensor([[2 / 8, 1 / 8, 6 / 8, 5 / 8]]), 8)
    expected = torch.full((1, 1, 8, 8), BACKGROUND_LOGIT)
    expected[..., 1:5, 2:6] = 7
    torch.testing.assert_close(frame, expected)


def test_outside_the_box_is_background_and_not_undecided():
    """Known mistake 2: pasted onto zeros, everything outside would be p = 0.5, and BCE and Dice would pay for it."""
    prob, image = ellipse(64, 0.5, 0.5, 0.1, 0.1).double(), torch.rand(1, 1, 64, 64, dtype=torch.float64)
    out = Refiner(LinearSam(), LesionRoi(), Prompts(DirectMaskPrompt()))(image, prob)
    x1, y1, x2, y2 = out.boxes[0].tolist()
    assert x1 > 0.1 and x2 < 0.9  # there is an outside
    centres = (torch.arange(64) + 0.5) / 64
    beyond = ((centres < x1 - 1 / 64) | (centres > x2 + 1 / 64))[None, :] | (
        (centres < y1 - 1 / 64) | (centres > y2 + 1 / 64)
    )[:, None]
    probability = torch.sigmoid(out.logits[0, 0][beyond])
    assert probability.max() < 1e-3
    empty = torch.zeros_like(probability)
    assert F.binary_cross_entropy(probability, empty) < 1e-3


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0.3, 0.5), st.floats(0.3, 0.5))
def test_paste_inverts_crop_without_a_shift(x1, y1, w, h):
    """Known mistake 3. A linear ramp survives crop and paste exactly; a shift of half a pixel anywhere would show."""
    size = 64
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    ramp = (3 * centres[None, :] + 5 * centres[:, None])[None, None]
    boxes = torch.tensor([[x1, y1, x1 + w, y1 + h]], dtype=torch.float64)
    back = paste(crop(ramp, boxes, 50), boxes, size)
    # Bilinear values are exact on a ramp except within half a sample of the borders of frame and crop.
    margin = 1.0 / size
    inside_x = (centres > max(x1, margin) + margin) & (centres < min(x1 + w, 1 - margin) - margin)
    inside_y = (centres > max(y1, margin) + margin) & (centres < min(y1 + h, 1 - margin) - margin)
    inside = inside_y[:, None] & inside_x[None, :]
    torch.testing.assert_close(back[0, 0][inside], ramp[0, 0][inside], atol=1e-9, rtol=0)


def test_prompts_of_the_crop_point_where_those_of_the_frame_do():
    prob = ellipse(224, 0.37, 0.58, 0.13, 0.08)
    boxes = LesionRoi().boxes(prob)
    x1, y1, x2, y2 = boxes[0]
    point = foreground_point(crop(prob, boxes, 256))[0, 0]
    back = torch.stack([x1 + point[0] * (x2 - x1), y1 + point[1] * (y2 - y1)])
    torch.testing.assert_close(back, foreground_point(prob)[0, 0], atol=5e-4, rtol=0)


def test_lesion_roi_grows_by_a_share_of_its_size_on_every_side():
    prob = ellipse(400, 0.5, 0.5, 0.1, 0.05)
    plain = LesionRoi(expand_ratio=0.0).boxes(prob)
    grown = LesionRoi(expand_ratio=0.2).boxes(prob)
    size = plain[:, 2:] - plain[:, :2]
    torch.testing.assert_close(grown, torch.cat([plain[:, :2] - 0.2 * size, plain[:, 2:] + 0.2 * size], 1))
    tiny = LesionRoi(min_size=0.3).boxes(ellipse(400, 0.5, 0.5, 0.02, 0.02))
    torch.testing.assert_close(tiny[:, 2:] - tiny[:, :2], torch.tensor([[0.3, 0.3]]))


# ------------------------------------------------------------------------------------------------- hard cases


@pytest.mark.parametrize("case", hard_cases())
def test_hard_cases_give_sane_prompts_and_bounded_gradients(case):
    prob = hard_cases()[case].requires_grad_()
    boxes = LesionRoi().boxes(prob)
    box = soft_box(prob)
    outputs = [boxes, box, foreground_point(prob), background_point(prob, box), crop(prob, boxes, 16)]
    outputs += [prompt(prob, 16) for prompt in MASK_PROMPTS.values()]
    for output in outputs:
        assert torch.isfinite(output).all()
        (gradient,) = torch.autograd.grad(output.mean(), prob, retain_graph=True, allow_unused=False)
        assert torch.isfinite(gradient).all() and gradient.abs().max() < 100
    for b in (boxes, box):
        assert (b >= 0).all() and (b <= 1).all() and (b[:, 2:] > b[:, :2]).all()
    for point in (foreground_point(prob), background_point(prob, box)):
        assert (point >= 0).all() and (point <= 1).all()


@pytest.mark.parametrize("case", ["empty", "nearly empty", "timid", "full"])
def test_a_missed_lesion_is_looked_for_everywhere(case):
    prob = hard_cases()[case]
    torch.testing.assert_close(LesionRoi().boxes(prob), torch.tensor([[0.0, 0, 1, 1]]))
    torch.testing.assert_close(foreground_point(prob), torch.full((1, 1, 2), 0.5))


def test_a_pixel_has_its_own_centre():
    torch.testing.assert_close(
        foreground_point(hard_cases()["pixel"]), torch.tensor([[[20.5 / 32, 5.5 / 32]]]), atol=1e-6, rtol=0
    )


def test_the_box_covers_both_of_two_lesions():
    x1, y1, x2, y2 = LesionRoi().boxes(hard_cases()["two"])[0]
    assert x1 <= 0.1 and x2 >= 0.9 and y1 <= 0.2 and y2 >= 0.8


# ------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("seed", [0, 1])
def test_gradcheck_of_moments_points_and_boxes(seed):
    prob = random_maps(seed).requires_grad_()
    assert gradcheck(lambda p: tuple(mask_moments(p)), prob)
    assert gradcheck(foreground_point, prob)
    assert gradcheck(lambda p: soft_box(p, 1.5), prob)
    assert gradcheck(lambda p: background_point(p, soft_box(p, 1.0)), prob)
    assert gradcheck(lambda p: LesionRoi(k=0.8, expand_ratio=0.1).boxes(p), prob)
    assert gradcheck(lambda p: sharpen(p, 0.5), prob)


@pytest.mark.parametrize("case", ["empty", "timid", "pixel", "two"])
def test_gradcheck_in_the_hard_cases(case):
    prob = hard_cases(12)[case].double().requires_grad_()
    assert gradcheck(lambda p: tuple(mask_moments(p)), prob)
    assert gradcheck(lambda p: background_point(p, torch.tensor([[0.2, 0.2, 0.8, 0.9]]).double()), prob)


@pytest.mark.parametrize("style", MASK_PROMPTS)
def test_gradcheck_of_mask_prompts(style):
    assert gradcheck(lambda p: MASK_PROMPTS[style](p, 20), random_maps().requires_grad_())


def test_gradcheck_of_crop_and_paste_in_values_and_boxes():
    x = torch.randn(2, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0.21, 0.13, 0.71, 0.66], [0.3, 0.2, 0.93, 0.81]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, b: crop(x, b, 7), (x, boxes))
    assert gradcheck(lambda x, b: paste(x, b, 13), (x, boxes))
    margins = torch.tensor([[0.1, 0.0, 0.03, 0.2]], dtype=torch.float64)
    assert gradcheck(lambda b: (covering(b, 1, margins), covering(b, 2)), boxes)


def test_gradcheck_of_select_and_gates():
    masks = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    iou = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda m, i: select(m, i, 0.3), (masks, iou))
    coarse, refined, image = (torch.randn(1, 1, 5, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for gate in (NoGate(), UncertaintyGate(1.7), LearnedGate().double(), HybridGate().double()):
        assert gradcheck(lambda c, r, g=gate: g(c, r, image.detach()), (coarse, refined))


# ------------------------------------------------------------------------------------------------- gates


def test_uncertainty_gate_follows_its_formula():
    coarse, refined = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])[None, None, None], torch.full((1, 1, 1, 5), 3.0)
    p = torch.sigmoid(coarse)
    gate = 0.2 + 0.6 * (1 - (2 * p - 1).abs() ** 2)
    torch.testing.assert_close(
        UncertaintyGate(gamma=2.0, low=0.2, high=0.8)(coarse, refined, coarse), coarse + gate * (refined - coarse)
    )


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_gates_have_a_gradient_where_the_coarse_network_is_undecided(gamma):
    """A power below 1 of |2P − 1| = 0 has an infinite slope."""
    values = torch.tensor([0.0, -1e-9, 1e-6, 2.0, -3.0])[None, None, None]
    for gate in (UncertaintyGate(gamma), HybridGate(gamma)):
        coarse = values.clone().requires_grad_()
        final = gate(coarse, torch.ones(1, 1, 1, 5), torch.ones(1, 1, 1, 5))
        final.sum().backward()
        assert final.isfinite().all() and coarse.grad.isfinite().all()
    certainty = (2 * torch.sigmoid(values) - 1).abs().pow(gamma)
    found = UncertaintyGate(gamma).gate(values, values, values)
    torch.testing.assert_close(found, 0.1 + 0.9 * (1 - certainty), rtol=0, atol=1e-6**gamma)


def test_a_shut_gate_leaves_the_coarse_mask_where_it_is():
    """Known mistake 3 again: beside the refined mask lies the coarse one, enlarged without a shift."""
    refiner = Refiner(LinearSam(), FullFrame(), Prompts(DirectMaskPrompt()))
    logit = torch.randn(1, 1, 10, 10, dtype=torch.float64)
    final = Cascade(None, refiner, UncertaintyGate(low=0, high=0)).refine(torch.rand(1, 1, 24, 24).double(), logit)
    torch.testing.assert_close(final.logits, paste(logit, FullFrame().boxes(logit), 24))


def test_learned_gate_starts_half_open_and_learns():
    gate, coarse, refined = LearnedGate(), torch.randn(1, 1, 6, 6), torch.randn(1, 1, 6, 6)
    out = gate(coarse, refined, torch.rand(1, 1, 6, 6))
    torch.testing.assert_close(out, (coarse + refined) / 2)
    out.sum().backward()
    assert gate.net[-1].weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------- the whole refiner


class LinearSam(torch.nn.Module):
    """The simplest promptable model: every prompt and the image move the masks smoothly."""

    image_size, mask_size = 16, 8

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = torch.nn.Conv2d(1, 3, 4, stride=2, padding=1).double()

    def encode(self, image):
        return self.image_encoder(image)

    def decode(self, embedding, points=None, labels=None, boxes=None, masks=None):
        logits = embedding.tanh() + 0.1 * masks
        if points is not None:
            logits = logits + points.sum((1, 2))[:, None, None, None]
        if boxes is not None:
            logits = logits * (1 + boxes.sum(1))[:, None, None, None]
        return logits, torch.sigmoid(logits.mean((2, 3)))


@pytest.mark.parametrize("roi", ["on", "off"])
@pytest.mark.parametrize("style", MASK_PROMPTS)
def test_finite_differences_through_the_whole_refiner(roi, style):
    torch.manual_seed(0)
    refiner = Refiner(LinearSam(), ROIS[roi], Prompts(MASK_PROMPTS[style], box_k=1.5), selection_temperature=0.5)
    image = torch.rand(1, 1, 24, 24, dtype=torch.float64)
    logit = (3 * ellipse(10, 0.45, 0.55, 0.2, 0.15) - 1.5).double().requires_grad_()
    assert gradcheck(lambda z: refiner(image, torch.sigmoid(z)).logits, logit)


@pytest.mark.parametrize("roi", ["on", "off"])
@pytest.mark.parametrize("gate", [None, UncertaintyGate()])
def test_coarse_logits_of_16_bits_are_refined_in_float32(gate, roi):
    """In bfloat16 P is exactly 1 from a logit of 6.2 on, and its slope 0."""
    refiner = Refiner(LinearSam().float(), ROIS[roi], Prompts(DirectMaskPrompt()))
    image, coarse = torch.rand(1, 1, 24, 24), (8 * (2 * ellipse(10, 0.5, 0.5, 0.2, 0.2) - 1)).bfloat16()
    found = []
    for logit in (coarse.requires_grad_(), coarse.detach().float().requires_grad_()):
        logits = Cascade(None, refiner, gate).refine(image, logit).logits
        logits.sum().backward()
        found.append((logits, logit.grad.float()))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] != 0).all()
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("roi", ["on", "off"])
def test_frozen_gradient_mode_gives_the_same_masks_and_still_reaches_the_map(roi):
    torch.manual_seed(0)
    sam, image = LinearSam().requires_grad_(False), torch.rand(1, 1, 24, 24, dtype=torch.float64)
    results = {}
    for mode in ("exact", "frozen"):
        prob = (0.9 * ellipse(20, 0.45, 0.55, 0.1, 0.15)).double().requires_grad_()
        out = Refiner(sam, ROIS[roi], Prompts(DirectMaskPrompt(), box_k=1.5), gradient=mode)(image, prob)
        out.logits.sum().backward()
        results[mode] = (out.logits.detach(), prob.grad)
    torch.testing.assert_close(results["exact"][0], results["frozen"][0])
    assert results["frozen"][1].abs().sum() > 0
    same = torch.allclose(results["exact"][1], results["frozen"][1])
    assert same == (roi == "off")  # the full frame does not depend on the map, so both modes agree there


def test_crops_have_the_detail_of_the_frame_not_of_the_coarse_image():
    """Known mistake 4: a one-pixel checkerboard survives in the crop of the frame, not in one of a 224-pixel image."""
    seen = {}

    class Spy(LinearSam):
        image_size = 128

        def encode(self, image):
            seen["image"] = image
            return super().encode(image)[..., :8, :8]

    board = (torch.arange(512)[:, None] + torch.arange(512)[None, :]).remainder(2).double()[None, None]
    prob = ellipse(224, 0.5, 0.5, 0.0625, 0.0625).double()
    Refiner(Spy(), LesionRoi(k=2.0, expand_ratio=0.5), Prompts(DirectMaskPrompt()))(board, prob)
    assert seen["image"].std() > 0.25


def test_switched_off_prompts_are_absent():
    prob = ellipse(16, 0.5, 0.5, 0.2, 0.2)
    prompts = Prompts(None, point=True, negative_point=False, box=False)(prob, 16)
    assert prompts.points.shape == (1, 1, 2) and prompts.labels.tolist() == [[1]]
    assert prompts.boxes is None and prompts.masks is None
    prompts = Prompts(DirectMaskPrompt(), point=False, negative_point=False)(prob, 16)
    assert prompts.points is None and prompts.labels is None and prompts.boxes.shape == (1, 4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"mask": None, "point": False, "negative_point": False, "box": False},
        {"point": False, "negative_point": True},
        {"temperature": 0},
        {"box_k": -1},
    ],
)
def test_senseless_prompt_settings_are_refused(arguments):
    with pytest.raises(ValueError):
        Prompts(**arguments)


@pytest.mark.parametrize("roi", ["on", "off"])
def test_the_exact_gradient_through_a_small_sam_against_finite_differences(roi):
    """dL_refined/d(coarse logits), through every part of a real SAM: image encoder, prompt encoder, mask decoder."""
    from ultrarefiner.models.sam import load_sam
    from ultrarefiner.phases import losses

    generator = torch.Generator().manual_seed(0)
    sam = load_sam("tiny", seed=1).double().requires_grad_(False)
    for name, parameter in sam.named_parameters():  # as drawn, it hardly looks at image or prompts
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.05)
        assert parameter.dtype == torch.float64, name
    image = torch.rand(1, 1, 160, 160, generator=generator, dtype=torch.float64)
    mask = ellipse(160, 0.5, 0.5, 0.2, 0.15).double()
    smooth = gaussian_blur(ellipse(56, 0.45, 0.55, 0.2, 0.15).double(), 0.03)

    def loss(logit: torch.Tensor, mode: str = "exact") -> torch.Tensor:
        cascade = Cascade(None, Refiner(sam, ROIS[roi], Prompts(DirectMaskPrompt(), box_k=2.0), gradient=mode))
        refined = cascade.refine(image, logit).logits
        return losses.bce(refined, mask) + losses.soft_dice_loss(refined.sigmoid(), mask)

    logit = (8 * smooth - 4).requires_grad_()
    (exact,) = torch.autograd.grad(loss(logit), logit)
    (frozen,) = torch.autograd.grad(loss(logit, "frozen"), logit)
    for seed in range(3):
        direction = torch.randn(logit.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step = 1e-6
        with torch.no_grad():
            slope = (loss(logit + step * direction) - loss(logit - step * direction)) / (2 * step)
        torch.testing.assert_close((exact * direction).sum(), slope, rtol=1e-5, atol=1e-9)
    assert torch.allclose(exact, frozen) == (roi == "off")
