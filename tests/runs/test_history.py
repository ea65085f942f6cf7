"""What a directory tells of its run: starts and ends, damage that heals, and what a run with more epochs takes."""

import datetime
import json
import shutil
from pathlib import Path

import pytest
import torch

from conftest import compose
from trouble import FOLDER, TROUBLE
from ultrarefiner import files
from ultrarefiner.errors import UserError
from ultrarefiner.results.found import Found
from ultrarefiner.runs import experiment, history, outcome
from ultrarefiner.runs.plan import plan

pytestmark = pytest.mark.xdist_group("history")  # what it trains first is trained on one worker
COARSE = ["phase=coarse", "model.schedule.coarse.epochs=1"]


@pytest.fixture
def root(finished_runs, tmp_path) -> Path:
    return Path(shutil.copytree(finished_runs, tmp_path / "out"))


def summaries(root: Path) -> dict[str, Path]:
    return {path.parent.parent.name.partition("-")[0]: path for path in root.glob("phantom/tiny/*/*/summary.json")}


def test_a_summary_says_what_it_started_from_and_when_where_and_how(finished_runs):
    found = summaries(finished_runs)
    told = json.loads(found["e2e"].read_text())["run"]
    assert {name: Path(path) for name, path in told["started_from"].items()} == {
        name: found[name].parent for name in ("coarse", "sam")
    }
    assert json.loads(found["coarse"].read_text())["run"]["started_from"] == {}
    began, last = (datetime.datetime.fromisoformat(told[name]) for name in ("began", "last"))
    assert began.tzinfo is not None and began <= last and 0 < told["seconds"] < 3600
    assert told["host"] and told["command"] and told["starts"] == 1 and told["ended"] == "finished"
    assert json.loads(found["e2e"].with_name("run.json").read_text())["ended"] == "finished"


@pytest.mark.parametrize("damage", [lambda rows: b'id,"patient', lambda rows: rows.splitlines(True)[0]])
def test_what_is_damaged_is_measured_again_and_nothing_is_trained(damage, root, caplog):
    """Of the cases a part of the header is left, or the header alone."""
    found = summaries(root)
    before = {name: json.loads(path.read_text()) for name, path in found.items()}
    kept = {path: path.read_bytes() for path in root.rglob("*.ckpt")}
    tables = {name: path.with_name("cases.csv").read_bytes() for name, path in found.items()}
    found["e2e"].write_text("null")
    found["coarse"].write_text("")
    found["sam"].with_name("cases.csv").write_bytes(damage(tables["sam"]))
    target = experiment.run(compose(f"output_root={root}"))
    assert target == found["e2e"].parent and caplog.text.count("is measured again") == 3
    for name, path in found.items():
        after = json.loads(path.read_text())
        other = {"run": 0, "environment": 0, "config": 0}  # the configuration names the folder that it was copied from
        assert after | other == before[name] | other
        assert after["run"]["starts"] == 2
    assert {name: path.with_name("cases.csv").read_bytes() for name, path in found.items()} == tables
    assert {path: path.read_bytes() for path in root.rglob("*.ckpt")} == kept


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"title": "e2e', "\x00\x00"])
def test_a_damaged_summary_without_a_checkpoint_is_one_sentence(root, content):
    found = summaries(root)["coarse"]
    found.write_text(content)
    shutil.rmtree(found.parent / "checkpoints")
    with pytest.raises(UserError, match=rf"{found} is damaged .*no checkpoint .*delete {found.parent}$"):
        experiment.run(compose(f"output_root={root}", "phase=coarse"))


def ended(root: Path, *overrides: str) -> tuple[str, str]:
    """How a failing run says that it ended, and as what a report finds it."""
    cfg = compose(f"output_root={root}", *COARSE, *overrides)
    (run,) = plan(cfg)
    with pytest.raises(BaseException) as raised:
        experiment.run(cfg)
    told = json.loads((run.directory / history.RECORD).read_text())["ended"]
    return f"{type(raised.value).__name__}: {raised.value}", f"{told} | {Found.read(run.directory).status}"


def test_a_crash_an_interrupt_and_a_kill_are_told_apart(tmp_path, monkeypatch):
    def instead(error):
        def write(*_):
            raise error

        monkeypatch.setattr(outcome.Outcome, "write", write)

    instead(ZeroDivisionError("a bug"))
    assert ended(tmp_path)[1] == "failed: ZeroDivisionError: a bug | failed: ZeroDivisionError: a bug"
    instead(UserError("cannot write x"))
    assert ended(tmp_path)[1] == "failed: cannot write x | failed: cannot write x"
    instead(KeyboardInterrupt())
    assert ended(tmp_path)[1] == "interrupted | interrupted"
    (record,) = tmp_path.rglob(history.RECORD)
    told = json.loads(record.read_text())
    assert told["starts"] == 3
    record.write_text(json.dumps(told | {"ended": None}))  # what a process leaves that was killed
    assert Found.read(record.parent).status == "killed"
    record.write_text("null")
    assert Found.read(record.parent).status.startswith("damaged")
    monkeypatch.undo()
    experiment.run(compose(f"output_root={tmp_path}", *COARSE))
    assert Found.read(record.parent).status == "finished"


def test_more_epochs_go_on_where_the_learning_rate_does_not_fall(tmp_path, capsys):
    settings = ["phase=coarse", "phase.poly_power=0"]
    short = experiment.run(compose(f"output_root={tmp_path}", *settings, "phase.epochs=1"))
    capsys.readouterr()
    longer = experiment.run(compose(f"output_root={tmp_path}", *settings, "phase.epochs=2"))
    shown = capsys.readouterr().out
    assert f"{short} has 1 of these 2 epochs; this run goes on from them" in shown and "epoch 1/2" not in shown
    whole = experiment.run(compose(f"output_root={tmp_path}/whole", *settings, "phase.epochs=2"))
    assert (longer / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    one, other = (files.load(path / "checkpoints" / "last.ckpt")["state_dict"] for path in (longer, whole))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert files.load(longer / "checkpoints" / "best.ckpt")["ultrarefiner"]["phase"]["epochs"] == 2


def test_more_epochs_begin_anew_where_the_learning_rate_falls(tmp_path, capsys):
    short = experiment.run(compose(f"output_root={tmp_path}", "phase=coarse", "phase.epochs=1"))
    capsys.readouterr()
    experiment.run(compose(f"output_root={tmp_path}", "phase=coarse", "phase.epochs=2"))
    shown = capsys.readouterr().out
    assert f"{short} has 1 of these 2 epochs, but its learning rate fell" in shown and "epoch 1/2" in shown


def test_other_data_with_the_same_settings_are_named(tmp_path, caplog, monkeypatch):
    first = experiment.run(compose(f"output_root={tmp_path}", *COARSE))
    monkeypatch.setattr("ultrarefiner.data.store.fingerprint", lambda *_: "0" * 64)
    monkeypatch.setattr("ultrarefiner.data.cache.fingerprint", lambda *_: "0" * 64)
    other = experiment.run(compose(f"output_root={tmp_path}", *COARSE))
    assert other != first and f"{first} has these settings with other data, weights or code" in caplog.text


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_worker_that_is_killed_for_memory_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "job0-process0").write_text("kill")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    said, recorded = ended(tmp_path / "out", TROUBLE, "trainer.num_workers=1")
    assert "UserError: the memory may not suffice" in said and "trainer.num_workers" in said
    assert recorded.startswith("failed: the memory may not suffice")


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path):
    for name in (".last.ckpt-abcdefgh", ".lock", "last.ckpt", ".summary.json-12345678"):
        (tmp_path / name).touch()
    files.remove_parts(tmp_path, tmp_path / "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "last.ckpt"]
