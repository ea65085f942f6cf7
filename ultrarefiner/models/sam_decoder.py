"""SAM's mask decoder and mask prompt on the publishers' own parameters: same names, same numbers, less time and memory.

segment-anything goes to and fro between images (P,C,h,w) and tokens (P,N,C). Here everything stays tokens, N = h·w:

- its convolutions have a stride equal to their kernel, so each is one matrix product on the pixels under a token;
- between them only norms and activations of single pixels follow, so the pixels may stay where they are, and only the
  finished logits are put into rows and columns;
- few prompt tokens meet thousands of image tokens, so what attention does to the image's tokens it does to the prompts'
  instead, by turning products round: (W·key)·query = key·(Wᵀ·query), and Σ aᵢ·(W·valueᵢ) = W·Σ aᵢ·valueᵢ. With T prompt
  tokens and H heads a projection to C channels costs H·T instead of C for every image token: 56 to 72 instead of 128.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
    from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock


def embed_masks(encoder: "PromptEncoder", masks: Float[Tensor, "P 1 M M"]) -> Float[Tensor, "P N D"]:
    """Mask prompts (logits) as what is added to the image's tokens; M is four times the embedding's side."""
    first, first_norm, activation, second, second_norm, _, last = encoder.mask_downscaling
    height, width = encoder.image_embedding_size
    # Row 4i + 2a + c and column 4j + 2b + d belong to token (i,j), there to pixel (a,b), there to (c,d).
    x = masks.unflatten(3, (width, 2, 2)).unflatten(2, (height, 2, 2)).permute(0, 2, 5, 3, 6, 4, 7, 1)
    x = x.flatten(5).flatten(3, 4).flatten(1, 2)  # P, tokens, (a,b), (c,d)
    x = activation(_norm(first_norm, F.linear(x, _patch(first), first.bias)))
    x = activation(_norm(second_norm, F.linear(x.flatten(2), _patch(second), second.bias)))
    return F.linear(x, _patch(last), last.bias)


def attend_both_ways(
    transformer: "TwoWayTransformer",
    keys: Float[Tensor, "P N D"],
    position: Float[Tensor, "N D"],
    tokens: Float[Tensor, "P T D"],
) -> tuple[Float[Tensor, "P T D"], Float[Tensor, "P N D"]]:
    """segment-anything's `TwoWayTransformer`: the tokens and the image's keys after all layers.

    Args:
        transformer: the publisher's.
        keys: image and mask prompt.
        position: of the keys.
        tokens: all prompts' tokens.
    """
    queries = tokens
    for layer in transformer.layers:
        queries, keys = _layer(layer, queries, keys, position, tokens)
    attended = _to_image(transformer.final_attn_token_to_image, queries + tokens, keys + position, keys)
    return transformer.norm_final_attn(queries + attended), keys


def draw(
    decoder: "MaskDecoder", keys: Float[Tensor, "P N D"], weights: Float[Tensor, "P K c"], height: int, width: int
) -> Float[Tensor, "P K 4*{height} 4*{width}"]:
    """The keys brought to four times the resolution, times the weights of each of K masks: their logits."""
    first, norm, activation, second, last_activation = decoder.output_upscaling
    x = F.linear(keys, _patch(first), first.bias.repeat(4)).unflatten(2, (4, -1))
    x = activation(_norm(norm, x))
    x = last_activation(F.linear(x, _patch(second), second.bias.repeat(4)))
    # In this order the way back leaves the largest tensors as they lie.
    logits = x.flatten(2).unflatten(2, (16, -1)).flatten(1, 2) @ weights.mT
    logits = logits.unflatten(1, (height, width, 2, 2, 2, 2))  # i, j, a, b, c, d as in `embed_masks`
    return logits.permute(0, 7, 1, 3, 5, 2, 4, 6).flatten(5).flatten(2, 4)


def _layer(
    layer: "TwoWayAttentionBlock", queries: Tensor, keys: Tensor, position: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens to themselves, tokens to image, MLP on the tokens, image to tokens."""
    if layer.skip_first_layer_pe:
        queries = layer.norm1(layer.self_attn(queries, queries, queries))
    else:
        placed = queries + tokens
        queries = layer.norm1(queries + layer.self_attn(placed, placed, queries))
    placed = keys + position
    queries = layer.norm2(queries + _to_image(layer.cross_attn_token_to_image, queries + tokens, placed, keys))
    queries = layer.norm3(queries + layer.mlp(queries))
    return queries, layer.norm4(keys + _to_tokens(layer.cross_attn_image_to_token, placed, queries + tokens, queries))


def _to_image(
    attention: "Attention", query: Float[Tensor, "P T D"], key: Float[Tensor, "P N D"], value: Float[Tensor, "P N D"]
) -> Float[Tensor, "P T D"]:
    """What each prompt token takes from all image tokens."""
    weights = _scores(attention, attention.q_proj(query), attention.k_proj, key).softmax(-1)
    mixed = (weights.flatten(1, 2) @ value).unflatten(1, weights.shape[1:3])
    out = torch.einsum("phtc,hdc->pthd", mixed, attention.v_proj.weight.unflatten(0, (attention.num_heads, -1)))
    return attention.out_proj(out.flatten(2) + attention.v_proj.bias)


def _to_tokens(
    attention: "Attention", query: Float[Tensor, "P N D"], key: Float[Tensor, "P T D"], value: Float[Tensor, "P T D"]
) -> Float[Tensor, "P N D"]:
    """What each image token takes from all prompt tokens."""
    weights = _scores(attention, attention.k_proj(key), attention.q_proj, query).softmax(2)
    values = attention.v_proj(value).unflatten(2, (attention.num_heads, -1))
    out = torch.einsum("pthd,chd->phtc", values, attention.out_proj.weight.unflatten(1, (attention.num_heads, -1)))
    # The weights of a head sum to 1, so the bias, which is added once, may be shared out among the heads.
    out = out + attention.out_proj.bias / attention.num_heads
    return weights.flatten(1, 2).mT @ out.flatten(1, 2)


def _scores(
    attention: "Attention", few: Float[Tensor, "P T C"], projection: nn.Linear, many: Float[Tensor, "P N D"]
) -> Float[Tensor, "P H T N"]:
    """Scaled dot products in each head of projected prompt tokens with image tokens, which `projection` would map."""
    few = few.unflatten(2, (attention.num_heads, -1))
    few = few / math.sqrt(few.shape[-1])
    weight, bias = (p.unflatten(0, (attention.num_heads, -1)) for p in (projection.weight, projection.bias))
    turned = torch.einsum("pthd,hdc->phtc", few, weight)
    constant = torch.einsum("pthd,hd->pht", few, bias)
    scores = torch.baddbmm(constant.flatten(1)[..., None], turned.flatten(1, 2), many.mT)
    return scores.unflatten(1, turned.shape[1:3])


def _patch(layer: nn.Conv2d | nn.ConvTranspose2d) -> Float[Tensor, "out in"]:
    """The matrix of a convolution whose stride is its kernel; the patch's pixels (row, column) come before channels."""
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return layer.weight.permute(0, 2, 3, 1).flatten(1)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """segment-anything's LayerNorm2d, where the channels are the last dimension."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]
