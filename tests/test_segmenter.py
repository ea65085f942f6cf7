"""A trained pipeline as one object: what it draws is what the training measured."""

import copy
import csv
import io
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
from ultrarefiner.segmenter import Segmenter, apart


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


def test_images_as_python_users_have_them(e2e, tmp_path):
    _, data, segmenter = e2e
    image, _ = data.reader.read(data.split.test[0])
    picture = Image.fromarray(image)
    picture.save(tmp_path / "x.png")
    deep = Image.fromarray(image.astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    assert np.array_equal(segmenter(deep).mask, segmenter(tmp_path / "deep.png").mask)
    expected = segmenter(image).mask
    for one in (picture, picture.convert("RGB"), picture.convert("RGBA"), tmp_path / "x.png"):
        assert np.array_equal(segmenter(one).mask, expected)
    assert np.array_equal(segmenter.batch([picture, str(tmp_path / "x.png")])[1].mask, expected)
    with pytest.raises(TypeError, match="a numpy array, a PIL image or a path, got Tensor"):
        segmenter(torch.zeros(60, 60))
    with pytest.raises(UserError, match=r"nope\.png does not exist$"):
        segmenter("nope.png")


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
    assert found.refined is None and "no refiner" in found.reason


def with_options(segmenter, **options):
    return Segmenter(segmenter.cascade, segmenter.image_size, segmenter.coarse_size, "cpu", **options)


def test_a_rejected_mask_leaves_the_coarse_one(e2e):
    _, data, segmenter = e2e
    image, truth = data.reader.read(data.split.test[0])
    free = segmenter(image, coarse=truth)
    assert free.accepted and free.reason == "" and np.array_equal(free.mask, free.refined)
    rules = Safety(min_iou=1.0, min_dice=None, min_area=None, max_area=1e-6)
    strict = with_options(segmenter, safety=rules)(image, coarse=truth)
    assert not strict.accepted and np.array_equal(strict.mask, strict.coarse)
    assert "predicted IoU" in strict.reason and "; area" in strict.reason
    assert np.array_equal(strict.refined, free.refined) and strict.iou == free.iou and strict.box == free.box
    assert np.array_equal(strict.probability > 0.5, strict.mask)
    assert np.array_equal(strict.coarse_probability, free.coarse_probability)
    assert np.array_equal(free.coarse_probability > 0.5, free.coarse)


def test_no_lesion_stays_none_also_beside_images_with_one(e2e):
    _, data, segmenter = e2e
    image, truth = data.reader.read(data.split.test[0])
    none = np.zeros_like(truth)
    for options in ({}, {"lesions": "each"}, {"tta": ["flips", "scales"]}):
        careful = with_options(segmenter, safety=Safety(min_dice=None, min_area=None, max_area=None), **options)
        empty, full, again = careful.batch([image] * 3, [none, truth, none])
        for one in (empty, again):
            assert not one.mask.any() and not one.accepted and one.reason == "the coarse mask is empty"
            assert one.refined is None and one.iou is None and one.box is None and one.uncertainty == 0
        assert full.accepted and np.array_equal(full.mask, careful(image, coarse=truth).mask)


def test_each_lesion_by_itself(e2e):
    """The union of what is drawn of each alone; of a single lesion there is no difference."""
    _, data, segmenter = e2e
    image, truth = data.reader.read(data.split.test[0])
    each = with_options(segmenter, lesions="each", safety=Safety.none())
    assert np.array_equal(each(image, coarse=truth).mask, segmenter(image, coarse=truth).mask)
    height, width = image.shape
    y, x = np.mgrid[:height, :width]
    left = (x - 0.25 * width) ** 2 + (y - 0.3 * height) ** 2 < (0.12 * width) ** 2
    right = (x - 0.75 * width) ** 2 + (y - 0.7 * height) ** 2 < (0.1 * width) ** 2
    sure = np.float32(0.999)  # probabilities, as a mask would be made soft
    found = each(image, coarse=sure * (left | right))
    alone = [segmenter(image, coarse=sure * one) for one in (left, right)]
    assert np.mean(found.mask ^ (alone[0].mask | alone[1].mask)) < 0.02
    assert found.iou == pytest.approx(min(one.iou for one in alone), abs=0.05)
    assert found.box[0] == pytest.approx(min(one.box[0] for one in alone), abs=2)
    assert found.box[3] == pytest.approx(max(one.box[3] for one in alone), abs=2)
    with pytest.raises(UserError, match="lesions must be"):
        with_options(segmenter, lesions="all")


def test_lesions_of_a_map_are_parted_where_they_are_nearest(e2e):
    logit = torch.full((1, 20, 30), -3.0)
    logit[0, 4:9, 4:9], logit[0, 12:15, 20:23], logit[0, 18, 2] = 2.0, 1.0, 0.5
    parts = apart(logit)
    assert parts.shape == (3, 1, 20, 30)
    assert torch.equal(parts.amax(0), logit)  # nothing is lost
    assert [int((part > 0).sum()) for part in parts] == [25, 9, 1]
    assert ((parts > -16).sum(0) == 1).all()  # each pixel goes to one lesion
    assert len(apart(logit, most=2)) == 2 and torch.equal(apart(logit, most=2).amax(0), logit)
    assert torch.equal(apart(torch.full((1, 5, 5), -1.0)), torch.full((1, 1, 5, 5), -1.0))


def test_the_mean_over_views(e2e):
    """Of a mirrored image: the mirrored result, which it would not be of a single view."""
    _, data, segmenter = e2e
    image, _ = data.reader.read(data.split.test[0])
    both = with_options(segmenter, tta="flips", safety=Safety.none())
    found, mirrored = both(image), both(np.ascontiguousarray(image[:, ::-1]))
    np.testing.assert_allclose(found.probability, mirrored.probability[:, ::-1], atol=1e-4)
    one, other = segmenter(image), segmenter(np.ascontiguousarray(image[:, ::-1]))
    np.testing.assert_allclose(found.probability, (one.probability + other.probability[:, ::-1]) / 2, atol=1e-5)
    assert found.iou == pytest.approx((one.iou + other.iou) / 2, abs=1e-5)
    scaled = with_options(segmenter, tta=["scales"])(image)
    assert scaled.probability.shape == image.shape and np.isfinite(scaled.probability).all()


def test_a_lesion_that_only_another_view_shows_is_redrawn(e2e):
    _, data, segmenter = e2e
    image = data.reader.read(data.split.test[0])[0]

    class LeftSide(torch.nn.Module):
        """Sure of a lesion in the left half of what it is shown where that is bright, undecided elsewhere."""

        def forward(self, image):
            logit = torch.where(image > 0.9, 6.0, -0.2)
            logit[..., image.shape[-1] // 2 :] = -0.2
            return torch.cat([torch.zeros_like(logit), logit], 1)

    seen = np.zeros_like(image)
    seen[20:40, 42:58] = 255
    both = with_options(copy.deepcopy(segmenter), tta="flips")
    both.cascade.coarse = LeftSide()
    for picture in (seen, np.ascontiguousarray(seen[:, ::-1])):
        found = both(picture)
        assert found.coarse.any() and found.refined is not None and "empty" not in found.reason


def test_it_is_frozen_and_can_be_loaded_where_nothing_is_trained(e2e):
    """SAM's image encoder takes its fastest form only where no parameter asks for a gradient."""
    with torch.inference_mode():
        segmenter = Segmenter.load("shipped", "cpu")
    assert not any(parameter.requires_grad for parameter in segmenter.cascade.parameters())
    segmenter(e2e[1].reader.read(e2e[1].split.test[0])[0])
    assert segmenter.cascade.refiner.sam.image_encoder._copy is not None


def test_a_path_and_a_picture_of_the_result(e2e, tmp_path):
    _, data, segmenter = e2e
    image, _ = data.reader.read(data.split.test[0])
    Image.fromarray(image).save(tmp_path / "image.png")
    found = segmenter(str(tmp_path / "image.png"))
    assert np.array_equal(found.mask, segmenter(image).mask) and np.array_equal(found.image[..., 0], image)
    with Image.open(io.BytesIO(found._repr_png_())) as picture:
        assert picture.size == image.shape[::-1] and picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), found.overlay())
    assert f"{image.shape[1]} × {image.shape[0]}" in repr(found) and "redrawn" in repr(found)
    with pytest.raises(UserError, match="nowhere"):
        segmenter(tmp_path / "nowhere.png")


def test_a_device_that_is_not_there(e2e):
    with pytest.raises(UserError, match="device=toaster is not there"):
        Segmenter(e2e[2].cascade, 64, 32, "toaster")


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


def test_the_package_names_it_without_importing_torch_nor_what_only_trains(e2e):
    code = (
        "import sys, ultrarefiner; assert 'torch' not in sys.modules; ultrarefiner.Segmenter.load(sys.argv[1]); "
        "assert not {'pytorch_lightning', 'torchmetrics', 'highdicom'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(e2e[0])], check=True)
    assert ultrarefiner.Segmenter is Segmenter
