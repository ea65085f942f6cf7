"""The ResNet that feeds TransUNet's transformer: weight-standardised convolutions, group normalisation.

Architecture: BiT's ResNet (Kolesnikov et al. 2020) as TransUNet (Chen et al. 2021) publishes it. Module names are the
published ones, so a published state_dict loads unchanged; this is why they are terse (``gn1``, ``downsample``).
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class StdConv2d(nn.Conv2d):
    """A convolution whose filters are standardised (zero mean, unit variance) each time they are used."""

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> StdConv2d:
    return StdConv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """1×1 → 3×3 (strided) → 1×1 convolutions beside a shortcut, projected where its shape changes."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, middle, 1)
        self.gn1 = nn.GroupNorm(groups, middle, eps=1e-6)
        self.conv2 = _conv(middle, middle, 3, stride)
        self.gn2 = nn.GroupNorm(groups, middle, eps=1e-6)
        self.conv3 = _conv(middle, outputs, 1)
        self.gn3 = nn.GroupNorm(groups, outputs, eps=1e-6)
        projected = stride != 1 or inputs != outputs
        self.downsample = _conv(inputs, outputs, 1, stride) if projected else nn.Identity()
        # One group per channel and PyTorch's default eps here: so it was trained and published.
        self.gn_proj = nn.GroupNorm(outputs, outputs) if projected else nn.Identity()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y = F.relu_(self.gn1(self.conv1(x)))
        y = F.relu_(self.gn2(self.conv2(y)))
        y = self.gn3(self.conv3(y))
        return F.relu_(y + self.gn_proj(self.downsample(x)))


class ResNetV2(nn.Module):
    """Stem and residual stages; returns the deepest features and one skip per resolution above them.

    Args:
        units: residual units in each stage, e.g. (3, 4, 9). Every stage but the first halves the resolution, after the
            stem has quartered it, so the whole network divides it by ``2 ** (len(units) + 1)``.
        width: channels of the stem; stage i (from 0) has ``4 · width · 2**i``.
        groups: groups of the group normalisation; divides ``width``.
    """

    def __init__(self, units: tuple[int, ...], width: int, groups: int) -> None:
        super().__init__()
        self.root = nn.Sequential(
            OrderedDict(conv=_conv(3, width, 7, stride=2), gn=nn.GroupNorm(groups, width, eps=1e-6), relu=nn.ReLU(True))
        )
        self.body = nn.Sequential()
        channels = [width]
        for stage, count in enumerate(units):
            middle, outputs, blocks = width * 2**stage, 4 * width * 2**stage, nn.Sequential()
            for unit in range(count):
                inputs, stride = (channels[-1], min(stage, 1) + 1) if unit == 0 else (outputs, 1)
                blocks.add_module(f"unit{unit + 1}", Bottleneck(inputs, middle, outputs, stride, groups))
            self.body.add_module(f"block{stage + 1}", blocks)
            channels.append(outputs)
        self.out_channels = channels[-1]
        self.skip_channels = tuple(reversed(channels[:-1]))

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B C h w"], list[Tensor]]:
        """Features at 1/2**(stages + 1) of the resolution, and the skips from the coarsest to the finest (1/2)."""
        x = self.root(image)
        skips = [x]
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        for stage, block in enumerate(self.body):
            x = block(x)
            if stage < len(self.body) - 1:
                # The unpadded pooling leaves the first stage one row and column short of a quarter of the image; its
                # skip is completed with zeros at the bottom and right, as published.
                short = image.shape[-1] // 2 ** (stage + 2) - x.shape[-1]
                skips.append(F.pad(x, (0, short, 0, short)))
        return x, skips[::-1]
