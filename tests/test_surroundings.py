"""What surrounds a command: a full disk, a closed pipe, a locale that knows ASCII alone, classes that fail."""

import os
import re
import subprocess
import sys

import pytest
import torch

from conftest import MICRO
from ultrarefiner import files
from ultrarefiner.errors import UserError
from ultrarefiner.models.weights import read_state_dict, write_state_dict

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


def test_a_reader_that_has_enough_is_no_mistake():
    """`python -m ultrarefiner.train --help | head -1`, the reader gone before the first line."""
    code = "import sys, time; time.sleep(1); from ultrarefiner import train; sys.argv[1:] = ['--help']; train.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


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
