"""Faster image encoders on the publishers' own parameters: same names, same numbers, less time and memory.

Two facts about SAM's ViT (Kirillov et al. 2023; relative positions of Li et al. 2022, "MViTv2") are used:

- its position bias is a sum of two parts, b(q,k) = q·R_y[row(q),row(k)] + q·R_x[col(q),col(k)], so it can be appended
  to query and key as extra dimensions (one-hot rows and columns on the key's side) or be built piece by piece; the N×N
  tensor that segment-anything builds never exists;
- tokens that pad an incomplete window are zeros in front of the qkv layer, so behind it they are its bias: the layer
  runs on real tokens only.

There are two ways through a block, equal in value. On a GPU whole tensors go through fused kernels that know their
gradient. On a CPU the work is cut into pieces that stay in the cache, since memory traffic and fresh pages cost as much
there as the arithmetic: the attention always (also on the way back, where the fused kernel is slower than
segment-anything's own code), and without gradients ("frugal") the other layers as well.
"""

from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.models.image_encoder import ImageEncoder, run_block
from ultrarefiner.models.sam_decoder import Embedding

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT
    from segment_anything.modeling.image_encoder import Attention, Block

SCORES = 1 << 22  # bytes of attention scores that exist at a time on the way back
QUERY_ROWS = 16  # frugal: rows of queries whose bias exists at a time; 16 × 64 queries × 4096 keys = 17 MB a head
PIECE = 512  # frugal: tokens that go through the layers behind the attention at a time


def relative_table(table: Float[Tensor, "L D"], size: int) -> Float[Tensor, "size size D"]:
    """R[q,k] of one axis from its table of 2·size−1 offsets, resampled linearly where the table has another length."""
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
    at = torch.arange(size, device=table.device)
    return table[at[:, None] - at[None, :] + size - 1]


def relative_parts(
    attention: "Attention", query: Float[Tensor, "B n N D"], height: int, width: int
) -> tuple[Float[Tensor, "B n N height"], Float[Tensor, "B n N width"]]:
    """The bias's two parts: of every query with every row of keys, and with every column of keys."""
    grid = query.unflatten(2, (height, width))
    rows = relative_table(attention.rel_pos_h, height).to(query.dtype)
    columns = relative_table(attention.rel_pos_w, width).to(query.dtype)
    # not by broadcasting, which would write the tables out for each head and window, and keep them for the way back
    by_row = torch.einsum("bnhwd,hkd->bnhwk", grid, rows)
    by_column = torch.einsum("bnhwd,wkd->bnhwk", grid, columns)
    return by_row.flatten(2, 3), by_column.flatten(2, 3)


def attend(
    attention: "Attention", qkv: Float[Tensor, "B N QKV"], height: int, width: int, frugal: bool = False
) -> Float[Tensor, "B N C"]:
    """Multi-head attention with decomposed relative positions over a grid of N = height·width tokens.

    Args:
        attention: segment-anything's `Attention`, of which the relative tables and the number of heads are read.
        qkv: its qkv layer's output.
        frugal: whether no gradient is wanted.
    """
    query, key, value = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if not attention.use_rel_pos:
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    by_row, by_column = relative_parts(attention, query, height, width)
    pieces = _attend_in_pieces if frugal else _InPieces.apply
    form = pieces if qkv.device.type == "cpu" and not torch.compiler.is_exporting() else _attend_appended
    return form(query, key, value, by_row, by_column).transpose(1, 2).flatten(2)


def _attend_in_pieces(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """The bias as an attention mask: for windows at once, for a large grid some heads and rows of queries at a time."""
    batch, heads, tokens, depth = query.shape
    rows, columns = by_row.shape[-1], by_column.shape[-1]
    images, group, step = batch, heads, tokens
    if tokens > PIECE:
        images, step = 1, (QUERY_ROWS if query.dtype == torch.float32 else QUERY_ROWS // 2) * columns
        group = min(heads, max(1, torch.get_num_threads() // 2))  # work for every thread
    if query.dtype == torch.bfloat16:
        key, value = key.contiguous(), value.contiguous()
    buffer = by_row.new_empty(images, group, min(step, tokens), rows, columns)
    out = query.new_empty(batch, tokens, heads, depth)
    for image, head, start in product(range(0, batch, images), range(0, heads, group), range(0, tokens, step)):
        these = (slice(image, image + images), slice(head, head + group))
        part = (*these, slice(start, start + step))
        wide, tall = by_row[part].unsqueeze(-1), by_column[part].unsqueeze(-2)
        bias = torch.add(wide, tall, out=buffer[:, : wide.shape[1], : wide.shape[2]]).flatten(3)
        out[these[0], part[2], these[1]] = _weigh(query[part], key[these], value[these], bias).transpose(1, 2)
    return out.transpose(1, 2)


def _weigh(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(query·keyᵀ/√depth + bias)·value; `bias` is not needed any more."""
    if query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    # On a CPU the fused kernel gains nothing from bfloat16, and plain products take less than half of their time.
    queries, keys, values = (x.flatten(0, 1) for x in (query * query.shape[-1] ** -0.5, key, value))
    scores = bias.flatten(0, 1).baddbmm_(queries, keys.transpose(1, 2))
    out: Tensor = (torch.softmax(scores, dim=-1) @ values).unflatten(0, query.shape[:2])
    return out


class _InPieces(torch.autograd.Function):
    """`_attend_in_pieces` with a gradient. Only its inputs and its output are kept; the scores are computed again.

    With S the scores, P = softmax(S), O = P·V and G the gradient of O: dS = P∘(G·Vᵀ − ΣG∘O) (Dao et al. 2022).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
        out = _attend_in_pieces(query, key, value, by_row, by_column)
        ctx.save_for_backward(query, key, value, by_row, by_column, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, by_row, by_column, out = ctx.saved_tensors
        batch, heads, tokens, depth = query.shape
        at_a_time = SCORES // query.element_size()
        images, group, step = max(1, at_a_time // (heads * tokens**2)), heads, tokens
        if heads * tokens**2 > at_a_time:
            group, step = 1, max(1, at_a_time // tokens)
        scale = depth**-0.5
        inner = (grad * out).sum(-1, keepdim=True)
        d_query, d_row, d_column = (torch.empty_like(x) for x in (query, by_row, by_column))
        wide = torch.promote_types(key.dtype, torch.float32)  # the sum of many pieces keeps its digits
        # Transposed, (B, n, D, N): a product whose large left side is transposed would be copied in bfloat16.
        d_key, d_value = (x.new_zeros(x.mT.shape, dtype=wide) for x in (key, value))
        for image, head in product(range(0, batch, images), range(0, heads, group)):
            these = (slice(image, image + images), slice(head, head + group))
            keys = key[these]
            keys_across, values_across = keys.mT.contiguous(), value[these].mT.contiguous()
            for start in range(0, tokens, step):
                part = (*these, slice(start, start + step))
                queries, grads = query[part] * scale, grad[part]
                scores = (queries @ keys_across).unflatten(3, (by_row.shape[-1], by_column.shape[-1]))
                scores.add_(by_row[part].unsqueeze(-1)).add_(by_column[part].unsqueeze(-2))
                weights = torch.softmax(scores.flatten(3), dim=-1)
                d_value[these].add_(grads.mT @ weights)
                d_scores = (grads @ values_across).sub_(inner[part]).mul_(weights)
                d_query[part] = (d_scores @ keys).mul_(scale)
                d_key[these].add_(queries.mT @ d_scores)
                d_scores = d_scores.view_as(scores)
                d_row[part], d_column[part] = d_scores.sum(-1), d_scores.sum(-2)
        return d_query, d_key.mT.to(key.dtype), d_value.mT.to(value.dtype), d_row, d_column


def _attend_appended(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """The bias as extra dimensions of query and key."""
    height, width, depth = by_row.shape[-1], by_column.shape[-1], query.shape[-1]
    row = torch.eye(height, dtype=key.dtype, device=key.device).repeat_interleave(width, dim=0)
    column = torch.eye(width, dtype=key.dtype, device=key.device).repeat(height, 1)
    where = torch.cat([row, column], dim=1).expand(*key.shape[:2], -1, -1)
    extra = -(depth + height + width) % 8  # fused kernels want a multiple of eight
    query = F.pad(torch.cat([query * depth**-0.5, by_row, by_column], dim=-1), (0, extra))
    key = F.pad(torch.cat([key, where], dim=-1), (0, extra))
    value = F.pad(value, (0, height + width + extra))  # … and one size for all three; others fall back to the N×N path
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :depth]


class ViTBlock(nn.Module):
    """segment-anything's `Block`, holding the very same submodules under the same names."""

    def __init__(self, block: "Block"):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.window_size: int = block.window_size

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """(B,H,W,C) tokens → the same shape."""
        _, height, width, _ = x.shape
        qkv = self.attn.qkv(self.norm1(x))
        tables = torch.is_grad_enabled() and self.attn.use_rel_pos and self.attn.rel_pos_h.requires_grad
        frugal = x.device.type == "cpu" and not (qkv.requires_grad or tables)
        frugal = frugal and not torch.compiler.is_exporting()  # a graph for any number of images knows no pieces
        if not self.window_size:
            out = attend(self.attn, qkv.flatten(1, 2), height, width, frugal).unflatten(1, (height, width))
        elif frugal:
            out = self._attend_strip_by_strip(qkv)
        else:
            windows = split_windows(qkv, self.window_size, self.attn.qkv.bias)
            out = attend(self.attn, windows, self.window_size, self.window_size)
            # In one piece: for a part of a grid a linear layer multiplies row by row, each with a copy of the weights.
            out = join_windows(out, self.window_size, height, width).contiguous()
        if not frugal:
            return self._after_attention(x, out)
        tokens = zip(x.flatten(0, 2).split(PIECE), out.flatten(0, 2).split(PIECE), strict=True)
        return torch.cat([self._after_attention(*part) for part in tokens]).view_as(x)

    def _after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        x = self.attn.proj(out).add_(x)  # in place: a linear layer's gradient does not need its output
        tokens: Tensor = self.mlp(self.norm2(x)).add_(x)
        return tokens

    def _attend_strip_by_strip(self, qkv: Float[Tensor, "B H W QKV"]) -> Float[Tensor, "B H W C"]:
        """One row of windows at a time."""
        side = self.window_size
        batch, height, width, channels = qkv.shape
        out = qkv.new_empty(batch, height, width, channels // 3)
        for image, top in product(range(batch), range(0, height, side)):
            strip = (slice(image, image + 1), slice(top, top + side))
            tokens = split_windows(qkv[strip], side, self.attn.qkv.bias)
            attended = attend(self.attn, tokens, side, side, frugal=True)
            out[strip] = join_windows(attended, side, qkv[strip].shape[1], width)
        return out


def split_windows(
    x: Float[Tensor, "B H W C"], side: int, padding: Float[Tensor, " C"]
) -> Float[Tensor, "Bw {side}*{side} C"]:
    """Cut a grid into windows of side × side; incomplete ones are filled with the vector `padding`."""
    batch, height, width, channels = x.shape
    down, right = -height % side, -width % side
    padding = padding.to(x.dtype)
    if right:
        x = torch.cat([x, padding.expand(batch, height, right, channels)], dim=2)
    if down:
        x = torch.cat([x, padding.expand(batch, down, width + right, channels)], dim=1)
    x = x.unflatten(1, (-1, side)).unflatten(3, (-1, side))  # B, rows, side, columns, side, C
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def join_windows(x: Float[Tensor, "Bw N C"], side: int, height: int, width: int) -> Float[Tensor, "B H W C"]:
    """Put windows back into their grid of height × width and drop what was filled in."""
    rows, columns = -(-height // side), -(-width // side)
    x = x.unflatten(1, (side, side)).unflatten(0, (-1, rows, columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]


class ViTEncoder(ImageEncoder):
    """segment-anything's `ImageEncoderViT` with the blocks above; state_dict() has the same names and shapes.

    `early` gives SAM-HQ's features too: those behind the first block without windows.
    """

    def __init__(self, encoder: "ImageEncoderViT", checkpointing: bool = False, early: bool = False):
        super().__init__(checkpointing)
        self.early = early
        self.img_size = encoder.img_size
        self.patch_embed = encoder.patch_embed
        self.pos_embed = encoder.pos_embed
        self.blocks = nn.ModuleList([ViTBlock(block) for block in encoder.blocks])
        self.neck = encoder.neck

    def _run(self, image: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B C h w"] | Embedding:
        x = self.patch_embed(image)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        early: list[Tensor] = []
        for block in self.blocks:
            x = run_block(block, x, self.checkpointing)
            if not early and not block.window_size:
                early.append(x.permute(0, 3, 1, 2))
        embedding = self.neck(x.permute(0, 3, 1, 2))  # a channels-last view: the convolutions take it as it lies
        return Embedding(embedding, tuple(early)) if self.early else embedding

    def attentions(self) -> list[nn.Module]:
        """The attention of every block, each with Linear layers `qkv` and `proj`."""
        return [block.get_submodule("attn") for block in self.blocks]
