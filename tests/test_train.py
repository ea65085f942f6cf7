"""The command line: help, composition, and a sentence for every mistake."""

import json
import os
import shutil
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from conftest import MICRO, compose
from reruns import GROUP, Command
from ultrarefiner import cli, train


def test_help_lists_every_group_and_option_in_our_words(command):
    done = command("--help")
    assert done.status == 0
    for group in train.GROUPS:
        for path in (cli.CONF / group).glob("*.yaml"):
            assert f"  {path.stem} " in done.out, f"{group}={path.stem}"
            assert path.read_text().startswith("# "), f"{path} needs a first line that says what it is"
    assert "fold=0" in done.out and "hydra.cc" not in done.out


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["-sc", "query=bash"]])
def test_looking_around_imports_no_torch(arguments):
    """Nor anything else that is slow; benchmarks/overhead.py takes the time."""
    code = (
        "import sys; from ultrarefiner import train\n"
        "try: train.main()\n"
        "finally: sys.stderr.write(str({'torch', 'monai', 'wandb', 'cv2', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    asked = os.environ | {"COMP_LINE": "ultrarefiner-train phase=", "COMP_POINT": "25"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=asked)
    assert done.stderr.endswith("set()") and done.returncode == 0, done.stderr


@pytest.mark.parametrize("fold", ["fold=0", "fold=4"])
@pytest.mark.parametrize("roi", ["on", "off"])
def test_protection_follows_roi_and_fold_is_a_number(fold, roi):
    cfg = compose(fold, f"roi={roi}", micro=False)
    assert cfg.protection.name == f"roi_{roi}" and cfg.roi.name == roi and isinstance(cfg.fold, int)
    assert compose(f"roi={roi}", "protection=none", micro=False).protection.name == "none"


def test_the_defaults_are_those_of_the_published_recipe():
    cfg = compose("model=base", micro=False)
    phase = OmegaConf.to_container(cfg.phase, resolve=True)
    assert (phase["coarse"]["epochs"], phase["coarse"]["batch_size"], phase["coarse"]["lr"]) == (150, 24, 0.01)
    assert (phase["sam"]["epochs"], phase["sam"]["batch_size"], phase["sam"]["lr"]) == (50, 4, 1e-4)
    assert (phase["epochs"], phase["batch_size"], phase["coarse_lr"], phase["sam_lr"]) == (100, 4, 1e-6, 1e-5)
    assert phase["grad_clip"] == 1.0
    on, off = cfg.protection, compose("roi=off", micro=False).protection
    assert (on.coarse_loss_weight, on.refined_loss_weight, on.grad_scale, on.weight_reg, on.freeze_epochs) == (
        0.8,
        0.2,
        0.01,
        0.1,
        0,
    )
    assert (off.coarse_loss_weight, off.refined_loss_weight, off.grad_scale, off.weight_reg, off.freeze_epochs) == (
        0.7,
        0.3,
        0.1,
        0.01,
        0,
    )
    assert cfg.roi.square and cfg.roi.k == 2.5 and cfg.prompt_style.box_k == 2.5


MISTAKES = {
    "unknown option": (["roi=maybe"], ["roi=maybe", "choose one of off, on"]),
    "unknown model": (["model=huge"], ["base, lite, tiny"]),
    "unknown experiment": (["+experiments=nothing"], ["experiments=nothing", "busbra_cv5"]),
    "misspelt key": (["phase.epohcs=3"], ["phase.epohcs", "phase.epochs"]),
    "misspelt nested key": (["roi.expand_ration=3"], ["roi.expand_ratio?"]),
    "misspelt group": (["rio=on"], ["rio", "roi"]),
    "wrong type": (["phase.epochs=many"], ["phase.epochs=many"]),
    "text as fold": (["fold=first"], ["fold=first"]),
    "fold outside the partition": (["fold=7"], ["fold=7", "5-fold", "0…4"]),
    "negative fold": (["fold=-1"], ["fold must be 0 or more, got -1"]),
    "unknown upstream": (["upstream=perhaps"], ["upstream must be one of build, require, got perhaps"]),
    "no epochs": (["phase=coarse", "phase.epochs=0"], ["phase.epochs must be between 1 and 1000000, got 0"]),
    "negative weight": (["protection.grad_scale=-1"], ["protection", "grad_scale"]),
    "unknown argument": (["+roi.zoom=2"], ["roi", "zoom"]),
    "unknown network": (["phase=coarse", "model.coarse.name=UNet"], ["UNet", "tiny"]),
    "no data_root": (["dataset=busbra"], ["busbra", "data_root"]),
    "data_root that is not there": (["dataset=busbra", "data_root=/nowhere"], ["/nowhere"]),
    "nothing upstream": (["upstream=require"], ["phase=coarse", "python -m ultrarefiner.train phase=coarse"]),
    "missing checkpoint": (["phase.sam_checkpoint=gone.ckpt"], ["gone.ckpt"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_sentence(mistake, command, tmp_path):
    arguments, expected = MISTAKES[mistake]
    if not any(a.startswith("dataset=") for a in arguments):
        arguments = [*MICRO, *arguments]
    done = command(f"output_root={tmp_path}/out", *arguments)
    assert done.status == 1
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.err
    for words in expected:
        assert words in lines[0]
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("config.yaml"))


def test_the_command_that_builds_what_is_missing_finds_the_same_options(command, tmp_path):
    (tmp_path / "options" / "roi").mkdir(parents=True)
    (tmp_path / "options" / "roi" / "mine.yaml").write_text('defaults: ["on", _self_]\n')
    given = [*MICRO, f"output_root={tmp_path}/out", "upstream=require", "roi=mine", "protection=roi_on"]
    done = command("--config-dir", f"{tmp_path}/options", *given)
    assert f"ultrarefiner.train --config-dir={tmp_path}/options phase=" in done.err, done.err
    assert " roi=mine" in done.err


def busbra(root, cases: int = 20):
    """A small data set in BUS-BRA's layout, of phantoms."""
    from ultrarefiner.data.phantom import make_phantom

    (root / "Images").mkdir(parents=True)
    (root / "Masks").mkdir()
    table, folds = ["ID,Case,Histology,Pathology,BIRADS,Device,Width,Height,Side,BBOX"], []
    for i in range(cases):
        image, mask = make_phantom(i, 0, 64)
        cv2.imwrite(str(root / "Images" / f"bus_{i:04}-l.png"), image)
        cv2.imwrite(str(root / "Masks" / f"mask_{i:04}-l.png"), mask.astype(np.uint8) * 255)
        table.append(f"bus_{i:04}-l,{i},x,{'benign' if i % 2 else 'malignant'},4,GE,64,64,left,[0]")
        valid = ["NaN" if i % 5 == k else str(int(i % 5 != (k + 1) % 5)) for k in range(5)]
        folds.append(f"bus_{i:04}-l,benign,{i % 5 + 1},{','.join(valid)}")
    (root / "bus_data.csv").write_text("\n".join(table) + "\n")
    (root / "5-fold-cv.csv").write_text(
        "ID,Pathology,kFold," + ",".join(f"valid_{k}" for k in range(1, 6)) + "\n" + "\n".join(folds) + "\n"
    )
    return root


def _remove(path):
    path.unlink()


def _resize(path):
    cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path), 0), (50, 60)))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("Masks/mask_0003-l.png", _remove),
        ("Images/bus_0003-l.png", _remove),
        ("Masks/mask_0003-l.png", _resize),
        ("Masks/mask_0003-l.png", _truncate),
        ("Images/bus_0003-l.png", _truncate),
    ],
    ids=["no mask", "no image", "mask of another size", "unreadable mask", "unreadable image"],
)
def test_a_broken_data_set_is_named_and_nothing_is_left_behind(file, damage, command, tmp_path):
    root = busbra(tmp_path / "BUSBRA")
    damage(root / file)
    done = command("dataset=busbra", f"data_root={root}", f"output_root={tmp_path}/out", "phase=coarse")
    assert done.status == 1
    assert "0003-l" in done.err and len(done.err.strip().splitlines()) == 1, done.err
    assert not list((tmp_path / "out").rglob("config.yaml"))


def test_an_empty_data_root_is_named(command, tmp_path):
    (tmp_path / "empty").mkdir()
    done = command("dataset=busbra", f"data_root={tmp_path / 'empty'}", f"output_root={tmp_path}/out")
    assert done.status == 1 and "empty" in done.err and len(done.err.strip().splitlines()) == 1


def test_busbra_layout_trains_from_its_parent_folder_too(command, tmp_path):
    root = busbra(tmp_path / "data" / "BUSBRA")
    done = command(
        "dataset=busbra",
        "phase=coarse",
        f"data_root={root.parent}",
        f"output_root={tmp_path}/out",
        "model.image_size=64",
        "phase.epochs=1",
        "fold=2",
    )
    assert done.status == 0, done.err
    summary = json.loads(next((tmp_path / "out").rglob("summary.json")).read_text())
    assert summary["data"]["test"]["cases"] == 4 and summary["data"]["val"]["cases"] == 4


def test_a_malicious_checkpoint_is_refused(command, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    for key in ("phase.sam_checkpoint", "phase.coarse_checkpoint", "model.coarse_weights"):
        done = command(*MICRO, f"output_root={tmp_path}/out", f"{key}={tmp_path}/evil.ckpt")
        assert done.status == 1 and "evil.ckpt" in done.err, key
        assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "executed").exists()


def test_a_sweep_runs_every_combination_and_a_failing_job_leaves_the_others(command, finished_runs, tmp_path):
    root = tmp_path / "out"
    shutil.copytree(finished_runs, root)
    done = command("-m", *MICRO, f"output_root={root}", "phase=coarse", "fold=0,1,9", "model.schedule.coarse.epochs=2")
    assert done.status == 1 and "fold=9" in done.err
    assert len(list(root.glob("phantom/tiny/coarse/fold*/summary.json"))) == 2


@pytest.mark.xdist_group(GROUP)
def test_a_run_can_be_killed_and_continues(tmp_path):
    """SIGKILL in the middle of Phase 3, then the same command again."""
    arguments = [*MICRO, f"output_root={tmp_path}", "model.schedule.e2e.epochs=3"]
    with Command("ultrarefiner.train", *arguments) as process:
        while process.poll() is None and "\ne2e  epoch 1/3" not in process.said("out"):
            time.sleep(0.05)
        process.kill()
    assert not list(tmp_path.glob("phantom/tiny/e2e*/*/summary.json"))
    done = subprocess.run([sys.executable, "-m", "ultrarefiner.train", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "epoch 3/3" in done.stdout and "coarse  epoch" not in done.stdout and "sam  epoch" not in done.stdout
    with Command("ultrarefiner.train", *arguments) as process:
        said, _ = process.communicate(timeout=120)
    assert "exists already" in said and "epoch" not in said
    assert "refined (Phase 2)" in said and "refined" in said
