"""Real predictions in Phase 2: leak-free, reused, and part of a result's identity only where they are used."""

import json
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.ndimage import distance_transform_edt

from conftest import compose
from data_layouts import write_busbra
from ultrarefiner import files
from ultrarefiner.data.cases import Case
from ultrarefiner.data.datamodule import DataModule
from ultrarefiner.data.failures import FailureSimulator, fit_bins
from ultrarefiner.data.failures.softness import Softness
from ultrarefiner.data.folds import Split, hold_out, save_split
from ultrarefiner.data.predictions import Predictions
from ultrarefiner.data.readers import BusBra
from ultrarefiner.data.store import Store
from ultrarefiner.errors import UserError
from ultrarefiner.phases.coarse import CoarsePhase
from ultrarefiner.refine.prompts import soft_box
from ultrarefiner.refine.roi import LesionRoi
from ultrarefiner.runs import out_of_fold, start, training
from ultrarefiner.runs.assemble import build_data
from ultrarefiner.runs.experiment import run
from ultrarefiner.runs.interruption import Deadline
from ultrarefiner.runs.plan import plan

pytestmark = pytest.mark.xdist_group("out_of_fold")  # what it trains first is trained on one worker
FIT = ["phase=sam", "phase.softness=fit", "phase.bins=fit", "phase.real_ratio=0.5", "phase.parts=2"]


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_the_parts_are_the_training_cases_and_share_no_patient(parts, tmp_path):
    reader = BusBra(write_busbra(tmp_path / "data", 40))
    options = {"fold": 1, "seed": 0, "batch_size": 4, "image_size": 64, "coarse_size": 32}
    whole = DataModule(Store(reader, tmp_path / "cache"), **options).split
    held: list[Case] = []
    for part in range(parts):
        split = DataModule(Store(reader, tmp_path / "cache"), without=[part, parts], **options).split
        assert (split.val, split.test) == (whole.val, whole.test)
        assert set(split.train) | set(split.held) == set(whole.train) and not set(split.train) & set(split.held)
        others = {case.patient for case in (*split.train, *split.val, *split.test)}
        assert not {case.patient for case in split.held} & others
        malignant = [sum(case.label == "malignant" for case in cases) for cases in (split.held, whole.train)]
        assert abs(malignant[0] - malignant[1] / parts) <= 2  # a patient has two images
        held += split.held
    assert sorted(held, key=lambda case: case.id) == sorted(whole.train, key=lambda case: case.id)
    save_split(split, tmp_path / "folds.csv")
    assert (tmp_path / "folds.csv").read_text().count("held,") == len(split.held)


@pytest.mark.parametrize(("part", "parts"), [(2, 2), (-1, 3), (0, 1), (0, 0)])
def test_a_part_that_is_not_there(part, parts):
    with pytest.raises(UserError, match=r"dataset\.without="):
        hold_out(Split((), (), ()), part, parts, {}, 0)


def test_more_parts_than_patients():
    cases = tuple(Case(str(i), "d", patient="one") for i in range(5))
    with pytest.raises(UserError, match=r"phase\.parts"):
        hold_out(Split(cases, (), ()), 0, 2, {case.key: 0 for case in cases}, 0)


MISTAKES = {
    "phase.softness=soft": "one of null, fit",
    "phase.bins=good": "one of null, fit",
    "phase.real_ratio=1.5": "between 0 and 1",
    "phase.real_ratio=-0.1": "between 0 and 1",
    "phase.parts=1": "2 or more",
}


@pytest.mark.parametrize("override", MISTAKES)
@pytest.mark.parametrize("phase", ["sam", "e2e"])
def test_what_cannot_be_is_refused_before_anything_is_trained(override, phase, tmp_path):
    override_here = override if phase == "sam" else override.replace("phase.", "phase.sam.")
    with pytest.raises(UserError, match=MISTAKES[override]):
        run(compose(f"phase={phase}", override_here, f"output_root={tmp_path}"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="contradict"):
        plan(compose("phase=sam", "phase.softness=fit", "+phase.failures.softness.width=3", f"output_root={tmp_path}"))
    with pytest.raises(UserError, match="contradict"):
        plan(compose("phase=sam", "phase.bins=fit", "+phase.failures.bins=[[0.5,0.9,1]]", f"output_root={tmp_path}"))


def test_how_the_coarse_network_is_trained_counts_only_where_it_is_used():
    plain = [plan(compose("phase=sam", f"phase.coarse.epochs={epochs}"))[-1] for epochs in (1, 2)]
    assert plain[0].cfg == plain[1].cfg and plain[0].directory == plain[1].directory
    assert plain[0].cfg.phase.coarse is None and "model.coarse" not in plain[0].settings
    for wanted in ("phase.softness=fit", "phase.bins=fit", "phase.real_ratio=0.1"):
        run = plan(compose("phase=sam", wanted, "phase.coarse.epochs=7"))[-1]
        assert run.cfg.phase.coarse.epochs == 7 and "model.coarse" in run.settings
    e2e = plan(compose("phase.sam.softness=fit", "phase.coarse.epochs=7"))[-1]
    assert e2e.cfg.phase.sam.coarse.epochs == 7  # one Phase 1 for both


def test_predictions_keep_their_logits(tmp_path):
    stored = Predictions(tmp_path / "p")
    logit = np.linspace(-20, 20, 64, dtype=np.float32).reshape(8, 8)
    case = Case("../a", "d")
    stored.save(case, logit)
    prob = stored.load(case, 8)
    inner = np.abs(logit) < 10
    np.testing.assert_allclose(np.log(prob / (1 - prob))[inner], logit[inner], rtol=2e-2, atol=1e-3)
    assert prob.dtype == np.float32 and prob.min() > 0 and [p.suffix for p in stored.folder.iterdir()] == [".npy"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Phase 2 with everything that this room adds, on phantoms; and what it was trained from."""
    root = tmp_path_factory.mktemp("fitted")
    seen = {}
    original = out_of_fold.add_predictions

    def spy(run):
        original(run)
        if run.cfg.phase.name == "sam":
            seen.update(cfg=run.cfg, data=run.data, directory=run.directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "add_predictions", spy)
        sizes = [
            "dataset.reader.cases=60",
            "phase.coarse.epochs=12",
            "phase.coarse.batch_size=4",
            f"output_root={root}",
        ]
        directory = run(compose(*FIT, *sizes))
    return root, directory, seen, [*FIT, *sizes]


@pytest.mark.slow
def test_phase_two_learns_from_out_of_fold_predictions(fitted):
    root, directory, seen, _ = fitted
    inner = [json.loads(path.read_text()) for path in root.glob("phantom/tiny/coarse/*/summary.json")]
    assert sorted(summary["config"]["dataset"]["without"] for summary in inner) == [[0, 2], [1, 2]]
    assert all(summary["title"].endswith("of 2") and "without part" in summary["title"] for summary in inner)
    data = seen["data"]
    files = list((directory / "predictions").iterdir())
    everyone = [*data.split.train, *data.split.val, *data.split.test]
    assert {path.name for path in files} == {data.predictions.path(case).name for case in everyone}
    assert data.predictions.ratio == 0.5
    # What chooses and measures Phase 2 is what Phase 3 starts from: a real mask of each case, never a simulated one.
    for part in ("val", "test"):
        items = data.dataset(part)
        for index, case in enumerate(data.split.part(part)):
            expected = data.predictions.load(case, items[index]["prob"].shape[-1])
            np.testing.assert_array_equal(items[index]["prob"][0], expected)
    softness = data.simulator.softness
    assert isinstance(softness, Softness) and softness != Softness()
    assert all(np.isfinite(value).all() for value in vars(softness).values())
    assert len(softness.background) > 5 and data.simulator.bins != FailureSimulator().bins


@pytest.mark.slow
def test_networks_that_were_stopped_early_predict_the_cases_they_were_trained_on(tmp_path, capsys):
    """Each all of them; Phase 1's own network, which Phase 3 starts from too, predicts those of validation and test."""
    given = ["phase.sam.real_ratio=1", "phase.sam.early_epochs=1", "phase.sam.parts=2", "dataset.reader.cases=30"]
    runs = plan(compose(*given, f"output_root={tmp_path}"))
    names = [(one.cfg.phase.name, one.cfg.seed, one.cfg.phase.epochs) for one in runs]
    assert names == [("coarse", 0, 2), ("coarse", 1, 1), ("coarse", 2, 1), ("sam", 0, 1), ("e2e", 0, 2)]
    sam = runs[3]
    assert [one.directory for one in sam.predictors] == [one.directory for one in runs[:3]]
    for predictor in runs[:3]:
        training.train(predictor, start.prepare(predictor), Deadline(None))
    out_of_fold.add_predictions(sam)
    assert not any(map(sam.unpredicted, sam.predictors))
    assert re.search(
        r"stopped early, training cases: 0\.\d+; Phase 1, validation cases: 0\.\d+\n", capsys.readouterr().out
    )
    split = sam.data.split
    assert len(list(sam.predictions.folder.iterdir())) == 2 * len(split.train) + len(split.val) + len(split.test)
    for predictor, part, version in (
        (runs[0], "val", 0),
        (runs[0], "test", 0),
        (runs[1], "train", 0),
        (runs[2], "train", 1),
    ):
        network = out_of_fold.build_phase(predictor.cfg, CoarsePhase, {})
        network.load_state_dict(files.load(predictor.directory / "checkpoints" / "best.ckpt")["state_dict"])
        network.eval()
        items = predictor.data.dataset(part)
        for index, case in enumerate(split.part(part)):
            with torch.inference_mode():
                prob = network.masks({"coarse_image": items[index]["coarse_image"][None]})["coarse"].sigmoid()[0, 0]
            np.testing.assert_allclose(sam.predictions.load(case, len(prob), version), prob, atol=5e-3)
    # An epoch shows some cases with the one mask and some with the other; the next one others.
    items, drawn = sam.data.dataset("train"), []
    for epoch in (0, 1):
        drawn.append([])
        for index, case in enumerate(split.train):
            shown = items[epoch, index]["prob"][0].numpy()
            both = [sam.predictions.load(case, len(shown), version) for version in (0, 1)]
            drawn[-1].append([np.array_equal(shown, one) for one in both].index(True))
    assert drawn[0] != drawn[1] and all(0 < sum(one) < len(one) for one in drawn)


def looks(pairs) -> dict[str, np.ndarray]:
    """What Phase 2 gets to see of coarse masks, for each of (probability, mask); areas in those of the lesion's box."""
    found: dict[str, list[float]] = {
        "roi": [],
        "box": [],
        "mass outside": [],
        "dice": [],
        "background": [],
        "spots": [],
    }
    for prob, mask in pairs:
        rows, columns = np.nonzero(mask)
        tight = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) / mask.size
        tensor = torch.from_numpy(np.ascontiguousarray(prob))[None, None]
        for name, box in (("roi", LesionRoi().boxes(tensor)[0]), ("box", soft_box(tensor)[0])):
            found[name].append(float((box[2] - box[0]) * (box[3] - box[1])) / tight)
        found["mass outside"].append(prob[~mask].sum() / mask.sum())
        predicted = prob >= 0.5
        found["dice"].append(2 * (predicted & mask).sum() / (predicted.sum() + mask.sum()))
        far = distance_transform_edt(~(mask | predicted)) > len(mask) / 10
        logit = np.log(prob / (1 - prob))[far]
        found["background"].append(np.median(logit))
        found["spots"].append(np.quantile(logit, 0.99))
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.slow
def test_phase_two_sees_what_phase_three_sees(tmp_path):
    """Fitted, the simulator's masks are distributed as a trained network's predictions of cases it has not seen."""
    sizes = ["dataset.reader.cases=240", "dataset.reader.size=128", "model.image_size=64", "trainer.progress_bar=false"]
    wanted = ["phase.softness=fit", "phase.bins=fit", "phase.parts=2", "phase.coarse.epochs=30"]
    target = plan(compose("phase=sam", *wanted, *sizes, f"output_root={tmp_path}", micro=False))[-1]
    predictor = target.predictors[0]
    training.train(predictor, start.prepare(predictor), Deadline(None))
    stored = Predictions(tmp_path / "predictions")
    out_of_fold._predict(predictor, {"held": list(range(len(predictor.data.split.held)))}, stored)
    pairs = list(out_of_fold._pairs(predictor.data.dataset("held"), stored))
    simulator = FailureSimulator(softness=Softness.fit(pairs), bins=fit_bins(pairs))
    masks = [pairs[seed % len(pairs)][1] for seed in range(400)]
    real, seen = looks(pairs), looks((simulator(mask, seed), mask) for seed, mask in enumerate(masks))
    quartiles = {name: [np.quantile(both[name], [0.25, 0.5, 0.75]) for both in (real, seen)] for name in real}
    # With the softness fitted before the background was, and the seed's bins: mass 1.95, Dice 0.11, spots 1.6 apart.
    for name in ("roi", "box", "mass outside"):
        one, other = quartiles[name]
        assert np.abs(np.log(other / one)).max() < np.log(1.45), (name, one, other)
    for name, tolerance in (("dice", 0.03), ("background", 0.4), ("spots", 0.8)):
        one, other = quartiles[name]
        assert np.abs(other - one).max() < tolerance, (name, one, other)


@pytest.mark.slow
def test_each_prediction_is_of_the_network_that_did_not_see_the_case(fitted):
    root, directory, seen, _ = fitted
    stored = Predictions(directory / "predictions")
    matched = 0
    for summary in root.glob("phantom/tiny/coarse/*/summary.json"):
        cfg = OmegaConf.create(json.loads(summary.read_text())["config"])
        data = build_data(cfg, CoarsePhase)
        trained = {case.key for case in (*data.split.train, *data.split.val)}
        network = out_of_fold.build_phase(cfg, CoarsePhase, {})
        weights = files.load(summary.parent / "checkpoints" / "best.ckpt")["state_dict"]
        network.load_state_dict(weights)
        network.eval()
        items = data.dataset("held")
        for index, case in enumerate(data.split.held):
            assert case.key not in trained
            with torch.inference_mode():
                logit = network.masks({"coarse_image": items[index]["coarse_image"][None]})["coarse"]
            prob = logit.sigmoid()[0, 0].numpy()
            np.testing.assert_allclose(stored.load(case, prob.shape[0]), prob, atol=5e-3)
            matched += 1
    assert matched == len(seen["data"].split.train)


@pytest.mark.slow
def test_real_and_simulated_masks_are_mixed_in_training_only(fitted):
    data = fitted[2]["data"]
    stored = data.predictions
    items = data.dataset("train")
    real = 0
    for index, case in enumerate(data.split.train):
        prob = items[(0, index)]["prob"][0].numpy()
        real += np.array_equal(prob, stored.load(case, prob.shape[0]))
    assert 0 < real < len(items)


@pytest.mark.slow
def test_predictions_are_reused(fitted, monkeypatch, capsys):
    _, directory, _, arguments = fitted
    (directory / "summary.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (directory / "predictions").iterdir()}
    monkeypatch.setattr(out_of_fold, "build_phase", lambda *_: pytest.fail("built"))
    assert run(compose(*arguments)) == directory
    assert {path: path.stat().st_mtime_ns for path in (directory / "predictions").iterdir()} == before


def test_require_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"phase=coarse.* 'dataset.without=\[0,2\]'"):
        run(compose(*FIT, f"output_root={tmp_path}", "upstream=require"))
