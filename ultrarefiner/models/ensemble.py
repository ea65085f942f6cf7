"""Several trained coarse networks as one: the mean of their logits."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.models.weights import read_state_dict

_FIRST = "members.0."


class Ensemble(nn.Module):
    """The mean of the logits of several coarse networks, each on frames of the size that it was trained on.

    `ultrarefiner.export checkpoint=RUN coarse=[RUN,...]` makes one of trained networks.

    Args:
        members: image (B,1,S,S) in [0, 1] -> logits (B,2,S,S), with an S of their own.
        sizes: their S, px. The image is brought there and the logits back, both bilinearly.
        mirrored: whether each also sees the image mirrored from left to right, and those logits count as much.
    """

    def __init__(self, members: Sequence[nn.Module], sizes: Sequence[int], mirrored: bool = False) -> None:
        super().__init__()
        self.members, self.sizes, self.mirrored = nn.ModuleList(members), tuple(sizes), mirrored

    def forward(self, image: Float[Tensor, "B 1 C C"]) -> Float[Tensor, "B 2 C C"]:
        """The mean logits; `image` in [0, 1]."""
        if not self.mirrored:
            return self._mean(image)
        views = torch.stack([image, image.flip(-1)]).flatten(0, 1)  # in one pass: half the graph, where it becomes one
        plain, turned = self._mean(views).unflatten(0, (2, -1))
        both: Tensor = (plain + turned.flip(-1)) / 2
        return both

    def _mean(self, image: Float[Tensor, "B 1 C C"]) -> Float[Tensor, "B 2 C C"]:
        side, logits = image.shape[-1], []
        for member, size in zip(self.members, self.sizes, strict=True):
            logits.append(_resized(member(_resized(image, size)), side))
        return torch.stack(logits).mean(0)


def _resized(image: Float[Tensor, "B C H W"], side: int) -> Float[Tensor, "B C S S"]:
    if image.shape[-1] == side:
        return image
    return F.interpolate(image, (side, side), mode="bilinear", align_corners=False, antialias=image.shape[-1] > side)


def first_member(path: Path) -> dict[str, Tensor]:
    """The weights of the first network of an ensemble in a file; nothing where there is no ensemble in it."""
    named = read_state_dict(path).items()
    return {name.removeprefix(_FIRST): value for name, value in named if name.startswith(_FIRST)}
