"""TransUNet (Chen et al. 2021, arXiv:2102.04306): the coarse segmentation network.

A ResNet (or bare patches) makes tokens, a vision transformer mixes them, a convolutional decoder brings them back to
the image's resolution with the ResNet's features as skips. Module names are those of the published code, so its
state_dicts load unchanged. Every variant, the published ones and the two small ones for a CPU, is a row of ``CONFIGS``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.errors import UserError
from ultrarefiner.models.resnet_v2 import ResNetV2
from ultrarefiner.models.transunet_weights import google_state, official_state
from ultrarefiner.models.weights import load_strictly


@dataclass(frozen=True)
class TransUNetConfig:
    """What tells one TransUNet from another; the defaults are common to all published ones."""

    hidden: int  # channels of a token
    layers: int
    heads: int
    mlp: int  # hidden channels of a transformer block's two-layer perceptron
    resnet_units: tuple[int, ...] = ()  # residual units in each ResNet stage; none: tokens are bare image patches
    resnet_width: int = 64
    resnet_groups: int = 32
    head_channels: int = 512  # between transformer and decoder
    decoder_channels: tuple[int, ...] = (256, 128, 64, 16)
    dropout: float = 0.1  # of the embeddings and in the perceptrons
    attention_dropout: float = 0.0

    @property
    def patch(self) -> int:
        """Side of a token in image pixels: each decoder block doubles the resolution back to the image's."""
        return 1 << len(self.decoder_channels)


_R50 = (3, 4, 9)
CONFIGS = {
    "R50-ViT-B_16": TransUNetConfig(hidden=768, layers=12, heads=12, mlp=3072, resnet_units=_R50),
    "R50-ViT-L_16": TransUNetConfig(hidden=1024, layers=24, heads=16, mlp=4096, resnet_units=_R50),
    "ViT-B_16": TransUNetConfig(hidden=768, layers=12, heads=12, mlp=3072),
    "ViT-L_16": TransUNetConfig(hidden=1024, layers=24, heads=16, mlp=4096),
    # For 224×224 on a laptop's CPU.
    "lite": TransUNetConfig(
        hidden=192,
        layers=4,
        heads=3,
        mlp=768,
        resnet_units=(1, 2, 2),
        resnet_width=16,
        resnet_groups=8,
        head_channels=128,
        decoder_channels=(64, 32, 16, 8),
    ),
    # For 64×64 phantoms: one ResNet stage less, so that the transformer still sees 8×8 tokens.
    "tiny": TransUNetConfig(
        hidden=96,
        layers=2,
        heads=3,
        mlp=192,
        resnet_units=(2, 2),
        resnet_width=16,
        resnet_groups=8,
        head_channels=64,
        decoder_channels=(32, 16, 8),
        dropout=0.0,
    ),
}


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: TransUNetConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.query = nn.Linear(config.hidden, config.hidden)
        self.key = nn.Linear(config.hidden, config.hidden)
        self.value = nn.Linear(config.hidden, config.hidden)
        self.out = nn.Linear(config.hidden, config.hidden)

    def forward(self, tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        query, key, value = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return F.dropout(out, self.dropout, self.training)


class Mlp(nn.Module):
    """The two-layer perceptron of a transformer block, with its published initialisation."""

    def __init__(self, config: TransUNetConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        out: Tensor = self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(tokens)))))
        return out


class Block(nn.Module):
    """A pre-normalised transformer block."""

    def __init__(self, config: TransUNetConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.attn = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.ffn = Mlp(config)

    def forward(self, tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        tokens = tokens + self.attn(self.attention_norm(tokens))
        out: Tensor = tokens + self.ffn(self.ffn_norm(tokens))
        return out


class Embeddings(nn.Module):
    """The image as tokens that know their position, and the ResNet's skips (none without a ResNet)."""

    def __init__(self, config: TransUNetConfig, grid: int) -> None:
        super().__init__()
        self.hybrid_model: ResNetV2 | None = None
        self.skip_channels: tuple[int, ...] = ()
        inputs, kernel = 3, config.patch
        if config.resnet_units:
            self.hybrid_model = ResNetV2(config.resnet_units, config.resnet_width, config.resnet_groups)
            self.skip_channels = self.hybrid_model.skip_channels
            inputs, kernel = self.hybrid_model.out_channels, 1
        self.patch_embeddings = nn.Conv2d(inputs, config.hidden, kernel, stride=kernel)
        self.position_embeddings = nn.Parameter(torch.zeros(1, grid**2, config.hidden))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B N C"], list[Tensor]]:
        features, skips = (image, []) if self.hybrid_model is None else self.hybrid_model(image)
        tokens = self.patch_embeddings(features).flatten(2).transpose(1, 2)
        return self.dropout(tokens + self.position_embeddings), skips


class Encoder(nn.Module):
    """The transformer's blocks and its final normalisation."""

    def __init__(self, config: TransUNetConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.encoder_norm = nn.LayerNorm(config.hidden, eps=1e-6)

    def forward(self, tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        for block in self.layer:
            tokens = block(tokens)
        encoded: Tensor = self.encoder_norm(tokens)
        return encoded


class Transformer(nn.Module):
    """Image → encoded tokens and skips."""

    def __init__(self, config: TransUNetConfig, grid: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, grid)
        self.encoder = Encoder(config)

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B N C"], list[Tensor]]:
        tokens, skips = self.embeddings(image)
        return self.encoder(tokens), skips


def _conv_bn_relu(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class DecoderBlock(nn.Module):
    """Doubles the resolution, joins the skip if there is one, convolves twice."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = _conv_bn_relu(inputs + skip, outputs)
        self.conv2 = _conv_bn_relu(outputs, outputs)

    def forward(self, x: Float[Tensor, "B C h w"], skip: Tensor | None = None) -> Float[Tensor, "B D H W"]:
        # Corners aligned, against this project's convention: published weights were trained so.
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        out: Tensor = self.conv2(self.conv1(x if skip is None else torch.cat([x, skip], dim=1)))
        return out


class Decoder(nn.Module):
    """Tokens → a map at the image's resolution; the coarsest ``len(skip_channels)`` skips are used."""

    def __init__(self, config: TransUNetConfig, skip_channels: Sequence[int]) -> None:
        super().__init__()
        self.conv_more = _conv_bn_relu(config.hidden, config.head_channels)
        outputs = config.decoder_channels
        inputs = (config.head_channels, *outputs[:-1])
        self.n_skip = len(skip_channels)
        skips = (*skip_channels, *[0] * (len(outputs) - self.n_skip))
        self.blocks = nn.ModuleList(map(DecoderBlock, inputs, skips, outputs))

    def forward(self, tokens: Float[Tensor, "B N C"], skips: list[Tensor]) -> Float[Tensor, "B D H W"]:
        side = round(tokens.shape[1] ** 0.5)
        x: Tensor = self.conv_more(tokens.transpose(1, 2).unflatten(-1, (side, side)))
        for i, block in enumerate(self.blocks):
            x = block(x, skips[i] if i < self.n_skip else None)
        return x


RELEASES_OF = {"R50-ViT-B_16": "r50_vit_b16"}
"""Which of `weights.RELEASES` a row of CONFIGS starts from."""


class TransUNet(nn.Module):
    """The whole network for square images of one size.

    Args:
        config: a row of ``CONFIGS`` or one of your own.
        image_size: side of the image (pixels), a multiple of ``config.patch``.
        num_classes: channels of the output.
        n_skip: how many of the ResNet's skips the decoder uses, the coarsest first; all of them if None.

    Raises:
        UserError: ``image_size``, ``num_classes`` or ``n_skip`` do not fit the configuration.
    """

    licence = "Apache-2.0"  # of the published code and weights

    def __init__(
        self, config: TransUNetConfig, image_size: int = 224, num_classes: int = 2, n_skip: int | None = None
    ) -> None:
        super().__init__()
        if image_size < config.patch or image_size % config.patch:
            below = max(image_size // config.patch, 1) * config.patch
            raise UserError(
                f"image_size={image_size} is not a multiple of the patch size {config.patch}; "
                f"take {below} or {below + config.patch}"
            )
        if num_classes < 1:
            raise UserError(f"num_classes={num_classes} must be at least 1 (2 for background and lesion)")
        self.config, self.image_size, self.num_classes = config, image_size, num_classes
        self.transformer = Transformer(config, grid=image_size // config.patch)
        available = self.transformer.embeddings.skip_channels
        n_skip = len(available) if n_skip is None else n_skip
        if not 0 <= n_skip <= len(available):
            raise UserError(f"n_skip={n_skip} is not possible: this TransUNet has {len(available)} skips to use")
        self.decoder = Decoder(config, available[:n_skip])
        self.segmentation_head = nn.Sequential(nn.Conv2d(config.decoder_channels[-1], num_classes, 3, padding=1))

    @classmethod
    def from_name(
        cls, name: str, image_size: int = 224, num_classes: int = 2, n_skip: int | None = None
    ) -> "TransUNet":
        """Build a row of ``CONFIGS`` with random weights.

        Raises:
            UserError: an unknown name, or a value that does not fit it.
        """
        if name not in CONFIGS:
            raise UserError(f"there is no TransUNet named {name!r}; known are {', '.join(CONFIGS)}")
        return cls(CONFIGS[name], image_size, num_classes, n_skip)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes H W"]:
        """Logits of every class; ``image`` in [0, 1] has one channel (repeated to three) or three.

        Raises:
            UserError: an image of another size or number of channels.
        """
        channels, *size = image.shape[1:]
        if size != [self.image_size] * 2 or channels not in (1, 3):
            raise UserError(
                f"TransUNet was built for images of 1 or 3 channels and {self.image_size}×{self.image_size} pixels, "
                f"not for a batch of shape {tuple(image.shape)}; resize the images or set image_size"
            )
        image = image.expand(-1, 3, -1, -1)
        if image.device.type == "cpu":  # its convolutions are a sixth faster so; the format spreads from here
            image = image.contiguous(memory_format=torch.channels_last)
        tokens, skips = self.transformer(image)
        logits: Tensor = self.segmentation_head(self.decoder(tokens, skips))
        return logits

    def load_official(self, path: str | Path) -> None:
        """Load a state_dict of the published TransUNet code, strictly; nothing changes if the file does not fit.

        It may lie in the file itself or under "model" or "state_dict", with or without DataParallel's "module."
        before its names. Position embeddings trained at another image size are resampled.

        Raises:
            UserError: an unreadable file, or what it misses, has left over or has in another shape; or NaN in it.
        """
        load_strictly(self, official_state(path, self.state_dict()), str(path))

    def load_npz(self, path: str | Path) -> None:
        """Load ResNet and transformer from Google's ``R50+ViT-B_16.npz`` and the like; the decoder stays as it is.

        The class token is dropped and the position embeddings are resampled to this image size.

        Raises:
            UserError: as `load_official`.
        """
        self.transformer.load_state_dict(google_state(path, self.transformer, self.config.heads))
