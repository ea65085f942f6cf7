"""The networks of a finished run in a folder for others: weights that say what they are, and a model card."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from torch import Tensor

from ultrarefiner.data.seen import Seen
from ultrarefiner.errors import UserError
from ultrarefiner.files import read_json, write_atomically
from ultrarefiner.models.weights import SAFETENSORS, narrowed, read_metadata, read_state_dict, write_state_dict
from ultrarefiner.results.card import changed, model_card, with_onnx
from ultrarefiner.runs.checkpoints import GATE, exported
from ultrarefiner.settings import COARSE, SAM

CARD = "README.md"
AND = " AND "
"""Between two licences that both hold, as SPDX writes it."""


def pack(
    run: Path,
    output: Path,
    bits: int = 16,
    more: Callable[[Path], list[Path]] = lambda folder: [],
    coarse: Sequence[Path] = (),
    mirrored: bool = False,
    share: float | None = None,
) -> list[Path]:
    """Write coarse.safetensors, sam.safetensors (what the run has of them) and README.md.

    Args:
        run: the directory of a finished run, or a folder that was written here.
        output: a folder that is empty or not there yet.
        bits: of the weights, see `narrowed`.
        more: called with the folder once the weights are in it; writes further files, which it returns.
        coarse: further runs or folders, whose coarse networks are averaged with that of `run`.
        mirrored: whether coarse networks also see the mirrored image, see `Ensemble`; a mean that does goes on so.
        share: in [0, 1], of the redrawn logits in the final ones, in place of the gate that was trained with.

    Returns:
        The files.

    Raises:
        UserError: a run is not finished or has no coarse network to average, the folder has something in it, bits
            or share are none, or a weight is too large for float16.
    """
    if bits not in (8, 16, 32):
        raise UserError(f"bits must be 8, 16 or 32, got {bits}")
    networks = _networks(run, "checkpoint")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"output={output} is not empty; give a new folder")
    states = {name: read_state_dict(path) for name, path in networks.items()}
    said = {name: read_metadata(path) for name, path in networks.items()}
    if coarse or mirrored:
        files = [_networks(path, "coarse").get(COARSE) for path in coarse]
        if COARSE not in networks or None in files:
            raise UserError("coarse=[…], mirrored: each run must have a coarse network, and that of checkpoint= too")
        _average(states, said, [path for path in files if path is not None], mirrored)
    if share is not None:
        if not 0 <= share <= 1:
            raise UserError(f"share must be between 0 and 1, got {share}")
        fixed = {"name": "mean", "_target_": "ultrarefiner.refine.gate.UncertaintyGate", "low": share, "high": share}
        for word in said.values():
            word["config"] = json.dumps(json.loads(word["config"]) | {"gate": fixed})
    written = []
    for name, source in networks.items():
        written.append(output / f"{name}{SAFETENSORS}")
        write_state_dict(narrowed(states[name], bits), written[-1], said[name])
        gate = source.with_suffix(GATE)
        if gate.is_file() and share is None:
            written.append(output / f"{name}{GATE}")
            shutil.copyfile(gate, written[-1])
    written += more(output)
    names = [path.name for path in (*written, output / CARD)]
    if exported(run):
        card = (run / CARD).read_text(encoding="utf-8") if (run / CARD).is_file() else ""
    else:
        content: dict[str, Any] = read_json(run / "summary.json")
        card = model_card(content, names, said)
    written.append(output / CARD)
    if coarse or mirrored or share is not None:
        card = changed(card, said[next(iter(said))])
    write_atomically(written[-1], with_onnx(card, names).encode())
    return written


def _networks(run: Path, key: str) -> dict[str, Path]:
    """The files of a finished run's or a folder's networks, by part."""
    summary, packed = run / "summary.json", exported(run)
    if not packed and not summary.is_file():
        raise UserError(f"{key}={run} is not the directory of a finished run: it holds no {summary.name}")
    best = {name: run / "checkpoints" / f"best_{name}{SAFETENSORS}" for name in (COARSE, SAM)}
    found = packed or {name: path for name, path in best.items() if path.is_file()}
    if not found:
        raise UserError(f"{run / 'checkpoints'} holds no best_*{SAFETENSORS}; train the run again with this version")
    return found


def _average(
    states: dict[str, dict[str, Tensor]], said: dict[str, dict[str, str]], files: list[Path], mirrored: bool
) -> None:
    """Put the mean of the coarse networks in the place of the first, and what all have seen and ask for to the rest."""
    words = [said[COARSE], *map(read_metadata, files)]
    members = []
    for word, state in zip(words, [states[COARSE], *map(read_state_dict, files)], strict=True):
        members += _members(json.loads(word["config"])["model"], state)
    networks, sizes, weights = zip(*members, strict=True)
    mean = {
        "_target_": "ultrarefiner.models.ensemble.Ensemble",
        "members": networks,
        "sizes": sizes,
        "mirrored": mirrored or any(json.loads(word["config"])["model"]["coarse"].get("mirrored") for word in words),
    }
    seen = [Seen.of_lists(json.loads(word["seen"])) for word in (*words, *said.values())]
    licences = {one for word in words for one in word.get("licence", "unknown").split(AND)}
    said[COARSE]["licence"] = AND.join(sorted(licences))
    states[COARSE] = {f"members.{n}.{name}": value for n, one in enumerate(weights) for name, value in one.items()}
    for word in said.values():
        config = json.loads(word["config"])
        config["model"] |= {"coarse": mean, "coarse_size": json.loads(words[0]["config"])["model"]["coarse_size"]}
        word |= {"config": json.dumps(config), "seen": json.dumps(reduce(or_, seen).as_lists())}


def _members(model: dict[str, Any], state: dict[str, Tensor]) -> list[tuple[dict[str, Any], int, dict[str, Tensor]]]:
    """How a coarse network is built, its frame and its weights; of a mean those of each network in it."""
    coarse = model["coarse"]
    if "members" not in coarse:
        return [(coarse, model["coarse_size"], state)]
    return [
        (*one, {k.removeprefix(mark): value for k, value in state.items() if k.startswith(mark)})
        for mark, *one in zip(
            (f"members.{n}." for n in range(len(coarse["sizes"]))), coarse["members"], coarse["sizes"], strict=True
        )
    ]
