"""Gated residual refinement: how far the refined mask may move the coarse one, pixel by pixel."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.refine.moments import precise


class NoGate(nn.Module):
    """The refined mask alone."""

    def forward(
        self, coarse: Float[Tensor, "B 1 H W"], refined: Float[Tensor, "B 1 H W"], image: Float[Tensor, "B 1 H W"]
    ) -> Float[Tensor, "B 1 H W"]:
        """Logits of the final mask from the logits of both masks and the image in [0, 1]."""
        return refined


class UncertaintyGate(nn.Module):
    """final = coarse + g·(refined − coarse), g open where the coarse network is undecided.

    g = low + (high − low)·(1 − |2P − 1|^γ), P the coarse probability.

    Args:
        gamma: γ > 0; larger values open the gate wider around P = 0.5.
        low: the gate where P is 0 or 1, in [0, high].
        high: the gate where P is 0.5, in [low, 1].
    """

    def __init__(self, gamma: float = 1.0, low: float = 0.1, high: float = 1.0) -> None:
        super().__init__()
        if gamma <= 0 or not 0 <= low <= high <= 1:
            raise ValueError(f"a gate needs gamma > 0, 0 ≤ low ≤ high ≤ 1, got gamma={gamma}, low={low}, high={high}")
        self.gamma, self.low, self.high = gamma, low, high

    def gate(self, coarse: Tensor, refined: Tensor, image: Tensor) -> Tensor:
        """The gate in [low, high], (B,1,S,S)."""
        # At P = 0.5 a power below 1 has no finite slope.
        certainty = (2 * torch.sigmoid(coarse) - 1).abs().clamp(min=1e-6).pow(self.gamma)
        return self.low + (self.high - self.low) * (1 - certainty)

    def forward(
        self, coarse: Float[Tensor, "B 1 H W"], refined: Float[Tensor, "B 1 H W"], image: Float[Tensor, "B 1 H W"]
    ) -> Float[Tensor, "B 1 H W"]:
        """Logits of the final mask from the logits of both masks and the image in [0, 1]."""
        coarse, refined = precise(coarse), precise(refined)
        return coarse + self.gate(coarse, refined, image) * (refined - coarse)


class LearnedGate(UncertaintyGate):
    """A gate from three 3×3 convolutions over image, coarse and refined probability; half open at the start.

    Args:
        width: channels between the convolutions.
        low, high: the range of the gate.
    """

    def __init__(self, width: int = 8, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(1.0, low, high)
        if not 1 <= width <= 1024:
            raise ValueError(f"width must be between 1 and 1024, got {width}")
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )
        nn.init.zeros_(self.net[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.net[-1].bias)  # type: ignore[arg-type]

    def gate(self, coarse: Tensor, refined: Tensor, image: Tensor) -> Tensor:
        """The gate in [low, high], (B,1,S,S)."""
        seen = torch.cat([image, torch.sigmoid(coarse), torch.sigmoid(refined)], 1)
        return self.low + (self.high - self.low) * torch.sigmoid(self.net(seen))


class HybridGate(LearnedGate):
    """The learned gate times the uncertainty gate: learned where the coarse network is undecided, shut elsewhere.

    Args:
        gamma, low, high: of the uncertainty gate.
        width: channels of the learned gate.
    """

    def __init__(self, gamma: float = 1.0, low: float = 0.1, high: float = 1.0, width: int = 8) -> None:
        super().__init__(width, 0.0, 1.0)
        self.uncertainty = UncertaintyGate(gamma, low, high)

    def gate(self, coarse: Tensor, refined: Tensor, image: Tensor) -> Tensor:
        """The gate in [0, high], (B,1,S,S)."""
        return super().gate(coarse, refined, image) * self.uncertainty.gate(coarse, refined, image)
