"""What surrounds a command: a full disk, a closed pipe, a locale that knows ASCII alone, classes that fail."""

import contextlib
import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import MICRO, compose
from data_layouts import write_folder
from ultrarefiner import cli, files
from ultrarefiner.data.cache import open_cache
from ultrarefiner.data.cases import Case
from ultrarefiner.data.phantom import Phantoms
from ultrarefiner.data.readers import Folder
from ultrarefiner.errors import UserError
from ultrarefiner.models.weights import read_state_dict, write_state_dict
from ultrarefiner.runs import checkpoints, experiment, keeping, training
from ultrarefiner.runs.plan import plan
from ultrarefiner.runs.provenance import sources

BIG = {"weight": torch.zeros(1_000_000)}  # 4 MB
WRITERS = {
    "x.pth": lambda path, big: write_state_dict(BIG if big else {"weight": torch.ones(3)}, path),
    "x.safetensors": lambda path, big: write_state_dict(BIG if big else {"weight": torch.ones(3)}, path, {"a": "b"}),
    "x.csv": lambda path, big: files.write_csv(path, [{"a": "b" * (4_000_000 if big else 1)}]),
    "x.json": lambda path, big: files.write_atomically(path, bytes(4_000_000 if big else 1)),
}


@pytest.fixture
def full_disk(tmp_path):
    """A real file system of 2 MB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_sentence_and_what_was_there_stays(name, full_disk):
    path = full_disk / name
    WRITERS[name](path, False)
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"cannot write {path}: .*what was there before is untouched") as raised:
        WRITERS[name](path, True)
    assert "\n" not in str(raised.value)
    assert [found.name for found in full_disk.iterdir()] == [name] and path.read_bytes() == before
    if name.endswith((".pth", ".safetensors")):
        assert torch.equal(read_state_dict(path)["weight"], torch.ones(3))


@pytest.mark.parametrize("argument", ["--help", "phase=coarse"])
def test_a_reader_that_has_enough_is_no_mistake(argument, tmp_path):
    """`python -m ultrarefiner.train … | head -1`, the reader gone before the first line."""
    code = (
        f"import sys, time; time.sleep(1); from ultrarefiner import train; sys.argv[1:] = [{argument!r}]; train.main()"
    )
    with_stderr = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": tmp_path}
    process = subprocess.Popen([sys.executable, "-c", code], **with_stderr)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


@pytest.mark.parametrize("where", ["ultrarefiner", "checkout"])
def test_no_folder_beside_experiments_hides_a_key_of_its_name(where, tmp_path):
    """In the wheel the package's rooms lie there (runs/, data/), in a clone whatever its user has put into it."""
    package = tmp_path / where / "ultrarefiner" if where == "checkout" else tmp_path / where
    shutil.copytree(cli.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "conf"))
    home = package.parent if where == "checkout" else package
    for name in ("conf", "experiments"):
        shutil.copytree(cli.HOME / name, home / name)
    for name in ("runs", "predictions"):
        (home / name).mkdir(exist_ok=True)
    surroundings = os.environ | {"PYTHONPATH": str(package.parent)}
    for command, *arguments in (
        ("report", "runs=x", "output=y"),
        ("evaluate", "predictions=x", "dataset=busi", "data_root=x", "output=y"),
        ("train", "+experiments=seed", "data_root=x"),
    ):
        program = [sys.executable, "-m", f"ultrarefiner.{command}", *arguments, "--cfg", "job"]
        done = subprocess.run(program, cwd=tmp_path, env=surroundings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_locale_of_ascii_shows_a_mistake_too():
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "ultrarefiner.train", "dataset=busi", "data_root=/nö/Ω"]
    done = subprocess.run(command, capture_output=True, env=plain)
    assert done.returncode == 1 and done.stderr.startswith(b"error: data_root=/n") and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "import nothing_such\n",
            r"cannot be loaded: ModuleNotFoundError: No module named 'nothing_such' .*own.py, line 1",
        ),
        ("class Net(:\n", r"cannot be loaded: SyntaxError: .*own.py, line 1"),
        ("x = 1\nNet = undefined\n", r"cannot be loaded: NameError: name 'undefined' .*own.py, line 2"),
        ("Other = 1\n", r"_target_=own\.Net cannot be loaded: (AttributeError|ModuleNotFoundError)"),
        (
            "class Net:\n    def __init__(self, **_):\n        self.x = undefined\n",
            r"own\.Net fails: NameError: name 'undefined' is not defined .*own.py, line 3",
        ),
        ("def Net(**_):\n    return 3\n", r"own\.Net"),
    ],
)
def test_a_class_of_somebodys_own_that_fails_says_where(source, sentence, command, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own", None)
    given = [*MICRO, f"output_root={tmp_path}/out", "phase=coarse", "model.coarse._target_=own.Net"]
    done = command(*given)
    sys.modules.pop("own", None)
    lines = done.err.strip().splitlines()
    assert done.status == 1 and len(lines) == 1 and re.search(sentence, lines[0]), done.err


def test_code_of_ones_own_belongs_to_a_result(tmp_path, monkeypatch):
    """Of the class's file and of her other files that it takes from; not of packages, nor of our own classes."""
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"model.coarse": {"_target_": "own_net.Net"}, "phase.optimizer": {"_target_": "torch.optim.AdamW"}}
    settings["roi._target_"] = "ultrarefiner.refine.roi.LesionRoi"
    net = "import torch\nfrom own_parts import Block\n\nclass Net(torch.nn.Module):\n    block = Block\n"

    def digest(net: str, block: str) -> dict[str, str]:
        (tmp_path / "own_net.py").write_text(net)
        (tmp_path / "own_parts.py").write_text(block)
        for name in ("own_net", "own_parts"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return sources(settings)

    first = digest(net, "class Block: pass\n")
    assert set(first) == {"own_net.Net"} and digest(net, "class Block: pass\n") == first
    assert digest(net + "    width = 3\n", "class Block: pass\n") != first
    assert digest(net, "class Block: width = 30\n") != first
    for name in ("own_net", "own_parts"):
        sys.modules.pop(name, None)
    assert "code" not in plan(compose("phase=coarse", f"output_root={tmp_path}"))[-1].settings


def test_a_finished_run_on_a_read_only_disk_is_shown(finished_runs, full_disk, capsys):
    root = full_disk / "out"
    for path in finished_runs.rglob("*"):  # a tmpfs of 2 MB: the tables, not the weights
        if path.suffix in (".json", ".csv", ".yaml") and "cache" not in path.parts:
            (root / path.relative_to(finished_runs)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.relative_to(finished_runs))
    subprocess.run(["mount", "-o", "remount,ro", full_disk], check=True)
    capsys.readouterr()
    experiment.run(compose(f"output_root={root}"))
    assert "exists already" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"{root}/.*cannot be written .*another output_root"):
        experiment.run(compose(f"output_root={root}", "seed=7"))


def write_summary(folder: Path, turn: int) -> None:
    files.write_json(folder / "summary.json", {"turn": turn, "rows": [turn] * 20_000})


def write_checkpoint(folder: Path, turn: int) -> None:
    content = {"turn": turn, "weight": torch.full((200_000,), float(turn))}
    keeping.SafeCheckpointIO().save_checkpoint(content, folder / checkpoints.LAST)


def write_cache(folder: Path, turn: int) -> None:
    open_cache(Phantoms(6, turn % 2, 64), (32, 64), folder)


def read_summary(folder: Path) -> None:
    if (folder / "summary.json").is_file():
        content = files.read_json(folder / "summary.json", ["turn", "rows"])
        assert content["rows"] == [content["turn"]] * 20_000


def read_checkpoint(folder: Path) -> None:
    """There is one to go on from as soon as one was written whole."""
    path = checkpoints.resume_point(folder)
    if path is not None:
        content = files.load(path)
        assert (content["weight"] == content["turn"]).all()
    assert path is not None or not (folder / checkpoints.LAST).exists()


def read_cache(folder: Path) -> None:
    """Built again where it was not whole; index and frames are those of the images."""
    for seed in (0, 1):
        reader = Phantoms(6, seed, 64)
        index, frames = open_cache(reader, (32, 64), folder)
        for position, case in enumerate(reader.cases()):
            image, mask = reader.read(case)
            assert index.entries[position].lesion_px == mask.sum()
            assert (frames[64].image(position) == image).all() and (frames[64].mask(position) == mask).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("write", "read"),
    [(write_summary, read_summary), (write_checkpoint, read_checkpoint), (write_cache, read_cache)],
)
def test_killed_at_ten_random_moments_of_writing(write, read, tmp_path):
    draw = random.Random(0)
    for attempt in range(10):
        folder = tmp_path if write is not write_cache else tmp_path / str(attempt)  # each cache is built once
        folder.mkdir(exist_ok=True)
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                for turn in range(10_000):
                    write(folder, turn)
            os._exit(1)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        read(folder)


def test_files_that_vanish_while_a_run_trains_cost_a_picture_at_most(tmp_path, monkeypatch, caplog):
    """The truth and the images are in the cache; a mount that is lost leaves the result."""
    root = write_folder(tmp_path / "data", 20)
    table = "id,patient,label\n" + "".join(f"case_{i},{i},benign\n" for i in range(20))
    (root / "table.csv").write_text(table)
    given = [text for text in MICRO if "reader" not in text]
    given += ["dataset=folder", f"data_root={root}", "phase=coarse", "model.schedule.coarse.epochs=1"]
    cfg = compose(f"output_root={tmp_path}/out", *given, micro=False)
    fit = training._fit

    def fit_and_lose(*args):
        fit(*args)
        shutil.rmtree(root)

    monkeypatch.setattr(training, "_fit", fit_and_lose)
    directory = experiment.run(cfg)
    assert (directory / "summary.json").is_file() and "is not among the overlays" in caplog.text


def test_files_that_change_while_they_are_read_are_not_cached(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data", 3)
    reader = Folder(root)
    read = Folder.read

    def read_and_change(self, case):
        done = read(self, case)
        if case.id == "case_2":
            shutil.copy(root / "masks" / "case_1.png", root / "masks" / "case_2.png")
        return done

    monkeypatch.setattr(Folder, "read", read_and_change)
    with pytest.raises(UserError, match="changed while they were read"):
        open_cache(reader, (32,), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.json"))


WRONG_READERS = {
    "no name": ("name = None", r"Own must be .* with a name"),
    "cases that are none": ("found = ['c1', 'c2']", r"cases\(\) of Own must give Case with paths, got 'c1'"),
    "masks as text": ("masks = ['x.png']", r"own_reader\.Own"),
    "a float image": ("kind = np.float32", r"read\(\) of Own must give an image \(H, W\) of uint8"),
    "a bug": ("broken = 1 // 0", r"own_reader\.Own.*ZeroDivisionError"),
    "a bug in cases": ("late = True", r"ValueError: no such thing .*own_reader\.py, line"),
}


def test_masks_may_be_a_list():
    """What is most often written in a reader of one's own."""
    case = Case("c", "own", image=Path("x.png"))
    object.__setattr__(case, "masks", [Path("y.png")])
    assert case.files == (Path("x.png"), Path("y.png"))


@pytest.mark.parametrize("what", WRONG_READERS)
def test_a_reader_of_ones_own_that_is_wrong_is_one_sentence(what, command, tmp_path, monkeypatch):
    line, sentence = WRONG_READERS[what]
    (tmp_path / "own_reader.py").write_text(f"""
from pathlib import Path
import numpy as np
from ultrarefiner.data.cases import Case
from ultrarefiner.data.readers import Reader

class Own(Reader):
    name, masks, kind, late, found = "own", (), np.uint8, False, None

    def __init__(self):
        {line if "broken" in line else "self." + line}

    def cases(self):
        if self.late:
            raise ValueError("no such thing")
        return self.found or [Case(f"c{{i}}", "own", masks=self.masks) for i in range(12)]

    def read(self, case):
        y, x = np.mgrid[:40, :40]
        place = int(case.id[1:])
        return ((y * x * (place + 2)) % 251).astype(self.kind), (y - 20) ** 2 + (x - 20) ** 2 < 90 + place
""")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_reader", None)
    monkeypatch.setattr(experiment, "train", lambda *_: pytest.fail("it is trained"))
    given = [text for text in MICRO if "reader" not in text]
    given += [
        "dataset.reader._target_=own_reader.Own",
        *(f"~dataset.reader.{key}" for key in ("cases", "seed", "size")),
    ]
    done = command(*given, "phase=coarse", f"output_root={tmp_path}/out")
    sys.modules.pop("own_reader", None)
    lines = done.err.strip().splitlines()
    assert done.status == 1 and len(lines) == 1 and re.search(f"^error: .*(?:{sentence})", lines[0]), done.err


def test_lightning_is_imported_without_what_nothing_here_uses():
    code = """
import sys
from ultrarefiner import extras
extras.import_lightning()
import ultrarefiner.runs.experiment
assert not {"torchvision", "matplotlib", "scipy.signal"} & set(sys.modules), "a second of each start"
import torch, torchmetrics
metric = torchmetrics.MeanMetric()  # what it has besides works
metric.update(torch.ones(3))
assert metric.compute() == 1
from lightning_utilities.core.imports import RequirementCache, package_available
assert package_available("scipy") and RequirementCache("scipy"), "as they are, for all that comes later"
extras.import_lightning()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
