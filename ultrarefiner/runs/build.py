"""From the configuration to objects: any class by its `_target_`, and the networks. Needs nothing that trains."""

import contextlib
import inspect
import logging
import random
import re
import traceback
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ultrarefiner.errors import UserError
from ultrarefiner.models.cascade import Cascade
from ultrarefiner.models.embedding_cache import EmbeddingCache
from ultrarefiner.models.ensemble import Ensemble, first_member
from ultrarefiner.models.lora import add_lora
from ultrarefiner.models.sam import Sam
from ultrarefiner.models.weights import SAFETENSORS, load_strictly, read_state_dict
from ultrarefiner.refine.refiner import Refiner
from ultrarefiner.refine.roi import FullFrame
from ultrarefiner.runs.provenance import targets
from ultrarefiner.settings import COARSE, SAM


def build(node: Any, key: str, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a configuration node by its `_target_`, with errors that name its key.

    Raises:
        UserError: there is no such class, it refuses a value or takes no such argument, or its code fails: then with
            the line.
    """
    node = plain(node)
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise UserError(f"{key} needs the path of a class or function as {key}._target_")
    find(node["_target_"], key)
    try:
        return instantiate(node, *args, **kwargs)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from error
        if isinstance(cause, ValueError) or (isinstance(cause, TypeError) and misfit(node, args, kwargs)):
            raise UserError(f"{key}: {node['_target_']} says: {cause}") from error
        raise UserError(f"{key}: {node['_target_']} fails: {told(cause)}") from error


def find(target: str, key: str) -> Any:
    """The class or function of a `_target_`.

    Raises:
        UserError: there is none, or its module cannot be imported; with the reason and, of a mistake in it, the line.
    """
    try:
        return get_object(target)
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}._target_={target} cannot be loaded: {told(error.__cause__ or error)}") from error


def told(error: BaseException) -> str:
    """An error of somebody's code in one line, with its place."""
    places = [(at.filename, at.lineno) for at in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places = [(str(error.filename), error.lineno)]
    theirs = [f" ({file}, line {line})" for file, line in places if not _MACHINERY.search(file)]
    return f"{type(error).__name__}: {' '.join(str(error).split())}{''.join(theirs[-1:])}"


def own_targets(cfg: DictConfig) -> list[str]:
    """The classes in a configuration that are not ours."""
    return sorted(name for name in targets(plain(cfg)) if not name.startswith(("ultrarefiner.", "torch.optim.")))


@contextlib.contextmanager
def blaming(cfg: DictConfig, what: str) -> Iterator[None]:
    """Turn what the code of others raises inside the block into one sentence, where there is such code.

    Raises:
        UserError: with what it is that fails, and the line.
    """
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException):
        raise
    except Exception as error:
        if not (own := own_targets(cfg)):
            raise
        raise UserError(f"{what}: {told(error)}; look at {', '.join(own)}") from error


_MACHINERY = re.compile(r"^<|[\\/](hydra|importlib|torch)[\\/]")
logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # what it logs is in the errors that it raises


def misfit(node: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Why the target does not take these arguments, if so; nothing of it has run then."""
    target = get_object(node["_target_"])
    given = {name: value for name, value in {**node, **kwargs}.items() if not name.startswith("_")}
    try:
        inspect.signature(target).bind(*args, **given)
    except TypeError as error:
        return str(error)
    return ""


def plain(node: Any) -> Any:
    """A configuration node as plain containers, interpolations resolved; anything else as it is."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def build_option(cfg: DictConfig, group: str, *args: Any, **kwargs: Any) -> Any:
    """Instantiate the chosen option of a group; its `name` is ours, not an argument of its class."""
    return build({key: value for key, value in plain(cfg[group]).items() if key != "name"}, group, *args, **kwargs)


def augments(cfg: DictConfig) -> bool:
    """Whether training images are changed at random."""
    return cfg.dataset.augment is not None and cfg.phase.augment


def build_cascade(cfg: DictConfig, parts: Collection[str], files: Mapping[str, Path]) -> Cascade:
    """The networks of some parts, which have the model's own starting weights.

    Args:
        cfg: the composed configuration.
        parts: of `settings.PARTS`.
        files: publishers' weights in place of the model's own, of "coarse" or "sam".
    """
    coarse = refiner = gate = None
    # Each network gets random numbers of its own: what Phase 3 builds must not depend on what was built before.
    if COARSE in parts:
        _seed(cfg.seed)
        coarse = build_coarse(cfg, files.get(COARSE))
    if SAM in parts:
        _seed(cfg.seed)
        refiner, gate = build_refiner(cfg, files.get(SAM))
    return Cascade(coarse, refiner, gate)


def _seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def build_coarse(cfg: DictConfig, file: Path | None) -> torch.nn.Module:
    """The coarse network, with the weights of a file where one is given."""
    coarse = build(cfg.model.coarse, "model.coarse")
    if not isinstance(coarse, torch.nn.Module):
        found = type(coarse).__name__
        raise UserError(f"model.coarse: {cfg.model.coarse['_target_']} must give a torch.nn.Module, got {found}")
    weights = file or cfg.model.coarse_weights
    if weights is not None:
        load_coarse(coarse, Path(weights).expanduser())
    _try(coarse, cfg.model.coarse_size, cfg.model.coarse["_target_"])
    return coarse


@torch.no_grad()
def _try(coarse: torch.nn.Module, size: int, target: str) -> None:
    """Show a coarse network one image: what is wrong with it must come out before anything is trained.

    Raises:
        UserError: it refuses the image, or does not give finite logits of two classes at the image's size.
    """
    training, image = coarse.training, torch.linspace(0, 1, size * size).view(1, 1, size, size)
    try:
        logits = coarse.eval()(image)
        found, wanted = tuple(getattr(logits, "shape", [type(logits).__name__])), (1, 2, size, size)
        if found != wanted:
            raise UserError(f"model.coarse: {target} gives {found} for an image of {size} px, not {wanted}")
        if not logits.isfinite().all():
            raise UserError(f"model.coarse: {target} gives NaN or infinite logits; other weights, or another network")
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model.coarse: {target} refuses an image of (1, 1, {size}, {size}): {reason}") from error
    coarse.train(training)


def load_coarse(coarse: torch.nn.Module, path: Path) -> None:
    """Give a coarse network the weights in a file: in its own way where it has one, else name by name.

    Of an ensemble's file a single network takes the first member's.

    Raises:
        UserError: the file is unreadable, or not of this network.
    """
    way = "load_npz" if path.suffix == ".npz" else "load_official"
    if not isinstance(coarse, Ensemble) and path.suffix == SAFETENSORS and (first := first_member(path)):
        load_strictly(coarse, first, str(path))
    elif hasattr(coarse, way):
        getattr(coarse, way)(path)
    elif way == "load_npz":
        raise UserError(f"model.coarse_weights={path} is for a TransUNet; this coarse network takes a state_dict")
    else:
        load_strictly(coarse, read_state_dict(path), str(path))


def build_refiner(cfg: DictConfig, file: Path | None) -> tuple[Refiner, torch.nn.Module]:
    """SAM in its pipeline, and the gate behind it."""
    node = plain(cfg.model.sam) | ({} if file is None else {"checkpoint": str(file)})
    sam = build(node | ({"checkpointing": True} if cfg.model.checkpointing else {}), "model.sam")
    sam.set_trainable(**cfg.model.train)
    if cfg.model.lora.rank:
        add_lora(sam, **plain(cfg.model.lora))
    roi = build_option(cfg, "roi")
    if cfg.phase.get("crops"):
        sam.embeddings = embedding_cache(cfg, sam, roi)
    pipeline = {key: cfg.model[key] for key in ("selection_temperature", "gradient")}
    pipeline["_target_"] = "ultrarefiner.refine.refiner.Refiner"
    refiner = build(pipeline, "model", sam, roi, build_option(cfg, "prompt_style"))
    return refiner, build_option(cfg, "gate")


def embedding_cache(cfg: DictConfig, sam: Sam, roi: torch.nn.Module) -> EmbeddingCache:
    """Where image embeddings are kept, for `phase.crops`.

    Raises:
        UserError: no crop would ever be met again, or its embedding changes.
    """
    obstacles = {
        "the crop follows the coarse network, which changes; set roi=off": not isinstance(roi, FullFrame)
        and "failures" not in cfg.phase,
        "the image encoder is trained; set model.train.image_encoder=false and model.lora.rank=0": any(
            p.requires_grad for p in sam.image_encoder.parameters()
        ),
    }
    for reason, applies in obstacles.items():
        if applies:
            raise UserError(f"phase.crops={cfg.phase.crops} is of no use here: {reason}, or leave it out")
    return EmbeddingCache(Path(cfg.output_root).expanduser() / "cache" / "embeddings", cfg.trainer.embeddings_gb)
