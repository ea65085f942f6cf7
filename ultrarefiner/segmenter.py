"""A trained pipeline as one object: image in, mask out, in numpy. Prediction, evaluation, demo and export use it.

segmenter = Segmenter.load("outputs/busbra/lite/e2e-...")
result = segmenter(image)              # result.mask, result.coarse, result.probability, ...
result = segmenter(image, coarse=mask) # redraw the mask of any other tool
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import get_class
from jaxtyping import Bool, Float, Float32, UInt8
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from ultrarefiner.data.dataset import as_tensor
from ultrarefiner.data.images import luminance, map_to_square, to_square
from ultrarefiner.errors import UserError
from ultrarefiner.files import load
from ultrarefiner.models.cascade import Cascade, lesion_logit, soft_logit
from ultrarefiner.phases.phase import Phase
from ultrarefiner.results.metrics import native_mask
from ultrarefiner.runs.build import build_cascade
from ultrarefiner.runs.checkpoints import BEST

Picture = NDArray[Any]
"""(H,W) or (H,W,3), 8 bits; checked where it is used."""
CoarseMask = NDArray[Any]
"""(H,W): a mask (bool), or probabilities in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What was found in one image, at the image's own size.

    Attributes:
        mask: the lesion.
        coarse: what it was before it was redrawn.
        probability: of each pixel, in [0, 1]; `mask` is where it exceeds 0.5.
        box: where SAM looked, (x1, y1, x2, y2) in px; None where nothing was redrawn.
        accepted: whether `mask` is the redrawn mask (True) or the coarse one (False).
        uncertainty: in [0, 1]: 4·p·(1 − p), averaged over the pixels of both masks; 0 where both are empty.
        iou: the IoU with the truth that SAM predicts for its best mask; None where nothing was redrawn.
    """

    mask: Bool[np.ndarray, "H W"]
    coarse: Bool[np.ndarray, "H W"]
    probability: Float32[np.ndarray, "H W"]
    box: tuple[float, float, float, float] | None
    accepted: bool
    uncertainty: float
    iou: float | None


class Segmenter:
    """Coarse network and refiner with trained weights.

    Args:
        cascade: the networks; without a coarse one each image needs a coarse mask, without a refiner none is redrawn.
        image_size, coarse_size: of the frames that they take, px.
        device: "cpu", "cuda", "mps", …; "auto" takes the fastest that is there.
    """

    def __init__(self, cascade: Cascade, image_size: int, coarse_size: int, device: str = "auto") -> None:
        self.device = torch.device(fastest_device() if device == "auto" else device)
        self.cascade = cascade.to(self.device).eval()
        self.image_size, self.coarse_size = image_size, coarse_size

    @classmethod
    def load(cls, path: str | Path | None = None, device: str = "auto") -> "Segmenter":
        """The pipeline of a run directory or of one of its checkpoints, which carries its configuration.

        Args:
            path: the directory, or a file such as `checkpoints/best.ckpt`; None is the pair that ships.
            device: see `Segmenter`.

        Raises:
            UserError: there is no such run or file, it is damaged, or it does not say how its networks are built.
        """
        if path is None:
            raise UserError("no trained pair ships with this version yet; give the path of a run or of a checkpoint")
        path = Path(path).expanduser()
        file = path / "checkpoints" / BEST if path.is_dir() else path
        if path.is_dir() and not file.is_file():
            raise UserError(f"{path} is not the directory of a run: it holds no checkpoints/{BEST}")
        content = load(file)
        if not isinstance(content, dict) or not {"config", "state_dict"} <= set(content):
            raise UserError(f"{file} does not say how its networks are built; give a run's {BEST}, or its directory")
        cfg = OmegaConf.create(content["config"])
        cascade = _untrained(cfg)
        prefix = "cascade."
        state = content["state_dict"]
        cascade.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        return cls(cascade, cfg.model.image_size, cfg.model.coarse_size, device)

    def __call__(self, image: Picture, coarse: CoarseMask | None = None) -> Segmentation:
        """Segment one image.

        Args:
            image: grey or colour, 0 to 255, of any size.
            coarse: a mask, or a probability map in [0, 1], of the image's size, in place of the coarse network's.
        """
        return self.batch([image], None if coarse is None else [coarse])[0]

    @torch.inference_mode()
    def batch(self, images: Sequence[Picture], coarse: Sequence[CoarseMask] | None = None) -> list[Segmentation]:
        """Segment several images, of any sizes, in one pass; see `__call__`.

        Raises:
            ValueError: an image is not 8-bit grey or colour, or a coarse mask has another size than its image.
            UserError: there is neither a coarse network nor a coarse mask.
        """
        pictures = [_grey(image) for image in images]
        frames = torch.cat([self._frame(picture, self.image_size) for picture in pictures])
        if coarse is not None:
            coarse_logits = torch.cat([self._coarse(*pair) for pair in zip(coarse, pictures, strict=True)])
        elif self.cascade.coarse is not None:
            small = torch.cat([self._frame(picture, self.coarse_size) for picture in pictures])
            coarse_logits = lesion_logit(self.cascade.coarse(small))
        else:
            raise UserError("this run has no coarse network (phase=sam): give a coarse mask with each image")
        if self.cascade.refiner is None:
            return [_describe(p, logit, None, None, None) for p, logit in zip(pictures, coarse_logits, strict=True)]
        aspect = torch.tensor([picture.shape[1] / picture.shape[0] for picture in pictures], device=self.device)
        refined = self.cascade.refine(frames, coarse_logits, aspect=aspect)
        parts = zip(pictures, coarse_logits, refined.logits, refined.boxes, refined.iou, strict=True)
        return [_describe(*part) for part in parts]

    def _frame(self, picture: UInt8[np.ndarray, "H W"], size: int) -> Float[Tensor, "1 1 S S"]:
        return as_tensor(to_square(picture, size))[None].to(self.device)

    def _coarse(self, mask: CoarseMask, picture: UInt8[np.ndarray, "H W"]) -> Float[Tensor, "1 1 C C"]:
        if mask.shape != picture.shape:
            raise ValueError(f"a coarse mask of {mask.shape} does not belong to an image of {picture.shape} pixels")
        prob = map_to_square(mask.astype(np.float32), self.coarse_size)
        return soft_logit(torch.from_numpy(prob)[None, None].to(self.device))


def fastest_device() -> str:
    """An NVIDIA or Apple GPU where there is one, else the processor."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _untrained(cfg: Any) -> Cascade:
    """The networks of a configuration, without a look for the files that they once started from."""
    assert isinstance(cfg, DictConfig)
    with open_dict(cfg):
        cfg.model.coarse_weights = None
        cfg.model.cache_embeddings = False
        if cfg.model.sam._target_ == "ultrarefiner.models.sam.load_sam":
            cfg.model.sam = {**cfg.model.sam, "checkpoint": None, "random_init": True}
    kind: type[Phase] = get_class(cfg.phase._target_)
    return build_cascade(cfg, kind.parts, {})


def _grey(image: Picture) -> UInt8[np.ndarray, "H W"]:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"an image must be (H,W) or (H,W,3) of 8 bits, got {image.shape} of {image.dtype}")
    return luminance(image) if image.ndim == 3 else image


def _describe(
    picture: UInt8[np.ndarray, "H W"],
    coarse_logit: Float[Tensor, "1 C C"],
    logit: Float[Tensor, "1 S S"] | None,
    box: Float[Tensor, " 4"] | None,
    iou: Float[Tensor, " K"] | None,
) -> Segmentation:
    height, width = picture.shape
    coarse = native_mask(coarse_logit, (height, width))
    final = coarse_logit if logit is None else logit
    native = F.interpolate(final[None].float(), size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    probability = native.sigmoid().cpu().numpy()
    mask = native_mask(final, (height, width))
    either = mask | coarse
    undecided = 4 * probability * (1 - probability)
    return Segmentation(
        mask=mask,
        coarse=coarse,
        probability=probability,
        box=None if box is None else tuple((box.cpu() * torch.tensor([width, height] * 2)).tolist()),
        accepted=logit is not None,
        uncertainty=float(undecided[either].mean()) if either.any() else 0.0,
        iou=None if iou is None else float(iou.max()),
    )
