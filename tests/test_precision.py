"""Sixteen bits where they are faster: which they are, and that they draw the same masks."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import compose
from ultrarefiner import precision
from ultrarefiner.errors import UserError
from ultrarefiner.models.sam import Sam, load_sam
from ultrarefiner.results.metrics import overlap
from ultrarefiner.runs.plan import plan
from ultrarefiner.segmenter import Segmenter

EXAMPLES = Path(__file__).parents[1] / "examples" / "images"


def half() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def test_the_probe_agrees_with_what_the_processor_says_of_itself():
    said = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    flags = set(re.search(r"^flags\s*:(.*)$", said, re.M)[1].split()) if "flags" in said else set()
    if not flags:
        pytest.skip("this system does not say what its processor can do")
    has = bool(flags & {"avx512_bf16", "amx_bf16"})
    assert (precision.fastest("cpu", 512) == "bf16-mixed") is has


@pytest.mark.parametrize(
    ("device", "frame", "pays", "expected"),
    [
        ("cpu", 512, True, "bf16-mixed"),
        ("cpu", 512, False, "32-true"),
        ("cpu", 128, True, "32-true"),  # model=tiny: converting costs what the products save
        ("cpu", 0, True, "32-true"),
        ("mps", 512, True, "32-true"),
    ],
)
def test_sixteen_bits_only_where_they_pay(monkeypatch, device, frame, pays, expected):
    monkeypatch.setattr(precision, "_processor_has_bfloat16", lambda: pays)
    assert precision.fastest(device, frame) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "32-true"), ((8, 0), "bf16-mixed")])
def test_a_gpu_that_only_imitates_it_computes_in_float32(monkeypatch, capability, expected):
    """A T4 or V100 makes tensors of bfloat16 too, but computes with them far slower than in float32."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=capability[0]))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert precision.fastest("cuda", 512) == expected


def test_what_the_probe_makes_of_its_times(monkeypatch):
    """The fastest of several products counts, and the probe leaves the threads as they were."""
    threads = torch.get_num_threads()
    for half, expected in ((0.5, True), (0.74, True), (0.9, False), (400.0, False)):
        taken = iter([[1.0, 3.0], [2 * half, half]])
        monkeypatch.setattr(precision.timeit, "repeat", lambda *_, taken=taken, **__: next(taken))
        assert precision._processor_has_bfloat16.__wrapped__() is expected
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("pays", [True, False])
def test_each_phase_takes_what_is_fastest_for_it(tmp_path, monkeypatch, pays):
    """Phase 1, which gains nothing, is the very run that phase=coarse makes; what was asked for is taken everywhere."""
    monkeypatch.setattr(precision, "_processor_has_bfloat16", lambda: pays)
    more = ("model=lite", "dataset=phantom", "trainer.accelerator=cpu", f"output_root={tmp_path}")
    runs = {run.cfg.phase.name: run for run in plan(compose("phase=e2e", *more, micro=False))}
    refining = "bf16-mixed" if pays else "32-true"
    assert {name: run.cfg.trainer.precision for name, run in runs.items()} == {
        "coarse": "32-true",
        "sam": refining,
        "e2e": refining,
    }
    assert ("bf16-mixed" in runs["e2e"].title) is pays
    assert plan(compose("phase=coarse", *more, micro=False))[-1].directory == runs["coarse"].directory
    asked = plan(compose("phase=e2e", *more, "trainer.precision=32-true", micro=False))
    assert [run.directory for run in asked].count(runs["coarse"].directory) == 1
    assert (asked[-1].directory == runs["e2e"].directory) is not pays  # the choice defines the result
    assert {run.cfg.trainer.precision for run in asked} == {"32-true"}


@pytest.fixture(scope="module")
def encoders() -> dict[str, Sam]:
    return {family: load_sam(family) for family in ("tiny", "litemedsam")}


@pytest.mark.parametrize("family", ["tiny", pytest.param("litemedsam", marks=pytest.mark.slow)])
def test_a_frozen_encoder_in_sixteen_bits(encoders, family):
    """Hardly further from float32 than an autocast around it is; the image's gradient points the same way."""
    if family == "litemedsam" and precision.fastest("cpu", 512) != "bf16-mixed":
        pytest.skip("this processor does not compute in bfloat16, and would need minutes")
    encoder = encoders[family].image_encoder
    image = torch.rand(1, 3, encoder.img_size, encoder.img_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder(image)
        with half():
            found, plain = encoder(image), encoder._run(image)
    assert found.dtype == torch.bfloat16
    assert 0 < error(found, expected) < 0.06 and error(found, expected) <= 1.5 * error(plain, expected)
    gradients = []
    for context in (torch.autocast("cpu", enabled=False), half()):
        x = image.clone().requires_grad_()
        with context:
            out = encoder(x)
        out.float().tanh().sum().backward()
        gradients.append(x.grad.flatten())
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95


def test_the_copy_in_sixteen_bits_follows_the_weights(encoders):
    sam = encoders["tiny"]
    names, image = list(sam.state_dict()), torch.rand(1, 1, sam.image_size, sam.image_size)
    with torch.no_grad(), half():
        first = sam.encode(image)
        assert torch.equal(sam.encode(image), first)
        sam.image_encoder.neck[3].bias.add_(1.0)
        torch.testing.assert_close(sam.encode(image), first + 1.0, atol=0.05, rtol=0.02)
        sam.image_encoder.neck[3].bias.sub_(1.0)
    assert list(sam.state_dict()) == names
    assert {p.dtype for p in sam.parameters()} == {torch.float32}


def test_a_trained_encoder_keeps_its_own_weights(encoders):
    """What is trained must not run on a copy, or no gradient would reach it."""
    sam = encoders["tiny"]
    sam.set_trainable(image_encoder=1, prompt_encoder=True, mask_decoder=True)
    with half():
        sam.encode(torch.rand(1, 1, sam.image_size, sam.image_size)).float().square().sum().backward()
    assert sam.image_encoder.neck[0].weight.grad.abs().sum() > 0
    sam.zero_grad()
    sam.set_trainable(image_encoder=False, prompt_encoder=True, mask_decoder=True)


@pytest.fixture(scope="module")
def drawn():
    """The examples, drawn by the pair that ships in both formats."""
    if precision.fastest("cpu", 512) != "bf16-mixed":
        pytest.skip("this processor does not compute in bfloat16, and would need minutes")
    images = [np.asarray(Image.open(path).convert("L")) for path in sorted(EXAMPLES.glob("*.png"))[:3]]
    found = {}
    for name in ("auto", "32-true"):
        segmenter = Segmenter.load("shipped", "cpu", precision=name)
        found[segmenter.precision] = segmenter.batch(images)
    return found


def test_the_pair_that_ships_draws_the_same_masks(drawn):
    assert set(drawn) == {"bf16-mixed", "32-true"}
    for low, full in zip(drawn["bf16-mixed"], drawn["32-true"], strict=True):
        assert overlap(low.mask, full.mask)["dice"] > 0.99
        assert np.array_equal(low.coarse_probability, full.coarse_probability)  # in float32 on a processor
        assert abs(low.probability - full.probability).mean() < 0.005
        assert low.probability.dtype == np.float32 and not np.array_equal(low.probability, full.probability)
        assert low.accepted == full.accepted and abs(low.iou - full.iou) < 0.02


def test_unknown_precisions():
    with pytest.raises(UserError, match="precision must be one of auto, 32-true, bf16-mixed, 16-mixed, got 8"):
        Segmenter.load("shipped", "cpu", precision="8")
