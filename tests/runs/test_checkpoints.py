"""Checkpoints: whole or not there, never executed, the previous one kept."""

import ast
import contextlib
import os
import pickle
import random

import pytest
import torch

from ultrarefiner import cli, files
from ultrarefiner.errors import UserError
from ultrarefiner.runs import checkpoints, keeping


class Malicious:
    def __reduce__(self):
        return (os.system, ("echo executed > executed.txt",))


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, monkeypatch):
    """Known mistake 9."""
    monkeypatch.chdir(tmp_path)
    for name, write in (("new.ckpt", torch.save), ("old.ckpt", lambda x, f: f.write_bytes(pickle.dumps(x)))):
        write({"state_dict": Malicious()}, tmp_path / name)
        with pytest.raises(UserError, match=name):
            files.load(tmp_path / name)
    assert not (tmp_path / "executed.txt").exists()


def test_files_are_unpickled_in_one_place():
    """Known mistake 9 for good: a second `torch.load`, or any other unpickling, would be noticed here."""
    found = []
    for path in cli.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                found.append(f"{path.name}: {ast.unparse(node)}")
    assert len(found) == 1 and found[0].startswith("files.py: torch.load(") and "weights_only=True" in found[0]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.ckpt"):
        files.load(tmp_path / "nothing.ckpt")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_damage_is_noticed_and_the_previous_checkpoint_used(tmp_path, caplog, damage):
    io = keeping.SafeCheckpointIO()
    for step in (1, 2):
        io.save_checkpoint({"step": step, "weights": torch.arange(5000.0)}, tmp_path / checkpoints.LAST)
    last = tmp_path / checkpoints.LAST
    assert files.load(checkpoints.resume_point(tmp_path))["step"] == 2
    content = bytearray(last.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    last.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}.get(damage, content))
    assert files.load(checkpoints.resume_point(tmp_path))["step"] == 1
    assert "last.ckpt" in caplog.text


def test_nothing_to_resume_from_is_none(tmp_path):
    assert checkpoints.resume_point(tmp_path) is None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.pth"
    files.save({"a": torch.ones(3)}, path)
    with pytest.raises(Exception):  # noqa: B017 - whatever pickling says
        files.save({"a": lambda: 0}, path)
    assert torch.equal(files.load(path)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["file.pth"]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(content, part):
        raise OSError(28, "No space left on device")

    files.save({"a": 1}, tmp_path / "x.pth")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"x\.pth: No space left on device"):
        files.save({"a": 2}, tmp_path / "x.pth")
    assert files.load(tmp_path / "x.pth")["a"] == 1


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_one_sentence_whatever_the_unpickler_makes_of_it(tmp_path, zipped):
    """Random damage ends in IndexError, UnicodeDecodeError and many more inside the unpickler."""
    path = tmp_path / "weights.pth"
    torch.save(
        {"a.weight": torch.arange(20.0), "b": {"c": [1, "text", 2.5]}}, path, _use_new_zipfile_serialization=zipped
    )
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        content = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.3 else whole)
        for _ in range(draw.randrange(1, 4)):
            if content:
                content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            files.load(path)
