"""The SAM families: how each is built, fed, and recognised in a file. A new one is one row of `FAMILIES`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.models import sam_decoder
from ultrarefiner.models.sam2 import build_sam2, prepare_sam2
from ultrarefiner.models.sam_hq import hq_decoder, hq_parts, predict_hq, prepare_hq
from ultrarefiner.models.sam_lite import LiteEncoder, lite_model, lite_weights
from ultrarefiner.models.sam_ultra import TABLE, from_mmengine

PIXEL_MEAN = (123.675, 116.28, 103.53)  # grey values 0–255, red green blue (segment-anything)
PIXEL_STD = (58.395, 57.12, 57.375)


def standardise(image: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 3 H W"]:
    """SAM's own input: grey in [0,1] → three channels of 255·grey less the mean, over the standard deviation."""
    mean, std = (image.new_tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (255 * image - mean) / std


def stretch(image: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 3 H W"]:
    """MedSAM's and LiteMedSAM's input: each image from its own minimum to its maximum onto [0,1] (Ma et al. 2024)."""
    low, high = image.amin(dim=(1, 2, 3), keepdim=True), image.amax(dim=(1, 2, 3), keepdim=True)
    return ((image - low) / (high - low).clamp_min(1e-8)).expand(-1, 3, -1, -1)


def build_vit_sam(
    width: int,
    depth: int,
    heads: int,
    global_blocks: tuple[int, ...],
    image_size: int = 1024,
    patch: int = 16,
    window: int = 14,
    channels: int = 256,
    decoder_heads: int = 8,
    decoder_mlp: int = 2048,
    checkpointing: bool = False,
    fused: bool = True,
    hq: bool = False,
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Image encoder, prompt encoder and mask decoder of segment-anything's classes, with random weights.

    Args:
        width, depth, heads: of the image encoder; `global_blocks` are those without windows of side `window`.
        image_size, patch: in px; the embedding is image_size/patch on a side, the masks four times that.
        channels: of the embedding; decoder_heads, decoder_mlp: of the mask decoder's transformer.
        checkpointing: see `ViTEncoder`. fused: without meaning here, there is no batch norm.
        hq: with SAM-HQ's mask decoder.
    """
    from segment_anything.modeling import ImageEncoderViT

    from ultrarefiner.models.sam_vit import ViTEncoder

    encoder = ImageEncoderViT(
        img_size=image_size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        out_chans=channels,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=global_blocks,
    )
    decoding = _build_decoding(image_size, patch, channels, decoder_heads, decoder_mlp, width if hq else None)
    return ViTEncoder(encoder, checkpointing, early=hq), *decoding


def _build_decoding(
    image_size: int, patch: int, channels: int = 256, heads: int = 8, mlp: int = 2048, hq_width: int | None = None
) -> tuple[nn.Module, nn.Module]:
    """Prompt encoder and mask decoder; SAM-HQ's where the early features have a width."""
    from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

    grid = (image_size // patch, image_size // patch)
    prompt_encoder = PromptEncoder(channels, grid, (image_size, image_size), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=channels, num_heads=heads, mlp_dim=mlp)
    if hq_width is not None:
        return prompt_encoder, hq_decoder(transformer, channels, hq_width)
    return prompt_encoder, MaskDecoder(transformer_dim=channels, transformer=transformer, iou_head_hidden_dim=channels)


def build_lite_sam(fused: bool = True, checkpointing: bool = False) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Image encoder, prompt encoder and mask decoder of LiteMedSAM, with random weights; see `LiteEncoder`."""
    model = lite_model()
    return LiteEncoder(model.image_encoder, fused, checkpointing), model.prompt_encoder, model.mask_decoder


def build_mobile_sam(
    fused: bool = True, checkpointing: bool = False, hq: bool = False
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The same of MobileSAM, or of SAM-HQ's version of it, whose package has MobileSAM's encoder."""
    encoder = hq_parts().TinyViT(
        img_size=1024,
        embed_dims=[64, 128, 160, 320],
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 5, 10],
        window_sizes=[7, 7, 14, 7],
        drop_path_rate=0.0,
    )
    decoding = _build_decoding(image_size=1024, patch=16, hq_width=160 if hq else None)
    return LiteEncoder(encoder, fused, checkpointing, early=hq), *decoding


Mark = dict[str, tuple[int, ...] | None]


@dataclass(frozen=True)
class Family:
    """What distinguishes one family.

    Attributes:
        build: makes image encoder, prompt encoder and mask decoder, and what else the file holds, by name; takes
            `fused` and `checkpointing`.
        normalise: grey image in [0,1] → what the image encoder was trained on.
        marks: names and shapes of weights by which a file of the family is told (None: there is none of that name); one
            of them suffices.
        multimask: three masks (True), or the single-mask token's only (False: it alone was trained).
        meta: all its tensors come from the file, so it may be built without memory first.
        bundled: the weights that come with its package, if any.
        needs_file: refuse to run on random weights unless asked to.
        licence: of the published weights (SPDX). notice: what it asks of those who use them, if that is unusual.
        trained_on: which of conf/dataset the published weights have seen; docs/models.md says where that is known from.
        convert: the weights in a published file → in the names of the model.
        prefix: of `prompt_encoder` and `mask_decoder` in the publisher's names.
        pads_boxes: whether a box is followed by the token that says "no point", as points are.
        prepare, predict: how masks are drawn; see `sam_decoder`.
    """

    build: Callable[..., tuple[Any, ...]]
    normalise: Callable[[Tensor], Tensor]
    marks: tuple[Mark, ...]
    multimask: bool = True
    meta: bool = True
    bundled: Callable[[], Path] | None = None
    needs_file: bool = True
    licence: str = "Apache-2.0"
    notice: str = ""
    trained_on: tuple[str, ...] = ()
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    prefix: str = ""
    pads_boxes: bool = False
    prepare: Callable[[nn.Module, Any], tuple[Tensor, tuple[Tensor, ...]]] = sam_decoder.as_it_is
    predict: Callable[..., tuple[Tensor, Tensor]] = sam_decoder.predict

    def recognises(self, state: dict[str, Tensor]) -> bool:
        """Whether a state_dict is of this family."""
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        return any(all(shapes.get(name) == shape for name, shape in mark.items()) for mark in self.marks)


_HQ, _STEM = "mask_decoder.hf_token.weight", "image_encoder.patch_embed."


def _vit_mark(width: int, patch: int = 16, hq: bool = False) -> Mark:
    return {_STEM + "proj.weight": (width, 3, patch, patch), _HQ: (1, 256) if hq else None}


def _mobile_mark(hq: bool = False) -> Mark:
    return {_STEM + "seq.0.c.weight": (32, 3, 3, 3), _HQ: (1, 256) if hq else None}


def _sam2(config: str, width: int, blocks: int) -> Family:
    stem, block = "image_encoder.trunk.patch_embed.proj.weight", "image_encoder.trunk.blocks.{}.norm1.weight"
    mark: Mark = {stem: (width, 3, 7, 7), block.format(blocks - 1): (8 * width,), block.format(blocks): None}
    return Family(
        partial(build_sam2, config),
        standardise,
        (mark,),
        meta=False,
        prefix="sam_",
        pads_boxes=True,
        prepare=prepare_sam2,
    )


def _hq(build: Callable[..., tuple[Any, ...]], mark: Mark, meta: bool = True) -> Family:
    # Its token was trained together with the single-mask token.
    return Family(
        partial(build, hq=True),
        standardise,
        (mark,),
        multimask=False,
        meta=meta,
        prepare=prepare_hq,
        predict=predict_hq,
    )


_vit_b = partial(build_vit_sam, width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11))
_vit_l = partial(build_vit_sam, width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23))
_vit_h = partial(build_vit_sam, width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31))
_tiny = partial(
    build_vit_sam,
    width=96,
    depth=4,
    heads=3,
    global_blocks=(1, 3),
    image_size=128,
    patch=8,
    window=8,
    channels=64,
    decoder_heads=4,
    decoder_mlp=128,
)

FAMILIES: dict[str, Family] = {
    "vit_b": Family(_vit_b, standardise, (_vit_mark(768),)),
    "vit_l": Family(_vit_l, standardise, (_vit_mark(1024),)),
    "vit_h": Family(_vit_h, standardise, (_vit_mark(1280),)),
    "medsam": Family(_vit_b, stretch, (_vit_mark(768),), multimask=False, trained_on=("busi",)),
    "litemedsam": Family(
        build_lite_sam,
        stretch,
        ({_STEM + "seq.0.c.weight": (32, 3, 1, 1)},),
        multimask=False,
        meta=False,
        bundled=lite_weights,
        trained_on=("busi",),
    ),
    "ultrasam": Family(
        _vit_b,
        standardise,
        ({TABLE: (11, 256)}, _vit_mark(768)),  # as published, and as written here
        convert=from_mmengine,
        licence="CC-BY-NC-SA-4.0",
        notice="no commercial use, and what is made from them must be shared under the same licence",
        trained_on=("busi", "busbra", "bus_uc", "bus_uclm", "udiat"),
    ),
    "mobilesam": Family(build_mobile_sam, standardise, (_mobile_mark(),), meta=False),
    "sam_hq_vit_tiny": _hq(build_mobile_sam, _mobile_mark(hq=True), meta=False),
    "sam_hq_vit_b": _hq(_vit_b, _vit_mark(768, hq=True)),
    "sam_hq_vit_l": _hq(_vit_l, _vit_mark(1024, hq=True)),
    "sam_hq_vit_h": _hq(_vit_h, _vit_mark(1280, hq=True)),
    "sam2.1_tiny": _sam2("t", 96, 12),
    "sam2.1_small": _sam2("s", 96, 16),
    "sam2.1_base_plus": _sam2("b+", 112, 24),
    "sam2.1_large": _sam2("l", 144, 48),
    "tiny": Family(_tiny, standardise, (_vit_mark(96, 8),), needs_file=False),
}
