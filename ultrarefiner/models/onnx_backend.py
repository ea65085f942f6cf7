"""An ONNX file of `models.graph` in place of the networks: `predict backend=onnx`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.errors import UserError
from ultrarefiner.extras import imported
from ultrarefiner.models.cascade import Cascade
from ultrarefiner.models.graph import INPUTS, MARK
from ultrarefiner.refine.refiner import Refinement


class OnnxCascade(Cascade):
    """What is asked of a `Cascade` in inference, answered by onnxruntime on the CPU.

    The file holds both networks in one graph. It is cut at the coarse logits: so the refiner runs only where there is a
    lesion, on each lesion by itself, or on the masks of another tool, as with torch.

    Attributes:
        coarse_size, image_size: of the frames that it takes, px.

    Args:
        path: the file.

    Raises:
        UserError: there is no such file, it is damaged or not one of ours, or onnx or onnxruntime are missing.
    """

    def __init__(self, path: Path) -> None:
        nn.Module.__init__(self)
        model, sizes = _read(path)
        self.coarse_size, self.image_size = int(sizes["coarse_size"]), int(sizes["image_size"])
        self._finding = _session(model, ["coarse_image"], ["coarse_logit"], path)
        self._drawing = _session(model, ["coarse_logit", *INPUTS[1:]], ["refined_logit", "box", "iou"], path)
        self.coarse = _Found(self._finding)
        self.refiner = nn.Identity()  # type: ignore[assignment]  # there is one

    def refine(
        self,
        image: Float[Tensor, "B 1 S S"],
        coarse_logit: Float[Tensor, "B 1 C C"],
        boxes: Float[Tensor, "B 4"] | None = None,
        aspect: Float[Tensor, " B"] | None = None,
    ) -> Refinement:
        """See `Cascade.refine`; one mask for each image, and no box of its own, which only a training has."""
        assert boxes is None
        aspect = torch.ones(len(image)) if aspect is None else aspect
        given = {"coarse_logit": coarse_logit, "image": image, "aspect": aspect}
        logits, boxes, iou = _run(self._drawing, given)
        return Refinement(logits, boxes, logits, iou)


class _Found(nn.Module):
    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, image: Float[Tensor, "B 1 C C"]) -> Float[Tensor, "B 2 C C"]:
        """The lesion's logit against the background's, which is 0."""
        (logit,) = _run(self.session, {"coarse_image": image})
        return torch.cat([torch.zeros_like(logit), logit], dim=1)


def _run(session: Any, given: dict[str, Tensor]) -> list[Tensor]:
    arrays = {name: value.numpy().astype(np.float32, copy=False) for name, value in given.items()}
    return [torch.from_numpy(value) for value in session.run(None, arrays)]


def _read(path: Path) -> tuple[Any, dict[str, int]]:
    onnx = imported("onnx", "onnx", "onnx")
    if not path.is_file():
        raise UserError(f"{path} does not exist; python -m ultrarefiner.export format=[onnx] makes it")
    try:
        model = onnx.load(path)
        said = {entry.key: entry.value for entry in model.metadata_props}
    except Exception as error:  # protobuf's own, of a version's own package
        raise UserError(f"{path} cannot be read, it is truncated or damaged; copy or make it again") from error
    if MARK not in said:
        raise UserError(f"{path} is not a file of python -m ultrarefiner.export format=[onnx]; make one")
    return model, json.loads(said[MARK])


def _session(model: Any, inputs: list[str], outputs: list[str], path: Path) -> Any:
    runtime = imported("onnxruntime", "onnxruntime", "onnx")
    utils = imported("onnx.utils", "onnx", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        known = {value.name for value in model.graph.value_info}
        model.graph.value_info.extend(value for value in model.graph.output if value.name not in known)
        for node in model.graph.node:  # the number of images: the graph reads it from any input, all have the same
            if node.op_type == "Shape" and node.input[0] in INPUTS and {one.i for one in node.attribute} == {0, 1}:
                node.input[0] = inputs[0]
        part = utils.Extractor(model).extract_model(inputs, outputs)
        return runtime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be run, it is damaged or made for another onnxruntime: {reason}") from error
