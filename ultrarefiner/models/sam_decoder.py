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
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
    from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock


class Embedding(NamedTuple):
    """What the image encoders of SAM-HQ and SAM 2 give; those of the others give a tensor, SAM's embedding."""

    image: Tensor
    """(B,D,h,w), as in SAM."""
    finer: tuple[Tensor, ...]
    """What else the mask decoder draws from: SAM-HQ's early features (B,C,h,w); SAM 2's at four and two times h."""


def as_it_is(sam: nn.Module, embedding: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """SAM's embedding as what `predict` needs of an image: the embedding, and nothing finer."""
    return embedding, ()


def predict(
    decoder: "MaskDecoder",
    keys: Float[Tensor, "P N D"],
    position: Float[Tensor, "N D"],
    grid: tuple[int, int],
    sparse: Float[Tensor, "P T D"],
    finer: Sequence[Tensor],
    multimask: bool,
) -> tuple[Tensor, Tensor]:
    """The mask decoder of SAM and SAM 2, one image for each prompt set (SAM's own repeats all images for each).

    Args:
        decoder: the publisher's.
        keys: image and mask prompt; position: theirs, on a grid of N = height·width.
        sparse: the prompts' tokens.
        finer: SAM 2's features for each prompt set: (P,c,4·height,4·width) and (P,c',2·height,2·width); else none.
        multimask: the three masks (P,3,m,m), or the single-mask token's (P,1,m,m).
    """
    # SAM 2 has one more token in front; it says whether the object is there at all.
    first = [decoder.obj_score_token] if hasattr(decoder, "obj_score_token") else []
    fixed = [*first, decoder.iou_token, decoder.mask_tokens]
    tokens, keys = attend_to(decoder, fixed, keys, position, sparse)
    tokens = tokens[:, len(first) :]
    wanted = slice(1, None) if multimask else slice(0, 1)
    logits = draw(decoder, keys, mask_weights(decoder, tokens)[:, wanted], *grid, finer)
    return logits, decoder.iou_prediction_head(tokens[:, 0])[:, wanted]


def attend_to(
    decoder: "MaskDecoder", fixed: list[Any], keys: Tensor, position: Tensor, sparse: Tensor
) -> tuple[Float[Tensor, "P T D"], Float[Tensor, "P N D"]]:
    """`attend_both_ways` with the decoder's own tokens (embeddings) in front of the prompts'."""
    own = torch.cat([token.weight for token in fixed]).expand(keys.shape[0], -1, -1)
    tokens = torch.cat([own, sparse.to(own.dtype)], dim=1)
    return attend_both_ways(decoder.transformer, keys, position, tokens)


def mask_weights(decoder: "MaskDecoder", tokens: Float[Tensor, "P T D"]) -> Float[Tensor, "P K c"]:
    """The weights of each mask token's drawing; the first token is the IoU's.

    Every token's network runs, also of those not returned: their gradient is then zero and not missing.
    """
    return torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)


def embed_masks(encoder: "PromptEncoder", masks: Float[Tensor, "P 1 M M"]) -> Float[Tensor, "P N D"]:
    """Mask prompts (logits) as what is added to the image's tokens; M is four times the embedding's side."""
    first, first_norm, activation, second, second_norm, _, last = encoder.mask_downscaling
    x = _under_tokens(masks, *encoder.image_embedding_size)
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
    queries, keys, position = tokens, _for_products(keys), _for_products(position)
    for layer in transformer.layers:
        queries, keys = _layer(layer, queries, keys, position, tokens)
    attended = _to_image(transformer.final_attn_token_to_image, queries + tokens, keys + position, keys)
    return transformer.norm_final_attn(queries + attended), keys


def draw(
    decoder: "MaskDecoder",
    keys: Float[Tensor, "P N D"],
    weights: Float[Tensor, "P K c"],
    height: int,
    width: int,
    finer: Sequence[Tensor] = (),
) -> Float[Tensor, "P K 4*{height} 4*{width}"]:
    """The keys brought to four times the resolution, times the weights of each of K masks: their logits.

    On the way SAM 2 adds the finer features (P,c,4·height,4·width) and (P,c',2·height,2·width).
    """
    first, norm, activation, second, last_activation = decoder.output_upscaling
    x = F.linear(keys, _patch(first), first.bias.repeat(4)).unflatten(2, (4, -1))
    if finer:
        half = finer[1].unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 3, 5, 1)
        x = x + half.flatten(3, 4).flatten(1, 2)
    x = activation(_norm(norm, x))
    x = F.linear(x, _patch(second), second.bias.repeat(4))
    x = last_activation(x + _under_tokens(finer[0], height, width) if finer else x)
    # In this order the way back leaves the largest tensors as they lie.
    logits = x.flatten(2).unflatten(2, (16, -1)).flatten(1, 2) @ weights.mT
    logits = logits.unflatten(1, (height, width, 2, 2, 2, 2))  # i, j, a, b, c, d as in `_under_tokens`
    placed: Tensor = logits.permute(0, 7, 1, 3, 5, 2, 4, 6).flatten(5).flatten(2, 4)
    return placed


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
    changed = keys + _to_tokens(layer.cross_attn_image_to_token, placed, queries + tokens, queries)
    return queries, _for_products(layer.norm4(changed))


def _for_products(x: Tensor) -> Tensor:
    """x in the numbers that autocast's products take: made once, and what goes through it is half as much to move."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _to_image(
    attention: "Attention", query: Float[Tensor, "P T D"], key: Float[Tensor, "P N D"], value: Float[Tensor, "P N D"]
) -> Float[Tensor, "P T D"]:
    """What each prompt token takes from all image tokens."""
    weights = _scores(attention, attention.q_proj(query), attention.k_proj, key).softmax(-1)
    mixed = (weights.flatten(1, 2) @ value).unflatten(1, weights.shape[1:3])
    out = torch.einsum("phtc,hdc->pthd", mixed, attention.v_proj.weight.unflatten(0, (attention.num_heads, -1)))
    attended: Tensor = attention.out_proj(out.flatten(2) + attention.v_proj.bias)
    return attended


def _to_tokens(
    attention: "Attention", query: Float[Tensor, "P N D"], key: Float[Tensor, "P T D"], value: Float[Tensor, "P T D"]
) -> Float[Tensor, "P N D"]:
    """What each image token takes from all prompt tokens."""
    weights = _scores(attention, attention.k_proj(key), attention.q_proj, query).softmax(2)
    values = attention.v_proj(value).unflatten(2, (attention.num_heads, -1))
    out = torch.einsum("pthd,chd->phtc", values, attention.out_proj.weight.unflatten(1, (attention.num_heads, -1)))
    # The weights of a head sum to 1, so the bias, which is added once, may be shared out among the heads.
    out = out + attention.out_proj.bias / attention.num_heads
    attended: Tensor = weights.flatten(1, 2).mT @ out.flatten(1, 2)
    return attended


def _scores(
    attention: "Attention", few: Float[Tensor, "P T C"], projection: nn.Linear, many: Float[Tensor, "P N D"]
) -> Float[Tensor, "P H T N"]:
    """Scaled dot products in each head of projected prompt tokens with image tokens, which `projection` would map."""
    few = few.unflatten(2, (attention.num_heads, -1))
    few = few / math.sqrt(few.shape[-1])
    weight, bias = (p.unflatten(0, (attention.num_heads, -1)) for p in (projection.weight, projection.bias))
    turned = torch.einsum("pthd,hdc->phtc", few, weight)
    constant = torch.einsum("pthd,hd->pht", few, bias)
    scores = torch.baddbmm(constant.flatten(1)[:, None], many, turned.flatten(1, 2).mT).mT.contiguous()
    scaled: Tensor = scores.unflatten(1, turned.shape[1:3])
    return scaled


def _under_tokens(
    x: Float[Tensor, "P C 4*{height} 4*{width}"], height: int, width: int
) -> Float[Tensor, "P {height}*{width} 4 4*C"]:
    """The 16 pixels under each token.

    Row 4i + 2a + c and column 4j + 2b + d belong to token (i,j), there to pixel (a,b), there to (c,d).
    """
    x = x.unflatten(3, (width, 2, 2)).unflatten(2, (height, 2, 2)).permute(0, 2, 5, 3, 6, 4, 7, 1)
    return x.flatten(5).flatten(3, 4).flatten(1, 2)  # P, tokens, (a,b), (c,d) with the channels


def _patch(layer: nn.Conv2d | nn.ConvTranspose2d) -> Float[Tensor, "out in"]:
    """The matrix of a convolution whose stride is its kernel; the patch's pixels (row, column) come before channels."""
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return layer.weight.permute(0, 2, 3, 1).flatten(1)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """segment-anything's LayerNorm2d, where the channels are the last dimension."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]
