"""Phase 3's protections: what reaches the coarse network, and what must not."""

import copy
import functools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from conftest import compose, phase_defaults
from ultrarefiner.config import E2EPhaseConfig, ProtectionConfig, SamPhaseConfig
from ultrarefiner.errors import UserError
from ultrarefiner.models.cascade import Cascade, lesion_logit, scale_gradient
from ultrarefiner.phases import losses
from ultrarefiner.phases.coarse import coarse_terms
from ultrarefiner.phases.e2e import E2EPhase
from ultrarefiner.phases.protection import WeightAnchor, hold_batchnorm
from ultrarefiner.phases.sam import SamPhase
from ultrarefiner.refine.prompts import DirectMaskPrompt, Prompts
from ultrarefiner.refine.refiner import Refiner
from ultrarefiner.refine.roi import LesionRoi
from ultrarefiner.runs.assemble import build_phase
from ultrarefiner.runs.keeping import KeepCheckpoints


class SmallCoarse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x):
        return self.net(x)


class SmallSam(nn.Module):
    image_size, mask_size = 16, 8

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Conv2d(1, 3, 4, stride=2, padding=1)

    def encode(self, image):
        return self.image_encoder(image)

    def decode(self, embedding, points, labels, boxes, masks):
        logits = embedding + 0.2 * masks + points.sum((1, 2))[:, None, None, None]
        return logits, torch.sigmoid(logits.mean((2, 3)))


def small_cascade(seed: int = 0) -> Cascade:
    torch.manual_seed(seed)
    return Cascade(SmallCoarse(), Refiner(SmallSam(), LesionRoi(), Prompts(DirectMaskPrompt())))


def small_batch(seed: int = 1) -> dict:
    torch.manual_seed(seed)
    mask = torch.zeros(2, 1, 24, 24)
    mask[:, :, 6:16, 8:18] = 1
    return {
        "image": torch.rand(2, 1, 24, 24),
        "mask": mask,
        "coarse_image": torch.rand(2, 1, 12, 12),
        "coarse_mask": mask[..., ::2, ::2],
        "aspect": torch.tensor([0.8, 1.25]),
        "id": ["a", "b"],
    }


def e2e(cascade: Cascade, **protection) -> E2EPhase:
    return E2EPhase(
        cascade,
        protection=ProtectionConfig(**protection),
        epochs=2,
        batch_size=2,
        coarse_lr=1e-3,
        sam_lr=1e-3,
        optimizer=torch.optim.AdamW,
        **phase_defaults(E2EPhaseConfig),
    )


def gradients(network: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]


def test_scale_gradient_is_the_identity_forward():
    x = torch.randn(3, requires_grad=True)
    y = scale_gradient(x, 0.1)
    assert torch.equal(x, y)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 0.1))


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0])
def test_only_what_comes_back_from_the_refiner_is_scaled(scale):
    """Known mistake 1: against two separate backward passes through two separate losses."""
    batch, settings = small_batch(), {"coarse_loss_weight": 0.8, "refined_loss_weight": 0.2}
    phase = e2e(small_cascade(), grad_scale=scale, **settings)
    phase.terms(batch)["loss"].backward()
    together = gradients(phase.cascade.coarse)
    sam_together = gradients(phase.cascade.refiner)

    plain = small_cascade()
    logits = plain.coarse(batch["coarse_image"])
    coarse = coarse_terms(logits, batch["coarse_mask"], 0.5, 0.5)["loss"]
    refined = plain.refine(batch["image"], lesion_logit(logits)).logits
    refined_loss = losses.bce(refined, batch["mask"]) + losses.soft_dice_loss(refined.sigmoid(), batch["mask"])
    (0.8 * coarse).backward(retain_graph=True)
    of_coarse = gradients(plain.coarse)
    plain.zero_grad()
    (0.2 * refined_loss).backward()
    of_refined = gradients(plain.coarse)
    assert any(g.abs().max() > 0 for g in of_refined)
    for got, a, b in zip(together, of_coarse, of_refined, strict=True):
        torch.testing.assert_close(got, a + scale * b, atol=1e-7, rtol=1e-4)
    for got, expected in zip(sam_together, gradients(plain.refiner), strict=True):
        torch.testing.assert_close(got, expected)  # the refiner itself always learns at full strength


@pytest.mark.parametrize("phase", ["sam", "e2e"])
def test_the_refiner_sees_the_frame_and_not_the_coarse_networks_image(phase, monkeypatch):
    """Known mistake 4, in the phases: training and validation crop the image at its own detail."""
    seen, original = [], Refiner.forward
    monkeypatch.setattr(
        Refiner, "forward", lambda self, image, *rest: seen.append(image) or original(self, image, *rest)
    )
    cascade, batch = small_cascade(), small_batch()
    batch["prob"] = 0.8 * batch["coarse_mask"] + 0.1
    sam = functools.partial(
        SamPhase, epochs=1, batch_size=2, lr=1e-3, optimizer=torch.optim.AdamW, **phase_defaults(SamPhaseConfig)
    )
    tested = sam(cascade) if phase == "sam" else e2e(cascade)
    tested.terms(batch)
    tested.masks(batch)
    assert len(seen) == 2 and all(image is batch["image"] for image in seen)


@pytest.mark.parametrize("roi", ["on", "off"])
def test_the_refined_loss_alone_moves_the_coarse_network(roi):
    from ultrarefiner.refine.roi import FullFrame

    cascade = small_cascade()
    cascade.refiner.roi = LesionRoi() if roi == "on" else FullFrame()
    batch = small_batch()
    out = cascade(batch["coarse_image"], batch["image"])
    losses.bce(out.refined.logits, batch["mask"]).backward()
    assert all(g.abs().sum() > 0 for g in gradients(cascade.coarse)[-2:])


def test_the_anchor_is_the_squared_distance_and_its_gradient_twice_the_difference():
    network = SmallCoarse()
    anchor = WeightAnchor(network)
    start = [p.detach().clone() for p in network.parameters()]
    assert anchor(network).item() == 0
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    distance = anchor(network)
    expected = sum(((p - s) ** 2).sum() for p, s in zip(network.parameters(), start, strict=True))
    torch.testing.assert_close(distance, expected)
    distance.backward()
    for p, s in zip(network.parameters(), start, strict=True):
        torch.testing.assert_close(p.grad, 2 * (p - s).detach())
    assert not anchor.state_dict()


def test_batch_statistics_are_held_when_asked():
    """Known mistake 7."""
    for hold in (True, False):
        network = SmallCoarse().train()
        before = network.net[1].running_mean.clone()
        if hold:
            hold_batchnorm(network)
        network(torch.rand(4, 1, 8, 8))
        assert torch.equal(before, network.net[1].running_mean) == hold


def test_all_parameter_groups_are_in_the_optimiser_from_the_start():
    """Known mistake 8: also those that are frozen in the first epochs."""
    phase = e2e(small_cascade(), freeze_epochs=1)
    groups = {group["name"]: group["params"] for group in phase.groups()}
    assert len(groups["coarse"]) == len(list(phase.cascade.coarse.parameters()))
    assert len(groups["sam"]) == 2
    assert not {id(p) for p in groups["coarse"]} & {id(p) for p in groups["sam"]}


def test_settings_that_protect_nothing_are_refused():
    with pytest.raises(UserError, match=r"protection.grad_scale must be 0 or more, got -1"):
        compose("protection.grad_scale=-1")
    with pytest.raises(ValueError, match="nothing would move"):
        e2e(small_cascade(), freeze_epochs=1, sam_freeze_epochs=1)
    for key in ("freeze_epochs", "sam_freeze_epochs"):
        with pytest.raises(ValueError, match=f"protection.{key}=2 is all of phase.epochs=2"):
            e2e(small_cascade(), **{key: 2})


class FakeTrainer(pl.Trainer):
    """A trainer that only holds what is put into it."""

    callbacks, callback_metrics, optimizers, current_epoch = (), {}, (), 0  # in place of properties

    def __init__(self, dice: float, optimizers: tuple = ()) -> None:
        self.callback_metrics = {"val/coarse/dice": torch.tensor(dice)}
        self.optimizers = optimizers


def after_validation(phase: E2EPhase, dice: float, monkeypatch, *optimizers) -> None:
    """What the phase does when an epoch's validation gave this coarse Dice."""
    monkeypatch.setattr(E2EPhase, "trainer", FakeTrainer(dice, optimizers), raising=False)
    monkeypatch.setattr(E2EPhase, "current_epoch", 1, raising=False)
    monkeypatch.setattr(E2EPhase, "log", lambda *a, **k: None)
    phase.on_validation_epoch_end()


def test_a_degrading_coarse_network_is_warned_of(monkeypatch, caplog):
    phase = e2e(small_cascade(), warn_drop=0.01)
    phase.start_from(0.8)
    with caplog.at_level(logging.WARNING):
        after_validation(phase, 0.795, monkeypatch)
        assert not caplog.records
        after_validation(phase, 0.7, monkeypatch)
    assert "degrades" in caplog.text and "0.8000" in caplog.text


def test_the_guard_restores_the_best_coarse_weights(monkeypatch, caplog):
    phase = e2e(small_cascade(), guard=0.05)
    phase.start_from(0.8)
    good = [p.detach().clone() for p in phase.cascade.coarse.parameters()]
    optimizer = torch.optim.AdamW(phase.groups(), lr=0.1)
    phase.terms(small_batch())["loss"].backward()
    optimizer.step()
    after_validation(phase, 0.76, monkeypatch, optimizer)
    assert not torch.equal(next(phase.cascade.coarse.parameters()), good[0])
    with caplog.at_level(logging.WARNING):
        after_validation(phase, 0.7, monkeypatch, optimizer)
    assert all(torch.equal(p, g) for p, g in zip(phase.cascade.coarse.parameters(), good, strict=True))
    assert "restored" in caplog.text and not phase.measured
    after_validation(phase, 0.79, monkeypatch)
    assert phase.measured
    # Adam forgets where the coarse network was heading, and only that.
    assert set(optimizer.state) == set(phase.cascade.refiner.sam.parameters())


def test_restored_weights_are_no_best_epoch(tmp_path):
    """The refined Dice of that epoch belongs to the coarse weights that were thrown away."""
    keeper, phase = KeepCheckpoints(tmp_path, "val/refined/dice"), e2e(small_cascade())
    trainer = FakeTrainer(0.7)
    trainer.saved, best = [], []
    trainer.save_checkpoint = lambda path, weights_only=False: trainer.saved.append((trainer.current_epoch, path.name))
    for epoch, (dice, measured) in enumerate([(0.9, False), (0.8, True), (0.85, False), (0.82, True)]):
        trainer.current_epoch, phase.measured = epoch, measured
        trainer.callback_metrics["val/refined/dice"] = torch.tensor(dice)
        keeper.on_validation_end(trainer, phase)
        keeper.on_train_epoch_end(trainer, phase)
        best.append(keeper.best_epoch)
    assert best == [0, 1, 1, 3]
    assert [epoch for epoch, name in trainer.saved if name == "best.ckpt"] == [0, 1, 3]


def test_the_guard_keeps_its_weights_across_a_resume(monkeypatch):
    monkeypatch.setattr(E2EPhase, "trainer", FakeTrainer(0.8), raising=False)
    phase, checkpoint = e2e(small_cascade(), guard=0.05), {"epoch": 0}
    phase.start_from(0.8)
    phase.on_save_checkpoint(checkpoint)
    again = e2e(small_cascade(seed=5), guard=0.05)
    again.start_from(0.7)
    again.on_load_checkpoint(checkpoint)
    dice, state = again._best_coarse
    assert dice == 0.8
    assert all(torch.equal(value, phase.cascade.coarse.state_dict()[name]) for name, value in state.items())


class NormedSam(SmallSam):
    """With batch statistics, which could move without any gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Sequential(self.image_encoder, nn.BatchNorm2d(3))


class Diary(pl.Callback):
    """What networks and optimiser hold at the start and after each epoch."""

    def __init__(self) -> None:
        self.states, self.groups = [], []

    def on_train_start(self, trainer, phase) -> None:
        self.on_train_epoch_end(trainer, phase)

    def on_train_epoch_end(self, trainer, phase) -> None:
        cascade = phase.cascade
        networks = {"coarse": cascade.coarse, "sam": cascade.refiner.sam}
        self.states.append({name: copy.deepcopy(network.state_dict()) for name, network in networks.items()})
        groups = trainer.optimizers[0].param_groups
        self.groups.append({group["name"]: [id(parameter) for parameter in group["params"]] for group in groups})


def fitted(phase: E2EPhase) -> Diary:
    diary = Diary()
    trainer = pl.Trainer(
        max_epochs=phase.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[diary],
    )
    phase.train()
    trainer.fit(phase, DataLoader([small_batch(1), small_batch(2)], batch_size=None))
    return diary


@pytest.mark.parametrize("frozen", ["coarse", "sam"])
def test_a_frozen_network_is_bit_identical_and_moves_afterwards(frozen):
    """Known mistake 8 in a real fit: all groups are in the optimiser from the start, and stay the same."""
    cascade = small_cascade()
    cascade.refiner.sam = NormedSam()
    freeze = {"coarse": "freeze_epochs", "sam": "sam_freeze_epochs"}[frozen]
    phase = E2EPhase(
        cascade,
        protection=ProtectionConfig(**{freeze: 2}),
        epochs=4,
        batch_size=2,
        coarse_lr=1e-2,
        sam_lr=1e-2,
        optimizer=functools.partial(torch.optim.AdamW, weight_decay=0.1),
        **phase_defaults(E2EPhaseConfig),
    )
    diary = fitted(phase)
    moving = "sam" if frozen == "coarse" else "coarse"
    for epoch in range(4):
        before, after = diary.states[epoch], diary.states[epoch + 1]
        assert all(torch.equal(value, after[frozen][name]) for name, value in before[frozen].items()) == (epoch < 2)
        assert not all(torch.equal(value, after[moving][name]) for name, value in before[moving].items())
    expected = {"coarse": [*cascade.coarse.parameters()], "sam": [*cascade.refiner.sam.parameters()]}
    for groups in diary.groups:
        assert groups == {name: [id(p) for p in parameters] for name, parameters in expected.items()}


def test_an_epoch_in_which_nothing_could_move_is_refused():
    cascade = small_cascade()
    cascade.refiner.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing would move"):
        e2e(cascade, freeze_epochs=1)
    assert e2e(cascade).groups()[1]["params"] == []  # SAM held for good: the coarse network learns alone
    fitted(e2e(cascade))
    with pytest.raises(ValueError, match="nothing to train"):
        SamPhase(
            cascade,
            epochs=1,
            batch_size=1,
            lr=1e-3,
            optimizer=torch.optim.AdamW,
            **phase_defaults(SamPhaseConfig),
        )


@pytest.mark.parametrize("hold", [True, False])
def test_batch_statistics_are_held_through_a_real_fit(hold):
    """Known mistake 7, in the phase itself: the weights learn, the statistics stay those of Phase 1."""
    diary = fitted(e2e(small_cascade(), hold_batchnorm=hold))
    before, after = diary.states[0]["coarse"], diary.states[-1]["coarse"]
    assert torch.equal(before["net.1.running_mean"], after["net.1.running_mean"]) == hold
    assert not torch.equal(before["net.0.weight"], after["net.0.weight"])


def test_the_anchor_enters_the_loss_with_its_weight():
    phase, batch = e2e(small_cascade(), weight_reg=0.3), small_batch()
    phase.start_from(0.8)
    with torch.no_grad():
        for parameter in phase.cascade.coarse.parameters():
            parameter.add_(0.1)
    terms = phase.terms(batch)
    count = sum(p.numel() for p in phase.cascade.coarse.parameters())
    torch.testing.assert_close(terms["anchor"], torch.tensor(0.01 * count), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["loss"], 0.5 * terms["coarse"] + 0.5 * terms["refined"] + 0.3 * terms["anchor"])


def test_freezing_more_than_half_of_the_training_is_said(caplog):
    for frozen, said in ((2, False), (3, True)):
        caplog.clear()
        build_phase(compose("phase.epochs=4", f"protection.freeze_epochs={frozen}"), E2EPhase, {})
        assert ("protection.freeze_epochs=3 leaves the coarse network 1 of 4 epochs" in caplog.text) is said


@pytest.mark.parametrize(
    ("phase", "rates", "falls"),
    [
        ("coarse", {"coarse": "phase.lr"}, lambda t: (1 - t) ** 0.9),
        ("sam", {"sam": "phase.lr"}, lambda t: (1 + np.cos(np.pi * t)) / 2),
        ("e2e", {"coarse": "phase.coarse_lr", "sam": "phase.sam_lr"}, lambda t: (1 + np.cos(np.pi * t)) / 2),
    ],
)
def test_the_learning_rate_falls_as_the_recipe_says(phase, rates, falls):
    """TransUNet's polynomial in Phase 1, half a cosine in the others, step by step over the whole phase."""
    cfg = compose(f"phase={phase}")
    built = build_phase(cfg, get_class(cfg.phase._target_), {})
    built._trainer = SimpleNamespace(estimated_stepping_batches=40)
    made = built.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    found = {group["name"]: [] for group in optimizer.param_groups}
    for _ in range(41):
        for group in optimizer.param_groups:
            found[group["name"]].append(group["lr"])
        optimizer.step()
        schedule.step()
    assert found.keys() == rates.keys()
    for name, key in rates.items():
        expected = OmegaConf.select(cfg, key) * falls(np.arange(41) / 40)
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-15)
