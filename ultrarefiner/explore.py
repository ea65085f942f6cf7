"""One image at a time: what the networks see and say, and the same again with a box or points of the user's.

Plain functions and data; `ultrarefiner.explore_page` shows them as a web page.
"""

import threading
from base64 import b64encode
from collections import OrderedDict
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor, nn

from ultrarefiner.data.dicom import Region, spacing_at
from ultrarefiner.data.scans import find_scans
from ultrarefiner.errors import UserError
from ultrarefiner.models.cascade import Cascade
from ultrarefiner.refine.prompts import PromptSet
from ultrarefiner.refine.refiner import Refiner
from ultrarefiner.refine.roi import covering
from ultrarefiner.results.measures import describe, separate
from ultrarefiner.results.pictures import overlay, png
from ultrarefiner.results.safety import Safety
from ultrarefiner.results.segmentation import Segmentation
from ultrarefiner.segmenter import Segmenter

LAYERS = ("coarse", "refined", "box", "points", "region", "uncertainty")
KEPT = 8
"""Embeddings that are kept in memory, the latest ones."""
AGREES = 0.3
"""From this IoU with the coarse mask's own box on, a box of the user's only limits the coarse mask."""
_WHITE, _GREY, _GREEN, _RED = (255, 255, 255), (150, 150, 150), (0, 200, 120), (255, 80, 80)

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in px; 0 is the left and the top edge of the image."""
Point = tuple[float, float, bool]
"""x and y in px; whether it lies in the lesion."""


@dataclass(frozen=True)
class Told:
    """What SAM was told, in px; None or nothing where a prompt is off.

    Attributes:
        region: the part of the image that it was shown.
        box: of the lesion.
        points: in it, or outside.
    """

    region: Box | None = None
    box: Box | None = None
    points: tuple[Point, ...] = ()


@dataclass(frozen=True, eq=False)
class Exploration:
    """An image, and what was found in it.

    Attributes:
        path: its file. frame, frames: which of how many, from 0.
        regions: of the image, where pixels have a known size.
        first: what the networks found by themselves. found: the latest result.
        told: what SAM was told for that.
        box, points: what the user has set.
        replaced: whether the user's box took the place of the coarse mask.
    """

    path: Path
    frame: int
    frames: int
    regions: tuple[Region, ...]
    first: Segmentation
    found: Segmentation
    told: Told
    box: Box | None = None
    points: tuple[Point, ...] = ()
    replaced: bool = False

    def mask(self, threshold: float = 0.5) -> Bool[np.ndarray, "H W"]:
        """The lesion, where its probability exceeds a threshold; that of 0.5 is the networks' own."""
        return self.found.mask if threshold == 0.5 else self.found.probability > threshold


class _Steering(nn.Module):
    """ROI and prompts of a pipeline, which note what they say, and say what the user wants where he wants something.

    `box` and `points` (x, y) are in [0, 1] over the image; the labels are 1 in the lesion and 0 outside.
    """

    def __init__(self, roi: nn.Module, prompts: nn.Module) -> None:
        super().__init__()
        self.roi, self.prompts = roi, prompts
        self.box: Float[Tensor, "1 4"] | None = None
        self.points: Float[Tensor, "1 N 2"] | None = None
        self.labels: list[int] = []
        self.region: Float[Tensor, "1 4"] | None = None
        self.told: PromptSet | None = None

    @property
    def keeps_aspect(self) -> bool:
        return bool(self.roi.keeps_aspect)

    def boxes(self, prob: Float[Tensor, "1 1 H W"], aspect: Float[Tensor, " 1"] | None = None) -> Float[Tensor, "1 4"]:
        """Those of the pipeline, or larger ones that hold what the user has set."""
        box: Tensor = self.roi.boxes(prob, aspect)  # type: ignore[operator]
        wanted = [] if self.box is None else [self.box]
        if self.points is not None:
            wanted.append(torch.cat([self.points.amin(1), self.points.amax(1)], dim=1))
        for one in (one.to(box) for one in wanted):
            if (one[:, :2] < box[:, :2]).any() or (one[:, 2:] > box[:, 2:]).any():
                box = covering(torch.cat([box, one]), 1, None, aspect if self.keeps_aspect else None)
        self.region = box
        return box

    def forward(
        self, prob: Float[Tensor, "1 1 H W"], mask_size: int, image: Float[Tensor, "1 4"] | None = None
    ) -> PromptSet:
        """The prompts, in coordinates of the region, of which `told` is a copy in those of the image."""
        told: PromptSet = self.prompts(prob, mask_size, image)
        assert self.region is not None
        low, size = self.region[:, None, :2], self.region[:, None, 2:] - self.region[:, None, :2]
        if self.box is not None and told.boxes is not None:
            told = told._replace(boxes=((self.box.to(low).unflatten(1, (2, 2)) - low) / size).flatten(1))
        if self.points is not None and told.points is not None and told.labels is not None:
            labels = torch.tensor([self.labels], device=told.labels.device)
            points = torch.cat([told.points, (self.points.to(low) - low) / size], dim=1)
            told = told._replace(points=points, labels=torch.cat([told.labels, labels], dim=1))
        self.told = told._replace(
            points=None if told.points is None else told.points * size + low,
            boxes=None if told.boxes is None else (told.boxes.unflatten(1, (2, 2)) * size + low).flatten(1),
        )
        return told


class _Remembering(Refiner):
    """A refiner that encodes the same view of an image once."""

    _known: OrderedDict[bytes, Any]

    def encode(self, image: Float[Tensor, "1 1 S S"], boxes: Float[Tensor, "1 4"]) -> Any:
        """See `Refiner.encode`."""
        mark = blake2b(image.cpu().numpy().tobytes() + boxes.cpu().numpy().tobytes()).digest()
        if mark not in self._known:
            self._known[mark] = super().encode(image, boxes)
        self._known.move_to_end(mark)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return self._known[mark]


class Explorer:
    """A trained pipeline that can be steered.

    Args:
        segmenter: its networks and rules; one image view, all lesions together.

    Raises:
        UserError: it has no coarse network.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        cascade = segmenter.cascade
        if cascade.coarse is None:
            raise UserError("checkpoint holds no coarse network (phase=sam): give one of phase=e2e, or leave it out.")
        self._alone = threading.Lock()  # the page asks from several threads
        self._steering: _Steering | None = None
        refiner = cascade.refiner
        if refiner is not None:
            self._steering = _Steering(refiner.roi, refiner.prompts)
            steered = _Remembering(
                refiner.sam, self._steering, self._steering, refiner.selection_temperature, refiner.gradient
            )
            steered._known = OrderedDict()
            cascade = Cascade(cascade.coarse, steered, cascade.gate)
        sizes = (segmenter.image_size, segmenter.coarse_size, str(segmenter.device))
        self._judged = Segmenter(cascade, *sizes, segmenter.safety, precision=segmenter.precision)
        # Who moves a box sees for himself what comes of it.
        self._free = Segmenter(cascade, *sizes, Safety.none(), precision=segmenter.precision)

    @property
    def refuses_box(self) -> str:
        """Why a box of the user's would mean nothing; "" where it does mean something."""
        return "" if self._steering else "This checkpoint has no refiner (phase=coarse): there is nothing to steer."

    @property
    def refuses_points(self) -> str:
        """Why points of the user's would mean nothing; "" where they do mean something."""
        if self._steering is None or getattr(self._steering.prompts, "point", True):
            return self.refuses_box
        family = self._judged.cascade.refiner.sam.family  # type: ignore[union-attr]
        return f"This pair ({family}) was trained without points, so a point would mean nothing to it: move the box."

    def start(self, path: Path, frame: int = 0) -> Exploration:
        """What the networks find by themselves.

        Args:
            path: of an image; see `data.scans`.
            frame: of a clip, from 0.

        Raises:
            UserError: it cannot be read.
        """
        image, regions, frames = _read(path, frame)
        with self._alone:
            self._steer(image, None, ())
            found = self._judged(image)
            return Exploration(path, frame, frames, regions, found, found, self._told(found))

    def redraw(self, before: Exploration, box: Box | None, points: tuple[Point, ...] = ()) -> Exploration:
        """The same image with a box and points of the user's; without both what the networks found by themselves.

        The box is told to SAM as it is, and the coarse mask counts only inside. Where it has little in common with the
        coarse mask (`AGREES`), an ellipse in the box takes the place of the coarse mask.

        Raises:
            UserError: the pair was not trained with such prompts; or the box is no box.
        """
        if refusal := (self.refuses_points if points else "") or (self.refuses_box if box else ""):
            raise UserError(refusal)
        image, coarse, replaced = before.first.image, before.first.coarse_probability, False
        if box is not None:
            box = _within(box, image.shape[1], image.shape[0])
            coarse, replaced = _limited(coarse, box)
        with self._alone:
            self._steer(image, box, points)
            segmenter = self._free if box or points else self._judged
            found = segmenter(image, coarse=coarse if box else None)
            told = self._told(found)
        return replace(before, found=found, told=told, box=box, points=points, replaced=replaced)

    def _steer(self, image: UInt8[np.ndarray, "H W *rgb"], box: Box | None, points: tuple[Point, ...]) -> None:
        if self._steering is None:
            return
        size = torch.tensor([image.shape[1], image.shape[0]], dtype=torch.float32)
        self._steering.box = None if box is None else torch.tensor([box]) / size.repeat(2)
        places = [[x, y] for x, y, _ in points]
        self._steering.points = torch.tensor([places]) / size if points else None
        self._steering.labels = [int(inside) for _, _, inside in points]
        self._steering.region = self._steering.told = None

    def _told(self, found: Segmentation) -> Told:
        if self._steering is None or self._steering.told is None or self._steering.region is None:
            return Told()
        told, height, width = self._steering.told, *found.mask.shape

        def px(box: Tensor) -> Box:
            x1, y1, x2, y2 = (box[0].cpu() * torch.tensor([width, height] * 2)).tolist()
            return x1, y1, x2, y2

        places = [] if told.points is None or told.labels is None else zip(told.points[0], told.labels[0], strict=True)
        points = tuple((float(x) * width, float(y) * height, bool(label)) for (x, y), label in places)
        return Told(px(self._steering.region), None if told.boxes is None else px(told.boxes), points)


def _read(path: Path, frame: int) -> tuple[UInt8[np.ndarray, "H W *rgb"], tuple[Region, ...], int]:
    """A frame of an image, its calibrated regions, and how many frames there are; errors name the file only."""
    try:
        found = find_scans(path, path.parent)
        if found.problems:
            raise UserError(found.problems[0])
        ((pixels, regions),) = found.scans[0].read([frame])
    except UserError as error:
        raise UserError(str(error).replace(f"images={path}", path.name).replace(str(path), path.name)) from error
    return pixels, tuple(regions), found.scans[0].frames


def _within(box: Box, width: int, height: int) -> Box:
    x1, x2 = sorted(min(max(x, 0.0), float(width)) for x in box[::2])
    y1, y2 = sorted(min(max(y, 0.0), float(height)) for y in box[1::2])
    if min(x2 - x1, y2 - y1) < 2:
        raise UserError("the box must be 2 px wide and high, or more: move its sides apart.")
    return x1, y1, x2, y2


def _limited(coarse: Float32[np.ndarray, "H W"], box: Box) -> tuple[Float32[np.ndarray, "H W"], bool]:
    """The coarse map inside a box; or an ellipse in it, where both have little in common."""
    x1, y1, x2, y2 = box
    y, x = (np.arange(side) + 0.5 for side in coarse.shape)
    inside = ((y > y1) & (y < y2))[:, None] & ((x > x1) & (x < x2))
    rows, columns = np.nonzero(coarse > 0.5)
    if len(rows):
        own = np.zeros_like(inside)
        own[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        if (own & inside).sum() >= AGREES * (own | inside).sum() and (coarse[inside] > 0.5).any():
            return np.where(inside, coarse, np.float32(0)), False
    radius = ((y - (y1 + y2) / 2) / (y2 - y1))[:, None] ** 2 + ((x - (x1 + x2) / 2) / (x2 - x1)) ** 2
    logit = np.clip(4 * (1 - 4 * radius), -10, 2)  # soft, as a coarse network's: SAM may correct it
    return (1 / (1 + np.exp(-logit))).astype(np.float32), True


def picture(
    now: Exploration, threshold: float = 0.5, layers: tuple[str, ...] = LAYERS[:4], corner: Point | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """The image with what was found in it.

    Args:
        now: the result.
        threshold: see `Exploration.mask`.
        layers: of `LAYERS`.
        corner: of a box of which the other corner is not set yet.
    """
    import cv2

    mask = now.mask(threshold)
    image = now.found.image
    if "uncertainty" in layers:
        prob = now.found.probability
        grey = np.dstack([image] * 3) if image.ndim == 2 else image
        heat = cv2.applyColorMap(np.round(255 * 4 * prob * (1 - prob)).astype(np.uint8), cv2.COLORMAP_INFERNO)
        image = np.round(0.45 * grey + 0.55 * heat[..., ::-1]).astype(np.uint8)
    coarse, refined = (
        one if name in layers else None for name, one in (("coarse", now.first.coarse), ("refined", mask))
    )
    canvas = overlay(image, coarse, refined)
    wide = max(1, round(float(np.hypot(*mask.shape)) / 600))
    for name, box, colour in (("region", now.told.region, _GREY), ("box", now.box or now.told.box, _WHITE)):
        if name in layers and box is not None:
            x1, y1, x2, y2 = (round(side) for side in box)
            cv2.rectangle(canvas, (x1, y1), (x2 - 1, y2 - 1), colour, wide)
    for x, y, lesion in now.told.points if "points" in layers else ():
        cv2.circle(canvas, (int(x), int(y)), 4 * wide, _GREEN if lesion else _RED, -1, cv2.LINE_AA)
        cv2.circle(canvas, (int(x), int(y)), 4 * wide, _WHITE, wide, cv2.LINE_AA)
    if corner is not None:
        cv2.drawMarker(canvas, (int(corner[0]), int(corner[1])), _WHITE, cv2.MARKER_CROSS, 16 * wide, wide)
    return canvas


def mask_png(now: Exploration, threshold: float = 0.5) -> bytes:
    """The mask as a PNG file, 255 on 0, at the image's size."""
    return png(now.mask(threshold).astype(np.uint8) * 255)


def rows(now: Exploration, threshold: float = 0.5, pixel: float | None = None) -> list[dict[str, str]]:
    """What is measured of each lesion, the largest first; mm are blank where the size of a pixel is not known.

    Args:
        now, threshold: see `Exploration.mask`.
        pixel: the side of a pixel in mm, where the file does not say it.
    """
    given = None if pixel is None else (pixel, pixel)
    lesions = separate(now.mask(threshold))
    return [describe(lesion, spacing_at(now.regions, lesion.centre, given)) for lesion in lesions]


def measured(now: Exploration, threshold: float = 0.5, pixel: float | None = None) -> str:
    """What was found, as a piece of HTML; see `rows`."""
    return _render("measured.html", now, threshold, pixel)


def report(now: Exploration, threshold: float = 0.5, pixel: float | None = None, model: str = "") -> str:
    """One page, as HTML that needs nothing else.

    Args:
        now, threshold, pixel: see `rows`.
        model: what the networks are called.
    """
    plain = picture(now, threshold, ())
    pictures = [f"data:image/png;base64,{b64encode(png(one)).decode()}" for one in (plain, picture(now, threshold))]
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return _render("explored.html", now, threshold, pixel, model=model, pictures=pictures, time=made)


def _render(template: str, now: Exploration, threshold: float, pixel: float | None, **more: Any) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "results")
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template(template)
    about = {"now": now, "found": now.found, "steered": bool(now.box or now.points), "replaced": now.replaced}
    return page.render(rows=rows(now, threshold, pixel), threshold=threshold, pixel=pixel, **about, **more)
