"""All three phases on the embedded default: what a run leaves, reuse, resume, and the consistency of phases."""

import csv
import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from conftest import compose
from ultrarefiner import files
from ultrarefiner.errors import UserError
from ultrarefiner.models import weights
from ultrarefiner.runs import keeping
from ultrarefiner.runs.experiment import run
from ultrarefiner.runs.plan import plan


def directories(root) -> dict:
    return {path.parent.parent.name.split("-")[0]: path.parent for path in root.glob("phantom/tiny/*/*/summary.json")}


def test_every_phase_leaves_what_it_promises(finished_runs):
    found = directories(finished_runs)
    assert set(found) == {"coarse", "sam", "e2e"}
    for phase, directory in found.items():
        summary = json.loads((directory / "summary.json").read_text())
        masks = {"coarse": ["coarse"], "sam": ["coarse", "refined"], "e2e": ["coarse", "refined"]}[phase]
        for part in ("val", "test"):
            assert list(summary[part]) == masks
            for scores in summary[part].values():
                assert set(scores) == {"dice", "iou", "hd95", "assd"} and 0 <= scores["dice"] <= 1
        assert (summary["baseline"] is not None) == (phase == "e2e")
        rows = list(csv.DictReader((directory / "cases.csv").open()))
        assert len(rows) == summary["data"]["test"]["cases"] == len({row["id"] for row in rows})
        dice = sum(float(row[f"{masks[-1]}_dice"]) for row in rows) / len(rows)
        assert dice == pytest.approx(summary["test"][masks[-1]]["dice"])
        assert {"id", "patient", "dataset", f"{masks[-1]}_hd95"} <= set(rows[0])
        epochs = list(csv.DictReader((directory / "metrics.csv").open()))
        assert [int(row["epoch"]) for row in epochs] == list(range(summary["epochs"]))
        assert all(float(row["train/loss"]) > 0 for row in epochs)
        assert OmegaConf.load(directory / "config.yaml").phase.name == phase
        for picture in ("curves.png", "overlays.png"):
            assert (directory / picture).read_bytes()[:4] == b"\x89PNG"
        assert {"best.ckpt", "last.ckpt"} <= {p.name for p in (directory / "checkpoints").iterdir()}


def test_the_sam_file_of_phase_two_loads_in_segment_anything_unchanged(finished_runs):
    """Known mistake 10."""
    from functools import partial

    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    encoder = ImageEncoderViT(
        img_size=128,
        patch_size=8,
        embed_dim=96,
        depth=4,
        num_heads=3,
        out_chans=64,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=8,
        global_attn_indexes=(1, 3),
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=64, num_heads=4, mlp_dim=128)
    decoder = MaskDecoder(transformer_dim=64, transformer=transformer, iou_head_hidden_dim=64)
    plain = Sam(encoder, PromptEncoder(64, (16, 16), (128, 128), mask_in_chans=16), decoder)
    path = directories(finished_runs)["sam"] / "checkpoints" / "best_sam.pth"
    plain.load_state_dict(torch.load(path, weights_only=True), strict=True)
    said = weights.read_metadata(path.with_suffix(".safetensors"))
    assert said["licence"] == "Apache-2.0" and json.loads(said["ultrarefiner"])["phase"]["name"] == "sam"
    assert len(json.loads(said["seen"])["trained"]) == 12 and not list(path.parent.glob("*.json"))


def test_phase_three_starts_from_both_earlier_phases(finished_runs, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(finished_runs, root)
    found = directories(root)
    e2e = run(compose(f"output_root={root}", "model.schedule.e2e.epochs=1", "phase.coarse_lr=0", "phase.sam_lr=0"))
    after = files.load(e2e / "checkpoints" / "best.ckpt")["state_dict"]
    for phase in ("coarse", "sam"):
        earlier = files.load(found[phase] / "checkpoints" / "best.ckpt")["state_dict"]
        for name, value in earlier.items():
            if "running" not in name and "num_batches" not in name:
                torch.testing.assert_close(after[name], value, msg=name)


def test_the_same_call_reuses_and_a_changed_setting_gets_its_own_directory(finished_runs, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished_runs.rglob("*.ckpt")}
    capsys.readouterr()
    same = run(compose(f"output_root={finished_runs}"))
    assert "exists already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished_runs.rglob("*.ckpt")} == before
    assert same in directories(finished_runs).values()
    root = tmp_path / "copy"
    shutil.copytree(finished_runs, root)
    other = run(compose(f"output_root={root}", "protection=none", "model.schedule.e2e.epochs=1"))
    assert other.name != same.name
    assert len(list(root.glob("phantom/tiny/coarse/*"))) == 1  # and the earlier phases are reused


def test_the_machine_and_the_place_of_the_data_do_not_define_a_result(finished_runs, capsys):
    run(compose(f"output_root={finished_runs}", "trainer.num_workers=1", "upstream=require", "data_root=/elsewhere"))
    assert "exists already" in capsys.readouterr().out


def test_require_names_the_command_that_builds_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"upstream=require.*phase=coarse.*python -m ultrarefiner.train phase=coarse"):
        run(compose(f"output_root={tmp_path}", "upstream=require"))
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("prompt_style=gaussian", "prompt_style"),
        ("roi=off", "roi"),
        ("roi.expand_ratio=0.3", "roi.expand_ratio"),
        ("model.coarse_size=80", "model.coarse_size"),
        ("fold=1", "fold"),
    ],
)
def test_a_phase_two_checkpoint_of_other_settings_is_refused(finished_runs, tmp_path, override, field):
    folder = directories(finished_runs)["sam"] / "checkpoints"
    for name in ("best.ckpt", "best_sam.pth", "best_sam.safetensors"):
        with pytest.raises(UserError, match=rf"{name}.*{field}"):
            run(compose(f"output_root={tmp_path}", f"phase.sam_checkpoint={folder / name}", override))
    assert not list(tmp_path.rglob("checkpoints"))


def test_checkpoints_by_path_give_the_same_start_as_the_runs_themselves(finished_runs, tmp_path):
    found = directories(finished_runs)
    settings = [f"output_root={tmp_path}", "model.schedule.e2e.epochs=1"]
    given = [f"phase.{name}_checkpoint={found[name] / 'checkpoints' / 'best.ckpt'}" for name in ("coarse", "sam")]
    plain, safe = (
        [f"phase.{name}_checkpoint={found[name] / 'checkpoints' / f'best_{name}{end}'}" for name in ("coarse", "sam")]
        for end in (".pth", ".safetensors")
    )
    whole = [f"phase.{name}_checkpoint={found[name]}" for name in ("coarse", "sam")]
    begun = [plan(compose(*settings, *paths))[-1].directory for paths in (given, whole)]
    assert begun[0] == begun[1]  # the directory of a run stands for its best checkpoint
    results = [
        files.load(run(compose(*settings, *paths)) / "checkpoints" / "best.ckpt")["state_dict"]
        for paths in (given, plain, safe)
    ]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]) and torch.equal(value, results[2][name]), name


def test_a_checkpoint_of_the_wrong_phase_is_refused(finished_runs, tmp_path):
    path = directories(finished_runs)["coarse"] / "checkpoints" / "best.ckpt"
    with pytest.raises(UserError, match="phase=coarse"):
        run(compose(f"output_root={tmp_path}", f"phase.sam_checkpoint={path}"))


def test_an_interrupted_run_ends_in_the_same_weights(finished_runs, tmp_path, monkeypatch):
    """Stopped after its first epoch, Phase 3 goes on from there to exactly what it would have become."""
    root = tmp_path / "copy"
    shutil.copytree(finished_runs, root)
    whole = directories(root)["e2e"]
    expected = files.load(whole / "checkpoints" / "last.ckpt")
    table = (whole / "metrics.csv").read_text()
    shutil.rmtree(whole)

    class Killed(Exception):
        pass

    original = keeping.KeepCheckpoints.on_train_epoch_end

    def kill_after_first(self, trainer, pl_module):
        original(self, trainer, pl_module)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(keeping.KeepCheckpoints, "on_train_epoch_end", kill_after_first)
        with pytest.raises(Killed):
            run(compose(f"output_root={root}"))
    assert not (whole / "summary.json").exists()
    assert run(compose(f"output_root={root}")) == whole
    resumed = files.load(whole / "checkpoints" / "last.ckpt")
    for name, value in expected["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    for a, b in zip(
        expected["optimizer_states"][0]["state"].values(), resumed["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
    assert (whole / "metrics.csv").read_text() == table


def test_a_second_process_is_refused_and_a_dead_lock_is_none(finished_runs):
    from ultrarefiner.runs import provenance

    directory = directories(finished_runs)["coarse"]
    assert (directory / ".lock").exists()  # left behind, and held by nobody
    with provenance.lock(directory, wait=False), pytest.raises(UserError, match="another process"):  # noqa: SIM117
        with provenance.lock(directory, wait=False):
            pass


@pytest.mark.parametrize(
    "options", [["roi=off"], ["prompt_style=gaussian", "gate=hybrid"], ["prompt_style=distance", "gate=uncertainty"]]
)
def test_other_options_run_too(options, tmp_path):
    directory = run(
        compose(f"output_root={tmp_path}", "model.schedule.coarse.epochs=1", "model.schedule.e2e.epochs=1", *options)
    )
    assert json.loads((directory / "summary.json").read_text())["test"]["refined"]
