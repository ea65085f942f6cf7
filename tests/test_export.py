"""A trained pair in a folder for others: it draws what the run drew, says what it is, and can be started from."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from conftest import compose
from ultrarefiner import export
from ultrarefiner.data.dataset import collate
from ultrarefiner.errors import UserError
from ultrarefiner.files import read_json
from ultrarefiner.models.weights import narrowed, read_metadata, read_state_dict, write_state_dict
from ultrarefiner.results.card import model_card
from ultrarefiner.results.metrics import overlap
from ultrarefiner.runs import checkpoints, plan, start
from ultrarefiner.runs.pack import pack
from ultrarefiner.segmenter import Segmenter


def run_of(root, phase):
    return next(path.parent for path in root.glob(f"phantom/tiny/{phase}*/*/summary.json"))


def images(run):
    data = plan.plan(OmegaConf.load(run / "config.yaml"))[-1].data
    return [data.reader.read(case)[0] for case in data.split.test]


@pytest.fixture(scope="module")
def packed(finished_runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "pair"
    pack(run_of(finished_runs, "e2e"), folder)
    return folder


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_it_draws_what_the_run_drew(finished_runs, tmp_path, bits):
    """To the bit with whole weights; with narrow ones a pixel or two at the boundary may differ."""
    run = run_of(finished_runs, "e2e")
    pack(run, tmp_path / "pair", bits)
    before, after = Segmenter.load(run), Segmenter.load(tmp_path / "pair")
    for image in images(run):
        one, other = before(image), after(image)
        if bits < 32:
            assert np.abs(one.probability - other.probability).max() < {16: 0.05, 8: 0.3}[bits]
            assert overlap(one.mask, other.mask)["dice"] > {16: 0.99, 8: 0.97}[bits]
        else:
            assert np.array_equal(one.mask, other.mask) and np.array_equal(one.probability, other.probability)


def test_the_command_prints_its_files_and_the_card_says_what_it_is(finished_runs, tmp_path, monkeypatch, capsys):
    run, output = run_of(finished_runs, "e2e"), tmp_path / "a folder (1)"
    monkeypatch.setattr(sys, "argv", ["export", f"checkpoint={run}", f"output={output}"])
    export.main()
    assert [line.rpartition("/")[2].split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "coarse.safetensors",
        "sam.safetensors",
        "README.md",
    ]
    card = (output / "README.md").read_text()
    summary = read_json(run / "summary.json")
    assert (
        f"{summary['test']['refined']['dice']:.4f}" in card
        and f"{summary['baseline']['test']['coarse']['dice']:.4f}" in card
    )
    seen = json.loads(read_metadata(output / "sam.safetensors")["seen"])
    assert f"{len(seen['trained'])} images that they were trained on" in card and "no medical device" in card


@pytest.mark.parametrize(
    ("parts", "does", "not_said"),
    [
        (["coarse"], "A coarse network finds the lesion in a breast-ultrasound image.", "Segment Anything"),
        (["sam"], "A Segment Anything model redraws the coarse mask", "A coarse network"),
        (["coarse", "sam"], "image, a Segment Anything model redraws its boundary.", "coarse=mask"),
    ],
)
def test_the_card_says_what_is_there_and_what_is_not_known_of_patients(finished_runs, parts, does, not_said):
    summary, said = read_json(run_of(finished_runs, "e2e") / "summary.json"), {part: {} for part in parts}
    card = model_card(summary, [], said)
    assert does in card and not_said not in card and "no patient is in two parts" in card
    for part in ("train", "val", "test"):
        summary["data"][part]["patients"] = 0
    card = model_card(summary, [], said)
    assert "no patient is in two parts" not in card
    assert "patients are not named, so images of one patient may be in two parts; near-duplicates were kept" in card


def test_a_run_that_is_not_finished_and_a_full_folder_are_refused(finished_runs, packed, tmp_path):
    with pytest.raises(UserError, match="not the directory of a finished run"):
        pack(tmp_path, tmp_path / "new")
    with pytest.raises(UserError, match="is not empty"):
        pack(run_of(finished_runs, "e2e"), packed)


def test_a_weight_that_16_bits_cannot_hold_is_named(finished_runs, tmp_path, monkeypatch):
    from ultrarefiner.runs import pack as room

    monkeypatch.setattr(room, "read_state_dict", lambda path: {"huge.weight": torch.full((1,), 1e6)})
    with pytest.raises(UserError, match=r"huge\.weight is too large for 16 bits; set bits=32"):
        pack(run_of(finished_runs, "e2e"), tmp_path / "new")


def test_weights_of_8_bits_are_off_by_half_a_step_at_most(tmp_path):
    weights = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 6).view(
        6, 1, 1, 1
    )
    weights[2] = 0
    state = {
        "conv.weight": weights,
        "conv.bias": torch.ones(6),
        "small.weight": torch.ones(6, 8),
        "steps": torch.tensor(3),
    }
    write_state_dict(narrowed(state, 8), tmp_path / "narrow.safetensors")
    back = read_state_dict(tmp_path / "narrow.safetensors")
    assert (
        back.keys() == state.keys() and back["steps"] == 3 and torch.equal(back["small.weight"], state["small.weight"])
    )
    step = weights.abs().amax((1, 2, 3), keepdim=True) / 127
    assert ((back["conv.weight"] - weights).abs() <= step * 0.5001).all()


@pytest.fixture(scope="module")
def averaged(finished_runs, tmp_path_factory):
    """The pair with the mean of its own coarse network and that of Phase 1."""
    folder = tmp_path_factory.mktemp("averaged") / "pair"
    pack(run_of(finished_runs, "e2e"), folder, 32, coarse=[run_of(finished_runs, "coarse")])
    return folder


def test_the_coarse_network_of_several_runs_is_the_mean_of_their_logits(finished_runs, averaged):
    runs = [run_of(finished_runs, phase) for phase in ("e2e", "coarse")]
    one, other, both = (Segmenter.load(path, "cpu") for path in (*runs, averaged))
    for image in images(runs[0])[:3]:
        logits = [np.log(p / (1 - p)) for p in (each(image).coarse_probability.astype(float) for each in (one, other))]
        mean = 1 / (1 + np.exp(-np.mean(logits, axis=0)))
        np.testing.assert_allclose(both(image).coarse_probability, mean, atol=2e-3)
    card = (averaged / "README.md").read_text()
    assert "is the mean of 2 networks" in card and "of the run as it was" in card


def test_a_mean_has_seen_what_each_of_its_networks_has_and_their_licences(finished_runs, packed, averaged, tmp_path):
    shutil.copytree(packed, tmp_path / "other")
    path = tmp_path / "other" / "coarse.safetensors"
    said = read_metadata(path)
    strange = {"seen": json.dumps({"trained": ["strange"], "chosen": []}), "licence": "GPL-3.0-only"}
    write_state_dict(read_state_dict(path), path, said | strange)
    pack(packed, tmp_path / "both", coarse=[tmp_path / "other", tmp_path / "other"])
    assert read_metadata(tmp_path / "both" / "coarse.safetensors")["licence"] == "Apache-2.0 AND GPL-3.0-only"
    assert "3 networks (licence: Apache-2.0 AND GPL-3.0-only)" in (tmp_path / "both" / "README.md").read_text()
    for name in ("coarse", "sam"):
        seen = json.loads(read_metadata(tmp_path / "both" / f"{name}.safetensors")["seen"])["trained"]
        assert set(seen) == {"strange", *json.loads(said["seen"])["trained"]}


def test_a_training_starts_from_the_first_network_of_a_mean(packed, averaged, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SHIPPED", averaged)
    own = plan.plan(compose("phase=coarse", "model.coarse_weights=shipped", f"output_root={tmp_path}"))[-1]
    begun = start.prepare(own).phase.cascade.coarse.state_dict()
    first = Segmenter.load(averaged, "cpu").cascade.coarse.members[0].state_dict()
    assert begun.keys() == first.keys() and all(torch.equal(begun[name], first[name]) for name in first)


def test_what_has_no_coarse_network_is_in_no_mean(finished_runs, packed, tmp_path):
    with pytest.raises(UserError, match="each run must have a coarse network"):
        pack(packed, tmp_path / "new", coarse=[run_of(finished_runs, "sam")])
    with pytest.raises(UserError, match=r"coarse=.*nowhere is not the directory of a finished run"):
        pack(packed, tmp_path / "new", coarse=[tmp_path / "nowhere"])
    assert not (tmp_path / "new").exists()


def test_the_command_takes_further_networks_and_bits(packed, tmp_path, execute):
    done = execute(export.main, f"checkpoint={packed}", f"coarse=[{packed}]", "bits=8", f"output={tmp_path}/both")
    assert done.status == 0 and set(done.out.split()[::3]) == {str(path) for path in (tmp_path / "both").iterdir()}
    mean, one = (Segmenter.load(folder, "cpu").cascade.coarse for folder in (tmp_path / "both", packed))
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert len(mean.members) == 2 and (mean(image) - one(image)).abs().max() < 0.5  # the mean of two that are the same
    for wrong, words in (
        ("bits=4", "bits must be 8, 16 or 32, got 4"),
        ("coarse=[/nowhere]", "coarse=/nowhere is not"),
    ):
        done = execute(export.main, f"checkpoint={packed}", wrong, f"output={tmp_path}/new")
        assert done.status == 1 and words in done.err and len(done.err.strip().splitlines()) == 1
        assert not (tmp_path / "new").exists()


def test_the_coarse_network_also_sees_the_mirrored_image(finished_runs, averaged, tmp_path, execute):
    given = [f"checkpoint={averaged}", "mirrored=true", "share=0.25", "bits=32", f"output={tmp_path}/pair"]
    assert execute(export.main, *given).status == 0
    before, after = Segmenter.load(averaged, "cpu"), Segmenter.load(tmp_path / "pair", "cpu")
    assert len(after.cascade.coarse.members) == 2  # the two of the mean, not the mean as one
    image = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = (before.cascade.coarse(image) + before.cascade.coarse(image.flip(-1)).flip(-1)) / 2
        torch.testing.assert_close(after.cascade.coarse(image), both)
        coarse, refined = torch.randn(2, 1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(after.cascade.gate(coarse, refined, image[:1]), 0.75 * coarse + 0.25 * refined)
    card = (tmp_path / "pair" / "README.md").read_text()
    assert "It also sees the mirrored image. The share of SAM's logits in the final ones is 0.25." in card
    given = [f"checkpoint={tmp_path}/pair", f"coarse=[{averaged}]", "bits=32", f"output={tmp_path}/more"]
    assert execute(export.main, *given).status == 0
    more = Segmenter.load(tmp_path / "more", "cpu").cascade.coarse
    assert more.mirrored and len(more.members) == 4
    done = execute(export.main, f"checkpoint={averaged}", "share=2", f"output={tmp_path}/new")
    assert done.status == 1 and "share must be between 0 and 1, got 2" in done.err


def test_weights_without_a_word_about_them_are_refused(packed, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(packed, tmp_path / "bare")
    save_file(load_file(packed / "sam.safetensors"), tmp_path / "bare" / "sam.safetensors")
    with pytest.raises(UserError, match="does not say how its network is built"):
        Segmenter.load(tmp_path / "bare")


def test_training_starts_from_the_shipped_pair_and_knows_what_it_has_seen(packed, tmp_path, monkeypatch):
    """Here a pair that was trained on the very test cases ships: it is refused, and only then taken."""
    monkeypatch.setattr(checkpoints, "SHIPPED", packed)
    monkeypatch.setattr(plan, "SHIPPED", packed)
    given = ["phase.coarse_checkpoint=shipped", "phase.sam_checkpoint=shipped", f"output_root={tmp_path}"]
    own = plan.plan(compose(*given))[-1]
    begun = start.prepare(own)
    assert not own.earlier and set(begun.seen.trained) >= set(own.data.marks("train"))
    whole = Segmenter.load(packed)
    for name in ("coarse", "refiner"):
        loaded, shipped = (getattr(cascade, name).state_dict() for cascade in (begun.phase.cascade, whole.cascade))
        assert all(np.array_equal(loaded[key], value) for key, value in shipped.items())
    with pytest.raises(UserError, match="has seen"):
        start.prepare(plan.plan(compose(*given, "fold=1"))[-1])
    started = plan.plan(compose("phase=coarse", "model.coarse_weights=shipped", f"output_root={tmp_path}"))[-1]
    assert started.settings["model.coarse_weights"].startswith("sha256:")


def test_fine_tuning_starts_from_the_pair_that_ships(tmp_path):
    """Not from LiteMedSAM's own file, with which that SAM once began; and there is a gradient to learn from."""
    given = ["phase=e2e", "model=lite", "phase.coarse_checkpoint=shipped", "phase.sam_checkpoint=shipped"]
    given += ["dataset.reader.cases=20", "dataset.reader.size=64", f"output_root={tmp_path}"]
    run = plan.plan(compose(*given, "roi=off", "model.gradient=frozen", micro=False))[-1]
    phase = start.prepare(run).phase
    shipped = read_state_dict(checkpoints.SHIPPED / "sam.safetensors")
    assert all(torch.equal(value, shipped[name]) for name, value in phase.cascade.refiner.sam.state_dict().items())
    phase.terms(collate([run.data.dataset("train")[0]]))["loss"].backward()
    trained = [p for group in phase.groups() for p in group["params"] if p.requires_grad]
    assert sum(float(p.grad.abs().sum()) > 0 for p in trained if p.grad is not None) > len(trained) / 2
    with pytest.raises(UserError, match=r"trained with other settings: roi=off \(here on\); make both the same"):
        start.prepare(plan.plan(compose(*given, micro=False))[-1])


def test_the_shipped_pair_is_there_and_small_enough_for_a_wheel():
    files = list(checkpoints.SHIPPED.iterdir())
    assert {"coarse.safetensors", "sam.safetensors", "README.md"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 32e6
    assert "Medical Physics" in (checkpoints.SHIPPED / "README.md").read_text()


COVERED = {"bus_0066-l": 1.7, "bus_0018-s": 2, "bus_0310-r": 5.7, "bus_0805-s": 6, "bus_0848-l": 18, "bus_0052-l": 19}
"""The share of each example that its lesion covers, in %, by BUS-BRA's own masks."""


def test_the_shipped_pair_finds_the_lesions_of_the_examples(tmp_path, monkeypatch, capsys):
    """As in the README: no run, no option, right after the installation."""
    from ultrarefiner import predict
    from ultrarefiner.files import read_csv

    examples = Path(__file__).resolve().parents[1] / "examples"
    monkeypatch.setattr(sys, "argv", ["predict", f"images={examples}", f"output={tmp_path / 'out'}"])
    predict.main()
    assert "6 images: 6 with a lesion" in capsys.readouterr().out
    rows = {row["id"].rpartition("/")[2]: row for row in read_csv(tmp_path / "out" / "predictions.csv")}
    assert rows.keys() == COVERED.keys()
    for name, row in rows.items():
        found = 100 * float(row["area_px2"]) / (int(row["width"]) * int(row["height"]))
        assert found == pytest.approx(COVERED[name], rel=0.5), name
