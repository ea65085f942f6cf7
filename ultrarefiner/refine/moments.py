"""Mass, centre and spread of a probability map, from its two marginals."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Below this mass (in pixels) a map counts as empty: what is missing is filled up with a uniform map. A lesion of one
# confident pixel is ten times heavier, so its moments are exact; an empty map has the moments of the whole frame, and
# no division by a mass near zero can blow a gradient up.
EMPTY_MASS = 0.1


class Moments(NamedTuple):
    """Moments of a probability map in normalised, edge-aligned coordinates."""

    mass: Float[Tensor, " B"]
    """ΣP, in pixels of the map."""
    centre: Float[Tensor, "B 2"]
    """(x, y) in [0, 1]."""
    spread: Float[Tensor, "B 2"]
    """(σx, σy), standard deviations as fractions of the frame's width and height."""


def precise(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it is float64: geometry is never computed in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Where a half-precision autocast does not reach; a graph that is exported knows none."""
    return nullcontext() if torch.compiler.is_exporting() else torch.autocast(x.device.type, enabled=False)


def pixel_centres(count: int, like: Tensor) -> Float[Tensor, " count"]:
    """The centres (j + 0.5) / count of `count` pixels along one axis of the frame."""
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count


def _axis_moments(marginal: Float[Tensor, "B N"], mass: Float[Tensor, " B"]) -> tuple[Tensor, Tensor]:
    x = pixel_centres(marginal.shape[1], marginal)
    missing = (EMPTY_MASS - mass).clamp(min=0)
    total = mass + missing
    centre = ((marginal * x).sum(1) + 0.5 * missing) / total
    about = x - centre[:, None]
    uniform = 1 / 12 + (0.5 - centre) ** 2
    variance = ((marginal * about**2).sum(1) + missing * uniform) / total
    # A lone pixel has variance 0, where the square root has no derivative: a spread is at least that of a pixel.
    return centre, variance.clamp(min=1 / (12 * marginal.shape[1] ** 2)).sqrt()


def mask_moments(prob: Float[Tensor, "B 1 H W"]) -> Moments:
    """Mass, centre and spread of each map (seed: "Box Prompts via Weighted Statistics").

    centre = ΣP·x / ΣP, σ = √(ΣP·(x − centre)² / ΣP). An empty map (ΣP below `EMPTY_MASS`) passes continuously into a
    uniform one: centre (0.5, 0.5), spread 1/√12 (so that centre ± 2.5σ is the whole frame).

    Args:
        prob: probabilities in [0, 1]; computed in float32 (float64 stays float64), also under autocast.
    """
    prob = precise(prob)
    columns, rows = prob.sum((1, 2)), prob.sum((1, 3))
    mass = columns.sum(1)
    (cx, sx), (cy, sy) = _axis_moments(columns, mass), _axis_moments(rows, mass)
    return Moments(mass, torch.stack([cx, cy], 1), torch.stack([sx, sy], 1))


def sharpen(prob: Float[Tensor, "B 1 H W"], temperature: float) -> Float[Tensor, "B 1 H W"]:
    """sigmoid(logit(P) / temperature) without the logit: < 1 pushes a timid map towards 0 and 1, 1 is the identity."""
    if temperature == 1:
        return prob
    # The larger of P and 1 - P becomes 1, which changes neither the ratio nor its gradient: both powers may else be 0.
    top = torch.maximum(prob, 1 - prob).detach()
    foreground, background = (prob / top) ** (1 / temperature), ((1 - prob) / top) ** (1 / temperature)
    return foreground / (foreground + background)


def spread_box(moments: Moments, half_widths: float | Tensor) -> Float[Tensor, "B 4"]:
    """The box centre ± half_widths·σ, not yet clamped to the frame."""
    half = moments.spread * half_widths
    return torch.cat([moments.centre - half, moments.centre + half], 1)
