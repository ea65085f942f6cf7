"""Which runs an experiment needs, and in which order.

A phase starts from what earlier phases left, and Phase 2 may want the predictions of networks that have not seen the
case. `plan` lists all of these runs, each with what follows from its configuration derived once: its settings, its data
and its directory. What then happens is a loop over that list (`runs.experiment`).
"""

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from ultrarefiner.config import Config, PhaseConfig
from ultrarefiner.data.cases import HELD, PARTS
from ultrarefiner.data.datamodule import DataModule
from ultrarefiner.data.predictions import Predictions
from ultrarefiner.data.store import Store
from ultrarefiner.errors import UserError
from ultrarefiner.models.transunet import RELEASES_OF
from ultrarefiner.models.weights import RELEASES, fetch
from ultrarefiner.phases.phase import Phase
from ultrarefiner.precision import FULL, fastest
from ultrarefiner.results.tables import read_result
from ultrarefiner.runs.assemble import build_data, build_store
from ultrarefiner.runs.build import find
from ultrarefiner.runs.checkpoints import BEST, SHIPPED, exported
from ultrarefiner.runs.provenance import run_directory, sources
from ultrarefiner.settings import COARSE, SAM, defining

FIT, AUTO = "fit", "auto"


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a plan.

    Attributes:
        cfg: its configuration, with what it does not use taken out and what the machine decides put in.
        kind: the class of its phase.
        data: its cases.
        settings: what defines its result.
        directory: where it lies.
        earlier: the runs whose best weights it starts from, by what they trained ("coarse", "sam").
        predictors: networks that were trained without one part of its training cases each, and predict that one; or
            that were stopped early and predict all, after Phase 1's, which predicts the other cases.
    """

    cfg: DictConfig
    kind: type[Phase]
    data: DataModule
    settings: dict[str, Any]
    directory: Path
    earlier: dict[str, "Run"] = field(default_factory=dict)
    predictors: tuple["Run", ...] = ()

    @property
    def finished(self) -> bool:
        """Whether its result is there and whole; what is damaged is measured again."""
        return self.damage is None and (self.directory / "summary.json").is_file()

    @property
    def damage(self) -> str | None:
        """What is wrong with its result, if it has one."""
        try:
            if (self.directory / "summary.json").is_file():
                read_result(self.directory)
        except UserError as error:
            return str(error)
        return None

    @property
    def title(self) -> str:
        """What it is called for people."""
        cfg = self.cfg
        title = f"{cfg.phase.name} · {cfg.dataset.name} · {cfg.model.name} · fold {cfg.fold} · seed {cfg.seed}"
        if cfg.trainer.precision != FULL:
            title += f" · {cfg.trainer.precision}"
        if cfg.dataset.without is not None:
            title += " · without part {} of {}".format(*cfg.dataset.without)
        return title

    @property
    def predictions(self) -> Predictions:
        """The predictors' predictions: one of a case, or one of each network that was stopped early."""
        versions = self.cfg.phase.parts if self.cfg.phase.early_epochs else 1
        return Predictions(self.directory / "predictions", self.cfg.phase.real_ratio, versions)

    def version(self, predictor: "Run") -> int:
        """Which of the predictions of a case is this predictor's."""
        place = [one.directory for one in self.predictors].index(predictor.directory)
        return max(0, place - 1) if self.cfg.phase.early_epochs else 0

    def unpredicted(self, predictor: "Run") -> dict[str, list[int]]:
        """The cases that a predictor has not predicted yet: the parts they are of, and their positions there.

        Each one predicts what was held out of its training, or, stopped early, what it was trained on; the first one
        (then Phase 1's) also the cases that none was trained on.
        """
        first, early = predictor is self.predictors[0], bool(self.cfg.phase.early_epochs)
        parts = [] if first and early else [PARTS[0] if early else HELD]
        parts += PARTS[1:] if first and self.cfg.phase.real_ratio > 0 else ()
        path = partial(self.predictions.path, version=self.version(predictor))
        missing = {
            part: [i for i, case in enumerate(predictor.data.split.part(part)) if not path(case).is_file()]
            for part in parts
        }
        return {part: positions for part, positions in missing.items() if positions}


def plan(cfg: DictConfig) -> list[Run]:
    """All runs of an experiment, each after those that it builds on; the last one is the experiment itself.

    Raises:
        UserError: the data set, the fold or a file of weights cannot be used, or settings contradict each other.
    """
    found: dict[Path, Run] = {}
    _add(cfg, build_store(cfg), found)
    return list(found.values())


def unfinished(runs: list[Run]) -> list[Run]:
    """Those runs of a plan that are still to be done for the last one, in order."""
    wanted: dict[Path, Run] = {}

    def want(run: Run) -> None:
        if run.directory in wanted or run.finished:
            return
        for earlier in run.earlier.values():
            want(earlier)
        for predictor in run.predictors:
            if run.unpredicted(predictor):
                want(predictor)
        wanted[run.directory] = run

    want(runs[-1])
    return list(wanted.values())


def _add(cfg: DictConfig, store: Store, found: dict[Path, Run]) -> Run:
    cfg = _settled(cfg)
    kind: type[Phase] = find(cfg.phase._target_, "phase")
    if not (isinstance(kind, type) and issubclass(kind, Phase)):
        raise UserError(f"phase._target_={cfg.phase._target_} is no phase: give a subclass of phases.phase.Phase")
    ours = {schema._target_: schema.name for schema in PhaseConfig.__subclasses__()}
    if ours.get(cfg.phase._target_, cfg.phase.name) != cfg.phase.name:
        raise UserError(
            f"phase.name={cfg.phase.name} is not what {cfg.phase._target_} is called; choose it with phase=NAME"
        )
    predicted = _wants_predictions(cfg.phase)
    parts = kind.parts | ({COARSE} if predicted else set())
    if COARSE in parts and cfg.model.coarse is None:
        raise UserError(
            f"phase={cfg.phase.name}{' with phase.softness, bins or real_ratio' if predicted else ''} trains a coarse "
            "network, and no gradient reaches another tool's masks (model/coarse=files); train phase=sam with "
            "phase.masks=FOLDER, or choose a network such as model/coarse=lite"
        )
    _fetch(cfg, parts)
    asked = cfg.trainer.precision
    cfg.trainer.precision = _precision(cfg, SAM in parts)
    data = build_data(cfg, kind, store)
    settings = defining(cfg, parts, Config) | {"data": store.fingerprint}
    if code := sources(settings):
        settings["code"] = code
    directory = run_directory(cfg, settings)
    if directory not in found:
        before = [(name, earlier_phase(cfg, name)) for name in _starts(cfg.phase)]
        predicting = list(_predictors(cfg)) if predicted else []
        for other in (*(phase for _, phase in before), *predicting):
            other.trainer.precision = asked  # the fastest for this phase need not be theirs
        earlier = {name: _add(phase, store, found) for name, phase in before}
        predictors = tuple(_add(part, store, found) for part in predicting)
        found[directory] = Run(cfg, kind, data, settings, directory, earlier, predictors)
    return found[directory]


def _precision(cfg: DictConfig, refines: bool) -> str:
    """The precision that was asked for; in the place of `auto` the fastest one here."""
    t = cfg.trainer
    if t.precision != AUTO:
        return str(t.precision)
    cuda = t.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    device = "cuda" if cuda else "mps" if t.accelerator == "mps" else "cpu"
    return fastest(device, cfg.model.image_size if refines else 0)


def _fetch(cfg: DictConfig, parts: Collection[str]) -> None:
    """Put the publishers' files in the place of `auto`: their contents define a run, as those of any other file."""
    model, sam = cfg.model, cfg.model.sam
    if COARSE in parts and model.coarse_weights == AUTO:
        name = RELEASES_OF.get(model.coarse.get("name"))
        if name is None:
            raise UserError("model.coarse_weights=auto: no file is known for this network; give a path, or null")
        model.coarse_weights = str(fetch(name))
    if SAM in parts and sam.get("checkpoint") == AUTO and sam.get("family") in RELEASES and not sam.get("random_init"):
        sam.checkpoint = str(fetch(sam.family))


def earlier_phase(cfg: DictConfig, name: str) -> DictConfig:
    """The same experiment with an earlier phase in place of this one."""
    earlier = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    with open_dict(earlier):
        earlier.phase = earlier.phase[name]
    assert isinstance(earlier, DictConfig)
    return earlier


def _starts(phase: DictConfig) -> Iterator[str]:
    """The earlier phases whose runs a phase starts from: those that no checkpoint was given for."""
    yield from (name for name in (COARSE, SAM) if phase.get(f"{name}_checkpoint", "") is None)


def _predictors(cfg: DictConfig) -> Iterator[DictConfig]:
    """Phase 1 without each of the parts of the training cases; or as it is, and of other seeds but stopped early."""
    early = cfg.phase.early_epochs
    if early:
        yield earlier_phase(cfg, COARSE)
    for part in range(cfg.phase.parts):
        earlier = earlier_phase(cfg, COARSE)
        if early:
            earlier.phase.epochs, earlier.seed = early, cfg.seed + 1 + part
        else:
            with open_dict(earlier):
                earlier.dataset.without = [part, cfg.phase.parts]
        yield earlier


def _wants_predictions(phase: DictConfig) -> bool:
    """Whether a phase's configuration asks for out-of-fold predictions of Phase 1 (only Phase 2's can)."""
    return bool(wants_fit(phase) or phase.get("real_ratio", 0) > 0)


def wants_fit(phase: DictConfig) -> bool:
    """Whether simulated masks are to be like Phase 1's out-of-fold predictions."""
    return FIT in (phase.get("softness"), phase.get("bins"))


def _take_shipped(cfg: DictConfig) -> None:
    """Put the files of the pair that ships in the places where its name stands."""
    for node, key, name in (
        (cfg.model, "coarse_weights", COARSE),
        (cfg.model.sam, "checkpoint", SAM),
        (cfg.phase, "coarse_checkpoint", COARSE),
        (cfg.phase, "sam_checkpoint", SAM),
    ):
        if node.get(key) == "shipped":
            node[key] = str(exported(SHIPPED)[name])


def _settled(cfg: DictConfig) -> DictConfig:
    """The configuration without what the phase does not use, which must not define its result.

    Raises:
        UserError: settings contradict each other.
    """
    cfg = copy.deepcopy(cfg)
    if cfg.phase.ema_decay is not None and cfg.protection.guard is not None and cfg.phase.name == "e2e":
        raise UserError("protection.guard restores weights, phase.ema_decay averages them; give one of them")
    _take_shipped(cfg)
    for name in (COARSE, SAM):
        given = cfg.phase.get(f"{name}_checkpoint")
        untrained = name == COARSE and (cfg.model.coarse_weights is None or cfg.model.coarse_weights.endswith(".npz"))
        if given == AUTO or (given == "pretrained" and untrained):
            raise UserError(
                f"phase.{name}_checkpoint={given}: no published file is a trained {name} network; give a checkpoint, "
                "or null for the run that this configuration describes"
            )
        if given and (inside := Path(given).expanduser() / "checkpoints" / BEST).is_file():
            cfg.phase[f"{name}_checkpoint"] = str(inside)  # the directory of a run was given
    node = cfg.phase.get("sam", cfg.phase)
    if "softness" in node:
        for name in ("softness", "bins"):
            if node[name] == FIT and node.failures.get(name) is not None:
                raise UserError(f"phase.{name}={FIT} and phase.failures.{name} contradict each other; give one of them")
        if node.early_epochs and not _wants_predictions(node):
            raise UserError("phase.early_epochs needs phase.real_ratio above 0, phase.softness=fit or phase.bins=fit")
        with open_dict(cfg):
            node.coarse = cfg.phase.coarse if _wants_predictions(node) else None
    return cfg
