"""A trained pipeline as one object: what it draws is what the training measured."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import ultrarefiner
from ultrarefiner.errors import UserError
from ultrarefiner.models.cascade import lesion_logit
from ultrarefiner.results.evaluation import native_masks
from ultrarefiner.results.metrics import overlap
from ultrarefiner.results.safety import Safety
from ultrarefiner.runs.plan import plan
from ultrarefiner.segmenter import Segmenter


def runs(root):
    found = {}
    for path in root.glob("phantom/tiny/*/*/config.yaml"):
        found[OmegaConf.load(path).phase.name] = path.parent
    return found


@pytest.fixture(scope="module")
def e2e(finished_runs):
    """The directory of Phase 3, its data and its segmenter."""
    directory = runs(finished_runs)["e2e"]
    data = plan(OmegaConf.load(directory / "config.yaml"))[-1].data
    return directory, data, Segmenter.load(directory, safety=Safety.none())


def test_it_draws_what_the_training_measured(e2e):
    """Masks equal to the bit, so Dice too: of every test case, one by one and in a batch."""
    directory, data, segmenter = e2e
    rows = {row["id"]: row for row in csv.DictReader((directory / "cases.csv").open())}
    images = [data.reader.read(case) for case in data.split.test]
    together = segmenter.batch([image for image, _ in images])
    for case, (image, truth), found in zip(data.split.test, images, together, strict=True):
        alone = segmenter(image)
        for which, mask in (("refined", alone.mask), ("coarse", alone.coarse)):
            assert overlap(mask, truth)["dice"] == float(rows[case.id][f"{which}_dice"])
        assert np.array_equal(found.mask, alone.mask) and np.array_equal(found.coarse, alone.coarse)
    assert len(rows) == len(together) > 1


def test_it_agrees_with_the_phases_own_prediction_to_the_bit(e2e):
    _, data, segmenter = e2e
    cascade = segmenter.cascade

    def predict(batch):
        out = cascade(batch["coarse_image"], batch["image"], batch["aspect"])
        return {"coarse": lesion_logit(out.coarse_logits), "refined": out.refined.logits}

    for batch in data.test_dataloader():
        with torch.inference_mode():
            expected = native_masks(predict, batch)
        ids = [case for case in data.split.test if case.id in batch["id"]]
        found = segmenter.batch([data.reader.read(case)[0] for case in ids])
        for one, masks in zip(found, expected, strict=True):
            assert np.array_equal(one.mask, masks["refined"]) and np.array_equal(one.coarse, masks["coarse"])


def test_what_is_said_of_a_mask_fits_it(e2e):
    _, data, segmenter = e2e
    image, _ = data.reader.read(data.split.test[0])
    found = segmenter(image)
    height, width = image.shape
    assert found.mask.shape == found.coarse.shape == found.probability.shape == image.shape
    assert found.mask.dtype == found.coarse.dtype == bool and found.probability.dtype == np.float32
    assert np.array_equal(found.probability > 0.5, found.mask)
    assert 0 <= found.uncertainty <= 1 and found.accepted and np.isfinite(found.iou)
    x1, y1, x2, y2 = found.box
    rows, columns = np.nonzero(found.mask)
    assert x1 <= columns.min() and columns.max() + 1 <= x2 + 1 and y1 <= rows.min() and rows.max() + 1 <= y2 + 1
    assert x2 - x1 <= 2 * width and y2 - y1 <= 2 * height


def test_an_image_of_any_shape_and_in_colour(e2e):
    _, data, segmenter = e2e
    image, _ = data.reader.read(data.split.test[0])
    wide = np.asarray(Image.fromarray(image).resize((200, 90)))
    assert segmenter(wide).mask.shape == (90, 200)
    colour = np.repeat(wide[..., None], 3, axis=2)
    assert np.array_equal(segmenter(colour).mask, segmenter(wide).mask)
    with pytest.raises(ValueError, match="8 bits"):
        segmenter(wide.astype(np.float32))


def test_a_mask_from_outside_takes_the_place_of_the_coarse_networks(e2e, finished_runs):
    """Phase 2's run has no coarse network: it needs such masks, and refines them."""
    _, data, segmenter = e2e
    image, truth = data.reader.read(data.split.test[0])
    given = segmenter(image, coarse=truth)
    assert overlap(given.coarse, truth)["dice"] > 0.9
    empty = segmenter(image, coarse=np.zeros_like(truth))
    assert not np.array_equal(empty.mask, given.mask) and not empty.coarse.any()
    phase2 = Segmenter.load(runs(finished_runs)["sam"])
    assert phase2(image, coarse=truth.astype(np.float32)).coarse.any()
    with pytest.raises(UserError, match="coarse mask"):
        phase2(image)
    with pytest.raises(ValueError, match="does not belong"):
        segmenter(image, coarse=truth[:-1])


def test_phase_one_alone_redraws_nothing(e2e, finished_runs):
    _, data, _ = e2e
    image, _ = data.reader.read(data.split.test[0])
    found = Segmenter.load(runs(finished_runs)["coarse"])(image)
    assert np.array_equal(found.mask, found.coarse) and found.box is None and not found.accepted


def test_a_checkpoint_is_one_file_that_carries_its_configuration(e2e, tmp_path):
    directory, data, segmenter = e2e
    image, _ = data.reader.read(data.split.test[0])
    alone = tmp_path / "elsewhere.ckpt"
    alone.write_bytes((directory / "checkpoints" / "best.ckpt").read_bytes())
    assert np.array_equal(Segmenter.load(alone, safety=Safety.none())(image).mask, segmenter(image).mask)
    torch.save({"state_dict": {}}, tmp_path / "plain.pth")
    for wrong, reason in ((tmp_path / "plain.pth", "how its networks"), (tmp_path, "no checkpoints"), ("/x", "exist")):
        with pytest.raises(UserError, match=reason):
            Segmenter.load(wrong)


def test_the_package_names_it_without_importing_torch():
    code = "import sys, ultrarefiner; assert 'torch' not in sys.modules; from ultrarefiner import Segmenter"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert ultrarefiner.Segmenter is Segmenter
