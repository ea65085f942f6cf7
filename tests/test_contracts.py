"""docs/contracts.md: what ships keeps to it, and what a user writes that does not is one sentence before training."""

import re
import sys

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from conftest import MICRO
from ultrarefiner.cli import CONF, HOME
from ultrarefiner.refine.roi import FullFrame, LesionRoi
from ultrarefiner.runs import experiment

PAGE = HOME / "docs" / "contracts.md"
MAPS = {
    "nothing": torch.zeros(2, 1, 24, 24),
    "everything": torch.ones(2, 1, 24, 24),
    "a lesion": torch.zeros(2, 1, 24, 24).index_fill(3, torch.arange(5, 12), 0.9),
}
GATES = sorted(path.stem for path in (CONF / "gate").glob("*.yaml"))
STYLES = sorted(path.stem for path in (CONF / "prompt_style").glob("*.yaml"))


def prob(name: str) -> torch.Tensor:
    return MAPS[name].clone().requires_grad_()


def test_the_page_names_each_kind_that_can_be_chosen():
    page = PAGE.read_text("utf-8")
    for group in (path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "trainer")):
        assert re.search(rf"`{group}[.`]", page), group


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("style", STYLES)
def test_prompt_styles(style, name):
    given = prob(name)
    logits = instantiate(OmegaConf.load(CONF / "prompt_style" / f"{style}.yaml").mask)(given, 16)
    assert logits.shape == (2, 1, 16, 16) and logits.abs().max() <= 10
    logits.sum().backward()
    assert given.grad.isfinite().all() and given.grad.abs().sum() > 0


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("roi", [LesionRoi(square=True), LesionRoi(square=False), FullFrame()])
def test_regions_of_interest(roi, name):
    given = prob(name)
    boxes = roi.boxes(given, torch.tensor([0.7, 1.5]))
    assert boxes.shape == (2, 4) and (boxes[:, :2] < boxes[:, 2:]).all()
    assert roi.keeps_aspect or ((boxes >= 0) & (boxes <= 1)).all()
    if boxes.requires_grad:
        boxes.sum().backward()
        assert given.grad.isfinite().all()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("gate", GATES)
def test_gates(gate, name):
    node = OmegaConf.load(CONF / "gate" / f"{gate}.yaml")
    node.pop("name")
    coarse = torch.logit(prob(name), eps=1e-7)
    refined = torch.randn(2, 1, 24, 24, requires_grad=True)
    final = instantiate(node)(coarse, refined, torch.rand(2, 1, 24, 24))
    assert final.shape == (2, 1, 24, 24) and final.isfinite().all()
    final.sum().backward()
    assert refined.grad.isfinite().all()


HEAD = """
import torch
from torch import nn
from ultrarefiner.phases.coarse import CoarsePhase


class Own(nn.Module):
    keeps_aspect = False

    def __init__(self, **_):
        super().__init__()

"""
BOXES = "    def boxes(self, prob, aspect=None):\n        return torch.tensor([{}]).repeat(len(prob), 1)\n"
GATE = "    def forward(self, coarse, refined, image):\n        return {}\n"
ROI, OTHER_GATE = ["phase=sam", "roi._target_=own_part.Own"], ["phase=sam", "gate._target_=own_part.Own"]
BROKEN = {
    "upside down": (BOXES.format([0.9, 0.9, 0.1, 0.1]), ROI, r"boxes\(\) of roi must be .*own_part\.Own"),
    "outside": (BOXES.format([0.1, 0.1, 1.5, 1.5]), ROI, r"boxes\(\) of roi must be .* in \[0, 1\].*own_part\.Own"),
    "another size": (GATE.format("refined[:, :, ::2]"), OTHER_GATE, r"own_part\.Own"),
    "NaN": (GATE.format("refined / 0 * 0"), OTHER_GATE, r"finite.*own_part\.Own"),
    "a prompt of another size": (
        "    def forward(self, prob, size):\n        return prob[:, :, ::2, ::2]\n",
        ["phase=sam", "prompt_style.mask._target_=own_part.Own"],
        r"own_part\.Own",
    ),
    "a loss of two numbers": (
        "\n\nclass Loss(CoarsePhase):\n    def terms(self, batch):\n        return {'loss': torch.ones(2)}\n",
        ["phase=coarse", "phase.name=own", "phase._target_=own_part.Loss"],
        r"must be one finite number.*own_part\.Loss",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_breaks_its_contract_is_one_sentence(what, command, tmp_path, monkeypatch):
    body, given, sentence = BROKEN[what]
    (tmp_path / "own_part.py").write_text(HEAD + body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(experiment, "train", lambda *_: pytest.fail("it is trained"))
    sys.modules.pop("own_part", None)
    done = command(*MICRO, f"output_root={tmp_path}/out", *given)
    sys.modules.pop("own_part", None)
    lines = done.err.strip().splitlines()
    assert done.status == 1 and len(lines) == 1 and re.search(f"^error: .*(?:{sentence})", lines[0]), done.err
