"""+experiments=seed: the settings of the original UltraRefiner, on any model, as a table."""

import pytest
from omegaconf import OmegaConf

from conftest import compose
from ultrarefiner.runs.build import build

ALL = {
    "model.frame": "stretch",
    "model.lora.rank": 0,
    "model.selection_temperature": 0.1,
    "model.train": {"image_encoder": False, "prompt_encoder": True, "mask_decoder": True},
    "prompt_style.name": "direct",
    "prompt_style.use_mask": True,
    "prompt_style.point": True,
    "prompt_style.negative_point": True,
    "prompt_style.box": True,
    "prompt_style.box_k": 2.5,
    "prompt_style.temperature": 1.0,
    "gate.name": "none",
}
ROI = {
    "on": {"roi.expand_ratio": 0.2, "roi.k": 2.5, "roi.square": False, "roi.temperature": 1.0},
    "off": {"roi.frame": "stretch"},
}
PROTECTION = {
    "on": {"coarse_loss_weight": 0.8, "refined_loss_weight": 0.2, "grad_scale": 0.01, "weight_reg": 0.1},
    "off": {"coarse_loss_weight": 0.7, "refined_loss_weight": 0.3, "grad_scale": 0.1, "weight_reg": 0.01},
}
PHASES = {
    "coarse": {
        "epochs": 150,
        "batch_size": 24,
        "lr": 0.01,
        "poly_power": 0.9,
        "ce_weight": 0.5,
        "dice_weight": 0.5,
        "grad_clip": None,
        "optimizer": {"_target_": "torch.optim.SGD", "momentum": 0.9, "weight_decay": 1e-4},
    },
    "sam": {
        "epochs": 50,
        "batch_size": 4,
        "lr": 1e-4,
        "bce_weight": 1.0,
        "dice_weight": 1.0,
        "focal_weight": 0.5,
        "change_weight": 0.5,
        "iou_weight": 0.1,
        "good_from": 0.6,
        "masks_per_image": 1,
        "softness": None,
        "real_ratio": 0.0,
    },
    "e2e": {
        "epochs": 100,
        "batch_size": 4,
        "coarse_lr": 1e-6,
        "sam_lr": 1e-5,
        "ce_weight": 0.5,
        "coarse_dice_weight": 0.5,
        "bce_weight": 1.0,
        "dice_weight": 1.0,
        "grad_clip": 1.0,
    },
}
BINS = ((0.90, 0.99, 0.25), (0.80, 0.90, 0.40), (0.60, 0.80, 0.35))


def value(cfg, key: str):
    found = OmegaConf.select(cfg, key, throw_on_missing=True)
    return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found


@pytest.mark.parametrize("roi", ["on", "off"])
@pytest.mark.parametrize("model", ["base", "lite", "tiny"])
def test_every_value_is_the_originals(model, roi):
    cfg = compose("+experiments=seed", f"model={model}", f"roi={roi}", micro=False)
    expected = ALL | ROI[roi]
    expected |= {f"protection.{key}": wanted for key, wanted in (PROTECTION[roi] | {"freeze_epochs": 0}).items()}
    for phase, settings in PHASES.items():
        prefix = "phase" if phase == "e2e" else f"phase.{phase}"
        expected |= {f"{prefix}.{key}": wanted for key, wanted in settings.items()}
    assert {key: value(cfg, key) for key in expected} == expected
    simulator = build(cfg.phase.sam.failures, "phase.sam.failures")
    assert tuple(tuple(row) for row in simulator.bins) == BINS


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_alone_has_them_too(phase):
    cfg = compose("+experiments=seed", "model=lite", f"phase={phase}", micro=False)
    assert {key: value(cfg, f"phase.{key}") for key in PHASES[phase]} == PHASES[phase]


def test_the_default_differs_where_it_was_measured_to_be_better():
    ours = compose("model=lite", micro=False)
    assert (ours.model.frame, ours.roi.square, ours.prompt_style.temperature) == ("pad", True, 0.5)
