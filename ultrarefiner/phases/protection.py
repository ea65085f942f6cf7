"""What keeps Phase 3 from harming the coarse network (seed: "TransUNet Protection Options")."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Protection:
    """The settings of a protection.

    Args:
        coarse_loss_weight: λc ≥ 0.
        refined_loss_weight: λr ≥ 0.
        grad_scale: factor on the gradient that the refiner sends to the coarse network; 0 cuts it.
        weight_reg: weight of Σ(θ − θ₀)², θ₀ the coarse network's weights at the start of the phase.
        freeze_epochs: epochs in which the coarse network does not move.
        sam_freeze_epochs: epochs in which SAM does not move.
        hold_batchnorm: keep the coarse network's batch statistics as they were; a batch of four would let them drift.
        warn_drop: warn when the coarse Dice falls below the Phase 1 baseline by more than this.
        guard: restore the best coarse weights when the coarse Dice falls below its baseline by more than this.
    """

    def __init__(
        self,
        coarse_loss_weight: float = 0.5,
        refined_loss_weight: float = 0.5,
        grad_scale: float = 1.0,
        weight_reg: float = 0.0,
        freeze_epochs: int = 0,
        sam_freeze_epochs: int = 0,
        hold_batchnorm: bool = False,
        warn_drop: float = 0.005,
        guard: float | None = None,
    ) -> None:
        for name, value in (
            ("coarse_loss_weight", coarse_loss_weight),
            ("refined_loss_weight", refined_loss_weight),
            ("grad_scale", grad_scale),
            ("weight_reg", weight_reg),
            ("freeze_epochs", freeze_epochs),
            ("sam_freeze_epochs", sam_freeze_epochs),
            ("warn_drop", warn_drop),
            ("guard", guard or 0),
        ):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if freeze_epochs and sam_freeze_epochs:
            raise ValueError("freeze_epochs and sam_freeze_epochs are both set: nothing would move in the first epoch")
        self.coarse_loss_weight, self.refined_loss_weight = coarse_loss_weight, refined_loss_weight
        self.grad_scale, self.weight_reg = grad_scale, weight_reg
        self.freeze_epochs, self.sam_freeze_epochs = freeze_epochs, sam_freeze_epochs
        self.hold_batchnorm = hold_batchnorm
        self.warn_drop, self.guard = warn_drop, guard


class WeightAnchor(nn.Module):
    """Σ(θ − θ₀)² over all parameters of a network, θ₀ being their values when the anchor was made.

    θ₀ is not part of the state: on resume it comes from the same Phase 1 checkpoint again.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._names = [name for name, _ in network.named_parameters()]
        for index, (_, parameter) in enumerate(network.named_parameters()):
            self.register_buffer(f"start_{index}", parameter.detach().clone(), persistent=False)

    def _starts(self) -> Iterator[Tensor]:
        return (getattr(self, f"start_{index}") for index in range(len(self._names)))

    def forward(self, network: nn.Module) -> Float[Tensor, ""]:
        """The squared distance of the network's weights from the start; its gradient is 2(θ − θ₀)."""
        moved = dict(network.named_parameters())
        terms = [((moved[name] - start) ** 2).sum() for name, start in zip(self._names, self._starts(), strict=True)]
        return torch.stack(terms).sum()


def hold_batchnorm(network: nn.Module) -> None:
    """Put the network's batch normalisation into evaluation mode: its statistics stay as they are."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
