"""Which backend segments fastest on this processor, and what it costs in Dice.

    python -m ultrarefiner.export checkpoint=shipped output=pair format=[onnx]
    python benchmarks/backends.py --data-root ~/BUSBRA --pair pair [--images 40] [--threads 1 2] [--repeats 1]

`pair` is a folder of ultrarefiner.export with model.onnx, made from weights that were trained on BUS-BRA's fold 0. Each
image goes through all backends in turn, so that whatever else the machine does falls on all alike. Prints a Markdown
table: seconds an image on the wall and on the processor (medians), the median of each image's ratio of the latter to
eager float32, for the whole pipeline and for SAM alone, the mean Dice with the radiologist's mask on validation images,
and the largest change of one image's Dice. int8 is quantised by onnxruntime: "dynamic" is what format=[int8] writes,
"static" has convolutions as well, calibrated on training images. OpenVINO takes the same file (pip install openvino).
Below the table stands SAM's encoder alone, with torch.
"""

import argparse
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from measure import machine, timed
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from page import table
from real_cases import spread

from ultrarefiner.data.cases import Case
from ultrarefiner.data.folds import make_split
from ultrarefiner.data.images import to_square
from ultrarefiner.data.readers import BusBra, Reader
from ultrarefiner.models.graph import write_int8
from ultrarefiner.precision import FULL, HALF
from ultrarefiner.results.metrics import overlap
from ultrarefiner.segmenter import Segmenter

EAGER = "eager float32"


class Backend:
    """A pipeline, and the seconds that its SAM has taken of the processor."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter, self.in_sam = segmenter, 0.0
        refine = segmenter.cascade.refine

        def refining(*args: Any, **kwargs: Any) -> Any:
            _, seconds, refined = timed(lambda: refine(*args, **kwargs))
            self.in_sam += seconds
            return refined

        segmenter.cascade.refine = refining  # type: ignore[method-assign]

    def __call__(self, image: np.ndarray) -> Any:
        return self.segmenter(image)


class OpenVino:
    """OpenVINO in the place of an onnxruntime session."""

    def __init__(self, model: bytes, options: Any, providers: list[str], precision: str) -> None:
        import openvino

        core = openvino.Core()
        how = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        how["INFERENCE_NUM_THREADS"] = options.intra_op_num_threads
        self.model = core.compile_model(core.read_model(model), "CPU", how)

    def run(self, _: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs."""
        found = self.model(given)
        return [found[number] for number in range(len(self.model.outputs))]


def openvino(path: Path, precision: str) -> Segmenter:
    """The pipeline in an ONNX file, run by OpenVINO."""
    with mock.patch("onnxruntime.InferenceSession", functools.partial(OpenVino, precision=precision)):
        return Segmenter.load(path, backend="onnx")


class Shown(CalibrationDataReader):
    """Training images as the graph takes them."""

    def __init__(self, reader: Reader, cases: list[Case], sizes: Mapping[str, int]) -> None:
        self.left = iter([_given(reader.read(case)[0], sizes) for case in cases])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)


def _given(image: np.ndarray, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    frames = {name: to_square(image, size)[None, None].astype(np.float32) / 255 for name, size in sizes.items()}
    return {**frames, "aspect": np.float32([image.shape[1] / image.shape[0]])}


def quantised(model: Path, folder: Path, shown: Shown) -> Iterator[tuple[str, Path]]:
    """The int8 files that onnxruntime makes of a float32 one."""
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    about = onnx.load(model).metadata_props
    ways: dict[str, Callable[[str], Any]] = {
        "int8 dynamic": lambda path: write_int8(model, Path(path)),
        "int8 static": lambda path: quantize_static(
            str(prepared),
            path,
            shown,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        ),
    }
    for name, way in ways.items():
        path = folder / f"{name.replace(' ', '-')}.onnx"
        try:
            way(str(path))
        except Exception as error:  # a way that this graph does not allow is left out, and said
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        made = onnx.load(path)
        if not made.metadata_props:
            made.metadata_props.extend(about)
            onnx.save(made, path)
        yield name, path


def bfloat16() -> bool:
    """Whether this processor computes with it; without, it takes hundreds of times as long."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def measure(backends: Mapping[str, Backend], reader: Reader, cases: list[Case], repeats: int) -> str:
    """Every image through every backend; the table."""
    wall: dict[str, list[float]] = {name: [] for name in backends}
    processor: dict[str, list[float]] = {name: [] for name in backends}
    sam: dict[str, list[float]] = {name: [] for name in backends}
    dice: dict[str, list[float]] = {name: [] for name in backends}
    for case in cases:
        image, truth = reader.read(case)
        for repeat in range(repeats):
            for name, backend in backends.items():
                backend.in_sam = 0.0
                seconds, own, found = timed(functools.partial(backend, image))
                wall[name].append(seconds)
                processor[name].append(own)
                sam[name].append(backend.in_sam)
                if repeat == 0:
                    dice[name].append(overlap(found.mask, truth)["dice"])
    rows = []
    for name in backends:
        times = [f"{median(values[name]):.2f}" for values in (wall, processor)]
        ratios = [f"{median(np.divide(values[name], values[EAGER])):.2f}" for values in (processor, sam)]
        change = np.subtract(dice[name], dice[EAGER])
        scores = [f"{np.mean(dice[name]):.4f}", f"{change.mean():+.4f}", f"{abs(change).max():.4f}"]
        rows.append([name, *times, *ratios, *scores])
    header = [
        "backend",
        "s an image",
        "s of processor",
        "ratio",
        "ratio of SAM",
        "Dice",
        "change",
        "largest of one image",
    ]
    return table(header, rows)


def encoder(segmenter: Segmenter, repeats: int = 9) -> str:
    """Seconds of SAM's encoder in float32 and in bfloat16."""
    refiner = segmenter.cascade.refiner
    assert refiner is not None
    sam = refiner.sam
    crop = torch.rand(1, 1, sam.image_size, sam.image_size)
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        for half, seconds in taken.items():
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                seconds.append(timed(lambda: sam.encode(crop))[1])
    whole, half_time = median(taken[False]), median(taken[True])
    return f"SAM's encoder alone, torch: float32 {whole:.2f} s of processor, bfloat16 {half_time / whole:.2f} of it"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--pair", type=Path, required=True)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--calibration", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    chosen = parser.parse_args()
    reader = BusBra(chosen.data_root)
    split = make_split(reader.cases(), 0)
    eager = Segmenter.load(chosen.pair, "cpu", precision=FULL)
    sizes = {"coarse_image": eager.coarse_size, "image": eager.image_size}
    shown = Shown(reader, spread(split.train, chosen.calibration), sizes)
    with tempfile.TemporaryDirectory() as name:
        files = dict(quantised(chosen.pair / "model.onnx", Path(name), shown))
        for threads in chosen.threads:
            torch.set_num_threads(threads)
            pipelines = {"onnx float32": Segmenter.load(chosen.pair, backend="onnx")}
            pipelines |= {kind: Segmenter.load(path, backend="onnx") for kind, path in files.items()}
            if importlib.util.find_spec("openvino"):
                precisions = {"f32": "float32"} | ({"bf16": "bfloat16"} if bfloat16() else {})
                for precision, called in precisions.items():
                    pipelines[f"OpenVINO {called}"] = openvino(chosen.pair, precision)
            backends = {EAGER: Backend(Segmenter.load(chosen.pair, "cpu", precision=FULL))}
            if bfloat16():
                backends["eager bfloat16"] = Backend(Segmenter.load(chosen.pair, "cpu", precision=HALF))
            backends |= {name: Backend(pipeline) for name, pipeline in pipelines.items()}
            for backend in backends.values():
                backend(reader.read(split.train[0])[0])  # warm
            print(f"\n{threads} threads, {machine()}\n", flush=True)
            print(measure(backends, reader, spread(split.val, chosen.images), chosen.repeats), flush=True)
            if bfloat16():
                print("\n" + encoder(eager), flush=True)
    if not bfloat16():
        print("\nbfloat16 is not measured: this processor does not compute with it.")


if __name__ == "__main__":
    main()
