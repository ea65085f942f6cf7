"""The look at a dataset before training, and the worked example of a new one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Finished, compose
from data_layouts import disc, save, texture, write_busbra, write_busi, write_folder
from ultrarefiner import cli, prepare
from ultrarefiner.data.index import fingerprint
from ultrarefiner.data.readers import Folder
from ultrarefiner.runs.assemble import build_store

README = Path(__file__).resolve().parents[1] / "README.md"
SMALL = ["model.image_size=64", "model.coarse_size=32"]


@pytest.fixture
def prepared(execute, tmp_path):
    """Run `python -m ultrarefiner.prepare ...` inside this process."""

    def run(*arguments: str) -> Finished:
        arguments = (*SMALL, f"output_root={tmp_path}/out", *arguments)
        return execute(prepare.main, *arguments)

    return run


def test_help_names_every_dataset_and_imports_no_torch():
    code = (
        "import sys; from ultrarefiner import prepare\n"
        "try: prepare.main()\n"
        "finally: sys.stderr.write('torch' if 'torch' in sys.modules else 'clean')"
    )
    for arguments in (["--help"], ["--cfg", "job"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.stderr.endswith("clean") and done.returncode == 0, done.stderr
    page = prepare.help_text()
    options = sorted(path for path in (cli.CONF / "dataset").glob("*.yaml"))
    assert len(options) == 9
    for path in options:
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ") and len(first) <= 92 and f"  {path.stem} " in page


LAYOUTS = {
    "busbra": lambda root: write_busbra(root),
    "busi": lambda root: write_busi(root),
    "folder": lambda root: write_folder(root),
    "bus": lambda root: write_pairs(root, "original", "GT", "{:06d}.png"),
    "udiat": lambda root: write_pairs(root, "original", "GT", "{:06d}.png"),
    "bus_uc": lambda root: write_pairs(root, "All/images", "All/masks", "{:03d}.png"),
    "bus_uclm": lambda root: write_pairs(root, "images", "masks", "ALWI_{:03d}.png"),
}


def write_pairs(root, images, masks, name):
    for number in range(6):
        save(root / images / name.format(number), texture(number))
        save(root / masks / name.format(number), disc(number))
    return root


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_each_dataset_is_checked_and_cached(dataset, prepared, tmp_path):
    root = LAYOUTS[dataset](tmp_path / "data")
    done = prepared(f"dataset={dataset}", f"data_root={root}")
    assert done.status == 0, done.err
    assert done.out.startswith(dataset) and " cases " in done.out and "60 × 48 px" in done.out
    assert all(len(line) <= 100 for line in done.out.splitlines() if str(tmp_path) not in line)
    folder = next((tmp_path / "out" / "cache").glob(f"{dataset}-*"))
    assert {"index.json", "images-32.npy", "masks-64.npy"} <= {path.name for path in folder.iterdir()}


def test_members_are_named(prepared, tmp_path):
    write_busbra(tmp_path / "data" / "BUSBRA")
    write_busi(tmp_path / "data" / "BUSI")
    members = ("dataset=combined", f"data_root={tmp_path / 'data'}")
    done = prepared(*members, "dataset.members=[busi,busbra]")
    assert done.status == 0 and done.out.startswith("busi+busbra") and re.search(r"cases +52\n", done.out)
    for wrong, words in (("[busi,busbar]", "'busbar'"), ("[]", "dataset.members=[…]"), ("[busi,busi]", "twice")):
        done = prepared(*members, f"dataset.members={wrong}")
        assert done.status == 1 and words in done.err and len(done.err.strip().splitlines()) == 1


def test_every_file_to_correct_is_listed(prepared, tmp_path):
    root = write_folder(tmp_path / "data", 40)
    for number in range(30):
        (root / "images" / f"case_{number}.png").write_bytes(b"")
    done = prepared("dataset=folder", f"data_root={root}")
    assert done.status == 1 and "30 files of folder have to be corrected" in done.err
    for number in range(30):
        assert f"case_{number}.png" in done.out
    assert not list((tmp_path / "out").rglob("*.npy"))


def test_what_is_left_out_and_what_is_odd_is_said(prepared, tmp_path):
    root = write_busi(tmp_path / "data")
    save(root / "malignant" / "malignant (9).png", texture(1), "RGB")  # benign (1) once more
    save(root / "malignant" / "malignant (9)_mask.png", disc(1))
    (root / "benign" / "notes.txt").write_text("x")
    done = prepared("dataset=busi", f"data_root={root}")
    assert done.status == 0 and "benign/notes.txt" in done.out and "4 (left out unless" in done.out
    assert "Suspicious (1)" in done.out and "the same file as busi malignant (9)" in " ".join(done.out.split())


def test_what_a_reader_of_ones_own_makes_of_the_files_is_read_anew(prepared, tmp_path, monkeypatch):
    """Its settings and its code are part of what the cache is of; ours have nothing but the files."""
    root = write_folder(tmp_path / "data")
    code = """
from ultrarefiner.data.readers import Folder

class Mine(Folder):
    def __init__(self, root, name, crop=0, **columns):
        super().__init__(root, name, **columns)
        self.crop = crop

    def read(self, case):
        image, mask = super().read(case)
        return image[self.crop :], mask[self.crop :]
"""
    (tmp_path / "cropping.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = ("dataset=folder", f"data_root={root}", "dataset.reader._target_=cropping.Mine", "dataset.reader.name=mine")

    def heights(*more: str) -> list[int]:
        done = prepared(*mine, *more)
        assert done.status == 0, done.err
        cfg = compose(*mine, *more, "phase=coarse", f"output_root={tmp_path}/out", *SMALL, micro=False)
        store = build_store(cfg)  # training finds the same
        (folder,) = (tmp_path / "out" / "cache").glob(f"*-{store.fingerprint[:16]}")
        return [entry.height for entry in store.open((32,))[0].entries[:1] if (folder / "index.json").is_file()]

    assert heights() == [48] and heights("+dataset.reader.crop=8") == [40] and heights() == [48]
    (tmp_path / "cropping.py").write_text(code.replace("image[self.crop :], mask[self.crop :]", "image[2:], mask[2:]"))
    monkeypatch.delitem(sys.modules, "cropping")
    assert heights() == [46]
    (tmp_path / "moved").mkdir()
    root.rename(tmp_path / "moved" / "data")
    assert heights(f"data_root={tmp_path}/moved/data") == [46]
    assert len(list((tmp_path / "out" / "cache").glob("mine-*"))) == 3
    ours = compose("dataset=folder", f"data_root={tmp_path}/moved/data", "phase=coarse", *SMALL, micro=False)
    reader = Folder(tmp_path / "moved" / "data")
    assert build_store(ours).fingerprint == fingerprint(reader, reader.cases())


def test_the_example_of_a_new_dataset_in_the_readme_works(tmp_path):
    """Exactly as written there: a reader of fewer than 40 lines and a YAML file."""
    section = README.read_text(encoding="utf-8").split("### Adding a dataset")[1].split("\n### ")[0]
    reader, yaml = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("python", "yaml"))
    command = re.search(r"^    python -m ultrarefiner\.train (.+)$", section, re.MULTILINE)[1]
    assert len(reader.splitlines()) < 40
    (tmp_path / "mine.py").write_text(reader)
    (tmp_path / "options" / "dataset").mkdir(parents=True)
    (tmp_path / "options" / "dataset" / "mine.yaml").write_text(yaml)
    for number in range(40):
        name = f"p{number // 2:03d}_{number}.png"
        save(tmp_path / "mine" / "pictures" / name, texture(number))
        save(tmp_path / "mine" / "lesions" / name, disc(number))
    arguments = [part.replace("~", str(tmp_path)) for part in command.split()]
    code = (
        "import sys\n"
        "from ultrarefiner import cli, train\n"
        "from ultrarefiner.runs.assemble import build_data\n"
        "from ultrarefiner.phases.coarse import CoarsePhase\n"
        "def one_batch(cfg):\n"
        "    data = build_data(cfg, CoarsePhase)\n"
        "    batch = next(iter(data.train_dataloader()))\n"
        "    patients = {case.patient for case in data.split.train}\n"
        "    print(tuple(batch['coarse_image'].shape), bool(data.augment), len(data.split.train), len(patients))\n"
        "cli.launch(one_batch, 'train', train.help_text)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "phase=coarse", "phase.batch_size=4"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{README.parent}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shape, augmented, cases, patients = re.fullmatch(r"(\(.+\)) (\w+) (\d+) (\d+)\n", done.stdout).groups()
    assert shape == "(4, 1, 64, 64)" and augmented == "True" and int(cases) == 2 * int(patients) > 20
