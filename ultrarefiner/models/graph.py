"""The whole pipeline as one graph that runs without this package: torch.export's .pt2, and ONNX.

`python -m ultrarefiner.export format=[…]` writes it; `models.onnx_backend` runs the second one.
"""

import contextlib
import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner import files
from ultrarefiner.errors import UserError
from ultrarefiner.extras import imported
from ultrarefiner.models.cascade import Cascade, lesion_logit

INPUTS = ("coarse_image", "image", "aspect")
OUTPUTS = ("coarse_logit", "refined_logit", "coarse", "refined", "iou", "box")
MARK = "ultrarefiner"
"""The key in an ONNX file's metadata by which it is known as one of these."""
OPSET = 20


class Graph(nn.Module):
    """Image in, both masks out, as tensors: what `Segmenter` asks of the networks for an image with a lesion."""

    def __init__(self, cascade: Cascade) -> None:
        super().__init__()
        self.cascade = copy.deepcopy(cascade).cpu().float().eval().requires_grad_(False)

    def forward(
        self, coarse_image: Float[Tensor, "B 1 C C"], image: Float[Tensor, "B 1 S S"], aspect: Float[Tensor, " B"]
    ) -> tuple[Tensor, ...]:
        """See `OUTPUTS`: logits and probabilities of both masks, the predicted IoUs (B,K), where SAM looked (B,4).

        Args:
            coarse_image, image: in [0, 1], stretched to the two networks' frames.
            aspect: native width / height.
        """
        assert self.cascade.coarse is not None
        coarse = lesion_logit(self.cascade.coarse(coarse_image))
        refined = self.cascade.refine(image, coarse, aspect=aspect)
        return coarse, refined.logits, coarse.sigmoid(), refined.logits.sigmoid(), refined.iou, refined.boxes


def trace(cascade: Cascade, coarse_size: int, image_size: int) -> torch.export.ExportedProgram:
    """The graph of a pair of networks, for any number of images.

    Raises:
        UserError: one of both networks is missing, or does something that no graph can express.
    """
    if cascade.coarse is None or cascade.refiner is None:
        raise UserError("format=onnx and format=export need a coarse network and a refiner: export a run of phase=e2e")
    shown = (torch.rand(2, 1, coarse_size, coarse_size), torch.rand(2, 1, image_size, image_size), torch.ones(2))
    batch = torch.export.Dim("batch", min=1, max=1024)
    how: dict[str, Any] = {"dynamic_shapes": [{0: batch}] * len(shown)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):  # the tracer has many of its own
            return torch.export.export(Graph(cascade), shown, **how, strict=False)
        try:  # reads the code of networks too, such as len(x), which the other takes for the same number always: slower
            return torch.export.export(Graph(cascade), shown, **how, strict=True)
        except Exception as error:
            raise _not_possible(cascade, error) from error


def write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a file for `torch.export.load`, atomically."""
    with files.replacing(path) as part, part.open("wb") as file:
        torch.export.save(program, file)


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a file for ONNX runtimes, atomically.

    Raises:
        UserError: the packages are missing, or an operation has no counterpart in ONNX.
    """
    for package in ("onnx", "onnxscript"):
        imported(package, package, "onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    how: dict[str, Any] = {"dynamo": True, "optimize": False, "opset_version": OPSET, "verbose": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(program, (), input_names=list(INPUTS), output_names=list(OUTPUTS), **how)
            assert made is not None
            _tidy(made.model)
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"format=onnx is not possible with these networks: {_first_line(error)}") from error
    model = made.model_proto
    about = model.metadata_props.add()
    sizes = [value.shape[-1] for value in program.example_inputs[0][:2]]
    about.key, about.value = MARK, json.dumps(dict(zip(("coarse_size", "image_size"), sizes, strict=True)))
    files.write_atomically(path, model.SerializeToString())


def _tidy(model: Any) -> None:
    """Compute what does not depend on the input, and nothing twice.

    The exporter's own `optimize` also looks for patterns to rewrite: that takes longest, and the graph runs no faster.
    """
    passes = imported("onnx_ir.passes.common", "onnxscript", "onnx")
    imported("onnxscript.optimizer", "onnxscript", "onnx").fold_constants(model)
    for step in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
    ):
        step(model)


def write_int8(model: Path, path: Path) -> None:
    """Write an ONNX file once more, atomically, with its matrix products in integers of 8 bits.

    Convolutions stay as they are: with them the masks get worse (docs/predict.md).
    """
    quantization = imported("onnxruntime.quantization", "onnxruntime", "onnx")
    graph = imported("onnx", "onnx", "onnx").load(model).graph
    axes = {weight.name: len(weight.dims) for weight in graph.initializer}
    stacks = [node.name for node in graph.node if axes.get((*node.input, "", "")[1], 2) > 2]  # no runtime takes these
    logging.disable(logging.WARNING)  # of a step before it that changes nothing here
    with files.replacing(path) as part:
        quantization.quantize_dynamic(model, part, ["MatMul", "Gemm"], per_channel=True, nodes_to_exclude=stacks)
    logging.disable(logging.NOTSET)


def _not_possible(cascade: Cascade, error: Exception) -> UserError:
    family = getattr(getattr(cascade.refiner, "sam", None), "family", "this model")
    return UserError(
        f"the networks ({type(cascade.coarse).__name__}, {family}) cannot be written as one graph: "
        f"{_first_line(error)}; leave format=onnx and format=export out"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
