"""The refiner: a probability map and an image in, a redrawn mask out, differentiable from end to end."""

from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ultrarefiner.refine.moments import precise
from ultrarefiner.refine.roi import coverage, covering, crop, image_within, paste


class Roi(Protocol):
    """Anything that says where to look."""

    keeps_aspect: bool
    """Whether its boxes are squares in native pixels, which may leave the image."""

    def boxes(self, prob: Float[Tensor, "B 1 H W"], aspect: Float[Tensor, " B"] | None = None) -> Float[Tensor, "B 4"]:
        """Boxes (x1, y1, x2, y2), in [0, 1] over the image."""


class PromptableModel(Protocol):
    """What the refiner needs of a Segment Anything model (`models.sam`); all coordinates are normalised."""

    image_size: int
    mask_size: int

    def encode(
        self, image: Float[Tensor, "B 1 size size"], inside: Float[Tensor, "B 1 size size"] | None = None
    ) -> Any:
        """The embedding of images in [0, 1], for `decode`; `inside`: which pixels are image and not padding."""

    def decode(
        self,
        embedding: Any,
        points: Float[Tensor, "P N 2"] | None,
        labels: Int[Tensor, "P N"] | None,
        boxes: Float[Tensor, "P 4"] | None,
        masks: Float[Tensor, "P 1 M M"] | None,
    ) -> tuple[Float[Tensor, "P K M M"], Float[Tensor, "P K"]]:
        """K low-resolution mask logits and their predicted IoUs; P / B neighbouring prompt sets share an embedding."""


class Refinement(NamedTuple):
    """What the refiner made of one batch of P coarse masks."""

    logits: Float[Tensor, "P 1 S S"]
    """The redrawn mask in the frame."""
    boxes: Float[Tensor, "P 4"]
    """Where the model looked."""
    masks: Float[Tensor, "P K M M"]
    """The candidate masks in the box, at low resolution."""
    iou: Float[Tensor, "P K"]
    """The IoU that the model predicts for each of them."""


def select(
    masks: Float[Tensor, "B K M M"], iou: Float[Tensor, "B K"], temperature: float = 0.1
) -> Float[Tensor, "B 1 M M"]:
    """Σ softmax(IoU / temperature)·mask over the K candidates: a differentiable choice of the best one.

    Resampling is linear, so the low-resolution masks are combined first and only one is resampled.
    """
    weights = torch.softmax(precise(iou) / temperature, dim=1).to(masks.dtype)
    return (weights[:, :, None, None] * masks).sum(1, keepdim=True)


def masks_per_image(masks: Float[Tensor, "P 1 h w"], image: Float[Tensor, "B 1 S S"]) -> int:
    """How many neighbouring masks belong to each image; in a graph for any number of images it is one.

    Raises:
        ValueError: their number is no multiple of that of the images.
    """
    if torch.compiler.is_exporting():
        return 1
    if len(masks) % len(image):
        raise ValueError(f"{len(masks)} maps are no multiple of {len(image)} images")
    return len(masks) // len(image)


class Refiner(nn.Module):
    """roi → crop → prompts → encode → decode → select → paste; the same object in Phase 2 and in Phase 3.

    Args:
        sam: the promptable model.
        roi: where to look.
        prompts: what to tell it.
        selection_temperature: τ of `select`.
        gradient: "exact" keeps the gradient that reaches the map through the image crop and the image encoder;
            "frozen" stops it there (the encoder then keeps no activations). Both keep the gradient through the
            prompts, the crop of the map and the paste.
    """

    def __init__(
        self,
        sam: nn.Module,
        roi: nn.Module,
        prompts: nn.Module,
        selection_temperature: float = 0.1,
        gradient: Literal["exact", "frozen"] = "exact",
    ) -> None:
        super().__init__()
        if gradient not in ("exact", "frozen"):
            raise ValueError(f'gradient must be "exact" or "frozen", got {gradient!r}')
        if selection_temperature <= 0:
            raise ValueError(f"selection_temperature must be positive, got {selection_temperature}")
        self.sam, self.roi, self.prompts = sam, roi, prompts
        self.selection_temperature = selection_temperature
        self.gradient = gradient

    def look(
        self,
        prob: Float[Tensor, "P 1 h w"],
        image: Float[Tensor, "B 1 S S"],
        margins: Float[Tensor, "B 4"] | None = None,
        aspect: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B 4"]:
        """One box for each image, that holds what all its P / B neighbouring maps propose.

        Args:
            prob: coarse probability maps in [0, 1].
            margins: see `roi.covering`.
            aspect: native width / height of each image, where the ROI keeps it; None: square images.
        """
        aspect = precise(prob).new_ones(image.shape[0]) if aspect is None else aspect
        single = self.roi.boxes(prob, aspect.repeat_interleave(masks_per_image(prob, image)))  # type: ignore[operator]
        return covering(single, image.shape[0], margins, aspect if self.roi.keeps_aspect else None)

    def encode(self, image: Float[Tensor, "B 1 S S"], boxes: Float[Tensor, "B 4"]) -> Any:
        """The embedding of what each box shows, taken from the frame at its native detail."""
        if self.gradient == "exact":
            return self._encode(image, boxes)
        trained = any(p.requires_grad for p in self.sam.image_encoder.parameters())  # type: ignore[union-attr]
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return self._encode(image, boxes.detach())

    def _encode(self, image: Tensor, boxes: Tensor) -> Any:
        sam: PromptableModel = self.sam  # type: ignore[assignment]
        shown = crop(image, boxes, sam.image_size)
        if not self.roi.keeps_aspect:  # then nothing can lie outside
            return sam.encode(shown)
        return sam.encode(shown, coverage(image_within(boxes), sam.image_size))

    def forward(
        self,
        image: Float[Tensor, "B 1 S S"],
        prob: Float[Tensor, "P 1 h w"],
        boxes: Float[Tensor, "B 4"] | None = None,
        aspect: Float[Tensor, " B"] | None = None,
    ) -> Refinement:
        """Redraw the masks that `prob` proposes: P = B, one for each image; or P = B·n, n neighbouring ones for each.

        The n masks of an image share one crop, whose box covers all of theirs, so it is encoded once.

        Args:
            image: the frame in [0, 1], S × S pixels.
            prob: the coarse probability maps in [0, 1], at the coarse network's resolution.
            boxes: where to look, see `look`; None: there where the maps themselves say.
            aspect: native width / height of each image, where the ROI keeps it; None: square images.

        Raises:
            ValueError: P is no multiple of B.
        """
        sam: PromptableModel = self.sam  # type: ignore[assignment]
        several = masks_per_image(prob, image)
        shared = self.look(prob, image, aspect=aspect) if boxes is None else boxes
        boxes = shared.repeat_interleave(several, dim=0)
        seen, within = crop(prob, boxes, sam.mask_size), None
        if self.roi.keeps_aspect:  # what lies outside the image is background, and no place for a prompt
            within = image_within(boxes)
            seen = seen * coverage(within, sam.mask_size)
        prompts = self.prompts(seen, sam.mask_size, within)
        masks, iou = sam.decode(self.encode(image, shared), *prompts)
        chosen = select(masks, iou, self.selection_temperature)
        return Refinement(paste(chosen, boxes, image.shape[-1]), boxes, masks, iou)
