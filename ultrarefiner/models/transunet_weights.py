"""Reading TransUNet weights that others trained: published checkpoints and Google's ViT files.

Nothing is unpickled, and what does not fit is named in one sentence.
"""

import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.errors import UserError
from ultrarefiner.models.weights import read_state_dict

POSITIONS = "embeddings.position_embeddings"

# Our module path → Google's, applied in order.
_GOOGLE_NAMES = (
    (r"^embeddings\.patch_embeddings$", "embedding"),
    (r"^embeddings\.hybrid_model\.root\.(\w+)$", r"\1_root"),
    (r"^embeddings\.hybrid_model\.body\.", ""),
    (r"\.downsample$", "/conv_proj"),
    (r"^encoder\.layer\.(\d+)", r"Transformer/encoderblock_\1"),
    (r"^encoder\.encoder_norm$", "Transformer/encoder_norm"),
    (r"\.attn\.", "/MultiHeadDotProductAttention_1/"),
    (r"\.ffn\.fc1$", "/MlpBlock_3/Dense_0"),
    (r"\.ffn\.fc2$", "/MlpBlock_3/Dense_1"),
    (r"\.attention_norm$", "/LayerNorm_0"),
    (r"\.ffn_norm$", "/LayerNorm_2"),
    (r"\.", "/"),
)
# The classifier of the file, for which a segmentation network has no use.
_GOOGLE_UNUSED = re.compile(r"cls|(head|pre_logits)/(kernel|bias)")


def official_state(path: str | Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict in a published checkpoint, with position embeddings for the image size of ``own``.

    Raises:
        UserError: the file cannot be read, holds NaN, or its tokens form no square.
    """
    state = {name.removeprefix("module."): value for name, value in read_state_dict(path).items()}
    key = f"transformer.{POSITIONS}"
    if key in state:
        state[key] = _fit_positions(path, key, state[key], own[key].shape)
    return state


def google_state(path: str | Path, transformer: nn.Module, heads: int) -> dict[str, Tensor]:
    """The state_dict of ``transformer`` (a TransUNet's, with its ResNet if it has one) from a Google ``.npz``.

    ``heads`` is its number of attention heads, which Google's shapes show and ours do not.

    Raises:
        UserError: the file cannot be read, or does not hold exactly this ResNet and transformer's finite weights.
    """
    arrays = _read_npz(Path(path).expanduser())
    state, used, wrong = {}, set(), []
    for name, module in transformer.named_modules():
        for leaf, own in module.named_parameters(recurse=False):
            key, shape = _google_layout(name, module, leaf, heads)
            used.add(key)
            if key not in arrays:
                wrong.append(f"misses {key}")
                continue
            value = arrays[key]
            if isinstance(module, nn.GroupNorm):
                value = value.reshape(-1)  # stored as (1, 1, 1, C)
            our_name = f"{name}.{leaf}"
            if our_name == POSITIONS:
                value = _fit_positions(path, key, value, own.shape)
            if tuple(value.shape) != shape:
                wrong.append(f"has {key} of shape {tuple(value.shape)} instead of {shape}")
                continue
            if isinstance(module, nn.Conv2d) and leaf == "weight":
                value = value.permute(3, 2, 0, 1)
            elif isinstance(module, nn.Linear) and leaf == "weight":
                value = value.reshape(module.in_features, module.out_features).T
            state[our_name] = value.reshape(own.shape)
    wrong += [f"has {key} left over" for key in arrays if key not in used and not _GOOGLE_UNUSED.fullmatch(key)]
    if wrong:
        raise UserError(f"{path} is not for this TransUNet: it {_some(wrong)}; check the model's name")
    return state


def _google_layout(name: str, module: nn.Module, leaf: str, heads: int) -> tuple[str, tuple[int, ...]]:
    """Google's name and shape of the parameter ``leaf`` of ``module``, the transformer's ``name``."""
    own = tuple(module.get_parameter(leaf).shape)
    if f"{name}.{leaf}" == POSITIONS:
        return "Transformer/posembed_input/pos_embedding", own
    key = name
    for pattern, replacement in _GOOGLE_NAMES:
        key = re.sub(pattern, replacement, key)
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
        return f"{key}/{'scale' if leaf == 'weight' else 'bias'}", own
    key = f"{key}/{'kernel' if leaf == 'weight' else 'bias'}"
    if isinstance(module, nn.Conv2d):
        return key, own if leaf == "bias" else (*own[2:], own[1], own[0])
    shape = own[::-1]
    if ".attn." in name:  # Google keeps the heads apart
        if name.endswith(".out"):
            shape = shape if leaf == "bias" else (heads, shape[0] // heads, shape[1])
        else:
            shape = (*shape[:-1], heads, shape[-1] // heads)
    return key, shape


def resample_positions(positions: Float[Tensor, "1 N C"], count: int) -> Float[Tensor, "1 count C"]:
    """Position embeddings of a square grid, linearly resampled to one of ``count`` tokens.

    The corners of both grids coincide, as in the published code (``scipy.ndimage.zoom`` of order 1).
    """
    old, new = isqrt(positions.shape[1]), isqrt(count)
    grid = positions.transpose(1, 2).unflatten(-1, (old, old))
    return F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)


def _fit_positions(path: str | Path, key: str, positions: Tensor, own: tuple[int, ...]) -> Tensor:
    """``positions`` without a class token and on the model's grid; of another width they are left to the caller."""
    if positions.ndim != 3 or positions.shape[::2] != own[::2]:
        return positions
    count = positions.shape[1]
    if isqrt(count) ** 2 != count:
        if count < 2 or isqrt(count - 1) ** 2 != count - 1:
            raise UserError(f"{path} has {count} position embeddings in {key}, which no square image has; take another")
        positions = positions[:, 1:]
    return positions if positions.shape[1] == own[1] else resample_positions(positions.float(), own[1])


def _read_npz(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"the weights file {path} does not exist; give the path of Google's .npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: torch.from_numpy(file[key].astype(np.float32)) for key in file.files}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read as a NumPy .npz file of numbers: it is truncated or of another format; download "
            "it again"
        ) from error
    bad = [key for key, value in arrays.items() if not value.isfinite().all()]
    if bad:
        raise UserError(f"{path} holds NaN or infinite weights in {_some(bad)}; download it again")
    return arrays


def _some(items: Iterable[str], limit: int = 4) -> str:
    """The first few of ``items``, and how many there are beyond."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
