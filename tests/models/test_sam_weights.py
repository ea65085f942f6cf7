"""models/weights.py: checkpoints that are accepted, those that are refused, and fetching them."""

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch

from ultrarefiner.errors import UserError
from ultrarefiner.models.sam import load_sam
from ultrarefiner.models.sam_lite import lite_weights
from ultrarefiner.models.weights import Release, download_checkpoint, read_state_dict


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
    with pytest.raises(UserError, match=r"sam_vit_b_01ec64\.pth>, published at https"):
        load_sam("vit_b")
    with pytest.raises(UserError, match="choose one of vit_b"):
        load_sam("vit_x")


def test_a_publishers_name_means_the_publishers_file(tmp_path):
    path = tmp_path / "sam_vit_b_01ec64.pth"
    torch.save(load_sam("tiny").state_dict(), path)
    with pytest.raises(UserError, match="instead of 375042383"):
        read_state_dict(path)


def test_download(tmp_path):
    source, folder = tmp_path / "published.pth", tmp_path / "weights"
    source.write_bytes(os.urandom(3_000_000))
    right = Release(source.as_uri(), 3_000_000, hashlib.sha256(source.read_bytes()).hexdigest())
    target = download_checkpoint("vit_b", folder, {"vit_b": right})
    assert target == folder / "published.pth" and target.read_bytes() == source.read_bytes()
    source.unlink()
    assert download_checkpoint("vit_b", folder, {"vit_b": right}) == target  # it is there: nothing is fetched
    target.unlink()
    with pytest.raises(UserError, match="could not be fetched"):
        download_checkpoint("vit_b", folder, {"vit_b": right})
    source.write_bytes(os.urandom(3_000_000))
    with pytest.raises(UserError, match="SHA-256"):
        download_checkpoint("vit_b", folder, {"vit_b": right})
    source.write_bytes(os.urandom(2_000_000))
    with pytest.raises(UserError, match="truncated"):
        download_checkpoint("vit_b", folder, {"vit_b": right})
    assert list(folder.iterdir()) == []  # nothing half-written
    with pytest.raises(UserError, match="no published file"):
        download_checkpoint("tiny", folder)
