"""models/weights.py: checkpoints that are accepted, and those that are refused."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ultrarefiner.errors import UserError
from ultrarefiner.models.sam import load_sam
from ultrarefiner.models.sam_lite import lite_weights
from ultrarefiner.models.weights import read_metadata, read_state_dict, write_state_dict


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module.", "model.sam."])
def test_files_that_are_accepted(tmp_path, wrap, prefix):
    sam = load_sam("tiny", seed=7)
    torch.save(wrap({prefix + name: value for name, value in sam.state_dict().items()}), tmp_path / "sam.pth")
    loaded = load_sam("tiny", tmp_path / "sam.pth").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in sam.state_dict().items())


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch /tmp/ultrarefiner-was-here",))


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "sam.pth"
    with pytest.raises(UserError, match="does not exist"):
        load_sam("tiny", path)
    state = load_sam("tiny").state_dict()

    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UserError, match="truncated"):
        load_sam("tiny", path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="truncated"):
        load_sam("tiny", path)
    path.write_bytes(pickle.dumps({"model": Malicious()}, protocol=2))
    with pytest.raises(UserError, match="refused"):
        load_sam("tiny", path)
    assert not Path("/tmp/ultrarefiner-was-here").exists()

    nan = {**state, "mask_decoder.iou_token.weight": torch.full((1, 64), float("nan"))}
    lost = {name: value for name, value in state.items() if "no_mask_embed" not in name}
    bent = {**state, "mask_decoder.iou_token.weight": torch.zeros(1, 32)}
    for content, message in [
        (nan, "NaN"),
        (lost, "missing: prompt_encoder.no_mask_embed.weight"),
        ({**state, "surplus.weight": torch.zeros(1)}, "left over: surplus.weight"),
        (bent, r"\(1, 32\) instead of \(1, 64\)"),
        ({"epoch": 3}, "holds no weights"),
        ([1, 2], "holds no weights"),
        ({"linear.weight": torch.zeros(1)}, "none of the known families"),
    ]:
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            load_sam("tiny", path)

    with pytest.raises(UserError, match="of litemedsam, not of vit_b"):
        load_sam("vit_b", lite_weights())
    torch.save(state, path)
    with pytest.raises(UserError, match="of tiny, not of medsam"):
        load_sam("medsam", path)
    said = r"model\.sam\.checkpoint=auto.*https.*or model\.sam\.checkpoint=<path of sam_vit_b_01ec64\.pth>"
    with pytest.raises(UserError, match=said):
        load_sam("vit_b")
    with pytest.raises(UserError, match="choose one of vit_b"):
        load_sam("vit_x")


def test_a_publishers_name_means_the_publishers_file(tmp_path):
    path = tmp_path / "sam_vit_b_01ec64.pth"
    torch.save(load_sam("tiny").state_dict(), path)
    with pytest.raises(UserError, match="instead of 375042383"):
        read_state_dict(path)


def test_safetensors(tmp_path):
    path, sam = tmp_path / "sam.safetensors", load_sam("tiny", seed=7)
    write_state_dict(sam.state_dict(), path, {"licence": "Apache-2.0", "seen": "busi"})
    loaded = load_sam("tiny", path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in sam.state_dict().items())
    assert read_metadata(path) == {"format": "pt", "licence": "Apache-2.0", "seen": "busi"}
    assert torch.equal(load_file(path)["mask_decoder.iou_token.weight"], sam.mask_decoder.iou_token.weight)

    turned = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(1).expand(4)}  # views of other tensors
    write_state_dict(turned, path)
    assert all(torch.equal(value, load_file(path)[name]) for name, value in turned.items())
    write_state_dict(turned, tmp_path / "plain.pth", {"licence": "Apache-2.0"})
    assert read_metadata(tmp_path / "plain.pth") == {}
    assert torch.equal(read_state_dict(tmp_path / "plain.pth")["a"], turned["a"])


def test_safetensors_that_are_refused(tmp_path):
    path = tmp_path / "sam.safetensors"
    for read in (read_state_dict, read_metadata):
        with pytest.raises(UserError, match="does not exist"):
            read(path)
    write_state_dict(load_sam("tiny").state_dict(), path)
    whole = path.read_bytes()
    for harmed in (whole[:100_000], whole[:7], b"", b"hello" * 100):
        path.write_bytes(harmed)
        for read in (read_state_dict, read_metadata):
            with pytest.raises(UserError, match="truncated or damaged"):
                read(path)
    write_state_dict({"mask_decoder.iou_token.weight": torch.full((1, 64), float("nan"))}, path)
    with pytest.raises(UserError, match="NaN"):
        read_state_dict(path)
    write_state_dict({"linear.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="none of the known families"):
        load_sam("tiny", path)
    blocked = tmp_path / "file" / "sam.safetensors"
    blocked.parent.write_text("no folder")
    with pytest.raises(UserError, match="cannot write"):
        write_state_dict({"linear.weight": torch.zeros(1)}, blocked)
