"""models/sam_ultra.py: UltraSam's own file computes here what its code computes, on random weights under its names."""

import logging
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from sam_reference import UltraDecoder, prompts_for, ultrasam_state
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from ultrarefiner.errors import UserError
from ultrarefiner.models.sam import Sam, load_sam
from ultrarefiner.models.sam_families import build_vit_sam
from ultrarefiner.models.sam_ultra import from_mmengine
from ultrarefiner.models.weights import load_strictly

SIZE, WIDTH, CHANNELS = 160, 48, 32


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def ultra() -> tuple[Sam, dict[str, Tensor]]:
    published = ultrasam_state(WIDTH, depth=2, head=16, channels=CHANNELS, mlp=64, grid=10, window=7, whole=(1,))
    sizes = {"image_size": SIZE, "window": 7, "channels": CHANNELS, "decoder_heads": 4, "decoder_mlp": 64}
    sam = Sam("ultrasam", *build_vit_sam(WIDTH, 2, 3, (1,), **sizes)).eval()
    load_strictly(sam, from_mmengine(published), "UltraSam")
    return sam, published


@pytest.mark.parametrize("kind", ["p", "b", "bm", "pb"])
def test_ultrasams_decoder(ultra, kind):
    sam, published = ultra
    prompts = prompts_for(kind, 1, sam.mask_size)
    image = torch.randn(1, CHANNELS, 10, 10, generator=torch.Generator().manual_seed(1))
    logits, iou = UltraDecoder(published, heads=4)(image, prompts)
    with torch.no_grad():
        for multimask, wanted in ((True, slice(1, None)), (False, slice(0, 1))):
            found = sam.decode(image, **prompts, multimask=multimask)
            close(found[0], logits[:, wanted])
            close(found[1], iou[:, wanted])


def test_ultrasams_image_encoder_is_sams(ultra):
    """mmpretrain's ViTSAM computes what segment-anything's encoder does, on the same tensors in the same places."""
    sam, published = ultra
    reference = ImageEncoderViT(
        SIZE,
        embed_dim=WIDTH,
        depth=2,
        num_heads=3,
        out_chans=CHANNELS,
        use_rel_pos=True,
        window_size=7,
        global_attn_indexes=(1,),
        norm_layer=lambda n: nn.LayerNorm(n, eps=1e-6),
    )
    named = {"pos_embed": "pos_embed"}
    for leaf in ("weight", "bias"):
        named[f"patch_embed.proj.{leaf}"] = f"patch_embed.projection.{leaf}"
        for n in range(4):
            named[f"neck.{n}.{leaf}"] = f"channel_reduction.{n}.{leaf}"
    for i in range(2):
        pairs = {"norm1": "ln1", "norm2": "ln2", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj"}
        pairs |= {"mlp.lin1": "ffn.layers.0.0", "mlp.lin2": "ffn.layers.1"}
        named |= {
            f"blocks.{i}.{k}.{leaf}": f"layers.{i}.{v}.{leaf}" for k, v in pairs.items() for leaf in ("weight", "bias")
        }
        named |= {f"blocks.{i}.attn.rel_pos_{axis}": f"layers.{i}.attn.rel_pos_{axis}" for axis in "hw"}
    state = {k: published[f"backbone.{v}"] for k, v in named.items() if f"backbone.{v}" in published}
    reference.load_state_dict(state)
    image = torch.rand(1, 1, SIZE, SIZE)
    with torch.no_grad():
        close(sam.encode(image), reference(sam.normalise(image)))


class HistoryBuffer:
    """As mmengine's: a pickle of it names the class and its functions, and holds NumPy arrays."""

    def __init__(self) -> None:
        self.history = np.arange(3.0)
        self.methods = OrderedDict(mean=HistoryBuffer.mean, last=np.float64(2.0))

    def mean(self) -> float:
        raise AssertionError("read, and never run")


@pytest.mark.slow
def test_ultrasams_own_file(tmp_path, monkeypatch, caplog):
    """Its size and its other contents: what mmengine logs is not needed to read the weights. Its licence is told."""
    name = "mmengine.logging.history_buffer"
    module = types.ModuleType(name)
    module.HistoryBuffer = HistoryBuffer
    for part in ("mmengine", "mmengine.logging", name):
        monkeypatch.setitem(sys.modules, part, module)
    monkeypatch.setattr(HistoryBuffer, "__module__", name)
    monkeypatch.setattr(HistoryBuffer.mean, "__module__", name)
    published = ultrasam_state(768, depth=12, head=64, channels=256, mlp=2048, grid=64, window=14, whole=(2, 5, 8, 11))
    assert len(published) == 293  # as in the published file
    path = tmp_path / "UltraSam_mine.pth"
    log = {"message_hub": {"log_scalars": OrderedDict(loss=HistoryBuffer())}, "meta": {"epoch": 1}}
    torch.save({**log, "state_dict": OrderedDict(published)}, path)
    del sys.modules[name], sys.modules["mmengine.logging"], sys.modules["mmengine"]
    with caplog.at_level(logging.WARNING):
        sam = load_sam("ultrasam", path)
    assert "CC-BY-NC-SA-4.0" in caplog.text and "commercial" in caplog.text
    table = published["prompt_encoder.label_encoder.label_embedding.weight"]
    assert torch.equal(sam.prompt_encoder.point_embeddings[1].weight, table[2:3])
    assert torch.equal(sam.mask_decoder.mask_tokens.weight, table[6:10])
    with pytest.raises(UserError, match="holds weights of ultrasam, not of vit_b"):
        load_sam("vit_b", path)
    torch.save(sam.state_dict(), path)  # what Phase 2 leaves
    assert torch.equal(load_sam("ultrasam", path).mask_decoder.iou_token.weight, table[10:])
