"""UltraSam (Meyer et al. 2025) as its authors publish it: an mmengine file, in names of its own.

It is SAM ViT-B. Two things differ beyond names. Its prompts and output tokens are rows of one table. And its decoder
adds a residual around a perceptron that has added it already, so what stands in front of the layer norm is 2x + f(x).
The norm divides the scale out again: x + f(x)/2 gives the same (but for its epsilon of 1e-5), and that is SAM's own
layer with the second linear map of f halved.
"""

import re

from torch import Tensor

TABLE = "prompt_encoder.label_encoder.label_embedding.weight"
# The rows of the table, in order.
_ROWS = (
    "prompt_encoder.no_mask_embed.weight",
    *(f"prompt_encoder.point_embeddings.{kind}.weight" for kind in range(4)),
    "prompt_encoder.not_a_point_embed.weight",
    *["mask_decoder.mask_tokens.weight"] * 4,
    "mask_decoder.iou_token.weight",
)
# mmdetection's and mmpretrain's names → segment-anything's, applied in order.
_NAMES = (
    (r"^backbone\.layers\.", "image_encoder.blocks."),
    (r"^backbone\.channel_reduction\.", "image_encoder.neck."),
    (r"^backbone\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^backbone\.", "image_encoder."),
    (r"^bbox_head\.", "mask_decoder."),
    (r"^decoder\.post_norm\.", "mask_decoder.transformer.norm_final_attn."),
    (r"^decoder\.", "mask_decoder.transformer."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.(?:ffn|mlp)\.layers\.0\.0\.", ".mlp.lin1."),
    (r"\.(?:ffn|mlp)\.layers\.1\.", ".mlp.lin2."),
    (r"\.attn\.([qkv])_proj_weight$", r".\1_proj.weight"),
    (r"\.attn\.(out_proj\.|in_proj_bias$)", r".\1"),
)
_DOUBLED = re.compile(r"mask_decoder\.transformer\.layers\.\d+\.mlp\.lin2\.")


def from_mmengine(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """UltraSam's weights in segment-anything's names; weights that have them already stay as they are."""
    if TABLE not in state:
        return state
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if name == TABLE:
            for row in set(_ROWS):
                found[row] = value[[index for index, other in enumerate(_ROWS) if other == row]]
        elif name.endswith(".in_proj_bias"):
            for letter, bias in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("in_proj_bias", f"{letter}_proj.bias")] = bias.clone()
        else:
            found[name] = value / 2 if _DOUBLED.match(name) else value
    return found
