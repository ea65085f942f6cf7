"""Which backend segments fastest on this processor, and what it costs in Dice.

    python -m ultrarefiner.export checkpoint=shipped output=pair format=[onnx]
    python benchmarks/backends.py --data-root ~/BUSBRA --pair pair [--images 40] [--threads 1 2] [--repeats 1]

`pair` is a folder of ultrarefiner.export with model.onnx, made from weights that were trained on BUS-BRA's fold 0. Each
image goes through all backends in turn, so that whatever else the machine does falls on all alike. Prints a Markdown
table: seconds an image on the wall and on the processor (medians), the median of each image's ratio to eager float32,
and the mean Dice with the radiologist's mask on validation images. int8 is quantised by onnxruntime: "dynamic"
the matrix products alone, "static" convolutions as well, calibrated on training images.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from measure import machine, timed
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from page import table
from real_cases import spread

from ultrarefiner.data.cases import Case
from ultrarefiner.data.folds import make_split
from ultrarefiner.data.images import to_square
from ultrarefiner.data.readers import BusBra, Reader
from ultrarefiner.results.metrics import overlap
from ultrarefiner.segmenter import Segmenter

Backend = Callable[[np.ndarray], Any]
EAGER = "eager float32"


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
        "int8 dynamic": lambda path: quantize_dynamic(
            str(prepared), path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
        ),
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
    dice: dict[str, list[float]] = {name: [] for name in backends}
    for case in cases:
        image, truth = reader.read(case)
        for repeat in range(repeats):
            for name, segment in backends.items():
                seconds, own, found = timed(lambda segment=segment, image=image: segment(image))
                wall[name].append(seconds)
                processor[name].append(own)
                if repeat == 0:
                    dice[name].append(overlap(found.mask, truth)["dice"])
    rows = []
    for name in backends:
        ratios = np.divide(processor[name], processor[EAGER])
        change = np.mean(dice[name]) - np.mean(dice[EAGER])
        times = (f"{np.median(values):.2f}" for values in (wall[name], processor[name]))
        rows.append([name, *times, f"{np.median(ratios):.2f}", f"{np.mean(dice[name]):.4f}", f"{change:+.4f}"])
    return table(["backend", "s an image", "s of processor", "ratio", "Dice", "change"], rows)


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
    eager = Segmenter.load(chosen.pair, "cpu")
    sizes = {"coarse_image": eager.coarse_size, "image": eager.image_size}
    shown = Shown(reader, spread(split.train, chosen.calibration), sizes)
    with tempfile.TemporaryDirectory() as name:
        files = dict(quantised(chosen.pair / "model.onnx", Path(name), shown))
        for threads in chosen.threads:
            torch.set_num_threads(threads)
            backends: dict[str, Backend] = {EAGER: eager}
            backends["onnx float32"] = Segmenter.load(chosen.pair, backend="onnx")
            backends |= {kind: Segmenter.load(path, backend="onnx") for kind, path in files.items()}
            if bfloat16():
                backends["bfloat16 autocast"] = _autocast(eager)
            for segment in backends.values():
                segment(reader.read(split.train[0])[0])  # warm
            print(f"\n{threads} threads, {machine()}\n", flush=True)
            print(measure(backends, reader, spread(split.val, chosen.images), chosen.repeats), flush=True)
    if not bfloat16():
        print("\nbfloat16 is not measured: this processor does not compute with it.")


def _autocast(segmenter: Segmenter) -> Callable[[np.ndarray], Any]:
    def segment(image: np.ndarray) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return segmenter(image)

    return segment


if __name__ == "__main__":
    main()
