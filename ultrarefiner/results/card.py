"""A model card: what a trained pair is, what it was trained on, how good it is, and what it is not for."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ultrarefiner.data.cases import PARTS
from ultrarefiner.files import ONNX
from ultrarefiner.results.tables import COLUMNS, Column, markdown, one_line
from ultrarefiner.settings import COARSE, SAM

CITATIONS = {
    "busbra": "W. Gómez-Flores, M. J. Gregorio-Calas, W. Coelho de Albuquerque Pereira: BUS-BRA: A breast ultrasound "
    "dataset for assessing computer-aided diagnosis systems. Medical Physics 51(4), 2024, 3110-3123.",
}
"""What the licence of a data set asks those to cite who use what was made from it."""

_FRONT_MATTER = """\
---
library_name: ultrarefiner
pipeline_tag: image-segmentation
tags: [ultrasound, breast, segmentation, medical-imaging]
---"""

_COARSE = "A coarse network finds the lesion in a breast-ultrasound image"
_DOES = {
    (COARSE,): f"{_COARSE}.",
    (SAM,): "A Segment Anything model redraws the coarse mask of a lesion in a breast-ultrasound image.",
    (COARSE, SAM): f"{_COARSE}, a Segment Anything model redraws its boundary.",
}
_USE = """\
```python
from ultrarefiner import Segmenter

result = Segmenter.load("this folder")("image.png")  # result.mask, result.probability, ...
```"""

_WITH_ONNX = f"""\
`{ONNX}` is the whole pipeline as one file, which needs no more than onnxruntime, numpy and pillow:

```python
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("{ONNX}", providers=["CPUExecutionProvider"])
image = Image.open("image.png").convert("L")
given = {{"aspect": np.float32([image.width / image.height])}}
for frame in session.get_inputs():
    if frame.name != "aspect":
        small = image.resize(frame.shape[2:], Image.Resampling.BILINEAR)
        given[frame.name] = np.float32(small)[None, None] / 255
logit, iou = session.run(["refined_logit", "iou"], given)
mask = np.array(Image.fromarray(logit[0, 0]).resize(image.size, Image.Resampling.BILINEAR)) > 0
```"""


def with_onnx(card: str, files: Sequence[str]) -> str:
    """A card with an example for the ONNX file, where there is one and the card has none yet."""
    if ONNX not in files or _WITH_ONNX in card:
        return card
    return card.replace(_USE, f"{_USE}\n\n{_WITH_ONNX}") if _USE in card else f"{card}\n{_WITH_ONNX}\n"


def changed(card: str, said: Mapping[str, str]) -> str:
    """A card with a word on what was changed when the run was exported: its figures are of the run as it was.

    Args:
        said: the metadata of the weights: how they are built, and the coarse network's licence.
    """
    config = json.loads(said["config"])
    coarse, gate = config["model"].get("coarse") or {}, config["gate"]
    more = []
    if (count := len(coarse.get("members", ()))) > 1:
        more.append(f"The coarse network here is the mean of {count} networks (licence: {one_line(said['licence'])}).")
    if coarse.get("mirrored"):
        more.append("It also sees the mirrored image.")
    if gate.get("low") == gate.get("high", ""):
        more.append(f"The share of SAM's logits in the final ones is {gate['low']}.")
    more.append("The figures are of the run as it was: measure this pair with `python -m ultrarefiner.evaluate`.")
    return card.replace("## Figures\n", f"## Figures\n\n{' '.join(more)}\n")


LIMITS = """\
For research. It is no medical device and must not decide on a patient. It has seen images of one data set, with the
scanners, sites and annotators named there; on other images it may fail without a sign. It was trained on images that
show a lesion: what it draws on an image without one means nothing. Contours that look plausible can be wrong, in
shadows and at faint margins above all; look at every mask."""


def model_card(summary: Mapping[str, Any], files: Sequence[str], said: Mapping[str, Mapping[str, str]]) -> str:
    """The card as Markdown, with the front matter that model hubs read.

    Args:
        summary: of the run (summary.json).
        files: that lie beside the card.
        said: network → the metadata of its weights: their licence, and what they have seen.
    """
    config, data = summary["config"], summary["data"]
    name, dataset = f"{config['model']['name']} ({config['phase']['name']})", data["dataset"]
    rows = [{"mask": mask, **scores} for mask, scores in _masks(summary).items()]
    parts = [
        {"part": part, "images": data[part]["cases"], "patients": data[part]["patients"] or "not named"}
        | {"classes": ", ".join(f"{count} {label}" for label, count in data[part]["classes"].items())}
        for part in PARTS
    ]
    apart = "no patient is in two parts"
    if any(data[part].get("without_patient") or not data[part]["patients"] for part in PARTS):
        some = "all " if any(data[part]["patients"] for part in PARTS) else ""
        apart = f"patients are not {some}named, so images of one patient may be in two parts; "
        apart += "near-duplicates were kept together"
    last = said[list(said)[-1]]  # has seen what those before it have
    seen = json.loads(last["seen"]) if "seen" in last else {}
    licences = "; ".join(f"{name}: {one_line(words.get('licence', 'unknown'))}" for name, words in said.items())
    unfair = summary.get("seen")
    cite = CITATIONS.get(dataset)
    fair = f"; not a fair test: {unfair['test_cases']} of them had been seen before" if unfair else ""
    paragraphs = [
        _FRONT_MATTER,
        f"# UltraRefiner {one_line(name)}, trained on {one_line(dataset)}",
        _DOES[tuple(sorted(said))],
        _USE if COARSE in said else _USE.replace('"image.png"', '"image.png", coarse=mask'),
        "## Data",
        f"{one_line(dataset)}, fold {data['fold']} of {data['folds']}; {apart}. The weights carry marks of the "
        f"{len(seen.get('trained', []))} images that they were trained on and of the {len(seen.get('chosen', []))} "
        "that chose them, and refuse to be measured on these.",
        markdown(parts),
        "## Figures",
        f"On the {data['test']['cases']} test images, at their native size{fair}:",
        markdown(rows, (Column("mask", "mask"), *COLUMNS)),
        *([f"This data set asks for this citation: {cite}"] if cite else []),
        "## Intended use and limits",
        LIMITS,
        "## Licences",
        f"Files: {', '.join(files)}. Licences of the weights: {licences}. The data: see the data set's own licence, "
        "which may ask for more than the citation.",
        f"Made by {one_line(summary['title'])}, commit {summary['environment'].get('commit') or 'unknown'}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _masks(summary: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    before = (summary.get("baseline") or {}).get("test", {})
    named = {"coarse (before end-to-end training)": before.get("coarse"), **summary["test"]}
    return {name: scores for name, scores in named.items() if scores}
