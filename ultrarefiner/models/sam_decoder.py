"""SAM's mask decoder and mask prompt on the publishers' own parameters: same names, same numbers, less time and memory.

segment-anything goes to and fro between images (P,C,h,w) and tokens (P,N,C). Here everything stays tokens, N = h·w:

- its convolutions have a stride equal to their kernel, so each is one matrix product on the pixels under a token;
- between them only norms and activations of single pixels follow, so the pixels may stay where they are, and only the
  finished logits are put into rows and columns;
- a projection of keys + position is the sum of both projections, and the position's is the same for all prompt sets;
- the first layer's keys are image + mask prompt: the image's projection is the same for all prompt sets of an image,
  and the mask prompt comes from a few features, which may be projected instead of it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
    from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock


def mask_features(encoder: "PromptEncoder", masks: Float[Tensor, "P 1 M M"]) -> Float[Tensor, "P N c"]:
    """Mask prompts (logits) as features of each token, see `last_step`; M is four times the embedding's side."""
    first, first_norm, activation, second, second_norm, _, _ = encoder.mask_downscaling
    height, width = encoder.image_embedding_size
    # Row 4i + 2a + c and column 4j + 2b + d belong to token (i,j), there to pixel (a,b), there to (c,d).
    x = masks.unflatten(3, (width, 2, 2)).unflatten(2, (height, 2, 2)).permute(0, 2, 5, 3, 6, 4, 7, 1)
    x = x.flatten(5).flatten(3, 4).flatten(1, 2)  # P, tokens, (a,b), (c,d)
    x = activation(_norm(first_norm, F.linear(x, _patch(first), first.bias)))
    return activation(_norm(second_norm, F.linear(x.flatten(2), _patch(second), second.bias)))


def last_step(encoder: "PromptEncoder") -> tuple[Float[Tensor, "D c"], Float[Tensor, " D"]]:
    """Weight and bias of the linear map from mask features to what is added to the image's tokens."""
    last = encoder.mask_downscaling[-1]
    return _patch(last), last.bias


def project_first(
    transformer: "TwoWayTransformer", image: Float[Tensor, "B N D"], position: Float[Tensor, "N D"]
) -> Float[Tensor, "B N c"]:
    """What the first layer's projections make of images and positions; with `project_prompt` added, of the keys."""
    return torch.cat(_project(transformer.layers[0], image, position), dim=-1)


def project_prompt(
    transformer: "TwoWayTransformer", x: Float[Tensor, "*shape d"], step: tuple[Tensor, Tensor] | None = None
) -> Float[Tensor, "*shape c"]:
    """What they make of mask prompts x, or with `last_step` of mask features x."""
    weight = torch.cat([layer.weight for layer in _projections(transformer.layers[0])])
    if step is None:
        return F.linear(x, weight)
    return F.linear(x, weight @ step[0], weight @ step[1])


def attend_both_ways(
    transformer: "TwoWayTransformer",
    keys: Float[Tensor, "P N D"],
    projected: Float[Tensor, "P N c"],
    position: Float[Tensor, "N D"],
    tokens: Float[Tensor, "P T D"],
) -> tuple[Float[Tensor, "P T D"], Float[Tensor, "P N D"]]:
    """segment-anything's `TwoWayTransformer`: the tokens and the image's keys after all layers.

    Args:
        transformer: the publisher's.
        keys: image and mask prompt. projected: what the first layer's projections make of them.
        position: of the keys.
        tokens: all prompts' tokens.
    """
    queries = tokens
    for number, layer in enumerate(transformer.layers):
        sizes = [projection.out_features for projection in _projections(layer)]
        parts = _project(layer, keys, position) if number else projected.split(sizes, dim=-1)
        queries, keys = _layer(layer, queries, keys, parts, tokens)
    final = transformer.final_attn_token_to_image
    key, value = _linear(keys, final.k_proj, final.v_proj)
    attended = _attention(final, final.q_proj(queries + tokens), key + _shared(final.k_proj, position), value)
    return transformer.norm_final_attn(queries + attended), keys


def draw(
    decoder: "MaskDecoder", keys: Float[Tensor, "P N D"], weights: Float[Tensor, "P K c"], height: int, width: int
) -> Float[Tensor, "P K 4*height 4*width"]:
    """The keys brought to four times the resolution, times the weights of each of K masks: their logits."""
    first, norm, activation, second, last_activation = decoder.output_upscaling
    x = F.linear(keys, _patch(first), first.bias.repeat(4)).unflatten(2, (4, -1))
    x = activation(_norm(norm, x))
    x = last_activation(F.linear(x, _patch(second), second.bias.repeat(4)))
    logits = weights @ x.flatten(2).unflatten(2, (16, -1)).flatten(1, 2).transpose(1, 2)
    logits = logits.unflatten(2, (height, width, 2, 2, 2, 2))  # i, j, a, b, c, d as in `embed_masks`
    return logits.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5).flatten(2, 4)


def _layer(
    layer: "TwoWayAttentionBlock", queries: Tensor, keys: Tensor, projected: Sequence[Tensor], tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens to themselves, tokens to image, MLP on the tokens, image to tokens."""
    to_image, to_tokens = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    if layer.skip_first_layer_pe:
        queries = layer.norm1(layer.self_attn(queries, queries, queries))
    else:
        placed = queries + tokens
        queries = layer.norm1(queries + layer.self_attn(placed, placed, queries))
    key, value, query = projected
    queries = layer.norm2(queries + _attention(to_image, to_image.q_proj(queries + tokens), key, value))
    queries = layer.norm3(queries + layer.mlp(queries))
    attended = _attention(to_tokens, query, to_tokens.k_proj(queries + tokens), to_tokens.v_proj(queries))
    return queries, layer.norm4(keys + attended)


def _projections(layer: "TwoWayAttentionBlock") -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Of the image's keys: to key and value for the tokens, to a query of the tokens."""
    to_image, to_tokens = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    return to_image.k_proj, to_image.v_proj, to_tokens.q_proj


def _project(layer: "TwoWayAttentionBlock", keys: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    projections = _projections(layer)
    key, value, query = _linear(keys, *projections)
    return key + _shared(projections[0], position), value, query + _shared(projections[2], position)


def _attention(attention: "Attention", query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Multi-head attention of what is projected already, and the projection behind it."""
    parts = (x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    return attention.out_proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


def _linear(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Several linear layers of the same input as one."""
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    return F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)


def _shared(layer: nn.Linear, position: Tensor) -> Tensor:
    """What the position adds to a projection; the bias is counted where the keys are projected."""
    return F.linear(position, layer.weight)


def _patch(layer: nn.Conv2d | nn.ConvTranspose2d) -> Float[Tensor, "out in"]:
    """The matrix of a convolution whose stride is its kernel; the patch's pixels (row, column) come before channels."""
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return layer.weight.permute(0, 2, 3, 1).flatten(1)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """segment-anything's LayerNorm2d, where the channels are the last dimension."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]
