"""The SAM families: how each is built, fed, and recognised in a file. A new one is one row of `FAMILIES`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.models.sam_lite import LiteEncoder, lite_model, lite_weights

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
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Image encoder, prompt encoder and mask decoder of segment-anything's classes, with random weights.

    Args:
        width, depth, heads: of the image encoder; `global_blocks` are those without windows of side `window`.
        image_size, patch: in px; the embedding is image_size/patch on a side, the masks four times that.
        channels: of the embedding; decoder_heads, decoder_mlp: of the mask decoder's transformer.
        checkpointing: see `ViTEncoder`. fused: without meaning here, there is no batch norm.
    """
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer

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
    grid = (image_size // patch, image_size // patch)
    prompt_encoder = PromptEncoder(channels, grid, (image_size, image_size), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=channels, num_heads=decoder_heads, mlp_dim=decoder_mlp)
    decoder = MaskDecoder(transformer_dim=channels, transformer=transformer, iou_head_hidden_dim=channels)
    return ViTEncoder(encoder, checkpointing), prompt_encoder, decoder


def build_lite_sam(fused: bool = True, checkpointing: bool = False) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Image encoder, prompt encoder and mask decoder of LiteMedSAM, with random weights; see `LiteEncoder`."""
    model = lite_model()
    return LiteEncoder(model.image_encoder, fused, checkpointing), model.prompt_encoder, model.mask_decoder


@dataclass(frozen=True)
class Family:
    """What distinguishes one family.

    Attributes:
        build: makes the three parts; takes `fused` and `checkpointing`.
        normalise: grey image in [0,1] → what the image encoder was trained on.
        mark: name and shape of a weight by which a file of the family is told.
        multimask: three masks (True), or the single-mask token's only (False: it alone was trained).
        meta: all its tensors come from the file, so it may be built without memory first.
        bundled: the weights that come with its package, if any.
        needs_file: refuse to run on random weights unless asked to.
    """

    build: Callable[..., tuple[nn.Module, nn.Module, nn.Module]]
    normalise: Callable[[Tensor], Tensor]
    mark: tuple[str, tuple[int, ...]]
    multimask: bool = True
    meta: bool = True
    bundled: Callable[[], Path] | None = None
    needs_file: bool = True

    def recognises(self, state: dict[str, Tensor]) -> bool:
        """Whether a state_dict is of this family."""
        name, shape = self.mark
        return name in state and tuple(state[name].shape) == shape


def _vit_mark(width: int, patch: int = 16) -> tuple[str, tuple[int, ...]]:
    return "image_encoder.patch_embed.proj.weight", (width, 3, patch, patch)


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
    "vit_b": Family(_vit_b, standardise, _vit_mark(768)),
    "vit_l": Family(_vit_l, standardise, _vit_mark(1024)),
    "vit_h": Family(_vit_h, standardise, _vit_mark(1280)),
    "medsam": Family(_vit_b, stretch, _vit_mark(768)),
    "litemedsam": Family(
        build_lite_sam,
        stretch,
        ("image_encoder.patch_embed.seq.0.c.weight", (32, 3, 1, 1)),
        multimask=False,
        meta=False,
        bundled=lite_weights,
    ),
    "tiny": Family(_tiny, standardise, _vit_mark(96, 8), needs_file=False),
}
