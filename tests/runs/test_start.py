"""Checkpoints that a user brings: the published pair through Phase 3, LoRA from phase to phase, and bad files."""

import gc
import json
import math
import resource

import pytest
import torch
from segment_anything import sam_model_registry

from conftest import MICRO, compose
from transunet_reference import published_shapes
from ultrarefiner import files
from ultrarefiner.data import phantom
from ultrarefiner.errors import Paused, UserError
from ultrarefiner.models.lora import add_lora
from ultrarefiner.models.sam import load_sam
from ultrarefiner.models.sam_lite import lite_weights
from ultrarefiner.models.transunet import TransUNet
from ultrarefiner.runs import checkpoints
from ultrarefiner.runs.experiment import run
from ultrarefiner.runs.plan import plan


@pytest.mark.slow
@pytest.mark.xdist_group("large")  # never beside the other test that takes gigabytes
def test_phase_three_of_the_published_pair_trains_saves_and_resumes_on_a_cpu(tmp_path, monkeypatch):
    """Random weights in files laid out like TransUNet's and Meta's; 512 px frames, SAM at 1024 px, within 8 GB."""
    monkeypatch.setattr(phantom, "VIEWS", 1)  # of a patient: each costs seconds
    generator = torch.Generator().manual_seed(0)
    coarse = {
        name: torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        if len(shape) > 1
        else torch.rand(shape, generator=generator) + (0.5 if name.endswith("weight") or "running_var" in name else 0)
        for name, shape in published_shapes(768, 12, 3072, tokens=14**2, units=(3, 4, 9)).items()
    }
    torch.save(coarse, tmp_path / "transunet.pth")
    torch.save(sam_model_registry["vit_b"]().state_dict(), tmp_path / "sam.pth")
    settings = [
        "model=base",
        f"output_root={tmp_path}/out",
        f"phase.coarse_checkpoint={tmp_path}/transunet.pth",
        f"phase.sam_checkpoint={tmp_path}/sam.pth",
        "phase.epochs=1",
        "phase.batch_size=1",
        "model.gradient=frozen",
        "protection.freeze_epochs=0",
        "dataset.reader.cases=20",
        "dataset.reader.size=128",
        "dataset.limit.train=2",
        "dataset.limit.val=1",
        "dataset.limit.test=1",
        "trainer.progress_bar=false",
    ]
    with pytest.raises(Paused, match="after step 1 of 2"):
        run(compose(*settings, "trainer.budget_minutes=0.00001", micro=False))
    gc.collect()  # the ended run's networks hang on its stack frames
    directory = run(compose(*settings, micro=False))
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["epochs"] == 1 and set(summary["test"]) == {"coarse", "refined"}
    last = files.load(directory / "checkpoints" / checkpoints.LAST)
    assert last["epoch"] == 0 and last["global_step"] == 2
    moved = last["state_dict"]
    assert not torch.equal(moved["cascade.coarse.segmentation_head.0.weight"], coarse["segmentation_head.0.weight"])
    sam_model_registry["vit_b"](checkpoint=str(directory / "checkpoints" / "best_sam.pth"))
    TransUNet.from_name("R50-ViT-B_16").load_official(directory / "checkpoints" / "best_coarse.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 * 2**20  # kB


LORA = ["model.train.image_encoder=false", "model.lora.rank=2", "model.lora.blocks=2"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The directory of a Phase 2 run with LoRA."""
    root = tmp_path_factory.mktemp("adapted")
    return run(compose("phase=sam", f"output_root={root}", "dataset.limit.val=2", "dataset.limit.test=2", *LORA))


def test_lora_trains_and_its_file_is_a_plain_one(adapted):
    trained = files.load(adapted / "checkpoints" / checkpoints.BEST)["state_dict"]
    names = [name for name in trained if "lora_up" in name]
    assert len(names) == 4 and all(trained[name].abs().sum() > 0 for name in names)
    plain = load_sam("tiny", adapted / "checkpoints" / "best_sam.pth")  # strict
    sam = load_sam("tiny")
    start = sam.state_dict()["image_encoder.blocks.0.attn.qkv.weight"].clone()
    add_lora(sam, rank=2, alpha=4.0, blocks=2)
    prefix = "cascade.refiner.sam."
    sam.load_state_dict({k.removeprefix(prefix): v for k, v in trained.items() if k.startswith(prefix)})
    image = torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain.encode(image), sam.encode(image), atol=1e-4, rtol=1e-4)
    assert torch.equal(plain.state_dict()["image_encoder.blocks.0.attn.qkv.weight"], start)  # the encoder is frozen


def test_phase_three_continues_the_lora_of_phase_two(adapted):
    root = adapted.parents[3]
    settings = [f"output_root={root}", "dataset.limit.val=2", "dataset.limit.test=2", *LORA]
    short = ["model.schedule.coarse.epochs=1", "model.schedule.e2e.epochs=1", "phase.coarse_lr=0", "phase.sam_lr=0"]
    e2e = run(compose(*settings, *short))
    assert len(list(root.glob("phantom/tiny/sam*/*"))) == 1  # the run that was there
    trained = files.load(adapted / "checkpoints" / checkpoints.BEST)["state_dict"]
    state = files.load(e2e / "checkpoints" / checkpoints.BEST)["state_dict"]
    for name, value in trained.items():
        assert torch.equal(state[name], value), name


def test_lora_terms_fit_their_own_settings_and_merged_weights_fit_any(adapted, command, tmp_path):
    arguments = [*MICRO, f"output_root={tmp_path}", "upstream=require", "model.lora.rank=3"]
    done = command(*arguments, f"phase.sam_checkpoint={adapted}/checkpoints/best.ckpt")
    assert done.status == 1 and "model.lora.rank=2 (here 3)" in done.err
    done = command(*arguments, f"phase.sam_checkpoint={adapted}/checkpoints/best_sam.pth")
    assert done.status == 1 and "phase=coarse" in done.err and "other settings" not in done.err


# ---------------------------------------------------------------------------------------------------- bad input


def _sam(change):
    """A tiny SAM's file with something done to it."""

    def write(path):
        state = load_sam("tiny").state_dict()
        torch.save(change(state) or state, path)

    return write


def _coarse(change):
    def write(path):
        state = TransUNet.from_name("tiny", 64).state_dict()
        torch.save(change(state) or state, path)

    return write


def _cut(write):
    def cut(path):
        write(path)
        path.write_bytes(path.read_bytes()[:-5000])

    return cut


def _spoil(state):
    name = next(name for name, value in state.items() if value.is_floating_point())
    state[name] = torch.full_like(state[name], torch.nan)


def _nothing(state):
    return None


BAD = {
    "another SAM": ("phase.sam_checkpoint", lambda p: p.symlink_to(lite_weights()), "of litemedsam, not of tiny"),
    "TransUNet for SAM": ("phase.sam_checkpoint", _coarse(_nothing), "of none of the known families"),
    "SAM for TransUNet": ("phase.coarse_checkpoint", _sam(_nothing), "missing"),
    "another TransUNet": (
        "phase.coarse_checkpoint",
        lambda p: torch.save(TransUNet.from_name("lite", 64).state_dict(), p),
        "missing",
    ),
    "truncated SAM": ("phase.sam_checkpoint", _cut(_sam(_nothing)), "truncated or damaged"),
    "truncated TransUNet": ("phase.coarse_checkpoint", _cut(_coarse(_nothing)), "truncated or damaged"),
    "truncated npz": ("model.coarse_weights", lambda p: p.write_bytes(b"PK\3\4 cut"), "truncated"),
    "NaN in SAM": ("phase.sam_checkpoint", _sam(_spoil), "NaN or infinite weights in"),
    "NaN in TransUNet": ("phase.coarse_checkpoint", _coarse(_spoil), "NaN or infinite weights in"),
    "image for SAM": ("phase.sam_checkpoint", lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "own.pth"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_sentence(what, command, tmp_path):
    key, write, message = BAD[what]
    path = tmp_path / ("own.npz" if "npz" in what else "own.pth")
    write(path)
    done = command(*MICRO, f"output_root={tmp_path}/out", f"{key}={path}")
    _one_sentence(done, message, path.name)
    assert not list((tmp_path / "out").rglob("config.yaml"))


def test_nan_in_a_checkpoint_of_ours_is_one_sentence(finished_runs, command, tmp_path):
    whole = next(finished_runs.glob("phantom/tiny/sam*/*/checkpoints/best.ckpt"))
    content = files.load(whole)
    _spoil(content["state_dict"])
    torch.save(content, tmp_path / "best.ckpt")
    done = command(*MICRO, f"output_root={tmp_path}/out", f"phase.sam_checkpoint={tmp_path}/best.ckpt")
    _one_sentence(done, "NaN or infinite weights in", "best.ckpt")


SENSELESS = {
    "size and patch": (["model.coarse_size=60"], "image_size=60 is not a multiple of the patch size 8"),
    "more blocks than there are": (["model.lora.rank=2", "model.lora.blocks=9"], "lora blocks=9"),
    "a block that is not there": (["model.lora.rank=2", "model.lora.blocks=[1,4]"], "4 is none of the 4 blocks"),
    "blocks as text": (["model.lora.rank=2", "model.lora.blocks=last"], "lora blocks=last"),
    "negative rank": (["model.lora.rank=-1"], "model.lora.rank must be 0 or more, got -1"),
    "unknown layer": (["model.lora.rank=2", "model.lora.targets=[mlp]"], "some of qkv, proj"),
    "unknown part": (["model.train.decoder=true"], "model.train.decoder"),
    "nothing to train": (
        [f"model.train.{part}=false" for part in ("image_encoder", "prompt_encoder", "mask_decoder")] + ["phase=sam"],
        "nothing to train",
    ),
    "unknown gradient": (["model.gradient=half"], "gradient"),
}


@pytest.mark.parametrize("what", SENSELESS)
def test_a_senseless_setting_is_one_sentence(what, command, tmp_path):
    arguments, message = SENSELESS[what]
    done = command(*MICRO, f"output_root={tmp_path}/out", *arguments)
    _one_sentence(done, message)
    assert not list((tmp_path / "out").rglob("config.yaml"))


def _one_sentence(done, *words):
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert done.status == 1 and len(lines) == 1 and lines[0].startswith("error: "), done.err
    for word in words:
        assert word in lines[0]


# ------------------------------------------------------------------------------------------- what weights have seen

SEEN = ["dataset.reader.cases=30", "model.schedule.coarse.epochs=1", "model.schedule.sam.epochs=1"]


@pytest.fixture(scope="module")
def other_fold(tmp_path_factory):
    """The checkpoints of Phase 1 of fold 0 of three folds, where another partition is what is asked for."""
    root = tmp_path_factory.mktemp("other")
    return run(compose(*SEEN, "phase=coarse", f"output_root={root}", "dataset.folds=3")) / "checkpoints"


@pytest.mark.parametrize("name", ["best.ckpt", "best_coarse.pth", "best_coarse.safetensors"])
@pytest.mark.parametrize("key", ["phase.coarse_checkpoint", "model.coarse_weights"])
def test_weights_that_have_seen_test_cases_are_refused(other_fold, tmp_path, name, key):
    """Known mistake 12: the fold has the same number, the partition is another."""
    if (name, key) == ("best.ckpt", "model.coarse_weights"):
        pytest.skip("a checkpoint of a run is no plain file of weights")
    given = [*SEEN, f"output_root={tmp_path}", "dataset.split_seed=1", f"{key}={other_fold / name}"]
    if key == "model.coarse_weights":
        given.append("phase=coarse")
    with pytest.raises(
        UserError, match=rf"{name} has seen \d+ of the \d+ test cases of fold=0, the first is \S+; give"
    ):
        run(compose(*given))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_asked_to_measure_all_the_same_every_table_says_so(other_fold, tmp_path, command):
    given = [*MICRO, *SEEN, f"output_root={tmp_path}", "dataset.split_seed=1", "phase=coarse", "allow_seen=true"]
    given.append(f"model.coarse_weights={other_fold / 'best_coarse.pth'}")
    done = command("-m", *given, "fold=0")
    assert done.status == 0 and "allow_seen=true" in done.out and "Not a fair test" in done.out
    summary = json.loads(next(tmp_path.rglob("summary.json")).read_text())
    assert 0 < summary["seen"]["test_cases"] <= summary["data"]["test"]["cases"] and summary["seen"]["first"]


def test_what_weights_have_seen_is_handed_down(other_fold, tmp_path):
    """A network that starts from others knows what they know."""
    key = f"model.coarse_weights={other_fold / 'best_coarse.pth'}"
    given = [*SEEN, f"output_root={tmp_path}", "dataset.split_seed=1", "phase=coarse", "allow_seen=true", key]
    folder = run(compose(*given)) / "checkpoints"
    before, after = (files.load(path / "best.ckpt")["seen"] for path in (other_fold, folder))
    for part in ("trained", "chosen"):
        assert set(before[part]) < set(after[part])


def test_the_same_split_is_no_leak(finished_runs, tmp_path):
    coarse = next(finished_runs.glob("phantom/tiny/coarse/*/checkpoints/best.ckpt"))
    done = run(compose(f"output_root={tmp_path}", f"phase.coarse_checkpoint={coarse}", "model.schedule.e2e.epochs=1"))
    assert json.loads((done / "summary.json").read_text())["seen"] is None


def test_new_weights_at_the_same_path_are_another_result(tmp_path):
    """Known mistake 13."""
    path = tmp_path / "own.pth"
    directories = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(TransUNet.from_name("tiny", 64).state_dict(), path)
        directories.append(plan(compose(f"output_root={tmp_path}", "phase=coarse", f"model.coarse_weights={path}"))[-1])
    first, second = (one.directory for one in directories)
    assert first != second
    moved = path.rename(tmp_path / "elsewhere.pth")
    again = plan(compose(f"output_root={tmp_path}", "phase=coarse", f"model.coarse_weights={moved}"))[-1]
    assert again.directory == second


def test_the_gate_goes_along_with_sam(tmp_path):
    """Known mistake 14: what Phase 2 trained beside SAM is there in Phase 3, or the file is refused."""
    settings = [*SEEN, f"output_root={tmp_path}", "gate=learned", "phase.sam_lr=0", "phase.coarse_lr=0"]
    phase2 = run(compose(*SEEN, f"output_root={tmp_path}", "gate=learned", "phase=sam")) / "checkpoints"
    given = f"phase.sam_checkpoint={phase2 / 'best_sam.pth'}"
    phase3 = run(compose(*settings, given, "model.schedule.e2e.epochs=1")) / "checkpoints"
    before, after = (files.load(folder / "best.ckpt")["state_dict"] for folder in (phase2, phase3))
    gates = [name for name in before if ".gate." in name]
    assert gates and all(torch.equal(before[name], after[name]) for name in gates)
    assert any(before[name].abs().sum() > 0 for name in gates)
    (phase2 / "best_sam.gate.pth").unlink()
    with pytest.raises(UserError, match=r"best_sam\.pth was trained with a gate.*best_sam\.gate\.pth"):
        run(compose(*settings, given, "model.schedule.e2e.epochs=2"))
