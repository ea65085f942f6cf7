"""What the tests of SAM share: random weights and prompts, and UltraSam's decoder written from its description."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomise(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(noise, alpha=0.1 if parameter.ndim > 1 else 0.3)


def prompts_for(kind: str, batch: int, mask_size: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(batch, 2, 2, generator=generator)
    corner = 0.5 * torch.rand(batch, 2, generator=generator)
    boxes = torch.cat([corner, corner + 0.1 + 0.4 * torch.rand(batch, 2, generator=generator)], dim=1)
    masks = 5 * torch.randn(batch, 1, mask_size, mask_size, generator=generator)
    every = {"points": points, "labels": torch.tensor([[1, 0]]).repeat(batch, 1), "boxes": boxes, "masks": masks}
    keep = {"p": ("points", "labels"), "b": ("boxes",), "m": ("masks",)}
    return {name: every[name] for letter in kind for name in keep[letter]}


class UltraDecoder:
    """What UltraSam's code does behind its image encoder, in float64 and on its own names.

    Its tokens are rows of one table, the prompts first and the IoU's last; its attention keeps the three biases in one
    vector; and a layer adds x to a perceptron that has added x itself.
    """

    def __init__(self, state: dict[str, Tensor], heads: int) -> None:
        self.state = {name: value.double() for name, value in state.items()}
        self.heads = heads

    def __call__(self, image: Tensor, prompts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embedding (1,D,h,w) and one prompt set → logits (1,4,4h,4w), IoUs (1,4); the first is the single mask's."""
        table = self.state["prompt_encoder.label_encoder.label_embedding.weight"]
        height, width = image.shape[2:]
        tokens = []
        if "points" in prompts:
            kinds = 1 + prompts["labels"][0]  # 1 is a background point, 2 a lesion's
            tokens.append(self.place(prompts["points"][0].double()) + table[kinds])
            if "boxes" not in prompts:
                tokens.append(table[5:6])
        if "boxes" in prompts:
            tokens.append(self.place(prompts["boxes"].double().view(2, 2)) + table[3:5])
        tokens = torch.cat([*tokens, table[6:11]])[None]
        dense = self.down(prompts["masks"].double()) if "masks" in prompts else table[0].view(1, -1, 1, 1)
        ys, xs = ((torch.arange(n).double() + 0.5) / n for n in (height, width))
        grid = torch.stack([xs.repeat(height), ys.repeat_interleave(width)], dim=1)
        keys = (image.double() + dense).flatten(2).mT
        queries, keys = self.attend_both_ways(tokens, keys, self.place(grid)[None])
        x = keys.mT.unflatten(2, (height, width))
        x = self.norm2d("bbox_head.output_upscaling.1", self.up("bbox_head.output_upscaling.0", x))
        x = F.gelu(self.up("bbox_head.output_upscaling.3", F.gelu(x)))
        drawn = [self.mlp(f"bbox_head.output_hypernetworks_mlps.{i}", queries[:, i - 5]) for i in range(4)]
        logits = torch.einsum("pkc,pchw->pkhw", torch.stack(drawn, dim=1), x)
        return logits, self.mlp("bbox_head.iou_prediction_head", queries[:, -1])

    def place(self, at: Tensor) -> Tensor:
        waves = self.state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
        angle = 2 * math.pi * (2 * at - 1) @ waves
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def attend_both_ways(self, tokens: Tensor, keys: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        queries = tokens
        for i in range(2):
            at = f"decoder.layers.{i}"
            if i == 0:
                queries = self.attend(f"{at}.self_attn", queries, queries, queries)
            else:
                q = queries + tokens
                queries = queries + self.attend(f"{at}.self_attn", q, q, queries)
            queries = self.norm(f"{at}.norm1", queries)
            crossed = self.attend(f"{at}.cross_attn_token_to_image", queries + tokens, keys + places, keys)
            queries = self.norm(f"{at}.norm2", queries + crossed)
            hidden = F.relu(self.linear(f"{at}.mlp.layers.0.0", queries))
            perceptron = queries + self.linear(f"{at}.mlp.layers.1", hidden)
            queries = self.norm(f"{at}.norm3", queries + perceptron)
            crossed = self.attend(f"{at}.cross_attn_image_to_token", keys + places, queries + tokens, queries)
            keys = self.norm(f"{at}.norm4", keys + crossed)
        last = self.attend("decoder.final_attn_token_to_image", queries + tokens, keys + places, keys)
        return self.norm("decoder.post_norm", queries + last), keys

    def attend(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        biases = self.state[f"{name}.attn.in_proj_bias"].chunk(3)
        parts = []
        for letter, x, bias in zip("qkv", (query, key, value), biases, strict=True):
            x = F.linear(x, self.state[f"{name}.attn.{letter}_proj_weight"], bias)
            parts.append(x.unflatten(2, (self.heads, -1)).transpose(1, 2))
        scores = parts[0] @ parts[1].mT / math.sqrt(parts[0].shape[-1])
        return self.linear(f"{name}.attn.out_proj", (scores.softmax(-1) @ parts[2]).transpose(1, 2).flatten(2))

    def down(self, masks: Tensor) -> Tensor:
        at = "prompt_encoder.mask_downscaling"
        for conv, norm in ((0, 1), (3, 4)):
            x = F.conv2d(masks, self.state[f"{at}.{conv}.weight"], self.state[f"{at}.{conv}.bias"], stride=2)
            masks = F.gelu(self.norm2d(f"{at}.{norm}", x))
        return F.conv2d(masks, self.state[f"{at}.6.weight"], self.state[f"{at}.6.bias"])

    def mlp(self, name: str, x: Tensor) -> Tensor:
        x = F.relu(self.linear(f"{name}.layers.0", x))
        return self.linear(f"{name}.layers.2", F.relu(self.linear(f"{name}.layers.1", x)))

    def up(self, name: str, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride=2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def norm2d(self, name: str, x: Tensor) -> Tensor:
        return self.norm(name, x.permute(0, 2, 3, 1), 1e-6).permute(0, 3, 1, 2)


def ultrasam_state(
    width: int, depth: int, head: int, channels: int, mlp: int, grid: int, window: int, whole: tuple[int, ...]
) -> dict[str, Tensor]:
    """Random weights under UltraSam's names, for a SAM of these sizes; the blocks `whole` are without windows."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)

    def linear(name: str, out: int, into: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draw(out, into), f"{name}.bias": draw(out)}

    def norm(name: str, size: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + draw(size), f"{name}.bias": draw(size)}

    def conv(name: str, out: int, into: int, side: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draw(out, into, side, side), f"{name}.bias": draw(out)}

    state = {"backbone.pos_embed": draw(1, grid, grid, width)}
    state |= conv("backbone.patch_embed.projection", width, 3, 16)
    for i in range(depth):
        at, side = f"backbone.layers.{i}", grid if i in whole else window
        state |= norm(f"{at}.ln1", width) | norm(f"{at}.ln2", width)
        state |= linear(f"{at}.attn.qkv", 3 * width, width) | linear(f"{at}.attn.proj", width, width)
        state |= {f"{at}.attn.rel_pos_{axis}": draw(2 * side - 1, head) for axis in "hw"}
        state |= linear(f"{at}.ffn.layers.0.0", 4 * width, width) | linear(f"{at}.ffn.layers.1", width, 4 * width)
    state |= {"backbone.channel_reduction.0.weight": draw(channels, width, 1, 1)}
    state |= {"backbone.channel_reduction.2.weight": draw(channels, channels, 3, 3)}
    state |= norm("backbone.channel_reduction.1", channels) | norm("backbone.channel_reduction.3", channels)
    state |= {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": draw(2, channels // 2)}
    state |= {"prompt_encoder.label_encoder.label_embedding.weight": draw(11, channels)}
    down = "prompt_encoder.mask_downscaling"
    state |= conv(f"{down}.0", 4, 1, 2) | norm(f"{down}.1", 4) | conv(f"{down}.3", 16, 4, 2) | norm(f"{down}.4", 16)
    state |= conv(f"{down}.6", channels, 16, 1)

    def attention(name: str, inner: int) -> dict[str, Tensor]:
        found = {f"{name}.attn.{letter}_proj_weight": draw(inner, channels) for letter in "qkv"}
        found |= {f"{name}.attn.in_proj_bias": draw(3 * inner)}
        return found | linear(f"{name}.attn.out_proj", channels, inner)

    for i in range(2):
        at = f"decoder.layers.{i}"
        state |= attention(f"{at}.self_attn", channels)
        for way in ("token_to_image", "image_to_token"):
            state |= attention(f"{at}.cross_attn_{way}", channels // 2)
        for n in range(1, 5):
            state |= norm(f"{at}.norm{n}", channels)
        state |= linear(f"{at}.mlp.layers.0.0", mlp, channels) | linear(f"{at}.mlp.layers.1", channels, mlp)
    state |= attention("decoder.final_attn_token_to_image", channels // 2) | norm("decoder.post_norm", channels)
    up = "bbox_head.output_upscaling"
    for n, into, out in ((0, channels, channels // 4), (3, channels // 4, channels // 8)):
        state |= {f"{up}.{n}.weight": draw(into, out, 2, 2), f"{up}.{n}.bias": draw(out)}
    state |= norm(f"{up}.1", channels // 4)
    ends = [(f"output_hypernetworks_mlps.{k}", channels // 8) for k in range(4)] + [("iou_prediction_head", 4)]
    for name, out in ends:
        for n, size in enumerate((channels, channels, out)):
            state |= linear(f"bbox_head.{name}.layers.{n}", size, channels)
    return state
