"""The networks of a finished run in a folder for others: weights that say what they are, and a model card."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ultrarefiner.errors import UserError
from ultrarefiner.files import read_json, write_atomically
from ultrarefiner.models.weights import SAFETENSORS, read_metadata, read_state_dict, write_state_dict
from ultrarefiner.results.card import model_card, with_onnx
from ultrarefiner.runs.checkpoints import GATE, exported
from ultrarefiner.settings import COARSE, SAM

CARD = "README.md"


def pack(
    run: Path, output: Path, half: bool = True, more: Callable[[Path], list[Path]] = lambda folder: []
) -> list[Path]:
    """Write coarse.safetensors, sam.safetensors (what the run has of them) and README.md.

    Args:
        run: the directory of a finished run, or a folder that was written here.
        output: a folder that is empty or not there yet.
        half: keep the weights in float16.
        more: called with the folder once the weights are in it; writes further files, which it returns.

    Returns:
        The files.

    Raises:
        UserError: the run is not finished, the folder has something in it, or a weight is too large for float16.
    """
    summary, packed = run / "summary.json", exported(run)
    if not packed and not summary.is_file():
        raise UserError(f"checkpoint={run} is not the directory of a finished run: it holds no {summary.name}")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"output={output} is not empty; give a new folder")
    written = []
    said: dict[str, str] = {}
    for name in (COARSE, SAM):
        source = packed.get(name, run / "checkpoints" / f"best_{name}{SAFETENSORS}")
        if source.is_file():
            said = read_metadata(source)
            state = read_state_dict(source)
            written.append(output / f"{name}{SAFETENSORS}")
            write_state_dict({key: _halved(key, value, half) for key, value in state.items()}, written[-1], said)
            gate = source.with_suffix(GATE)
            if gate.is_file():
                written.append(output / f"{name}{GATE}")
                shutil.copyfile(gate, written[-1])
    if not written:
        raise UserError(f"{run / 'checkpoints'} holds no best_*{SAFETENSORS}; train the run again with this version")
    written += more(output)
    names = [path.name for path in (*written, output / CARD)]
    if packed:
        card = (run / CARD).read_text(encoding="utf-8") if (run / CARD).is_file() else ""
    else:
        content: dict[str, Any] = read_json(summary)
        card = model_card(content, names, said)
    written.append(output / CARD)
    write_atomically(written[-1], with_onnx(card, names).encode())
    return written


def _halved(name: str, value: torch.Tensor, half: bool) -> torch.Tensor:
    if not half or value.dtype != torch.float32:
        return value
    if value.numel() and float(value.abs().max()) > torch.finfo(torch.float16).max:
        raise UserError(f"the weight {name} is too large for 16 bits; set half=false")
    return value.half()
