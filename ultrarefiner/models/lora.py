"""Low-rank adaptation of a SAM image encoder (Hu et al. 2022, "LoRA"): W + (alpha/rank)·up·down, W frozen."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.errors import UserError
from ultrarefiner.models.sam import Sam

TARGETS = ("qkv", "proj")


class LoraLinear(nn.Linear):
    """A linear layer that keeps its own weight and bias under their names and adds a trainable low-rank term.

    `lora_up` starts at zero, so the layer starts as the one it is made from.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_down = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_up = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=5**0.5)  # as nn.Linear draws its weights
        self.scale = alpha / rank

    def forward(self, x: Float[Tensor, "*shape in"]) -> Float[Tensor, "*shape out"]:
        """x·Wᵀ + b + scale·(x·downᵀ)·upᵀ."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_down), self.lora_up)

    def merged(self) -> Float[Tensor, "out in"]:
        """The weight of the plain layer that equals this one."""
        return self.weight + self.scale * (self.lora_up @ self.lora_down)


def add_lora(
    sam: Sam, rank: int = 4, alpha: float = 4.0, blocks: Any = None, targets: Sequence[str] = TARGETS
) -> list[nn.Parameter]:
    """Give the image encoder's attention layers trainable low-rank terms; what was there keeps its requires_grad.

    Args:
        sam: changed in place.
        rank: inner dimension, at least 1. alpha: the terms are scaled by alpha/rank.
        blocks: n for the last n blocks, or the indices of blocks (negative ones count from the end); None is all.
        targets: of "qkv" and "proj".

    Returns:
        The new parameters, for the optimiser.

    Raises:
        UserError: a rank below 1, an unknown target, or more blocks than the encoder has.
    """
    attentions = sam.image_encoder.attentions()  # type: ignore[operator]  # every family's encoder has it
    depth = len(attentions)
    if rank < 1:
        raise UserError(f"lora rank={rank} must be at least 1.")
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        raise UserError(f"lora targets={list(targets)} must be some of {', '.join(TARGETS)}.")
    if isinstance(blocks, str) or (isinstance(blocks, Sequence) and {type(i) for i in blocks} != {int}):
        raise UserError(f"lora blocks={blocks} must be null (all), a number of last blocks, or a list of blocks.")
    if isinstance(blocks, int) and not 0 < blocks <= depth:
        raise UserError(
            f"lora blocks={blocks}, but the image encoder of {sam.family} has {depth} blocks; give 1 to {depth}."
        )
    chosen = range(depth)[-blocks:] if isinstance(blocks, int) else range(depth) if blocks is None else blocks
    beyond = [index for index in chosen if not -depth <= index < depth]
    if beyond:
        raise UserError(
            f"lora blocks={list(chosen)}: {beyond[0]} is none of the {depth} blocks of {sam.family}, "
            f"which are 0 to {depth - 1}."
        )
    added: list[nn.Parameter] = []
    for index in sorted({index % depth for index in chosen}):
        for target in targets:
            layer = getattr(attentions[index], target)
            if isinstance(layer, LoraLinear):
                raise UserError(f"block {index} of {sam.family} has LoRA on {target} already.")
            if rank > (most := min(layer.in_features, layer.out_features)):
                raise UserError(f"lora rank={rank} is more than the {most} that {target} of {sam.family} has.")
            adapted = LoraLinear(layer, rank, alpha)
            setattr(attentions[index], target, adapted)
            added += [adapted.lora_down, adapted.lora_up]
    return added


@torch.no_grad()
def merge_lora(sam: nn.Module) -> dict[str, Tensor]:
    """The plain SAM state_dict that equals the adapted model; its names are the publisher's. `sam` stays as it is."""
    state = {name: value for name, value in sam.state_dict().items() if "lora_" not in name}
    for name, module in sam.named_modules():
        if isinstance(module, LoraLinear):
            state[f"{name}.weight"] = module.merged()
    return state
