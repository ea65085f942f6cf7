"""Coarse network → refiner, and the one place where the gradient between them is scaled."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.refine.moments import precise
from ultrarefiner.refine.refiner import Refinement, Refiner, masks_per_image


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x itself; its gradient is multiplied by `scale` on the way back."""
    return x if scale == 1 else _ScaleGradient.apply(x, scale)


def lesion_logit(logits: Float[Tensor, "B 2 H W"]) -> Float[Tensor, "B 1 H W"]:
    """The lesion's logit against the background's: its sigmoid is softmax(logits)[:, 1].

    In float32 at least: in 16 bits P rounds to 1 from a logit of about 6 on, where the loss then has no gradient.
    """
    logits = precise(logits)
    return logits[:, 1:2] - logits[:, 0:1]


def soft_logit(prob: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The logit of a probability; 0 and 1 become ∓16, which is as far as float32 tells 1 from less."""
    return torch.logit(prob, eps=1e-7)


class CascadeOutput(NamedTuple):
    """What one pass through the cascade gives."""

    coarse_logits: Float[Tensor, "B 2 C C"]
    refined: Refinement
    """`refined.logits` (B,1,S,S) is the final mask, after the gate."""


class Cascade(nn.Module):
    """The coarse network, the refiner and the gate; a phase that needs only one of them leaves the others out.

    Args:
        coarse: image (B,1,C,C) in [0, 1] -> logits (B,2,C,C).
        refiner: redraws the coarse mask.
        gate: mixes coarse and refined logits; None takes the refined ones.
        grad_scale: factor on all that comes back from the refiner to the coarse network; the coarse network's own loss
            is not touched by it.
    """

    def __init__(
        self,
        coarse: nn.Module | None = None,
        refiner: Refiner | None = None,
        gate: nn.Module | None = None,
        grad_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.coarse, self.refiner, self.gate = coarse, refiner, gate
        self.grad_scale = grad_scale

    def compile_networks(self) -> None:
        """Compile what takes the time, in place: parameters keep their names."""
        if self.coarse is not None:
            self.coarse.compile()
        if self.refiner is not None:
            self.refiner.sam.get_submodule("image_encoder").compile()

    def refine(
        self,
        image: Float[Tensor, "B 1 S S"],
        coarse_logit: Float[Tensor, "P 1 C C"],
        boxes: Float[Tensor, "B 4"] | None = None,
        aspect: Float[Tensor, " B"] | None = None,
    ) -> Refinement:
        """Redraw coarse masks given as the lesion's logits, one or several for each image; see `Refiner.forward`."""
        assert self.refiner is not None
        coarse_logit = scale_gradient(precise(coarse_logit), self.grad_scale)
        refined: Refinement = self.refiner(image, torch.sigmoid(coarse_logit), boxes, aspect)
        if self.gate is None:
            return refined
        coarse_frame = F.interpolate(coarse_logit, size=image.shape[-2:], mode="bilinear", align_corners=False)
        each = image.repeat_interleave(masks_per_image(coarse_logit, image), dim=0)
        return refined._replace(logits=self.gate(coarse_frame, refined.logits, each))

    def forward(
        self,
        coarse_image: Float[Tensor, "B 1 C C"],
        image: Float[Tensor, "B 1 S S"],
        aspect: Float[Tensor, " B"] | None = None,
    ) -> CascadeOutput:
        """The coarse logits and the redrawn mask of images in [0, 1], given at both sizes.

        Args:
            coarse_image, image: the images, stretched to squares.
            aspect: their native width / height, see `Refiner.forward`.
        """
        assert self.coarse is not None
        coarse_logits = self.coarse(coarse_image)
        return CascadeOutput(coarse_logits, self.refine(image, lesion_logit(coarse_logits), aspect=aspect))
