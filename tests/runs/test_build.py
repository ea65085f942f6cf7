"""From the configuration to objects: every setting arrives, and every phase keeps to its fold."""

import ast
import dataclasses
import re

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from conftest import compose
from data_layouts import write_busbra
from ultrarefiner import cli, config
from ultrarefiner.models.sam_lite import lite_weights
from ultrarefiner.runs import assemble, build, plan
from ultrarefiner.runs.plan import earlier_phase


def test_every_phase_keeps_to_the_fold(tmp_path):
    """Known mistakes 5 and 6: Phase 2 does not train on what Phase 3 is validated and tested on."""
    cfg = compose(f"output_root={tmp_path}", "fold=1")
    splits = {}
    for phase in (earlier_phase(cfg, "coarse"), earlier_phase(cfg, "sam"), cfg):
        data = assemble.build_data(phase, get_class(phase.phase._target_))
        splits[phase.phase.name] = {part: {c.key for c in data.split.part(part)} for part in ("train", "val", "test")}
        loaded = {name for batch in data.train_dataloader() for name in batch["id"]}
        assert loaded <= {case.id for case in data.split.train}
    assert splits["coarse"] == splits["sam"] == splits["e2e"]
    train, val, test = splits["e2e"].values()
    assert train and val and test and not train & val and not train & test and not val & test


@pytest.mark.parametrize("name", sorted(path.stem for path in cli.CONF.with_name("experiments").glob("*.yaml")))
def test_every_experiment_that_ships_can_be_planned(name, tmp_path, monkeypatch):
    """On a folder laid out as BUS-BRA is, with stand-ins for the publishers' files."""
    root = write_busbra(tmp_path / "data")
    monkeypatch.setattr(plan, "fetch", lambda of: lite_weights())
    given = [f"+experiments={name}", f"data_root={root}", f"output_root={tmp_path}"]
    given += ["dataset=busbra"] if name == "seed" else []
    runs = plan.plan(compose(*given, micro=False))
    names = [run.cfg.phase.name for run in runs]
    # Out-of-fold networks, or two that are stopped early, come before Phase 2 where its masks are real ones.
    others = {"busbra_base": 2, "busbra_lite": 2}.get(name, 0)
    assert names[-1] == "e2e" and sorted(names) == sorted(["coarse"] * (1 + others) + ["sam", "e2e"])
    assert all(run.cfg.dataset.name == "busbra" for run in runs)


def changed(value: object) -> object:
    """Another value that is as valid."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 0.9 if isinstance(value, float) else value


PLACES = {
    "protection": lambda phase: phase.protection,
    "phase": lambda phase: phase,
    "prompt_style": lambda phase: phase.cascade.refiner.prompts,
    "roi": lambda phase: phase.cascade.refiner.roi,
    "gate": lambda phase: phase.cascade.gate,
}


@pytest.mark.parametrize("group", PLACES)
def test_every_setting_arrives_in_its_object(group):
    """Known mistake 11: no key is parsed and then left aside."""
    base = ["gate=uncertainty", "protection=roi_off", "phase.coarse_lr=0.001", "phase.sam_lr=0.002"]
    node = OmegaConf.to_container(compose(*base)[group], resolve=True)
    left = {"name", "_target_", "freeze_epochs", "negative_point", "use_mask", *config.not_arguments()}
    settings = {k: changed(v) for k, v in node.items() if k not in left and isinstance(v, (bool, int, float))}
    cfg = compose(
        *base, *(f"{group}.{key}={value}" for key, value in settings.items()), "prompt_style.negative_point=false"
    )
    place = PLACES[group](assemble.build_phase(cfg, get_class(cfg.phase._target_), {}))
    assert settings and {key: getattr(place, key) for key in settings} == settings


def test_the_models_own_settings_arrive():
    cfg = compose(
        "model.gradient=frozen",
        "model.selection_temperature=0.3",
        "model.prompts.mask=false",
        "model.prompts.temperature=0.5",
        "model.prompts.box_k=1.7",
        "model.train.image_encoder=false",
        "model.train.prompt_encoder=false",
        "model.lora={rank: 3, alpha: 6.0, blocks: [1], targets: [proj]}",
        "model.checkpointing=true",
    )
    refiner, _ = build.build_refiner(cfg, None)
    assert refiner.gradient == "frozen" and refiner.selection_temperature == 0.3
    assert refiner.prompts.mask is None and refiner.prompts.temperature == 0.5 and refiner.prompts.box_k == 1.7
    assert refiner.sam.image_encoder.checkpointing
    trained = {name: p.shape for name, p in refiner.sam.named_parameters() if p.requires_grad}
    lora = {name: shape for name, shape in trained.items() if not name.startswith("mask_decoder.")}
    proj = "image_encoder.blocks.1.attn.proj.lora_"
    assert lora == {f"{proj}down": torch.Size([3, 96]), f"{proj}up": torch.Size([96, 3])} and len(trained) > 20


def test_every_setting_is_read_by_name():
    """Known mistake 11, the other half: what arrives is also used."""
    # By patterns of names: SamPhase reads its terms' weights so, and start.py the checkpoints.
    read = {"focal_weight", "change_weight", "iou_weight", "coarse_checkpoint", "sam_checkpoint"}
    for path in cli.PACKAGE.rglob("*.py"):
        if path.name != "config.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read.add(node.attr)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):  # an argument that is used
                    read.add(node.id)
    for path in cli.CONF.rglob("*.yaml"):
        read |= {key for keys in re.findall(r"\$\{\.*([\w.]+)\}", path.read_text()) for key in keys.split(".")}
    unpacked = {"TrainedParts", "LoraConfig", "LimitConfig"}  # given to a function or class as keyword arguments
    for name, schema in vars(config).items():
        if dataclasses.is_dataclass(schema) and name not in unpacked:
            unread = {field.name for field in dataclasses.fields(schema)} - read - {"_target_"}
            assert not unread, f"{name}: nothing reads {unread}"
