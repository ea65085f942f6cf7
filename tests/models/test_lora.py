"""models/lora.py: starts as the plain model, trains only its own terms, merges back into a plain file."""

import pytest
import torch
from torch import Tensor

from ultrarefiner.errors import UserError
from ultrarefiner.models.lora import add_lora, merge_lora
from ultrarefiner.models.sam import Sam, load_sam


def image(sam: Sam) -> Tensor:
    return torch.rand(1, 1, sam.image_size, sam.image_size, generator=torch.Generator().manual_seed(0))


def disturb(parameters: list[torch.nn.Parameter]) -> None:
    """The same terms in every run: some draws sharpen the attention so much that rounding alone reaches 1e-4."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_starts_as_the_plain_model_and_trains_only_its_terms():
    sam = load_sam("tiny")
    with torch.no_grad():
        plain = sam.encode(image(sam))
    sam.set_trainable(False, False, False)
    added = add_lora(sam, rank=2)
    assert len(added) == 4 * 2 * 2
    with torch.no_grad():
        assert torch.equal(sam.encode(image(sam)), plain)
    embedding = sam.encode(image(sam))
    torch.testing.assert_close(embedding, plain, rtol=1e-4, atol=1e-5)  # with gradients: another order of summation
    embedding.square().sum().backward()
    touched = {name for name, p in sam.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in sam.named_parameters() if "lora_" in name}
    assert all(p.grad.abs().sum() > 0 for name, p in sam.named_parameters() if "lora_up" in name)
    sam.set_trainable(image_encoder=False, prompt_encoder=True, mask_decoder=True)
    assert all(p.requires_grad for p in added)


@pytest.mark.parametrize("family", ["tiny", pytest.param("litemedsam", marks=pytest.mark.slow)])
def test_merged_file_equals_the_adapted_model(family, tmp_path):
    sam = load_sam(family)
    names = sam.state_dict().keys()
    plain = sam.state_dict()["prompt_encoder.no_mask_embed.weight"].clone()
    disturb(add_lora(sam, rank=3, alpha=6.0, blocks=2))
    torch.save(merge_lora(sam), tmp_path / "merged.pth")
    merged = load_sam(family, tmp_path / "merged.pth")
    assert merged.state_dict().keys() == names
    assert torch.equal(merged.state_dict()["prompt_encoder.no_mask_embed.weight"], plain)
    with torch.no_grad():
        adapted, folded, before = (model.encode(image(model)) for model in (sam, merged, load_sam(family)))
    torch.testing.assert_close(folded, adapted, atol=1e-4, rtol=1e-4)
    assert (folded - before).abs().max() > 1e-3


def test_the_formula():
    sam = load_sam("tiny")
    disturb(add_lora(sam, rank=2, alpha=5.0, blocks=[1], targets=["proj"]))
    layer, x = sam.image_encoder.blocks[1].attn.proj, torch.randn(7, 96)
    expected = x @ layer.weight.T + layer.bias + 2.5 * (x @ layer.lora_down.T @ layer.lora_up.T)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("blocks", "expected"), [(1, {3}), (2, {2, 3}), (None, {0, 1, 2, 3}), ([0, -1], {0, 3}), ([2, 2], {2})]
)
def test_which_blocks(blocks, expected):
    sam = load_sam("tiny")
    add_lora(sam, blocks=blocks, targets=["qkv"])
    adapted = {i for i, block in enumerate(sam.image_encoder.blocks) if hasattr(block.attn.qkv, "lora_up")}
    assert adapted == expected


def test_adapted_state_resumes():
    sam, again = load_sam("tiny"), load_sam("tiny", seed=3)
    disturb(add_lora(sam, blocks=2))
    add_lora(again, blocks=2)
    again.load_state_dict(sam.state_dict())
    torch.testing.assert_close(again.encode(image(again)), sam.encode(image(sam)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 5}, "has 4 blocks"),
        ({"blocks": 0}, "has 4 blocks"),
        ({"blocks": [4]}, "4 is none of the 4 blocks"),
        ({"blocks": "2"}, "must be null"),
        ({"blocks": [1.5]}, "must be null"),
        ({"rank": 0}, "rank=0"),
        ({"targets": ["mlp"]}, "some of qkv, proj"),
        ({"targets": []}, "some of qkv, proj"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        add_lora(load_sam("tiny"), **options)


def test_twice():
    sam = load_sam("tiny")
    add_lora(sam, blocks=1)
    with pytest.raises(UserError, match="already"):
        add_lora(sam)
