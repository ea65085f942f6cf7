"""Masks of new images: what the command writes, what it says of bad files, and that it goes on after any end."""

import csv
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bad_scans import REFUSED
from PIL import Image

from conftest import Finished
from data_layouts import disc, save, texture
from dicom_files import ultrasound_region, write_dicom
from reruns import GROUP, Command
from ultrarefiner import cli, files, predict, segmenter
from ultrarefiner.files import read_csv
from ultrarefiner.results import prediction
from ultrarefiner.results.measures import describe, separate
from ultrarefiner.results.safety import Safety
from ultrarefiner.segmenter import Segmenter


@pytest.fixture(scope="module")
def pair(finished_runs) -> Path:
    """The run of a pair of networks that has learnt next to nothing."""
    (directory,) = finished_runs.glob("phantom/tiny/e2e-*/*")
    return directory


@pytest.fixture
def predicted(execute, tmp_path, pair):
    """Run `python -m ultrarefiner.predict ...` inside this process, with the pair and into tmp_path/out."""

    def call(*arguments: str) -> Finished:
        given = {argument.partition("=")[0] for argument in arguments}
        defaults = {"checkpoint": pair, "output": tmp_path / "out", "safety": "none", "images": tmp_path / "scans"}
        more = [f"{key}={value}" for key, value in defaults.items() if key not in given]
        return execute(predict.main, *more, *arguments)

    return call


@pytest.fixture
def scans(tmp_path) -> Path:
    """Six images of several kinds, one of them a clip of three frames."""
    folder = tmp_path / "scans"
    for number, name in enumerate(("b.png", "a.jpg", "inner/b.png", "inner/=1+1.bmp")):
        save(folder / name, texture(number, 70 + number, 50))
    save(folder / "colour.tif", np.stack([texture(number) for number in (5, 6, 7)], axis=2))
    clip = np.stack([texture(number) for number in (8, 9, 10)])
    write_dicom(folder / "clip.dcm", clip, frames=True, SequenceOfUltrasoundRegions=[
        ultrasound_region((0, 0, 59, 47), (0.02, 0.03))
    ])  # fmt: skip
    return folder


NAMES = ["a", "b", "clip/0001", "clip/0002", "clip/0003", "colour", "inner/=1+1", "inner/b"]


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)


def test_help_imports_no_torch():
    code = (
        "import sys; from ultrarefiner import predict\n"
        "try: predict.main()\n"
        "finally: sys.stderr.write('torch' if 'torch' in sys.modules else 'clean')"
    )
    for arguments in (["--help"], ["--cfg", "job"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.stderr.endswith("clean") and done.returncode == 0, done.stderr
    page = predict.help_text()
    shown = {line.split("=")[0].strip() for line in page.splitlines()} | set(re.findall(r"(\w+)=", page))
    assert set(vars(predict.PredictConfig())) <= shown | {"safety"}
    assert all(f"  {path.stem} " in page for path in (cli.CONF / "safety").glob("*.yaml"))


def test_what_is_written(predicted, scans, tmp_path, pair):
    (scans / "notes.txt").write_text("x")
    done = predicted("batch_size=3")
    assert done.status == 0 and "6 images" in done.out and "1 other files" in done.out, done.err
    out = tmp_path / "out"
    rows = {row["id"]: row for row in read_csv(out / "predictions.csv")}
    assert list(rows) == NAMES
    expected = {"settings.json", "predictions.csv", "lesions.csv", ".lock"}
    expected |= {f"{kind}/{name}.png" for kind in ("masks", "probabilities", "overlays") for name in NAMES}
    assert set(content(out)) == expected
    segmenter = Segmenter.load(pair, safety=Safety.none())
    lesions = read_csv(out / "lesions.csv")
    for name, row in rows.items():
        image, frame = scans / row["image"], int(row["frame"])
        pixels = texture(7 + frame) if name.startswith("clip/") else picture(image)
        found = segmenter(pixels)
        mask, prob = picture(out / row["mask"]), picture(out / "probabilities" / f"{name}.png")
        assert np.array_equal(mask, found.mask * np.uint8(255))
        assert prob.dtype == np.uint16 and np.abs(prob / 65535 - found.probability).max() < 1e-4
        assert np.array_equal(picture(out / "overlays" / f"{name}.png"), found.overlay())
        assert (int(row["height"]), int(row["width"])) == mask.shape
        spacing = (0.3, 0.2) if name.startswith("clip/") else None
        parts = separate(found.mask)
        assert int(row["lesions"]) == len(parts)
        measures = describe(parts[0] if parts else None, spacing, int(found.mask.sum()))
        assert {key: row[key] for key in measures} == measures and bool(measures["area_mm2"]) == bool(spacing and parts)
        one_by_one = [line for line in lesions if line["id"] == name]
        assert [line["lesion"] for line in one_by_one] == [str(n + 1) for n in range(len(parts))]
        assert [line["area_px2"] for line in one_by_one] == [str(int(part.mask.sum())) for part in parts]
        assert row["accepted"] == "1" and row["reason"] == "" and float(row["predicted_iou"]) == round(found.iou, 4)
        assert float(row["uncertainty"]) == pytest.approx(found.uncertainty, abs=1e-3)
    raw = (out / "predictions.csv").read_text()
    assert "inner/=1+1" in raw  # an id begins with a formula only where its image does
    assert json.loads((out / "settings.json").read_text())["safety"]["min_dice"] is None


def test_a_name_that_is_a_formula_is_no_formula_in_the_table(predicted, tmp_path):
    for name in ('=cmd()|"x".png', "+1.png", "-2+3.png", "@a.png", "<script>.png"):
        save(tmp_path / "scans" / name, texture(1))
    assert predicted().status == 0
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if re.match(r"[=+@-]", cell) and not re.fullmatch(r"[+-]?[\d.]+", cell)]
    assert {row["image"] for row in read_csv(tmp_path / "out" / "predictions.csv")} == {
        path.name for path in (tmp_path / "scans").iterdir()
    }


def test_files_of_one_stem_do_not_overwrite_each_other(predicted, tmp_path):
    names = ("x.png", "x.bmp", "X.tif", "x/0001.png", "x/y.png")
    for number, name in enumerate(names):
        save(tmp_path / "scans" / name, texture(number, 40 + number, 30))
    assert predicted("extras=[]").status == 0
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    masks = {row["image"]: picture(tmp_path / "out" / row["mask"]).shape for row in rows}
    assert masks == {name: (30, 40 + number) for number, name in enumerate(names)}
    assert len(content(tmp_path / "out" / "masks")) == 5 and not (tmp_path / "out" / "overlays").exists()


def test_bad_files_are_named_and_the_others_done(predicted, scans, tmp_path):
    (scans / "bad.png").write_text("text")
    (scans / "inner" / "bad.dcm").write_bytes(b"\0" * 128 + b"DICM")
    write_dicom(scans / "short.dcm", np.stack([texture(1)] * 3), frames=True, NumberOfFrames=5)
    save(scans / "cut.jpg", np.random.default_rng(0).integers(0, 256, (80, 80)).astype(np.uint8))
    (scans / "cut.jpg").write_bytes((scans / "cut.jpg").read_bytes()[:2000])
    done = predicted()
    assert done.status == 1 and "error: 4 files could not be read (see above); the others are done" in done.err
    for name in ("bad.png", "bad.dcm", "short.dcm", "cut.jpg"):
        assert len(re.findall(rf"^\S*{name} .*\.$", done.err, re.M)) == 1, done.err
    assert "Traceback" not in done.err and "Warning" not in done.err
    ids = [row["id"] for row in read_csv(tmp_path / "out" / "predictions.csv")]
    assert set(ids) >= set(NAMES) and not {"bad", "inner/bad", "cut"} & set(ids)
    again = predicted()
    assert again.status == 1 and again.err == done.err
    for name in ("bad.png", "inner/bad.dcm", "short.dcm", "cut.jpg"):
        (scans / name).unlink()
    save(scans / "bad.png", texture(3))
    repaired = predicted()
    assert repaired.status == 0 and "bad" in {row["id"] for row in read_csv(tmp_path / "out" / "predictions.csv")}


def test_a_folder_full_of_bad_files(predicted, tmp_path):
    """Each is named once, with status 1; strange names and a clip of 150 frames among them are done."""
    for name, (make, _) in REFUSED.items():
        path = tmp_path / "scans" / f"bad {name}"
        path.parent.mkdir(exist_ok=True)
        make(path)
    good = ["=cmd()|' calc'!A1", "<script>alert(1)<", "%2e%2e%2fup", "-rf", "a\nb", "é" * 60, "con", "good"]
    for number, name in enumerate(good):
        save(tmp_path / "scans" / f"{name}.png", texture(number))
    write_dicom(tmp_path / "scans" / "clip.dcm", np.stack([texture(1, 20, 24)] * 150), frames=True)
    before = content(tmp_path / "scans").keys()
    done = predicted("extras=[]")
    assert done.status == 1 and f"error: {len(REFUSED)} files could not be read" in done.err, done.err
    assert "Traceback" not in done.err and "Warning" not in done.err
    for name, (_, words) in REFUSED.items():
        (sentence,) = re.findall(rf"^\S*/bad {re.escape(name)} .*\.$", done.err, re.M)
        assert re.search(words, sentence)
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    whole = [row["image"] for row in rows if not row["image"].startswith("bad ")]
    assert sorted(whole) == sorted([f"{name}.png" for name in good] + ["clip.dcm"] * 150)
    sound_at_first = {"bad a bomb behind.tif", "bad more frames than it has.dcm"}
    assert {row["image"] for row in rows} - set(whole) == sound_at_first
    assert content(tmp_path / "scans").keys() == before
    assert {path.name for path in tmp_path.iterdir()} == {"scans", "out"}
    assert all((tmp_path / "out" / row["mask"]).resolve().is_relative_to(tmp_path / "out" / "masks") for row in rows)


def test_masks_of_another_tool(predicted, scans, tmp_path, pair, finished_runs):
    masks = tmp_path / "masks"
    for name in NAMES:
        shape = {"a": (71, 50), "b": (70, 50), "inner/b": (72, 50), "inner/=1+1": (73, 50)}.get(name, (60, 48))
        save(masks / f"{name}.png", disc(3, *shape))
    save(masks / "b.png", np.zeros((50, 70), np.uint8))
    assert predicted(f"masks={masks}", "safety=default").status == 0
    rows = {row["id"]: row for row in read_csv(tmp_path / "out" / "predictions.csv")}
    assert not picture(tmp_path / "out" / "masks" / "b.png").any() and rows["b"]["reason"] == "the coarse mask is empty"
    assert rows["b"]["lesions"] == "0" and rows["b"]["area_px2"] == rows["b"]["predicted_iou"] == ""
    found = Segmenter.load(pair)(picture(scans / "a.jpg"), coarse=disc(3, 71, 50) > 0)
    assert np.array_equal(picture(tmp_path / "out" / "masks" / "a.png") > 0, found.mask)
    assert rows["a"]["reason"] == found.reason and rows["a"]["accepted"] == str(int(found.accepted))
    # A mask that changes is refined again, and nothing else.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "masks").rglob("*.png")}
    save(masks / "colour.png", disc(6))
    assert predicted(f"masks={masks}", "safety=default").status == 0
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path.stem for path in before if before[path] != after[path]] == ["colour"]
    # Phase 2's run has no coarse network: with masks it refines, without it says what it lacks.
    (sam,) = finished_runs.glob("phantom/tiny/sam-*/*")
    other = (f"checkpoint={sam}", f"output={tmp_path}/sam")
    assert predicted(*other, f"masks={masks}").status == 0
    refused = predicted(f"checkpoint={sam}", f"output={tmp_path}/none")
    assert refused.status == 1 and "coarse mask" in refused.err
    (masks / "a.png").unlink()
    save(masks / "colour.png", disc(6, 61, 48))
    done = predicted(f"masks={masks}", f"output={tmp_path}/lacking")
    assert done.status == 1 and re.search(r"a\.jpg has no mask a\.png in", done.err)
    assert re.search(r"colour\.png has 61 × 48 px but its image 60 × 48", done.err)


def test_other_settings_other_results_other_folder(predicted, scans, tmp_path, pair):
    assert predicted().status == 0
    before = content(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "masks").rglob("*.png")}
    assert predicted("batch_size=2").status == 0 and content(tmp_path / "out") == before
    assert times == {path: path.stat().st_mtime_ns for path in times}  # nothing was done twice
    for change in ("lesions=each", "safety.min_iou=0.5", "tta=flips", "spacing=[0.1,0.1]"):
        done = predicted(change)
        key = change.partition("=")[0].partition(".")[0]
        assert done.status == 1 and f"was made with {key}=" in done.err and len(done.err.splitlines()) == 1
    copy = tmp_path / "other.ckpt"
    copy.write_bytes((pair / "checkpoints" / "best.ckpt").read_bytes())
    assert predicted(f"checkpoint={copy}").status == 0  # the same weights
    last = predicted(f"checkpoint={pair / 'checkpoints' / 'last.ckpt'}")
    assert last.status == 1 and "checkpoint" in last.err
    assert content(tmp_path / "out") == before
    save(scans / "b.png", texture(99))  # the same name, another image
    (tmp_path / "out" / "overlays" / "a.png").unlink()
    assert predicted().status == 0
    changed = {name for name, one in content(tmp_path / "out").items() if one != before[name]}
    assert {"masks/b.png", "probabilities/b.png", "overlays/b.png"} & changed and set(before) == set(
        content(tmp_path / "out")
    )
    assert not [name for name in changed if not re.search(r"b\.png|\.csv", name)]


def test_an_image_has_one_row_whatever_its_results_are_called(predicted, scans, tmp_path):
    def ids() -> list[str]:
        rows = read_csv(tmp_path / "out" / "predictions.csv")
        assert {row["id"] for row in read_csv(tmp_path / "out" / "lesions.csv")} <= {row["id"] for row in rows}
        return [row["id"] for row in rows]

    assert predicted().status == 0 and ids() == NAMES
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "masks").rglob("*.png")}
    (scans / "a.jpg").rename(scans / "z.jpg")
    (scans / "inner" / "b.png").unlink()
    save(scans / "b.jpg", texture(3))  # what was b is b.png now
    done = predicted()
    others = [name for name in NAMES if name != "b"]  # those of files that are gone too: nothing is lost
    assert done.status == 0 and f"\n{len(NAMES) + 2} images:" in done.out, done.out
    assert sorted(ids()) == sorted([*others, "b.png", "b.jpg", "z"])
    assert predicted(f"images={scans}/b.jpg").status == 0
    assert sorted(ids()) == sorted([*others, "b.png", "b", "z"])
    kept = {path for path in drawn if path.stat().st_mtime_ns == drawn[path]}
    assert kept >= {path for path in drawn if path.stem not in ("a", "b")}  # and are not drawn again


def test_results_of_others_are_never_overwritten(predicted, scans, tmp_path):
    """A folder with masks of its own is no place for ours."""
    data = tmp_path / "data"
    save(data / "images" / "a.png", texture(1))
    truth = save(data / "masks" / "a.png", disc(1)).read_bytes()
    done = predicted(f"images={data}/images", f"output={data}")
    assert done.status == 1 and "holds something else" in done.err and (data / "masks" / "a.png").read_bytes() == truth
    for output, words in ((scans, "output as well"), (scans / "b.png", "output="), (scans / "b.png" / "x", "output=")):
        done = predicted(f"output={output}")
        assert done.status == 1 and words in done.err and len(done.err.strip().splitlines()) == 1
    inside = predicted(f"output={scans}/results")
    assert inside.status == 0 and predicted(f"output={scans}/results").out == inside.out  # results are no images


def test_links_do_not_lead_out_of_the_output(predicted, tmp_path):
    save(tmp_path / "elsewhere" / "a.png", texture(1))
    (tmp_path / "scans" / "deep").mkdir(parents=True)
    (tmp_path / "scans" / "deep" / "link.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "scans" / "folder").symlink_to(tmp_path / "elsewhere")
    assert predicted().status == 0
    assert {row["mask"] for row in read_csv(tmp_path / "out" / "predictions.csv")} == {
        "masks/deep/link.png",
        "masks/folder/a.png",
    }
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["a.png"]


def test_a_disk_that_is_full(predicted, scans, tmp_path, monkeypatch):
    """One sentence, and with room again the same command ends with all files."""
    reference = predicted(f"output={tmp_path}/reference")
    assert reference.status == 0
    written: list[Path] = []
    original = files.replacing

    def full(path):
        written.append(path)
        if len(written) > 12:
            raise files.UserError(f"cannot write {path}: {os.strerror(errno.ENOSPC)}")
        return original(path)

    monkeypatch.setattr(files, "replacing", full)
    done = predicted()
    assert done.status == 1 and "No space left on device" in done.err and len(done.err.splitlines()) == 1
    monkeypatch.setattr(files, "replacing", original)
    assert predicted().status == 0 and content(tmp_path / "out") == content(tmp_path / "reference")


def test_one_process_at_a_time(predicted, scans, tmp_path):
    with prediction.alone_in(tmp_path / "out"):
        done = predicted()
    assert done.status == 1 and "another process writes into" in done.err
    assert predicted().status == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["images=nowhere"], "images=nowhere does not exist"),
        (["checkpoint=nowhere"], "nowhere does not exist"),
        (["masks=nowhere"], "masks=nowhere is no folder"),
        (["lesions=all"], "lesions must be one of together, each"),
        (["tta=flop"], "tta=flop is not there"),
        (["device=toaster"], "device=toaster is not there"),
        (["batch_size=0"], "batch_size must be 1 or more"),
        (["spacing=[0.1]"], "spacing must be the height and the width"),
        (["spacing=-1"], "spacing must be the height and the width"),
        (["spacing=[0.1,wide]"], "spacing must be the height and the width"),
        (["extras=[sounds]"], "extras must be of probabilities, overlays, got sounds"),
        (["safety.min_area=3", "safety.max_area=2"], "safety.min_area=3 is above safety.max_area=2"),
        (["safety.min_dice=2"], "safety.min_dice must be between 0 and 1"),
        (["safety.min_dise=0"], "did you mean safety.min_dice"),
        (["safety=strict"], "choose one of default, none"),
        (["image=x"], "did you mean images"),
    ],
)
def test_mistakes_end_in_one_sentence(predicted, scans, arguments, words):
    done = predicted(*arguments)
    assert done.status == 1 and words in done.err and len(done.err.strip().splitlines()) == 1, done.err


@pytest.mark.parametrize("wrong", ["spacing=[0.1]", "tta=flop", "extras=[sounds]", "lesions=all"])
def test_values_are_checked_before_networks_are_loaded(predicted, scans, monkeypatch, wrong):
    monkeypatch.setattr(Segmenter, "load", lambda *given, **options: pytest.fail("they were loaded"))
    assert predicted(wrong).status == 1


def test_one_number_is_the_height_and_the_width_of_a_pixel(predicted, scans, tmp_path):
    assert predicted("spacing=0.1").status == 0 and predicted("spacing=[0.1,0.1]").status == 0  # the same settings
    row = next(row for row in read_csv(tmp_path / "out" / "predictions.csv") if int(row["lesions"]))
    assert float(row["longest_mm"]) == pytest.approx(0.1 * float(row["longest_px"]), abs=0.01)


def test_a_folder_goes_on_in_the_precision_it_was_begun_in(predicted, scans, tmp_path, monkeypatch):
    """Measured anew on a busy machine `auto` may be another one, and the same command is to continue."""
    for measured in ("bf16-mixed", "32-true"):
        monkeypatch.setattr(segmenter, "fastest", lambda device, frame, measured=measured: measured)
        done = predicted("extras=[]")
        assert done.status == 0, done.err
        assert json.loads((tmp_path / "out" / "settings.json").read_text())["precision"] == "bf16-mixed"
    refused = predicted("precision=32-true")
    assert refused.status == 1 and "was made with precision=" in refused.err


def test_pictures_of_an_earlier_call_are_no_images(predicted, scans, tmp_path):
    assert predicted(f"output={scans}/inner/earlier").status == 0
    done = predicted()
    assert done.status == 0 and "6 images" in done.out and "3 other files left alone" in done.out, done.out
    assert [row["id"] for row in read_csv(tmp_path / "out" / "predictions.csv")] == NAMES


@pytest.mark.parametrize(
    "name", ["benign (1).png", "a=b, c.png", "it's \\'one\\.png", '"quoted".png', "a  b.png", "ä.png"]
)
def test_a_path_may_hold_what_hydra_gives_a_meaning(predicted, tmp_path, name):
    save(tmp_path / "odd (d)=1, x" / name, texture(1))
    done = predicted(f"images={tmp_path}/odd (d)=1, x/{name}", f"output={tmp_path}/o (u)=t\\")
    assert done.status == 0, done.err
    (row,) = read_csv(tmp_path / "o (u)=t\\" / "predictions.csv")
    assert row["image"] == name


@pytest.mark.slow
@pytest.mark.xdist_group(GROUP)
def test_killed_at_any_moment_it_ends_with_the_same_files(tmp_path, pair):
    scans = tmp_path / "scans"
    for number in range(200):
        save(scans / f"{number}.png", texture(number, 120, 100))
    (scans / "bad.png").write_text("x")
    arguments = [f"images={scans}", f"checkpoint={pair}", "batch_size=2"]

    def start(output: str) -> Command:
        return Command("ultrarefiner.predict", *arguments, f"output={tmp_path / output}")

    assert start("whole").wait() == 1

    def done() -> int:
        table = tmp_path / "killed" / "predictions.csv"
        return len(read_csv(table)) if table.is_file() else 0

    rng, kills, begun = random.Random(0), 0, []
    for _ in range(10):
        begun.append(done())
        if begun[-1] == 200:
            break
        process = start("killed")
        until = begun[-1] + rng.randint(1, 7)
        while process.poll() is None and done() < until:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.05)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3 and len(set(begun)) >= 3  # it went on from what was done
    assert start("killed").wait() == 1
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
