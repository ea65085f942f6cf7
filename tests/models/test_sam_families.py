"""The SAM families beside segment-anything's and LiteMedSAM: each against its publisher's own code."""

import subprocess
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from sam_reference import prompts_for, randomise
from torch import Tensor, nn

from ultrarefiner.cli import CONF
from ultrarefiner.errors import UserError
from ultrarefiner.models.embedding_cache import EmbeddingCache
from ultrarefiner.models.lora import add_lora, merge_lora
from ultrarefiner.models.sam import Sam, load_sam
from ultrarefiner.models.sam2 import sam2_model
from ultrarefiner.models.sam_decoder import Embedding
from ultrarefiner.models.sam_families import FAMILIES, build_mobile_sam, build_vit_sam
from ultrarefiner.models.weights import load_strictly

warnings.simplefilter("ignore", UserWarning)  # of the publishers' packages
hq = pytest.importorskip("segment_anything_hq")
# Looked for and not imported: it would start Hydra on its folder.
needs_sam2 = pytest.mark.skipif(find_spec("sam2") is None, reason="needs sam2")
BOTH = ["hq", pytest.param("sam2", marks=needs_sam2)]

KINDS = ["p", "b", "m", "pb", "pbm", ""]
SIZE, WIDTH, CHANNELS = 160, 48, 32


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)


def grey(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)


def in_pixels(prompts: dict[str, Tensor], size: int) -> dict[str, Tensor | None]:
    """Prompts as segment-anything's `predict_torch` takes them."""
    return {
        "point_coords": prompts["points"] * size - 0.5 if "points" in prompts else None,
        "point_labels": prompts.get("labels"),
        "boxes": prompts["boxes"] * size - 0.5 if "boxes" in prompts else None,
        "mask_input": prompts.get("masks"),
        "return_logits": True,
    }


def drift(module: nn.Module) -> None:
    """Batch statistics other than 0 and 1."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)


# ----------------------------------------------------------------------------------------------------- SAM-HQ


@pytest.fixture(scope="module")
def hq_pair():
    """A small SAM-HQ shaped like ViT-B, ours and the publisher's with its image set, on the same random weights."""
    sizes = {"image_size": SIZE, "window": 7, "channels": CHANNELS, "decoder_heads": 4, "decoder_mlp": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = Sam("sam_hq_vit_b", *build_vit_sam(WIDTH, 4, 3, (1, 3), **sizes, hq=True))
    randomise(ours)
    modeling = hq.modeling
    encoder = modeling.ImageEncoderViT(
        SIZE,
        embed_dim=WIDTH,
        depth=4,
        num_heads=3,
        out_chans=CHANNELS,
        use_rel_pos=True,
        window_size=7,
        global_attn_indexes=(1, 3),
        norm_layer=lambda n: nn.LayerNorm(n, eps=1e-6),
    )
    prompts = modeling.PromptEncoder(CHANNELS, (10, 10), (SIZE, SIZE), 16)
    decoder = modeling.MaskDecoderHQ(
        transformer_dim=CHANNELS,
        transformer=modeling.TwoWayTransformer(2, CHANNELS, 4, 64),
        iou_head_hidden_dim=CHANNELS,
        vit_dim=WIDTH,
    )
    reference = modeling.Sam(encoder, prompts, decoder).eval()
    reference.load_state_dict(ours.state_dict())  # strict: the names are the publisher's
    predictor = hq.SamPredictor(reference)
    predictor.set_image(np.repeat(grey(SIZE)[:, :, None], 3, axis=2))
    return ours.eval(), predictor


@pytest.mark.parametrize("kind", KINDS)
def test_sam_hq_equals_its_predictor(hq_pair, kind):
    """One mask; and of the three the one whose predicted IoU is largest, which is the one that its code returns."""
    ours, predictor = hq_pair
    prompts = prompts_for(kind, 1, ours.mask_size)
    with torch.no_grad():
        embedding = ours.encode(torch.from_numpy(grey(SIZE))[None, None] / 255)
        close(embedding.image, predictor.features)
        logits, iou = ours.decode(embedding, **prompts)
        three, ious = ours.decode(embedding, **prompts, multimask=True)
    _, expected_iou, expected = predictor.predict_torch(**in_pixels(prompts, SIZE), multimask_output=False)
    assert logits.shape == (1, 1, 40, 40) and three.shape == (1, 3, 40, 40)
    close(logits, expected)
    close(iou, expected_iou)
    _, expected_iou, expected = predictor.predict_torch(**in_pixels(prompts, SIZE), multimask_output=True)
    best = int(ious.argmax())
    close(three[:, best : best + 1], expected)
    close(ious[:, best : best + 1], expected_iou)


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_sam_hq_has_its_publishers_names(size):
    with torch.device("meta"):
        expected = {k: v.shape for k, v in hq.sam_model_registry[size]().state_dict().items()}
        ours = load_sam(f"sam_hq_{size}", random_init=True).state_dict()
    assert {k: v.shape for k, v in ours.items()} == expected


# ----------------------------------------------------------------------------------------------------- TinyViT


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_mobilesam_equals_its_package(fused):
    mobile = pytest.importorskip("mobilesam_lite.mobile_sam")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = mobile.sam_model_registry["vit_t"]()
        drift(reference)
    ours = Sam("mobilesam", *build_mobile_sam(fused=fused)).eval()
    load_strictly(ours, {k: v.clone() for k, v in reference.state_dict().items()}, "MobileSAM")
    predictor = mobile.SamPredictor(reference.eval())
    predictor.set_image(np.repeat(grey(1024)[:, :, None], 3, axis=2))
    with torch.no_grad():
        embedding = ours.encode(torch.from_numpy(grey(1024))[None, None] / 255)
        close(embedding, predictor.features)
        for kind in ("pb", "bm"):
            prompts = prompts_for(kind, 1, 256)
            logits, iou = ours.decode(embedding, **prompts)
            _, expected_iou, expected = predictor.predict_torch(**in_pixels(prompts, 1024))
            close(logits, expected)
            close(iou, expected_iou)


@pytest.mark.slow
def test_tiny_sam_hq_equals_its_package():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = hq.sam_model_registry["vit_tiny"]()
        drift(reference)
    ours = Sam("sam_hq_vit_tiny", *build_mobile_sam(hq=True)).eval()
    load_strictly(ours, {k: v.clone() for k, v in reference.state_dict().items()}, "SAM-HQ")
    predictor = hq.SamPredictor(reference.eval())
    predictor.set_image(np.repeat(grey(1024)[:, :, None], 3, axis=2))
    prompts = prompts_for("pb", 1, 256)
    with torch.no_grad():
        logits, iou = ours.decode(ours.encode(torch.from_numpy(grey(1024))[None, None] / 255), **prompts)
    _, expected_iou, expected = predictor.predict_torch(**in_pixels(prompts, 1024), multimask_output=False)
    close(logits, expected)
    close(iou, expected_iou)


# ----------------------------------------------------------------------------------------------------- SAM 2.1


@pytest.fixture(scope="module")
def sam2_pair(tmp_path_factory):
    """SAM 2.1 with Hiera tiny, ours and the publisher's with its image set; its file is what ours has written."""
    ours = load_sam("sam2.1_tiny", random_init=True, seed=3)  # first: it keeps the package from starting its Hydra
    from sam2.build_sam import _load_checkpoint
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    randomise(ours.mask_decoder)
    path = tmp_path_factory.mktemp("sam2") / "ours.pt"
    torch.save({"model": ours.state_dict()}, path)
    reference = sam2_model("t").eval()
    _load_checkpoint(reference, path)
    predictor = SAM2ImagePredictor(reference)
    predictor.set_image(np.repeat(grey(1024)[:, :, None], 3, axis=2))
    again = load_sam("sam2.1_tiny", path)
    with torch.no_grad():
        embedding = again.encode(torch.from_numpy(grey(1024))[None, None] / 255)
    return again, embedding, predictor


@needs_sam2
@pytest.mark.slow
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_sam2_equals_its_predictor(sam2_pair, kind, multimask):
    ours, embedding, predictor = sam2_pair
    prompts = prompts_for(kind, 1, 256)
    scaled = in_pixels(prompts, 1024)
    with torch.no_grad():
        logits, iou = ours.decode(embedding, **prompts, multimask=multimask)
    masks, expected_iou, _ = predictor._predict(
        scaled["point_coords"],
        scaled["point_labels"],
        scaled["boxes"],
        scaled["mask_input"],
        multimask,
        return_logits=True,
    )
    assert logits.shape == (1, 3 if multimask else 1, 256, 256)
    full = torch.nn.functional.interpolate(logits, (1024, 1024), mode="bilinear", align_corners=False)
    close(full, masks)
    close(iou, expected_iou)


@needs_sam2
def test_building_sam2_leaves_hydra_alone():
    """The package starts Hydra when it is imported, which would forbid us to start it on our own folder."""
    code = "from ultrarefiner.models.sam import load_sam; load_sam('sam2.1_tiny', random_init=True)\n"
    code += "from hydra import initialize; initialize(config_path=None, version_base='1.3')"
    subprocess.run([sys.executable, "-c", code], check=True)


# ----------------------------------------------------------------------------------------------------- all of them


@pytest.fixture
def two_images(which, hq_pair) -> tuple[Sam, Embedding]:
    """SAM-HQ or SAM 2, with the embeddings of two images."""
    generator = torch.Generator().manual_seed(4)
    if which == "hq":
        with torch.no_grad():
            return hq_pair[0], hq_pair[0].encode(torch.rand(2, 1, SIZE, SIZE, generator=generator))
    image, quarter, half = (torch.randn(2, 256, side, side, generator=generator) for side in (64, 256, 128))
    return load_sam("sam2.1_tiny", random_init=True), Embedding(image, (quarter, half))


@pytest.mark.parametrize("which", BOTH)
def test_several_prompt_sets_share_an_embedding(two_images):
    sam, embedding = two_images
    prompts = prompts_for("pbm", 6, sam.mask_size)
    with torch.no_grad():
        shared = sam.decode(embedding, **prompts)
        for i in (0, 2, 5):
            one = Embedding(embedding.image[i // 3][None], tuple(f[i // 3][None] for f in embedding.finer))
            alone = sam.decode(one, **{name: value[i : i + 1] for name, value in prompts.items()})
            for together, single in zip(shared, alone, strict=True):
                torch.testing.assert_close(together[i : i + 1], single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("which", BOTH)
def test_the_gradient_reaches_prompts_and_the_finer_layers(two_images, which):
    sam, embedding = two_images
    sam.set_trainable(image_encoder=False, prompt_encoder=True, mask_decoder=True)
    prompts = prompts_for("bm", 2, sam.mask_size)
    boxes, masks = prompts["boxes"].requires_grad_(), prompts["masks"].requires_grad_()
    logits, iou = sam.decode(embedding, boxes=boxes, masks=masks)
    (logits.tanh().mean() + iou.mean()).backward()
    finer = {"hq": ("hf_mlp", "compress_vit_feat", "embedding_maskfeature"), "sam2": ("conv_s0", "conv_s1")}
    reached = [p.grad for name, p in sam.mask_decoder.named_parameters() if name.startswith(finer[which])]
    sam.zero_grad()
    assert len(reached) >= 4 and all(grad is not None and grad.abs().sum() > 0 for grad in [*reached, boxes.grad])
    assert masks.grad.abs().sum() > 0
    trained = {name.split(".")[0].removeprefix("sam_") for name, p in sam.named_parameters() if p.requires_grad}
    assert trained == {"prompt_encoder", "mask_decoder"}  # nothing of what SAM 2 needs for videos


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mobilesam", pytest.param("sam2.1_tiny", marks=needs_sam2)])
def test_lora_and_recomputed_activations(family):
    plain, sam = (load_sam(family, random_init=True, checkpointing=checkpointing) for checkpointing in (False, True))
    image = torch.rand(1, 1, 1024, 1024, generator=torch.Generator().manual_seed(0))
    names = sam.state_dict().keys()
    added = add_lora(sam, blocks=2)
    assert merge_lora(sam).keys() == names
    for encoder in (plain, sam):
        embedding = encoder.encode(image)
        embedding = embedding.image if isinstance(embedding, Embedding) else embedding
        if encoder is plain:
            expected = embedding.detach()
    close(embedding.detach(), expected)
    embedding.square().mean().backward()
    assert all(p.grad is not None for p in added)
    assert all("lora_" in name for name, p in sam.image_encoder.named_parameters() if p.grad is not None)


def test_every_family_is_told_by_its_weights():
    """Also the sizes of one family from each other. What no file can tell: SAM, MedSAM and UltraSam as saved here."""
    alike = {"vit_b", "medsam", "ultrasam"}
    for family in FAMILIES:
        if family == "sam2.1_large" or (family.startswith("sam2") and find_spec("sam2") is None):
            continue
        with torch.device("meta" if FAMILIES[family].meta else "cpu"):
            state = load_sam(family, random_init=True).state_dict()
        found = {name for name, other in FAMILIES.items() if other.recognises(state)}
        assert found == (alike if family in alike else {family})


def test_masks_medsam_was_trained_to_give():
    """A box, and the single-mask token: the other three were never trained."""
    sam = Sam("medsam", *build_vit_sam(WIDTH, 2, 3, (1,), image_size=SIZE, channels=CHANNELS, decoder_heads=4))
    logits, iou = sam.decode(torch.zeros(1, CHANNELS, 10, 10), boxes=torch.tensor([[0.2, 0.2, 0.6, 0.8]]))
    assert logits.shape == (1, 1, 40, 40) and iou.shape == (1, 1)
    assert not load_sam("litemedsam").multimask and load_sam("tiny").multimask


def test_what_families_say_of_themselves():
    options = {path.stem: path for path in (CONF / "model" / "sam").glob("*.yaml")}
    assert options.keys() == FAMILIES.keys()
    datasets = {path.stem for path in (CONF / "dataset").glob("*.yaml")}
    for name, path in options.items():
        package, comment, *_ = path.read_text().splitlines()
        kind, node = FAMILIES[name], OmegaConf.load(path).sam
        assert package == "# @package model"
        assert comment.startswith("# ") and kind.licence in comment
        assert node == {"_target_": "ultrarefiner.models.sam.load_sam", "family": name, "checkpoint": None}
        assert set(kind.trained_on) <= datasets
    assert FAMILIES["ultrasam"].trained_on == ("busi", "busbra", "bus_uc", "bus_uclm", "udiat")


def test_a_missing_package_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "segment_anything_hq.modeling", None)
    with pytest.raises(UserError, match=r"segment-anything-hq .*ultrarefiner\[sam-hq\]"):
        load_sam("mobilesam", random_init=True)
    monkeypatch.setitem(sys.modules, "sam2", None)
    with pytest.raises(UserError, match=r"sam2 .*ultrarefiner\[sam2\]"):
        load_sam("sam2.1_tiny", random_init=True)


def test_embeddings_of_several_tensors_are_not_kept(hq_pair, tmp_path):
    ours, _ = hq_pair
    ours.embeddings = EmbeddingCache(tmp_path / "embeddings", 1.0)
    try:
        with pytest.raises(UserError, match=r"phase\.crops=null"):
            ours.encode(torch.rand(1, 1, SIZE, SIZE))
    finally:
        ours.embeddings = None
