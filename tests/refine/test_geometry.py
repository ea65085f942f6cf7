"""Aspect: what SAM sees keeps the shape it has in native pixels, and padding is outside the image everywhere."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from data_layouts import save
from ultrarefiner.data.images import mask_to_square, to_square
from ultrarefiner.models.embedding_cache import EmbeddingCache
from ultrarefiner.models.sam import load_sam
from ultrarefiner.models.sam_families import stretch
from ultrarefiner.phases import losses
from ultrarefiner.refine.moments import mask_moments, sharpen
from ultrarefiner.refine.prompts import DirectMaskPrompt, Prompts
from ultrarefiner.refine.refiner import Refiner
from ultrarefiner.refine.roi import FullFrame, LesionRoi, coverage, covering, crop, image_within, paste, squared
from ultrarefiner.results import metrics

WAYS = {
    "square": LesionRoi(expand_ratio=0.5, square=True),
    "stretched": LesionRoi(expand_ratio=0.5),
    "padded frame": FullFrame(pad=True),
    "stretched frame": FullFrame(),
}
KEEPING = ["square", "padded frame"]
SHAPES = {"tall": (420, 240), "wide": (260, 400), "even": (300, 300)}  # height, width


def native_disc(shape: tuple[int, int], x: float, y: float, radius: float) -> np.ndarray:
    """A circle in native pixels; centre as shares of width and height, radius as a share of the shorter side."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    return (columns - x * shape[1]) ** 2 + (rows - y * shape[0]) ** 2 <= (radius * min(shape)) ** 2


def frame(mask: np.ndarray, size: int) -> Tensor:
    return torch.from_numpy(mask_to_square(mask, size)).float()[None, None]


def aspect_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([shape[1] / shape[0]], dtype=dtype)


class Echo(nn.Module):
    """Draws the mask prompt as it comes, and remembers what it was shown and told."""

    image_size, mask_size = 256, 256

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Identity()

    def encode(self, image, inside=None):
        self.image, self.inside = image, inside
        return image

    def decode(self, embedding, points=None, labels=None, boxes=None, masks=None):
        self.points, self.boxes, self.masks = points, boxes, masks
        return masks, masks.new_zeros(len(masks), 1)


def shown(way: str, shape: tuple[int, int], mask: np.ndarray) -> tuple[Echo, torch.Tensor]:
    """What SAM sees of an image that is white in the mask, and the mask refined to itself."""
    refiner = Refiner(Echo(), WAYS[way], Prompts(DirectMaskPrompt()))
    refined = refiner(frame(mask, 512), frame(mask, 224), aspect=aspect_of(shape))
    return refiner.sam, refined.logits


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("place", [(0.5, 0.5), (0.8, 0.75)])
@pytest.mark.parametrize("way", WAYS)
def test_a_circle_in_native_pixels_is_a_circle_in_what_sam_sees(way, place, shape):
    """Its spread is the same in both directions; where the image is stretched, it is off by the aspect."""
    sam, _ = shown(way, SHAPES[shape], native_disc(SHAPES[shape], *place, 0.15))
    across, down = mask_moments(sam.image).spread[0].tolist()
    if way in KEEPING:
        assert across / down == pytest.approx(1, abs=0.01)
    elif way == "stretched frame":
        assert across / down == pytest.approx(SHAPES[shape][0] / SHAPES[shape][1], rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_padded_frame_begins_at_the_top_left_and_ends_with_the_longer_side(shape):
    height, width = SHAPES[shape]
    box = FullFrame(pad=True).boxes(torch.zeros(1, 1, 8, 8), aspect_of(SHAPES[shape]))[0]
    longer = max(height, width)
    torch.testing.assert_close(box, torch.tensor([0, 0, longer / width, longer / height]))
    sam, _ = shown("padded frame", SHAPES[shape], native_disc(SHAPES[shape], 0.5, 0.5, 0.2))
    image_px = (round(256 * height / longer), round(256 * width / longer))
    assert (sam.inside > 0.5).sum(dim=(2, 3)).item() == image_px[0] * image_px[1]
    assert (sam.inside[..., : image_px[0] - 1, : image_px[1] - 1] == 1).all()
    assert shape == "even" or (sam.inside[..., image_px[0] + 1 :, :] == 0).all()


begins, sizes = st.floats(0, 0.9), st.floats(0.02, 1.5)
boxes_and_aspects = (begins, begins, sizes, sizes, st.floats(0.4, 2.5))


@settings(deadline=None, max_examples=100)
@given(*boxes_and_aspects)
def test_a_squared_box_is_a_native_square_in_the_image_that_holds_the_box(x, y, w, h, aspect):
    given_box = torch.tensor([[x, y, x + w, y + h]], dtype=torch.float64)
    x1, y1, x2, y2 = squared(given_box, torch.tensor([aspect], dtype=torch.float64))[0].tolist()
    side, longest = (x2 - x1) * aspect, max(aspect, 1)
    assert side == pytest.approx(y2 - y1) == pytest.approx(min(max(w * aspect, h), longest))
    for low, high, begin, end in ((x1, x2, x, x + w), (y1, y2, y, y + h)):
        assert low >= 0
        assert high <= 1 + 1e-9 or low == 0  # padding only right and below, and only where it must be
        assert low <= min(begin, 1) + 1e-9 and high >= min(end, 1) - 1e-9


@settings(deadline=None, max_examples=40)
@given(*boxes_and_aspects)
def test_paste_inverts_crop_where_the_box_leaves_the_image(x, y, w, h, aspect):
    """A linear ramp survives; nothing of the padding comes back."""
    size, part = 64, 50
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    ramp = (3 * centres[None, :] + 5 * centres[:, None])[None, None]
    box = squared(torch.tensor([[x, y, x + w, y + h]]).double(), torch.tensor([aspect]).double())
    x1, y1, x2, y2 = box[0].tolist()
    seen = crop(ramp, box, part)
    seen = torch.where(coverage(image_within(box), part) > 0, seen, 1e6)
    back = paste(seen, box, size)
    step_x, step_y = 1.5 * max((x2 - x1) / part, 1 / size), 1.5 * max((y2 - y1) / part, 1 / size)
    across = (centres > max(x1, 0) + step_x) & (centres < min(x2, 1) - step_x)
    down = (centres > max(y1, 0) + step_y) & (centres < min(y2, 1) - step_y)
    kept = down[:, None] & across[None, :]
    torch.testing.assert_close(back[0, 0][kept], ramp[0, 0][kept], atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_a_perfect_mask_survives_at_native_size(way, shape):
    mask = native_disc(SHAPES[shape], 0.7, 0.4, 0.25)
    _, logits = shown(way, SHAPES[shape], mask)
    assert metrics.overlap(metrics.native_mask(logits[0], mask.shape), mask)["dice"] > 0.985


# ------------------------------------------------------------------------------------------------- padding is outside


def hard_maps() -> dict[str, Tensor]:
    empty = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    pixel, corner = empty.clone(), empty.clone()
    pixel[0, 0, 5, 20] = 1
    corner[0, 0, 31, 31] = 1
    border = empty.clone()
    border[..., 10:20, 26:] = 0.9
    return {"empty": empty, "pixel": pixel, "corner": corner, "border": border, "full": empty + 1}


@pytest.mark.parametrize("aspect", [0.35, 1.0, 2.8])
@pytest.mark.parametrize("case", hard_maps())
@pytest.mark.parametrize("way", KEEPING)
def test_prompts_lie_in_the_image_and_nothing_is_nan(way, case, aspect):
    prob = hard_maps()[case].requires_grad_()
    refiner = Refiner(Echo(), WAYS[way], Prompts(DirectMaskPrompt()))
    image = torch.rand(1, 1, 48, 48, dtype=torch.float64)
    refined = refiner(image, prob, aspect=torch.tensor([aspect]).double())
    assert torch.isfinite(refined.logits).all()
    (gradient,) = torch.autograd.grad(refined.logits.mean() + refiner.sam.image.mean() + refiner.sam.boxes.sum(), prob)
    assert torch.isfinite(gradient).all()
    part, sam = image_within(refined.boxes)[0], refiner.sam
    for corners in (sam.points[0], sam.boxes[0].unflatten(0, (2, 2))):
        assert (corners >= part[:2].clamp(min=0) - 1e-9).all() and (corners <= part[2:].clamp(max=1) + 1e-9).all()
    assert (sam.boxes[0, 2:] > sam.boxes[0, :2]).all()
    assert (sam.masks[sam.inside == 0] == -10).all()


def test_an_empty_map_looks_at_the_padded_frame():
    prob, aspect = torch.zeros(2, 1, 16, 16), torch.tensor([0.7, 1.6])
    torch.testing.assert_close(WAYS["square"].boxes(prob, aspect), FullFrame(pad=True).boxes(prob, aspect))


class Scribbler(Echo):
    """Also draws something in the padding."""

    scribble = 0.0

    def decode(self, *prompts, **named):
        masks, iou = super().decode(*prompts, **named)
        return torch.where(self.inside > 0, masks, masks + self.scribble), iou


def test_what_sam_draws_in_the_padding_counts_nowhere():
    """Neither in the frame (so in no loss and no metric there) nor in the loss of the IoU head."""
    shape = SHAPES["tall"]
    mask = native_disc(shape, 0.8, 0.5, 0.3)
    target = frame(mask, 512)
    found = []
    for scribble in (0.0, 1e3):
        refiner = Refiner(Scribbler(), WAYS["padded frame"], Prompts(DirectMaskPrompt()))
        refiner.sam.scribble = scribble
        refined = refiner(target, frame(mask, 224), aspect=aspect_of(shape))
        loss = losses.iou_head_loss(refined.masks, refined.iou, target, refined.boxes)
        found.append((refined.logits[..., :508], loss))  # 508: the last mask pixel of the image lies half outside
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][1] == pytest.approx(1, abs=0.05)  # it draws the truth, and expects an IoU of 0


def test_covering_keeps_squares_square():
    aspect = torch.tensor([0.7, 1.5])
    single = squared(
        torch.tensor([[0.1, 0.2, 0.3, 0.3], [0.5, 0.5, 0.9, 0.8], [0, 0, 1, 1], [0.2, 0.1, 0.3, 0.4]]),
        aspect.repeat_interleave(2),
    )
    assert torch.equal(covering(single, 4, aspect=aspect.repeat_interleave(2)), single)
    margins = torch.tensor([[0.1, 0.0, 0.05, 0.1], [0.1, 0.1, 0.1, 0.1]])
    for box in (covering(single, 2, None, aspect), covering(single, 2, margins, aspect)):
        torch.testing.assert_close((box[:, 2] - box[:, 0]) * aspect, box[:, 3] - box[:, 1])
        for i in range(2):
            these = single[2 * i : 2 * i + 2].clamp(0, 1)
            assert (box[i, :2] <= these[:, :2] + 1e-6).all() and (box[i, 2:] >= these[:, 2:] - 1e-6).all()
        assert box[1, 3] > 1 and box[1, 1] == 0  # the padded frame stays it
    grown, plain = covering(single, 2, margins, aspect)[0], covering(single, 2, None, aspect)[0]
    assert grown[2] - grown[0] > plain[2] - plain[0]


def test_several_masks_of_images_of_different_aspect_share_crops():
    refiner = Refiner(Echo(), WAYS["square"], Prompts(DirectMaskPrompt()))
    shapes = [SHAPES["tall"], SHAPES["wide"]]
    masks = [native_disc(shape, *place, 0.1) for shape in shapes for place in ((0.3, 0.4), (0.6, 0.5))]
    image = torch.cat([frame(masks[0] | masks[1], 512), frame(masks[2] | masks[3], 512)])
    aspect = torch.cat([aspect_of(shape) for shape in shapes])
    maps = torch.cat([frame(m, 224) for m in masks])
    refined = refiner(image, maps, refiner.look(maps, image, 0.1 * torch.ones(2, 4), aspect), aspect)
    assert len(refiner.sam.image) == 2
    for i, mask in enumerate(masks):
        assert metrics.overlap(metrics.native_mask(refined.logits[i], mask.shape), mask)["dice"] > 0.97


# ------------------------------------------------------------------------------------------------- gradients


def test_gradcheck_with_padding():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 9, 9, dtype=torch.float64, generator=generator, requires_grad=True)
    boxes = torch.tensor([[0.21, 0.13, 0.71, 0.66], [-0.31, 0.2, 0.93, 1.41], [0.05, 0.02, 1.4, 1.03]]).double()
    boxes.requires_grad_()
    aspect = torch.tensor([0.63, 1.31, 1.71], dtype=torch.float64)
    assert gradcheck(lambda b: squared(b, aspect), boxes)
    assert gradcheck(lambda b: coverage(image_within(b), 7), boxes)
    assert gradcheck(lambda x, b: crop(x, b, 7) * coverage(image_within(b), 7), (x, boxes))
    assert gradcheck(lambda x, b: paste(x, b, 13), (x, boxes))
    margins = torch.tensor([[0.1, 0.0, 0.03, 0.2]], dtype=torch.float64)
    assert gradcheck(lambda b: covering(b, 1, margins, aspect[:1]), boxes)
    prob = torch.rand(2, 1, 12, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    roi = LesionRoi(k=1.1, expand_ratio=0.1, square=True, temperature=0.5)
    assert gradcheck(lambda p: roi.boxes(p, aspect[:2]), prob)


class Smooth(Echo):
    """Every prompt, the image and the padding move the masks smoothly."""

    image_size, mask_size = 16, 8

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Conv2d(1, 3, 4, stride=2, padding=1).double()

    def encode(self, image, inside=None):
        return self.image_encoder(image * inside)

    def decode(self, embedding, points, labels, boxes, masks):
        logits = (embedding.tanh() + 0.1 * masks + points.sum((1, 2))[:, None, None, None]) * (
            1 + boxes.sum(1)[:, None, None, None]
        )
        return logits, torch.sigmoid(logits.mean((2, 3)))


@pytest.mark.parametrize("aspect", [0.6, 1.9])
@pytest.mark.parametrize("way", KEEPING)
def test_finite_differences_through_the_whole_refiner_with_padding(way, aspect):
    torch.manual_seed(0)
    roi = LesionRoi(k=2.2, expand_ratio=0.3, square=True, temperature=0.6) if way == "square" else WAYS[way]
    refiner = Refiner(Smooth(), roi, Prompts(DirectMaskPrompt(), box_k=1.5), selection_temperature=0.5)
    image = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    logit = torch.full((1, 1, 10, 10), -1.5, dtype=torch.float64)
    logit[..., 3:8, 2:7] = 1.5
    ratio = torch.tensor([aspect], dtype=torch.float64)
    with torch.no_grad():
        box = refiner(image, torch.sigmoid(logit), aspect=ratio).boxes
    assert box.max() > 1  # there is padding
    assert gradcheck(lambda z: refiner(image, torch.sigmoid(z), aspect=ratio).logits, logit.requires_grad_())


# ------------------------------------------------------------------------------------------------- the temperature


def test_roi_and_prompt_box_are_of_the_same_sharpened_map():
    soft = 0.02 + 0.9 * frame(native_disc((200, 200), 0.4, 0.5, 0.1), 64)
    at = LesionRoi(temperature=0.5).boxes(soft)
    torch.testing.assert_close(at, LesionRoi().boxes(sharpen(soft, 0.5)))
    area = lambda b: ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])).item()  # noqa: E731
    assert area(at) < 0.4 * area(LesionRoi().boxes(soft))
    with pytest.raises(ValueError, match="temperature"):
        LesionRoi(temperature=0)


# ------------------------------------------------------------------------------------------------- SAM's own padding


@pytest.mark.parametrize("family", ["tiny", "litemedsam"])
def test_embeddings_are_the_old_ones_bit_by_bit_where_nothing_leaves_the_image(family):
    sam = load_sam(family)
    refiner = Refiner(sam, WAYS["square"], Prompts(DirectMaskPrompt()))
    image = torch.rand(2, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    boxes = squared(torch.tensor([[0.21, 0.33, 0.6, 0.7], [0.0, 0.0, 1.0, 1.0]]), torch.tensor([0.8, 1.0]))
    with torch.no_grad():
        assert torch.equal(refiner.encode(image, boxes), sam.encode(crop(image, boxes, sam.image_size)))


def test_kept_embeddings_know_the_padding(tmp_path):
    """An image is not the same image padded, and the cache gives what the encoder would."""
    sam = load_sam("tiny")
    refiner, image = Refiner(sam, FullFrame(pad=True), Prompts(DirectMaskPrompt())), torch.rand(1, 1, 64, 64)
    boxes = [FullFrame(pad=True).boxes(image, torch.tensor([aspect])) for aspect in (0.6, 1.0, 1.7)]
    with torch.no_grad():
        expected = [refiner.encode(image, box) for box in boxes]
        sam.embeddings = EmbeddingCache(tmp_path, 1)
        for _ in range(2):
            for box, embedding in zip(boxes, expected, strict=True):
                torch.testing.assert_close(refiner.encode(image, box), embedding, atol=2e-3, rtol=2e-3)
    assert len(list(tmp_path.rglob("*.npy"))) == 3


def smooth_image(shape: tuple[int, int]) -> np.ndarray:
    noise = np.random.default_rng(3).random((9, 7)).astype(np.float32)
    smooth = cv2.resize(noise, shape[::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)
    return np.round(20 + 200 * smooth).astype(np.uint8)


def longest_side(image: np.ndarray, size: int) -> np.ndarray:
    """The publishers' way: the longer side becomes `size`."""
    scale = size / max(image.shape)
    height, width = (int(side * scale + 0.5) for side in image.shape)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)


def padded(image: np.ndarray, size: int) -> Tensor:
    return torch.from_numpy(np.pad(image, ((0, size - image.shape[0]), (0, size - image.shape[1]))))


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_the_padded_frame_is_what_litemedsam_was_trained_on(shape):
    """Its authors' inference script: longest side to 256, minimum to maximum onto [0, 1], zeros right and below.

    (They round the shorter side to whole pixels, here it is 192; ours may end inside one.)
    """
    sam, image = load_sam("litemedsam"), smooth_image(shape)
    small = longest_side(image, 256)
    theirs = padded((small - small.min()) / (small.max() - small.min()), 256).expand(1, 3, 256, 256)
    stored = torch.from_numpy(to_square(image, 512).copy()).float()[None, None] / 255
    refiner = Refiner(sam, FullFrame(pad=True), Prompts(DirectMaskPrompt()))
    box = FullFrame(pad=True).boxes(stored, aspect_of(shape))
    ours = stretch(crop(stored, box, 256)) * coverage(image_within(box), 256)
    assert (ours - theirs).abs().max() < 0.03 and (ours - theirs).abs().mean() < 0.003
    with torch.no_grad():
        reference, found = sam.encode(theirs), refiner.encode(stored, box)
        other = refiner.encode(stored, FullFrame().boxes(stored))
    assert (found - reference).norm() < 0.1 * reference.norm()
    assert (other - reference).norm() > 0.5 * reference.norm()


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_the_padded_frame_is_what_sam_was_trained_on(shape):
    from segment_anything.modeling import Sam
    from segment_anything.utils.transforms import ResizeLongestSide

    sam, image = load_sam("tiny"), smooth_image(SHAPES[shape])
    small = ResizeLongestSide(128).apply_image(np.repeat(image[:, :, None], 3, axis=2))
    mean, std = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    own = SimpleNamespace(
        pixel_mean=torch.tensor(mean)[:, None, None],
        pixel_std=torch.tensor(std)[:, None, None],
        image_encoder=SimpleNamespace(img_size=128),
    )
    theirs = Sam.preprocess(own, torch.from_numpy(small).permute(2, 0, 1).float())[None]
    stored = torch.from_numpy(to_square(image, 512).copy()).float()[None, None] / 255
    box = FullFrame(pad=True).boxes(stored, aspect_of(SHAPES[shape]))
    sam.image_encoder = nn.Identity()
    shown_to_sam = Refiner(sam, FullFrame(pad=True), Prompts(DirectMaskPrompt())).encode(stored, box)
    assert shown_to_sam.shape == theirs.shape and (shown_to_sam - theirs).abs().mean() < 0.02
    outside = coverage(image_within(box), 128).expand_as(theirs) == 0
    assert outside.any() and (shown_to_sam[outside] == 0).all() and (theirs[outside] == 0).all()


def test_minimum_and_maximum_are_the_images_own():
    """Black padding would become the minimum: what lies outside repeats the border until the image is normalised."""
    image = 0.4 + 0.2 * torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[0.0, 0.0, 2.0, 1.0]])
    ours = (stretch(crop(image, box, 64)) * coverage(image_within(box), 64))[..., :32]
    alone = stretch(crop(image, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 64))
    assert ours.max() > 0.9 and ours[..., :31].min() < 0.1
    torch.testing.assert_close(ours.mean(), alone.mean(), atol=0.05, rtol=0)


# ------------------------------------------------------------------------------------------------- the way to it


class Encoded:
    """A hook that keeps what the image encoder gets."""

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.image = inputs[0]


def test_the_aspect_comes_from_the_files_and_reaches_sam(tmp_path):
    """Two shapes in one batch, in Phase 2 and in Phase 3, training and judging."""
    from conftest import compose
    from ultrarefiner.phases.e2e import E2EPhase
    from ultrarefiner.phases.sam import SamPhase
    from ultrarefiner.runs import assemble
    from ultrarefiner.runs.plan import earlier_phase

    for i in range(20):
        shape = (96, 64) if i % 2 else (64, 80)
        picture = np.random.default_rng(i).integers(0, 255, shape).astype(np.uint8)
        save(tmp_path / "data" / "images" / f"{i}.png", picture)
        lesion = native_disc(shape, 0.5, 0.5, 0.2 + 0.01 * i)
        save(tmp_path / "data" / "masks" / f"{i}.png", lesion.astype(np.uint8) * 255)
    cfg = compose(f"output_root={tmp_path}", "dataset=folder", f"data_root={tmp_path / 'data'}", "roi=off", micro=False)
    for kind, own in ((E2EPhase, cfg), (SamPhase, earlier_phase(cfg, "sam"))):
        data, phase = assemble.build_data(own, kind), assemble.build_phase(own, kind, {})
        sam, met = phase.cascade.refiner.sam, Encoded()
        sam.image_encoder.register_forward_pre_hook(met)
        for loader, use in ((data.train_dataloader(), phase.terms), (data.val_dataloader(), phase.masks)):
            batch = next(iter(loader))
            expected = [80 / 64 if int(id) % 2 == 0 else 64 / 96 for id in batch["id"]]
            torch.testing.assert_close(batch["aspect"], torch.tensor(expected))
            use(batch)
            share = (met.image != 0).float().mean((1, 2, 3))
            torch.testing.assert_close(share, torch.minimum(batch["aspect"], 1 / batch["aspect"]), atol=0.01, rtol=0)


def test_the_settings_reach_the_roi():
    from conftest import compose
    from ultrarefiner.runs.build import build_refiner

    cfg = compose("prompt_style.temperature=0.7", "model.roi.expand_ratio=0.3", "roi.square=true")
    roi = build_refiner(cfg, None)[0].roi
    assert (roi.square, roi.temperature, roi.expand_ratio) == (True, 0.7, 0.3)
    assert build_refiner(compose("roi=off"), None)[0].roi.pad
    assert not build_refiner(compose("roi=off", "model.frame=stretch"), None)[0].roi.pad
