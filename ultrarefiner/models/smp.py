"""Any network of segmentation-models-pytorch as the coarse one (Iakubovskii 2019)."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SmpNetwork(nn.Module):
    """An architecture and an encoder of that library, for grey images in [0, 1] and two classes.

    Args:
        architecture: such as unet, unetplusplus, fpn, segformer.
        encoder: such as resnet34, efficientnet-b3, tu-convnext_tiny.
        encoder_weights: "imagenet" and others that the library fetches from the internet; None starts from random ones.
        mean, std: what the encoder's weights expect of each channel of an image in [0, 1].
        options: further arguments of the architecture's class.

    Raises:
        UserError: the library is not installed, knows no such name, or cannot fetch the weights.
    """

    def __init__(
        self,
        architecture: str = "unet",
        encoder: str = "resnet34",
        encoder_weights: str | None = "imagenet",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        **options: Any,
    ) -> None:
        super().__init__()
        try:
            import segmentation_models_pytorch as smp
        except ImportError as error:
            raise UserError(
                "model/coarse=smp needs segmentation-models-pytorch: pip install ultrarefiner[smp]"
            ) from error
        _check("architecture", architecture, list(smp.MODEL_ARCHITECTURES_MAPPING))
        if not encoder.startswith("tu-"):  # the other names are timm's, which checks them itself
            _check("encoder", encoder, list(smp.encoders.encoders))
        given = {"encoder_name": encoder, "encoder_weights": encoder_weights, "in_channels": 3, "classes": 2}
        try:
            self.network = smp.create_model(architecture, **given, **options)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"model.coarse: {architecture} on {encoder} with encoder_weights={encoder_weights} cannot be built "
                f"({reason}); without a connection to the internet set model.coarse.encoder_weights=null"
            ) from error
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 2 _ _"]:
        """Logits of background and lesion."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        logits: Tensor = self.network((image.expand(-1, 3, -1, -1) - mean) / std)
        return logits


def _check(key: str, name: str, known: list[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3) or known[:8]
        raise UserError(
            f"model.coarse.{key}={name} is not known to segmentation-models-pytorch; choose one such as "
            f"{', '.join(close)}"
        )
