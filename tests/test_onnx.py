"""The pipeline as one graph: it draws what the Segmenter draws, for any number of images, with torch out of the way."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import compose
from data_layouts import disc, save, texture
from ultrarefiner import export, files, predict
from ultrarefiner.errors import UserError
from ultrarefiner.files import read_csv
from ultrarefiner.models import graph
from ultrarefiner.results.card import with_onnx
from ultrarefiner.results.metrics import overlap
from ultrarefiner.results.safety import Safety
from ultrarefiner.runs.build import build_cascade
from ultrarefiner.segmenter import Segmenter

pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("onnx")]  # graphs are made once


OTHERS = ("roi=off model.frame=stretch gate=learned",)  # `pair` has the defaults


@pytest.fixture(scope="module")
def graphs(finished_runs, tmp_path_factory):
    """A folder with a pair as both kinds of graph, and the graphs of other pipelines."""
    run = next(path.parent for path in finished_runs.glob("phantom/tiny/e2e*/*/summary.json"))
    folder = tmp_path_factory.mktemp("graphs")
    program = [sys.executable, str(Path(__file__).with_name("traced.py")), str(run), str(folder), *OTHERS]
    subprocess.run(program, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def pair(graphs):
    """What the command makes of a run."""
    return graphs / "pair"


IMAGES = [texture(1, 70, 50), texture(2, 48, 60), texture(3, 90, 120)]


def given(segmenter, images):
    sizes = (segmenter.coarse_size, segmenter.image_size)
    frames = [torch.cat([segmenter._frame(image, size) for image in images]) for size in sizes]
    return [*frames, torch.tensor([i.shape[1] / i.shape[0] for i in images])]


@pytest.mark.parametrize("count", [1, 3])
def test_the_graphs_give_what_the_networks_give(pair, count):
    import onnxruntime

    segmenter = Segmenter.load(pair, "cpu")
    inputs = given(segmenter, IMAGES[:count])
    with torch.no_grad():
        wanted = segmenter.cascade(*inputs)
        program = torch.export.load(pair / "model.pt2").module()(*inputs)
    session = onnxruntime.InferenceSession(pair / "model.onnx", providers=["CPUExecutionProvider"])
    arrays = session.run(None, dict(zip(graph.INPUTS, (one.numpy() for one in inputs), strict=True)))
    coarse = wanted.coarse_logits.softmax(1)[:, 1:]
    refined = wanted.refined
    expected = {"coarse": coarse, "refined": refined.logits.sigmoid(), "iou": refined.iou, "box": refined.boxes}
    for found in (dict(zip(graph.OUTPUTS, program, strict=True)), dict(zip(graph.OUTPUTS, arrays, strict=True))):
        for name, value in expected.items():
            assert np.abs(np.asarray(found[name]) - value.numpy()).max() < 1e-3, name


@pytest.mark.parametrize(("coarse", "lesions"), [(False, "together"), (False, "each"), (True, "together")])
def test_the_segmenter_draws_the_same_with_both(pair, coarse, lesions):
    masks = [disc(seed, *image.shape[::-1]) > 0 for seed, image in enumerate(IMAGES)] if coarse else None
    results = []
    for backend in ("torch", "onnx"):
        segmenter = Segmenter.load(pair, "cpu", backend, lesions=lesions, safety=Safety.none(), tta="flips")
        results.append(segmenter.batch(IMAGES, masks))
    for one, other in zip(*results, strict=True):
        assert np.abs(one.probability - other.probability).max() < 1e-3
        assert one.iou == pytest.approx(other.iou, abs=1e-3) and one.box == pytest.approx(other.box, abs=0.1)


def test_in_eight_bits_it_is_smaller_and_draws_nearly_the_same(pair):
    import onnx

    whole, small = pair / "model.onnx", pair / "model.int8.onnx"
    assert small.stat().st_size < 0.8 * whole.stat().st_size
    assert "MatMulInteger" in {node.op_type for node in onnx.load(small).graph.node}
    one, other = (Segmenter.load(file, backend="onnx", safety=Safety.none()) for file in (whole, small))
    for image in IMAGES:
        assert overlap(other(image).mask, one(image).mask)["dice"] > 0.95
        assert np.abs(other(image).probability - one(image).probability).max() > 0  # it is another file


def test_predict_writes_the_same_tables_and_masks(pair, tmp_path, execute):
    for number, image in enumerate(IMAGES):
        save(tmp_path / "scans" / f"{number}.png", image)
    rows = []
    for backend in ("torch", "onnx"):
        output = tmp_path / backend
        places = (f"checkpoint={pair}", f"images={tmp_path}/scans", f"output={output}")
        assert execute(predict.main, *places, f"backend={backend}").status == 0
        rows.append(read_csv(output / "predictions.csv"))
    assert len(rows[0]) == 3
    for one, other in zip(*rows, strict=True):
        assert one["id"] == other["id"] and one["reason"] == other["reason"] and one["lesions"] == other["lesions"]
        assert float(one["area_px2"] or 0) == pytest.approx(float(other["area_px2"] or 0), abs=3)


def test_the_example_of_the_card_runs_without_torch(pair, tmp_path):
    card = (pair / "README.md").read_text()
    (code,) = (part for part in re.findall(r"```python\n(.*?)```", card, re.S) if "onnxruntime" in part)
    image = texture(4, 300, 280)
    save(tmp_path / "image.png", image)
    (tmp_path / "model.onnx").write_bytes((pair / "model.onnx").read_bytes())
    code += "\nimport sys\nassert 'torch' not in sys.modules and 'onnx' not in sys.modules\nnp.save('mask.npy', mask)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mask = np.load(tmp_path / "mask.npy")
    own = Segmenter.load(pair, "cpu", safety=Safety.none())(image).mask
    assert mask.shape == own.shape and (overlap(mask, own)["dice"] > 0.99 or not (mask.any() or own.any()))
    assert with_onnx(card, ["model.onnx"]) == card and with_onnx("x", []) == "x"


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_other_pipelines_are_written_too(graphs, number):
    import onnxruntime

    content = files.load(graphs / f"{number}.pt")
    session = onnxruntime.InferenceSession(graphs / f"{number}.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    arrays = {name: value.numpy() for name, value in zip(graph.INPUTS, content["inputs"], strict=True) if name in names}
    refined, box = session.run(["refined", "box"], arrays)
    assert np.abs(refined - content["refined"].numpy()).max() < 1e-3
    assert np.abs(box - content["box"].numpy()).max() < 1e-3


def test_what_cannot_be_a_graph_says_so(graphs):
    said = (graphs / "refused").read_text()
    assert said.startswith("the networks (Odd, tiny) cannot be written as one graph")
    assert len(said.splitlines()) == 1
    cascade = build_cascade(compose(), ("coarse", "sam"), {})
    cascade.coarse = None
    with pytest.raises(UserError, match="need a coarse network and a refiner"):
        graph.trace(cascade, 64, 64)


def test_bad_files_and_values_end_in_one_sentence(pair, tmp_path, execute):
    import onnx

    save(tmp_path / "scans" / "a.png", IMAGES[0])
    cut, alien = tmp_path / "cut.onnx", tmp_path / "alien.onnx"
    cut.write_bytes((pair / "model.onnx").read_bytes()[:-5000])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), alien)
    (tmp_path / "empty").mkdir()
    here = (f"images={tmp_path}/scans", f"output={tmp_path}/out")
    for checkpoint, backend, words in (
        (cut, "onnx", "cut.onnx cannot be"),
        (alien, "onnx", "is not a file of python -m ultrarefiner.export"),
        (tmp_path / "empty", "onnx", "backend=onnx needs a .onnx file or a folder with model.onnx"),
        (tmp_path / "no.onnx", "onnx", "backend=onnx needs a .onnx file"),
        ("shipped", "onnx", "checkpoint=shipped output=DIR format=[onnx]"),
        (pair, "foo", "backend must be one of torch, onnx"),
    ):
        said = execute(predict.main, *here, f"checkpoint={checkpoint}", f"backend={backend}").err.strip()
        assert words in said and len(said.splitlines()) == 1, said
    more = (f"checkpoint={pair}", "backend=onnx", "device=cuda")
    assert "backend=onnx runs on device=cpu" in execute(predict.main, *here, *more).err
    done = execute(export.main, f"checkpoint={pair}", f"output={tmp_path}/o", "format=[tflite]")
    assert done.status == 1 and "format must be of safetensors, onnx, int8, export, got tflite" in done.err


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_packages_a_sentence_says_what_to_install(pair, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"package {package} .*ultrarefiner\[onnx\]"):
        Segmenter.load(pair, backend="onnx")


@pytest.mark.slow
def test_the_shipped_pair_as_a_graph(tmp_path):
    # In a process of its own, without the checks of types that the tests install: no graph can hold them.
    given = ["checkpoint=shipped", f"output={tmp_path}/pair", "format=[onnx]"]
    subprocess.run([sys.executable, "-m", "ultrarefiner.export", *given], check=True, capture_output=True)
    image = sorted((Path(__file__).parents[1] / "examples" / "images").glob("*.png"))[0]
    one = Segmenter.load(device="cpu", precision="32-true")(image)
    other = Segmenter.load(tmp_path / "pair", backend="onnx")(image)
    # The two resample the frame of the second coarse network with coordinates that differ in the last digits.
    assert np.abs(one.probability - other.probability).max() < 3e-3 and one.reason == other.reason
    assert (one.mask != other.mask).sum() <= 2
