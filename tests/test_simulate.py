"""Simulated coarse masks as files: written for one part of one fold, and read back by Phase 2."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from conftest import Finished, compose
from data_layouts import disc, save, write_busbra, write_busi, write_folder
from reruns import GROUP, Command
from ultrarefiner import cli, simulate
from ultrarefiner.data.failures.files import file_name
from ultrarefiner.errors import UserError
from ultrarefiner.phases.coarse import CoarsePhase
from ultrarefiner.phases.sam import SamPhase
from ultrarefiner.runs.assemble import build_data
from ultrarefiner.runs.experiment import run
from ultrarefiner.runs.plan import plan

SMALL = ["model.image_size=64", "model.coarse_size=32"]


@pytest.fixture
def simulated(execute, tmp_path):
    """Run `python -m ultrarefiner.simulate ...` inside this process."""

    def call(*arguments: str) -> Finished:
        arguments = (*SMALL, f"output_root={tmp_path}/out", *arguments)
        return execute(simulate.main, *arguments)

    return call


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "masks.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def busbra(root: Path, *more: str):
    return compose("dataset=busbra", f"data_root={root}", "model=tiny", *SMALL, *more, micro=False)


def test_help_imports_no_torch():
    code = (
        "import sys; from ultrarefiner import simulate\n"
        "try: simulate.main()\n"
        "finally: sys.stderr.write('torch' if 'torch' in sys.modules else 'clean')"
    )
    for arguments in (["--help"], ["--cfg", "job"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.stderr.endswith("clean") and done.returncode == 0, done.stderr
    page = simulate.help_text()
    assert all(f"  {path.stem} " in page for path in (cli.CONF / "dataset").glob("*.yaml"))


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("fold", [0, 3])
def test_the_cases_are_those_of_the_part(simulated, tmp_path, part, fold):
    root = write_busbra(tmp_path / "data")
    chosen = [] if part == "train" else [f"part={part}"]  # the training part is what one gets without a word
    done = simulated(
        "dataset=busbra", f"data_root={root}", f"fold={fold}", "samples=60", f"output={tmp_path}/m", *chosen
    )
    assert done.status == 0, done.err
    rows = table(tmp_path / "m")
    split = build_data(busbra(root, "phase=coarse", f"fold={fold}", f"output_root={tmp_path}/out"), CoarsePhase).split
    assert {row["id"] for row in rows} == {case.id for case in split.part(part)} and len(rows) == 60
    assert {(row["part"], row["dataset"]) for row in rows} == {(part, "busbra")}


def test_files_table_and_sheet(simulated, tmp_path):
    root = write_folder(tmp_path / "data", 30)
    out = tmp_path / "set" / "masks"
    arguments = ("dataset=folder", f"data_root={root}", "samples=40", f"output={out}")
    done = simulated(*arguments)
    assert done.status == 0 and "40 simulated coarse masks" in done.out and str(out) in done.out
    files, rows = read(out), table(out)
    assert len(rows) == 40 == len(files) - 2 and {row["file"] for row in rows} < set(files)
    assert cv2.imread(str(out / "sheet.png")).shape == (4 * 240, 8 * 112, 3)
    for row in rows:
        assert 0.6 <= float(row["dice"]) <= 0.99 and row["id"].startswith("case_") and row["kind"]
        prob = cv2.imread(str(out / row["file"]), cv2.IMREAD_UNCHANGED)
        assert prob.dtype == np.uint16 and prob.shape == (32, 32)
    assert simulated(*arguments).status == 0 and read(out) == files  # the same again, in its place
    assert simulated(*arguments, "seed=1").status == 0 and read(out) != files
    assert simulated(*arguments, "simulator.bins=[[0.7,0.75,1.0]]").status != 0  # a key of its own needs a +
    assert simulated(*arguments, "+simulator.bins=[[0.7,0.75,1.0]]").status == 0
    assert all(0.7 <= float(row["dice"]) <= 0.75 for row in table(out))
    assert [path.name for path in out.parent.iterdir()] == ["masks"]


def test_masks_never_leave_their_folder_or_overwrite_another(simulated, tmp_path):
    for id in ("../../up", "/etc/passwd", "a\nb", "..", "ä" * 300, ""):
        name = file_name(3, id)
        assert Path(name).name == name and re.fullmatch(r"000003-[A-Za-z0-9_-]*\.png", name) and len(name) < 80
    root = write_folder(tmp_path / "data", 30)
    done = simulated("dataset=folder", f"data_root={root}", "samples=2", f"output={root}")
    assert done.status == 1 and "holds something else" in done.err and (root / "images").is_dir()
    # Another tool's table beside its masks, an earlier set of ours that holds more by now, and one with another table.
    theirs = tmp_path / "theirs"
    save(theirs / "000001-a.png", disc(1))
    (theirs / "masks.csv").write_text("file,dataset,id,part\n000001-a.png,folder,case_1,train\n")
    arguments = ("dataset=folder", f"data_root={root}", "samples=2")
    for name in ("notes.txt", "val-000000-a.png", ".hidden"):
        assert simulated(*arguments, f"output={tmp_path}/{name}-set").status == 0
        (tmp_path / f"{name}-set" / name).write_text("mine")
    for out in (theirs, *tmp_path.glob("*-set")):
        before = read(out)
        done = simulated(*arguments, f"output={out}")
        assert done.status == 1 and "holds something else: give a new folder" in done.err and read(out) == before
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        done = simulated("dataset=folder", f"data_root={root}", "samples=2", f"output={out}")
        assert done.status == 1 and "output=" in done.err
    for wrong in ("samples=0", "samples=some", "part=all", "fold=5", "fold=-1", "seed=-1"):
        done = simulated("dataset=folder", f"data_root={root}", wrong)
        assert done.status == 1 and wrong.partition("=")[0] in done.err and len(done.err.strip().splitlines()) == 1


def test_an_interrupted_set_leaves_nothing(simulated, tmp_path, monkeypatch):
    from ultrarefiner.data.failures import FailureSimulator

    root = write_folder(tmp_path / "data", 30)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(FailureSimulator, "simulate", stop)
    done = simulated("dataset=folder", f"data_root={root}", "samples=2", f"output={tmp_path}/set/masks")
    assert done.status == 130 and not list((tmp_path / "set").iterdir())


@pytest.mark.slow
@pytest.mark.xdist_group(GROUP)
def test_a_killed_set_is_made_again(tmp_path):
    """SIGKILL in the middle: nothing under the set's name, and the same command makes it."""
    root, out = write_folder(tmp_path / "data", 30), tmp_path / "set" / "masks"
    arguments = [*SMALL, "dataset=folder", f"data_root={root}", f"output_root={tmp_path}/out", f"output={out}"]
    process = Command("ultrarefiner.simulate", *arguments, "samples=100000")
    while not list(tmp_path.glob("set/.masks-*/000020-*")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    subprocess.run([sys.executable, "-m", "ultrarefiner.simulate", *arguments, "samples=30"], check=True)
    assert len(table(out)) == 30


# ---------------------------------------------------------------------------------------------------------- read back


@pytest.fixture
def written(simulated, tmp_path):
    """A data set, and masks of its fold 0: its root and their folder."""
    root = write_busbra(tmp_path / "data")
    done = simulated("dataset=busbra", f"data_root={root}", "samples=60", f"output={tmp_path}/masks")
    assert done.status == 0, done.err
    return root, tmp_path / "masks"


def items(root: Path, masks: Path, *more: str):
    cfg = busbra(root, "phase=sam", f"phase.masks={masks}", f"output_root={root.parent}/out", *more)
    return build_data(cfg, SamPhase)


def stored(masks: Path, id: str) -> list[np.ndarray]:
    names = [row["file"] for row in table(masks) if row["id"] == id]
    return [cv2.imread(str(masks / name), cv2.IMREAD_UNCHANGED).astype(np.float32) / 65535 for name in names]


def test_training_takes_masks_from_the_files(written):
    root, masks = written
    data = items(root, masks, "dataset.augment=null")
    train = data.dataset("train")
    chosen = set()
    for epoch in range(6):
        for index, case in enumerate(data.split.train):
            options = stored(masks, case.id)
            found = train[(epoch, index)]["prob"][0].numpy()
            same = [np.array_equal(found, option) for option in options]
            assert len(options) >= 2 and sum(same) == 1
            chosen.add((index, same.index(True)))
            np.testing.assert_array_equal(found, train[(epoch, index)]["prob"][0].numpy())
    assert len(chosen) > 1.5 * len(data.split.train)  # another one in another epoch
    files = {path.name for path in masks.iterdir()}
    val = data.dataset("val")  # has no files here: simulated as ever
    assert val[0]["prob"].shape == (1, 32, 32) and {path.name for path in masks.iterdir()} == files
    several = items(root, masks, "phase.masks_per_image=3").dataset("train", data.augment)
    assert several[(0, 0)]["prob"].shape == (3, 32, 32)


def test_masks_from_files_follow_the_geometry(written):
    root, masks = written
    data = items(root, masks)
    for row in table(masks):  # each mask is the lesion itself
        position = data._source.positions["busbra", row["id"]]
        lesion = data._source.coarse.mask(position)
        cv2.imwrite(str(masks / row["file"]), lesion.astype(np.uint8) * 255)  # 8 bits, as other tools write
    changed = data.dataset("train", data.augment)
    for index in range(8):
        item = changed[(1, index)]
        assert ((item["prob"] >= 0.5) == item["coarse_mask"].bool()).float().mean() > 0.99


def test_validation_takes_files_of_its_part(written, simulated):
    root, masks = written
    val = masks.parent / "val"
    assert simulated("dataset=busbra", f"data_root={root}", "samples=20", f"output={val}", "part=val").status == 0
    rows = table(val)
    for row in rows:
        (val / row["file"]).rename(masks / f"val-{row['file']}")
    with (masks / "masks.csv").open("a", newline="") as file:
        csv.writer(file).writerows([f"val-{row['file']}", row["dataset"], row["id"], "val", "", "", ""] for row in rows)
    data = items(root, masks)
    for index, case in enumerate(data.split.val):
        options = stored(masks, case.id)
        assert any(np.array_equal(data.dataset("val")[index]["prob"][0].numpy(), option) for option in options)


def edit(masks: Path, change) -> None:
    text = (masks / "masks.csv").read_text()
    (masks / "masks.csv").write_text(change(text))


def only_some(masks: Path) -> None:
    edit(masks, lambda text: "".join(text.splitlines(keepends=True)[:9]))


def another_size(masks: Path) -> None:
    cv2.imwrite(str(masks / table(masks)[7]["file"]), np.zeros((32, 31), np.uint8))


MISTAKES = {
    "no table": (lambda masks: (masks / "masks.csv").unlink(), r"no mask for \d+ of .* the first is bus_.*masks\.csv"),
    "no folder": (lambda masks: masks.rename(masks.with_name("gone")), r"phase\.masks=.* has no masks\.csv and no"),
    "a column": (lambda masks: edit(masks, lambda text: text.replace("part", "PART", 1)), "no column part"),
    "no rows": (lambda masks: edit(masks, lambda text: text.splitlines()[0]), "no rows"),
    "test": (lambda masks: edit(masks, lambda text: text.replace("train", "test", 1)), "1 cases .* part test"),
    "another part": (
        lambda masks: edit(masks, lambda text: text.replace("train", "trian", 1)),
        "train, val or test.*trian",
    ),
    "outside": (
        lambda masks: edit(masks, lambda text: text.replace("000000", "../000000", 1)),
        "not lie in the folder",
    ),
    "some": (only_some, r"no mask for \d+ of the \d+ cases of part train, the first is bus_"),
    "size": (another_size, r"000007-.*31 × 32 px, not 32 × 32"),
    "a file": (lambda masks: (masks / table(masks)[3]["file"]).unlink(), r"000003-.*cannot be read"),
    "damaged": (lambda masks: (masks / table(masks)[3]["file"]).write_bytes(b"x" * 99), r"000003-.*cannot be read"),
    "unknown": (lambda masks: edit(masks, lambda text: text.replace(",bus_", ",nobody_", 1)), "1 cases .* nobody_"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_is_refused_before_training(written, mistake):
    root, masks = written
    change, sentence = MISTAKES[mistake]
    change(masks)
    with pytest.raises(UserError, match=sentence) as raised:
        items(root, masks).prepare_data()
    assert "\n" not in str(raised.value)


def test_masks_of_another_fold_are_refused(written):
    root, masks = written
    sentence = r"masks of \d+ cases .* part train \((\d+) of them are its test cases\)"
    with pytest.raises(UserError, match=sentence) as raised:
        items(root, masks, "fold=1").prepare_data()
    tested = {case.id for case in build_data(busbra(root, "phase=coarse", "fold=1"), CoarsePhase).split.test}
    number = len(tested & {row["id"] for row in table(masks)})
    assert number > 0 and f"({number} of them" in str(raised.value)


def test_the_content_of_the_folder_defines_the_result(written):
    root, masks = written

    def directories(*more: str) -> list[Path]:
        return [
            plan(busbra(root, f"{key}={masks}", f"output_root={root.parent}/out", *phase, *more))[-1].directory
            for key, phase in (("phase.masks", ["phase=sam"]), ("phase.sam.masks", []))
        ]

    first = directories()
    copy = masks.with_name("copy")
    masks.rename(copy)
    masks, gone = copy, masks
    assert directories() == first and not gone.exists()  # another place, the same masks
    pixels = cv2.imread(str(masks / table(masks)[0]["file"]), cv2.IMREAD_UNCHANGED)
    pixels[0, 0] ^= 1
    cv2.imwrite(str(masks / table(masks)[0]["file"]), pixels)
    second = directories()
    assert all(one != other for one, other in zip(first, second, strict=True))
    edit(masks, lambda text: text.rstrip("\n") + "\n")
    edit(masks, lambda text: text.replace("0.", "1.", 1))
    assert all(one != other for one, other in zip(second, directories(), strict=True))


@pytest.mark.slow
def test_phase_two_trains_on_files(written):
    root, masks = written
    directory = run(
        busbra(root, "phase=sam", f"phase.masks={masks}", "phase.epochs=1", f"output_root={root.parent}/out")
    )
    assert (directory / "summary.json").is_file()


def test_normal_images_get_masks_too(simulated, tmp_path):
    root = write_busi(tmp_path / "data", 12)
    arguments = ("dataset=busi", f"data_root={root}", "dataset.include_normal=true", "samples=40")
    assert simulated(*arguments, f"output={tmp_path}/m").status == 0
    rows = table(tmp_path / "m")
    normal = [row for row in rows if row["id"].startswith("normal")]
    assert normal and {row["kind"] for row in normal} == {"none"}
