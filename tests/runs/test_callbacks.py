"""Training that does not waste its user's time: it ends when it diverges, when nothing improves, when time is up."""

import csv
import functools
import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.optim.swa_utils import get_ema_avg_fn

import type_checks
from conftest import compose
from ultrarefiner import files
from ultrarefiner.errors import Paused, UserError
from ultrarefiner.phases.phase import Phase
from ultrarefiner.runs import callbacks, tracking
from ultrarefiner.runs.experiment import run

COARSE = ("phase=coarse", "dataset.reader.cases=12")


def result(root):
    (summary,) = root.glob("phantom/tiny/*/*/summary.json")
    return summary.parent, json.loads(summary.read_text())


def test_a_loss_that_explodes_stops_with_the_cases_and_what_to_try(tmp_path):
    with pytest.raises(UserError, match=r"epoch \d, step \d+: .*cases phantom_\d+.*lower phase\.lr") as error:
        run(compose(*COARSE, "phase.lr=1e12", "phase.epochs=5", f"output_root={tmp_path}"))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("phantom/tiny/*/*/summary.json"))


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, monkeypatch):
    """And the checkpoint of the epoch before is kept, so training can go on after a smaller step."""
    whole = Phase.training_step

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    def poisoned(self, batch, batch_idx):
        loss = whole(self, batch, batch_idx)
        return Poison.apply(loss) if self.current_epoch == 1 else loss

    monkeypatch.setattr(Phase, "training_step", poisoned)
    with pytest.raises(UserError, match=r"epoch 2, step .*its gradient is not"):
        run(compose(*COARSE, "phase.epochs=3", f"output_root={tmp_path}"))
    (last,) = tmp_path.glob("phantom/tiny/*/*/checkpoints/last.ckpt")
    content = files.load(last)
    assert content["epoch"] == 0
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_patience_ends_training_that_does_not_improve_and_stays_ended(tmp_path, monkeypatch):
    """Killed between its last epoch and its summary, a training that was over does not go on."""
    from ultrarefiner.runs.outcome import Outcome

    cfg = compose(*COARSE, "phase.lr=0", "phase.epochs=9", "phase.patience=2", f"output_root={tmp_path}")
    draw = Outcome._draw
    monkeypatch.setattr(Outcome, "_draw", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(cfg)
    monkeypatch.setattr(Outcome, "_draw", draw)
    run(cfg)
    directory, summary = result(tmp_path)
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Without a learning rate only the batch statistics move; the best epoch is whichever they made best.
    assert len(rows) == summary["epochs"] == min(9, summary["best_epoch"] + 1 + 2)
    assert summary["epochs"] < 9


def test_an_averaged_network_is_what_is_judged_and_kept(tmp_path, monkeypatch):
    """Against the formula θ̄ ← d·θ̄ + (1−d)·θ over the weights after each step."""
    seen = []

    class Spy(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.on_train_batch_end(trainer, pl_module)

        def on_train_batch_end(self, trainer, pl_module, *rest):
            seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    callbacks = tracking.callbacks
    monkeypatch.setattr(tracking, "callbacks", lambda *args: [*callbacks(*args), Spy()])
    run(compose(*COARSE, "phase.epochs=1", "phase.batch_size=2", "phase.ema_decay=0.5", f"output_root={tmp_path}"))
    directory, _ = result(tmp_path)
    best = files.load(directory / "checkpoints" / "best.ckpt")["state_dict"]
    average, update = dict(seen[1]), get_ema_avg_fn(0.5)
    for weights in seen[2:]:
        average = {name: update(average[name], weights[name], 1) for name in average}
    assert len(seen) > 3
    for name, value in average.items():
        torch.testing.assert_close(best[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert any(not torch.equal(best[name], seen[-1][name]) for name in average)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("phase.patience=0", r"phase\.patience must be 1 or more, got 0"),
        ("phase.ema_decay=1.0", r"phase\.ema_decay must be more than 0 and less than 1, got 1.0"),
        ("trainer.budget_minutes=-1", r"trainer\.budget_minutes must be more than 0, got -1"),
        ("trainer.save_minutes=-1", r"trainer\.save_minutes must be 0 or more, got -1"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path, override, sentence):
    with pytest.raises(UserError, match=sentence):
        run(compose(*COARSE, override, f"output_root={tmp_path}"))


def test_a_guard_and_an_average_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match=r"protection\.guard.*phase\.ema_decay"):
        run(compose("protection.guard=0.1", "phase.ema_decay=0.9", f"output_root={tmp_path}"))


def test_patience_counts_from_the_best_epoch_also_when_that_is_the_newest(tmp_path, monkeypatch):
    dice = iter([0.3, 0.2, 0.4, 0.1, 0.2, 0.9])
    measure = Phase.on_validation_epoch_end

    def measured(self):
        measure(self)
        self.log("val/coarse/dice", next(dice))

    monkeypatch.setattr(Phase, "on_validation_epoch_end", measured)
    run(compose(*COARSE, "phase.epochs=6", "phase.patience=2", f"output_root={tmp_path}"))
    _, summary = result(tmp_path)
    assert (summary["best_epoch"], summary["epochs"]) == (2, 5)


def test_a_time_budget_ends_between_steps_with_them_saved_and_the_same_command_goes_on(tmp_path, command):
    from conftest import MICRO

    arguments = [*MICRO, *COARSE, "phase.epochs=2", "phase.batch_size=4", f"output_root={tmp_path}"]
    where = []
    for _ in range(6):
        done = command(*arguments, "trainer.budget_minutes=0.00001")
        if done.status == 0:
            break
        assert done.status == Paused.STATUS and not done.err
        assert "trainer.budget_minutes=1e-05 are up" in done.out
        where.append(done.out.partition("are up ")[2].partition(";")[0])
        last = files.load(next(tmp_path.glob("phantom/tiny/*/*/checkpoints/last.ckpt")))
        assert last["global_step"] == len(where), "each start does one step, and it is saved"
    assert where == ["in epoch 1 of 2, after step 1 of 2", "after epoch 1 of 2", "in epoch 2 of 2, after step 1 of 2"]
    _, summary = result(tmp_path)
    assert summary["epochs"] == 2


def test_a_budget_is_one_for_all_phases(tmp_path):
    cfg = compose("dataset.reader.cases=12", "trainer.budget_minutes=0.00001", f"output_root={tmp_path}")
    with pytest.raises(Paused, match="epoch 1 of 2"):  # Phase 1's
        run(cfg)


@pytest.mark.parametrize("memory_known", [True, False])
def test_a_long_training_is_estimated_after_its_first_steps(tmp_path, monkeypatch, capsys, memory_known):
    monkeypatch.setattr(callbacks, "Estimate", functools.partial(callbacks.Estimate, 0.0))
    if not memory_known:  # Windows
        monkeypatch.setitem(sys.modules, "resource", None)
    run(compose(*COARSE, "phase.epochs=2", "phase.batch_size=1", f"output_root={tmp_path}"))
    said = capsys.readouterr().out
    assert said.count("s a step") == 1
    assert "to the end" in said and ("peak memory so far" in said) == memory_known


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2, "4 s"), (89, "89 s"), (90, "2 min"), (5399, "1 h 30 min"), (11100, "3 h 05 min")]
)
def test_durations_are_for_people(seconds, text):
    assert callbacks.duration(seconds) == text


COMPILED = """
import functools, sys, torch
from conftest import compose
from ultrarefiner.runs.experiment import run
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
for name in ("plain", "compiled"):
    run(compose(*sys.argv[2:], f"trainer.compile={name == 'compiled'}", f"output_root={sys.argv[1]}/{name}"))
print("frames", torch._dynamo.utils.counters["frames"]["ok"])
"""


@pytest.mark.slow
def test_compiled_networks_learn_the_same(tmp_path):
    """And are saved under the same names. Without C++ code, which takes minutes to make and is torch's own promise.

    In a process without the checks of types, which take twice as long to compile as the networks.
    """
    given = [*COARSE, "phase.epochs=1", "phase.batch_size=2", "dataset.limit.val=2", "dataset.limit.test=2"]
    environment = os.environ | {type_checks.SWITCH: "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, "-c", COMPILED, str(tmp_path), *given]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0
    plain, compiled = (
        files.load(result(tmp_path / name)[0] / "checkpoints" / "last.ckpt")["state_dict"]
        for name in ("plain", "compiled")
    )
    assert list(plain) == list(compiled)
    for name in plain:
        torch.testing.assert_close(
            plain[name], compiled[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_steps_count_on_from_the_earlier_phases(finished_runs):
    steps = {}
    for summary in finished_runs.glob("phantom/tiny/*/*/summary.json"):
        content = json.loads(summary.read_text())
        steps[content["config"]["phase"]["name"]] = (content["first_step"], content["last_step"])
    assert steps["coarse"][0] == steps["sam"][0] == 0
    assert steps["e2e"][0] == steps["coarse"][1] + steps["sam"][1]
    assert steps["e2e"][1] > steps["e2e"][0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do as they do")
@pytest.mark.parametrize("own", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_memory_that_tensors_leave_is_kept_for_the_next_ones(own):
    """Pages that came anew are minor faults; what the user chose in the environment stays."""
    program = """
import resource, sys, torch
from ultrarefiner.runs.callbacks import keep_pages
keep_pages()
for _ in range(3):
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | own
    faults = int(subprocess.check_output([sys.executable, "-c", program], text=True, env=environment))
    pages = 5 * 40_000_000 // 4096
    assert faults > 0.9 * pages if own else faults < 0.1 * pages


def test_what_phase_three_is_compared_with_is_measured_once(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(tracking.Progress, "__call__", lambda self, loader, part: (shown.append(part), loader)[1])
    settings = ["phase.epochs=1", "phase.batch_size=4", "dataset.reader.cases=12", f"output_root={tmp_path}"]
    run(compose(*settings, "phase=sam"))
    for _ in range(2):
        with pytest.raises(Paused):
            run(compose(*settings, "trainer.budget_minutes=0.00001"))
    baseline = ["baseline, val", "baseline, test"]
    assert [part for part in shown if part in baseline] == baseline
    (file,) = tmp_path.glob("phantom/tiny/e2e*/*/checkpoints/baseline.pt")
    files.save(("other weights", files.load(file)[1]), file)
    summary = json.loads((run(compose(*settings)) / "summary.json").read_text())
    assert [part for part in shown if part in baseline] == 2 * baseline
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    (file.parents[1] / "summary.json").unlink()
    run(compose(*settings))
    assert [part for part in shown if part in baseline] == 3 * baseline, "a damaged file is no obstacle"
    rows = files.load(file)[1]["test"]
    assert summary["baseline"]["test"]["refined"]["dice"] == pytest.approx(np.mean([r["refined_dice"] for r in rows]))
