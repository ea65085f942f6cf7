"""`python -m ultrarefiner.evaluate`: what it measures is what the training measured, and what formulas say."""

import csv
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from omegaconf import OmegaConf

from data_layouts import disc, save, texture, write_busi, write_table
from ultrarefiner import evaluate
from ultrarefiner.results.safety import Safety
from ultrarefiner.runs.plan import plan
from ultrarefiner.segmenter import Segmenter

MICRO = ["dataset=phantom", "dataset.reader.cases=20", "dataset.reader.size=64"]
NO_RULES = "safety=none"


@pytest.fixture(scope="module")
def e2e(finished_runs) -> Path:
    """The directory of Phase 3."""
    paths = finished_runs.glob("phantom/tiny/*/*/config.yaml")
    return next(path.parent for path in paths if OmegaConf.load(path).phase.name == "e2e")


@pytest.fixture
def call(execute, finished_runs):
    """Run the command inside this process."""
    return partial(execute, evaluate.main, f"output_root={finished_runs}")


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "cases.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


def test_it_measures_what_the_training_measured(call, e2e, tmp_path):
    """To the last digit, case by case; the rules of safety add a third mask and change none of the others."""
    done = call(f"checkpoint={e2e}", *MICRO, f"output={tmp_path}/a")
    assert done.status == 0 and "refined - coarse" in done.out and str(tmp_path / "a") in done.out, done.err
    before = {row["id"]: row for row in rows_of(e2e)}
    found = rows_of(tmp_path / "a")
    assert {row["id"] for row in found} == set(before)
    for row in found:
        for name in ("coarse_dice", "coarse_iou", "coarse_hd95", "coarse_assd", "refined_dice", "refined_hd95"):
            if name.startswith("coarse") or float(row["coarse_px"]) > 0:
                assert float(row[name]) == float(before[row["id"]][name]), name
        kept = "coarse" if row["rejected"] else "refined"
        assert row["accepted_dice"] == row[f"{kept}_dice"]
    content = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert content["seen"] is None and set(content["masks"]) == {"coarse", "refined", "accepted"}
    mean = np.mean([float(row["refined_dice"]) for row in found])
    assert content["masks"]["refined"]["over"]["dice"]["mean"] == pytest.approx(mean)
    for name in ("reliability.png", "scatter.png", "overlays.png"):
        assert cv2.imread(str(tmp_path / "a" / name)) is not None
    assert len(list((tmp_path / "a" / "pictures").iterdir())) == len(found)
    text = (tmp_path / "a" / "tables.md").read_text()
    assert "nsd 2px" in text and "false positives per image" in text and "Not a fair test" not in text


def test_calibration_is_of_all_pixels(call, e2e, tmp_path):
    """Against numpy: the coarse network's own probabilities, in 15 bins over all test cases."""
    assert call(f"checkpoint={e2e}", *MICRO, f"output={tmp_path}/a", NO_RULES).status == 0
    found = json.loads((tmp_path / "a" / "summary.json").read_text())["masks"]["accepted"]["calibration"]
    data = plan(OmegaConf.load(e2e / "config.yaml"))[-1].data
    segmenter = Segmenter.load(e2e, safety=Safety.none())
    pairs = [data.reader.read(case) for case in data.split.test]
    prob = np.concatenate([segmenter(image).probability.ravel() for image, _ in pairs]).astype(float)
    truth = np.concatenate([mask.ravel() for _, mask in pairs])
    assert found["brier"] == pytest.approx(((prob - truth) ** 2).mean(), abs=1e-6)
    bins = np.minimum((prob * 15).astype(int), 14)
    gaps = [abs(prob[bins == b].mean() - truth[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    assert found["ece"] == pytest.approx(sum(gaps), abs=1e-6)


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(call, e2e, tmp_path, monkeypatch):
    arguments = (f"checkpoint={e2e}", *MICRO, "batch_size=1")
    assert call(*arguments, f"output={tmp_path}/whole").status == 0
    batch, calls = Segmenter.batch, []

    def stop(self, *given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch(self, *given)

    monkeypatch.setattr(Segmenter, "batch", stop)
    assert call(*arguments, f"output={tmp_path}/part").status == 130
    lines = tmp_path / "part" / "cases.jsonl"
    assert 1 < len(lines.read_text().splitlines()) <= 3 and not (tmp_path / "part" / "cases.csv").exists()
    with lines.open("a") as file:
        file.write('{"row": {"id": "cut o')  # killed while it wrote
    before = len(calls)
    assert call(*arguments, f"output={tmp_path}/part").status == 0
    count = len(rows_of(tmp_path / "whole"))
    assert len(calls) - before == count - 2  # of each case that was left
    assert (tmp_path / "part" / "cases.csv").read_bytes() == (tmp_path / "whole" / "cases.csv").read_bytes()
    done = call(*arguments, f"output={tmp_path}/part", "tolerances=[4]")
    assert done.status == 1 and "another tolerances" in done.err


def test_it_goes_on_in_the_precision_it_was_begun_in(call, e2e, tmp_path):
    """`auto` is measured: another time another one may be the fastest, and the same command continues all the same."""
    given = [f"checkpoint={e2e}", *MICRO, f"output={tmp_path}/a", "dataset.limit.test=2"]
    assert call(*given, "precision=bf16-mixed").status == 0
    assert call(*given).status == 0
    settings = json.loads((tmp_path / "a" / "cases.jsonl").read_text().splitlines()[0])
    assert settings["precision"] == "bf16-mixed"
    assert "another precision" in call(*given, "precision=32-true").err


def test_images_that_the_checkpoint_has_seen(call, e2e, tmp_path):
    arguments = (f"checkpoint={e2e}", *MICRO, "split=train", "dataset.limit.train=2", f"output={tmp_path}/a")
    done = call(*arguments)
    assert done.status == 1 and "has seen 2 of the 2 training cases" in done.err and "allow_seen=true" in done.err
    assert not (tmp_path / "a").exists()
    done = call(*arguments, "allow_seen=true")
    assert done.status == 0 and f"{e2e} on phantom, train, fold 0: 2 cases" in done.out
    assert "Not a fair test: the weights have seen 2" in done.out
    assert "**Not a fair test:** the weights have seen 2" in (tmp_path / "a" / "tables.md").read_text()
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["seen"]["test_cases"] == 2


@pytest.fixture
def folder(tmp_path):
    """A data set of one's own: 30 images, with device and spacing."""
    root = tmp_path / "data"
    for number in range(30):
        save(root / "images" / f"case_{number}.png", texture(number))
        save(root / "masks" / f"case_{number}.png", disc(number))
    table = [[f"case_{i}", f"p{i // 2}", "benign", "AB"[i % 2], 0.1 if i % 2 else 0.2] for i in range(30)]
    write_table(root / "cases.csv", ["id", "patient", "label", "device", "spacing"], table)
    about = "+dataset.reader.about_columns=[device,spacing]"
    return root, ("dataset=folder", f"data_root={root}", "dataset.reader.table=cases.csv", about, "split=all")


def test_masks_of_another_tool(call, folder, tmp_path):
    _, arguments = folder
    (tmp_path / "tool").mkdir()
    for number in range(30):
        shifted = np.roll(disc(number), number % 4, axis=1)
        cv2.imwrite(str(tmp_path / "tool" / f"case_{number}.png"), shifted)
    (tmp_path / "tool" / "dataset.json").write_text("{}")  # as nnU-Net leaves it
    done = call(*arguments, f"predictions={tmp_path}/tool", f"output={tmp_path}/out")
    assert done.status == 0, done.err
    rows = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert len(rows) == 30
    for number in range(30):
        row, truth = rows[f"case_{number}"], disc(number) > 0
        assert float(row["coarse_dice"]) == pytest.approx(dice(np.roll(truth, number % 4, axis=1), truth))
        mm = 0.1 if number % 2 else 0.2
        assert float(row["coarse_hd95_mm"]) == pytest.approx(mm * float(row["coarse_hd95"]))
        assert row["device"] == "AB"[number % 2] and (row["lesions"], row["lesions_coarse_false"]) == ("1", "0")
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (
        list(content["masks"]) == ["coarse"]
        and content["patients"] == 15
        and "nsd_0.5mm" in content["masks"]["coarse"]["over"]
    )
    assert content["masks"]["coarse"]["calibration"] is None
    assert "| device | B | 15 |" in (tmp_path / "out" / "tables.md").read_text()


def test_the_size_of_a_pixel_may_be_unknown_and_may_change(call, folder, tmp_path):
    """Millimetres of the cases that have them, whichever comes first; measured again where the table has changed."""
    root, arguments = folder
    (tmp_path / "tool").mkdir()
    for number in range(30):
        cv2.imwrite(str(tmp_path / "tool" / f"case_{number}.png"), np.roll(disc(number), 2, axis=1))
    for out, known, mm in (("a", range(3, 30), 0.1), ("b", range(20), 0.1), ("b", range(30), 0.2)):
        spacing = {f"case_{i}": mm if i in known else "" for i in range(30)}
        write_table(
            root / "cases.csv",
            ["id", "patient", "label", "device", "spacing"],
            [[id, f"p{id}", "benign", "A", value] for id, value in spacing.items()],
        )
        done = call(*arguments, f"predictions={tmp_path}/tool", f"output={tmp_path}/{out}")
        assert done.status == 0, done.err
        rows = rows_of(tmp_path / out)
        means = json.loads((tmp_path / out / "summary.json").read_text())["masks"]["coarse"]["over"]
        assert means["hd95_mm"]["cases"] == sum(value != "" for value in spacing.values())
        assert {row["id"]: row["coarse_hd95_mm"] != "" for row in rows} == {i: v != "" for i, v in spacing.items()}
        for row in rows:
            if spacing[row["id"]] != "":
                assert float(row["coarse_hd95_mm"]) == pytest.approx(mm * float(row["coarse_hd95"]))


def test_probabilities_of_another_tool_are_refined(call, folder, e2e, tmp_path):
    _, arguments = folder
    (tmp_path / "tool").mkdir()
    for number in range(30):
        soft = cv2.GaussianBlur(disc(number).astype(np.float32) / 255, (0, 0), 1.5)
        np.savez(tmp_path / "tool" / f"case_{number}.npz", probabilities=np.stack([1 - soft, soft]))
    few = ["dataset.limit.train=3", "dataset.limit.val=1", "dataset.limit.test=2"]
    done = call(*arguments, *few, f"checkpoint={e2e}", f"predictions={tmp_path}/tool", f"output={tmp_path}/out")
    assert done.status == 0, done.err
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert content["cases"] == len(rows_of(tmp_path / "out")) >= 2
    assert list(content["masks"]) == ["coarse", "refined", "accepted"]
    assert 0 < content["masks"]["coarse"]["calibration"]["ece"] < 0.2
    for row in rows_of(tmp_path / "out"):
        truth = disc(int(row["id"].removeprefix("case_"))) > 0
        soft = cv2.GaussianBlur(truth.astype(np.float32), (0, 0), 1.5)
        assert float(row["coarse_dice"]) == pytest.approx(dice(soft > 0.5, truth))


def test_normal_images_are_counted_apart(call, tmp_path):
    root = write_busi(tmp_path / "busi", 6)
    (tmp_path / "tool").mkdir()
    for path in sorted(root.glob("*/*_mask.png")):
        mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        if path.name.startswith("normal (1)"):
            mask[4:9, 4:9] = 255
        cv2.imwrite(str(tmp_path / "tool" / path.name.replace("_mask", "")), mask)
    arguments = ("dataset=busi", f"data_root={root}", "split=all", "dataset.include_normal=true", "dataset.folds=2")
    done = call(*arguments, f"predictions={tmp_path}/tool", f"output={tmp_path}/out")
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["masks"]["coarse"]
    assert (found["lesion"]["cases"], found["normal"]["cases"], found["normal"]["clean"]) == (12, 6, 5)
    assert found["lesions"]["false_positives"] == 1 and found["lesions"]["images"] == 18
    assert found["lesions"]["lesions"] == 13 and found["lesions"]["found"] == 12  # benign (1) has two, one was drawn
    drawn, *empty = (row for row in rows_of(tmp_path / "out") if row["label"] == "normal")
    assert drawn["coarse_px"] == "25.0" and {row["coarse_dice"] for row in (drawn, *empty)} == {""}
    text = (tmp_path / "out" / "tables.md").read_text()
    assert f"| coarse | 1 | 12 | {found['lesion']['dice']:.4f} |" in text


def test_mistakes_are_one_sentence(call, e2e, folder, tmp_path):
    _, arguments = folder
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    weights = f"checkpoint={e2e}"
    for given, said in (
        (MICRO, "give checkpoint="),
        ([*arguments, f"predictions={tmp_path}/no", "output=o"], "is no folder"),
        ([*arguments, f"predictions={tmp_path}/empty", "output=o"], "predictions="),
        ([*arguments, f"predictions={tmp_path}/empty"], "output=FOLDER"),
        ([weights, *MICRO, "split=some"], "split must be one of"),
        ([weights, *MICRO, f"output={tmp_path}/full"], "holds something else"),
        ([weights, *MICRO, f"output={tmp_path}/new", "tolerances=[0]"], "tolerances"),
        ([weights, *MICRO, "fold=9"], "fold=9"),
        ([weights], "dataset=NAME is needed, one of bus, "),
        ([weights, "dataset=phantom"], "give dataset.reader.size=VALUE"),
        ([f"checkpoint={tmp_path}/none", *MICRO, f"output={tmp_path}/new"], "does not exist"),
    ):
        done = call(*given)
        assert done.status == 1 and said in done.err and len(done.err.strip().splitlines()) == 1, (given, done.err)


def test_help_imports_no_torch():
    code = "import sys; from ultrarefiner import evaluate; evaluate.main(); sys.exit('torch' in sys.modules)"
    for arguments in (["--help"], ["dataset=busi", "--cfg", "job"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
