"""What keeps Phase 3 from harming the coarse network (seed: "TransUNet Protection Options")."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class WeightAnchor(nn.Module):
    """Σ(θ − θ₀)² over all parameters of a network, θ₀ being their values when the anchor was made.

    θ₀ is not part of the state: on resume it comes from the same Phase 1 checkpoint again.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._names = [name for name, _ in network.named_parameters()]
        for index, (_, parameter) in enumerate(network.named_parameters()):
            self.register_buffer(f"start_{index}", parameter.detach().clone(), persistent=False)

    def forward(self, network: nn.Module) -> Float[Tensor, ""]:
        """The squared distance of the network's weights from the start; its gradient is 2(θ − θ₀)."""
        moved = dict(network.named_parameters())
        pairs = [(moved[name], getattr(self, f"start_{index}")) for index, name in enumerate(self._names)]
        # mse_loss keeps no difference for the way back, which would be as large as the network
        return torch.stack([F.mse_loss(weight, start, reduction="sum") for weight, start in pairs]).sum()


def hold_batchnorm(network: nn.Module) -> None:
    """Put the network's batch normalisation into evaluation mode: its statistics stay as they are."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
