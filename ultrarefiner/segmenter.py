"""A trained pipeline as one object: image in, mask out, in numpy. Prediction, evaluation, demo and export use it.

segmenter = Segmenter.load("outputs/busbra/lite/e2e-...")
result = segmenter(image)              # result.mask, result.coarse, ...; result.box: where SAM looked
result = segmenter(image, coarse=mask) # redraw the mask of any other tool
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, UInt8
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image
from torch import Tensor

from ultrarefiner.data.dataset import as_tensor
from ultrarefiner.data.images import eight_bits, load_colours, luminance, picture_pixels, to_square
from ultrarefiner.data.mask_maps import coarse_map
from ultrarefiner.data.views import mean, views
from ultrarefiner.errors import UserError
from ultrarefiner.files import ONNX, folder_sha256, load, sha256
from ultrarefiner.models.cascade import Cascade, lesion_logit, soft_logit
from ultrarefiner.models.onnx_backend import OnnxCascade
from ultrarefiner.precision import AUTO, FULL, computing, fastest
from ultrarefiner.results.measures import numbered
from ultrarefiner.results.safety import NO_LESION, Safety
from ultrarefiner.results.segmentation import Segmentation as Segmentation
from ultrarefiner.runs.build import build_cascade
from ultrarefiner.runs.checkpoints import BEST, SHIPPED, exported, load_gate, located, said_of
from ultrarefiner.settings import COARSE, PREDICTING, SAM

Picture = NDArray[Any]
"""(H,W) or (H,W,3), 8 bits; checked where it is used."""
Given = Any
"""A `Picture`, a PIL image, or the path of a PNG, JPEG, TIFF, BMP or DICOM file; checked where it is used."""
CoarseMask = NDArray[Any]
"""(H,W): a mask (bool), or probabilities in [0, 1]."""
BACKENDS = ("torch", "onnx")
_NETWORKS = {COARSE: "coarse", SAM: "refiner"}
"""What they are called in a `Cascade`."""
_FROM_FILES = {"encoder_weights": None, "pretrained": False}
"""Arguments of coarse networks that fetch or read weights, and their values that do not."""
_NOTHING = -16.0
"""The logit of what is certainly no lesion; see `soft_logit`."""


class _Drawn(NamedTuple):
    """What was drawn of one view of an image, at its size."""

    coarse: Float[Tensor, "1 H W"]  # logits, as the next one
    refined: Float[Tensor, "1 H W"] | None
    box: tuple[float, float, float, float] | None
    iou: float | None


class Segmenter:
    """Coarse network and refiner with trained weights.

    Args:
        cascade: the networks; without a coarse one each image needs a coarse mask, without a refiner none is redrawn.
        image_size, coarse_size: of the frames that they take, px.
        device: "cpu", "cuda", "mps", …; "auto" takes the fastest that is there.
        safety: which redrawn masks are rejected; `Safety.none()` takes them all.
        lesions: "together" redraws all lesions of an image in one pass; "each" redraws each by itself.
        tta: "flips", "scales" or both: how the image is shown as well; the probabilities are averaged.
        precision: "32-true", "bf16-mixed", "16-mixed", or "auto": the fastest here, see `precision.fastest`.
    """

    def __init__(
        self,
        cascade: Cascade,
        image_size: int,
        coarse_size: int,
        device: str = "auto",
        safety: Safety | None = None,
        lesions: str = "together",
        tta: str | Sequence[str] | None = None,
        precision: str = AUTO,
    ) -> None:
        if precision not in PREDICTING:
            raise UserError(f"precision must be one of {', '.join(PREDICTING)}, got {precision}")
        if lesions not in ("together", "each"):
            raise UserError(f"lesions must be one of together, each, got {lesions}")
        self.views, self.lesions, self.safety = views(tta), lesions, safety or Safety()
        self.device = _device(fastest_device() if device == "auto" else device)
        self.cascade = cascade.to(self.device).eval()
        self.image_size, self.coarse_size = image_size, coarse_size
        frame = 0 if cascade.refiner is None else image_size
        self.precision = fastest(self.device.type, frame) if precision == AUTO else precision

    @classmethod
    @torch.inference_mode(False)
    def load(
        cls, path: str | Path | None = None, device: str = "auto", backend: str = "torch", **options: Any
    ) -> "Segmenter":
        """The pipeline of a run, which carries its configuration.

        Args:
            path: the directory, a file such as `checkpoints/best.ckpt`, or a folder of `ultrarefiner.export`; "shipped"
                or None: the pair that ships.
            device, options: see `Segmenter`.
            backend: "torch", or "onnx": the file that `ultrarefiner.export format=[onnx]` wrote, on the CPU in float32.

        Raises:
            UserError: there is no such run or file, it is damaged, or it does not say how its networks are built.
        """
        file = checkpoint_file(path, backend)
        if backend == "onnx":
            if device not in ("auto", "cpu"):
                raise UserError(f"backend=onnx runs on device=cpu, not on {device}")
            answering = OnnxCascade(file)
            options["precision"] = FULL
            return cls(answering, answering.image_size, answering.coarse_size, "cpu", **options)
        if networks := exported(file.parent):
            return cls(*_exported(networks), device, **options)
        content = load(file)
        if not isinstance(content, dict) or not {"config", "state_dict"} <= set(content):
            raise UserError(f"{file} does not say how its networks are built; give a run's {BEST}, or its directory")
        cfg = OmegaConf.create(content["config"])
        prefix = "cascade."
        state = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
        there = {name.partition(".")[0] for name in state}
        cascade = _untrained(cfg, {part for part, name in _NETWORKS.items() if name in there})
        cascade.load_state_dict(state)
        return cls(cascade, cfg.model.image_size, cfg.model.coarse_size, device, **options)

    def __call__(self, image: Given, coarse: CoarseMask | None = None) -> Segmentation:
        """Segment one image.

        Args:
            image: grey or colour, 0 to 255, of any size; a PIL image; or the path of a PNG, JPEG, TIFF, BMP or DICOM
                file.
            coarse: a mask, or a probability map in [0, 1], of the image's size, in place of the coarse network's.
                A mask becomes as soft as a network's, see `data.mask_maps.coarse_map`.
        """
        return self.batch([image], None if coarse is None else [coarse])[0]

    @torch.inference_mode()
    def batch(self, images: Sequence[Given], coarse: Sequence[CoarseMask] | None = None) -> list[Segmentation]:
        """Segment several images, of any sizes, in one pass; see `__call__`.

        Raises:
            TypeError: an image is nothing of the kind.
            ValueError: an image is not 8-bit grey or colour, or a coarse mask has another size than its image.
            UserError: there is neither a coarse network nor a coarse mask; a file is not there, or damaged.
        """
        images = [_pixels(image) for image in images]
        pictures = [_grey(image) for image in images]
        for mask, picture in zip(coarse or (), pictures, strict=coarse is not None):
            if mask.shape != picture.shape:
                raise ValueError(f"a coarse mask of {mask.shape} does not belong to an image of {picture.shape} pixels")
        seen = []
        for view in self.views:
            masks = None if coarse is None else [view.show(mask) for mask in coarse]
            with computing(self.precision, self.device.type):
                seen.append(self._draw([view.show(picture) for picture in pictures], masks))
        return [
            self._judge(image, drawn) for image, drawn in zip(images, map(list, zip(*seen, strict=True)), strict=True)
        ]

    def _draw(self, pictures: Sequence[Picture], coarse: Sequence[CoarseMask] | None) -> list[_Drawn]:
        if coarse is not None:
            coarse_logits = torch.cat([self._coarse(mask) for mask in coarse])
        elif self.cascade.coarse is not None:
            small = torch.cat([self._frame(picture, self.coarse_size) for picture in pictures])
            coarse_logits = lesion_logit(self.cascade.coarse(small))
        else:
            raise UserError("this run has no coarse network (phase=sam): give a coarse mask with each image")
        natives = [_native(*pair) for pair in zip(coarse_logits, pictures, strict=True)]
        parts = [self._parts(*pair) for pair in zip(coarse_logits, natives, strict=True)]
        logits, boxes, ious = self._refine(pictures, parts)
        ends = np.cumsum([len(part) for part in parts])
        drawn = []
        for native, picture, part, end in zip(natives, pictures, parts, ends, strict=True):
            own = slice(int(end) - len(part), int(end))
            if own.start == own.stop:
                drawn.append(_Drawn(native, None, None, None))
                continue
            corners = torch.cat([boxes[own, :2].amin(0), boxes[own, 2:].amax(0)])
            box = tuple((corners * torch.tensor([picture.shape[1], picture.shape[0]] * 2)).tolist())
            refined = _native(logits[own].amax(0), picture)
            drawn.append(_Drawn(native, refined, box, float(ious[own].amax(1).amin())))
        return drawn

    def _parts(self, logit: Float[Tensor, "1 C C"], native: Float[Tensor, "1 H W"]) -> Float[Tensor, "n 1 C C"]:
        """What of a coarse map is redrawn by itself; nothing where there is no refiner, or no lesion."""
        if self.cascade.refiner is None or (self.safety.keep_empty and not (native > 0).any()):
            return logit[None][:0]
        return apart(logit) if self.lesions == "each" else logit[None]

    def _refine(
        self, pictures: Sequence[Picture], parts: Sequence[Float[Tensor, "_ 1 C C"]]
    ) -> tuple[Float[Tensor, "P 1 S S"], Float[Tensor, "P 4"], Float[Tensor, "P K"]]:
        """The redrawn logits, boxes and predicted IoUs of all parts, never more of them at once than images."""
        owner = [index for index, part in enumerate(parts) for _ in part]
        if not owner:
            return torch.zeros(0, 1, 1, 1), torch.zeros(0, 4), torch.zeros(0, 1)
        maps = torch.cat(list(parts))
        done = []
        for start in range(0, len(owner), len(pictures)):
            some = [pictures[index] for index in owner[start : start + len(pictures)]]
            frames = torch.cat([self._frame(picture, self.image_size) for picture in some])
            aspect = torch.tensor([picture.shape[1] / picture.shape[0] for picture in some], device=self.device)
            refined = self.cascade.refine(frames, maps[start : start + len(some)], aspect=aspect)
            done.append((refined.logits, refined.boxes.cpu(), refined.iou.cpu()))
        logits, boxes, ious = zip(*done, strict=True)
        return torch.cat(logits), torch.cat(boxes), torch.cat(ious)

    def _judge(self, image: Picture, drawn: Sequence[_Drawn]) -> Segmentation:
        """One result of all views: the mean of each map, and the redrawn one only where the rules accept it."""
        shape = (image.shape[0], image.shape[1])
        coarse_prob, coarse = self._mean([one.coarse for one in drawn], shape)
        prob, mask, refined, iou = coarse_prob, coarse, None, None
        if self.cascade.refiner is None:
            reason = "the run has no refiner (phase=coarse)"
        elif all(one.refined is None for one in drawn):
            reason = NO_LESION
        else:
            # A view in which nothing was found says so with its coarse map.
            redrawn, refined = self._mean([one.coarse if one.refined is None else one.refined for one in drawn], shape)
            iou = float(np.mean([one.iou for one in drawn if one.iou is not None]))
            reason = "; ".join(self.safety.reasons(coarse, refined, iou))
            if not reason:
                prob, mask = redrawn, refined
        either = mask | coarse
        undecided = 4 * prob * (1 - prob)
        return Segmentation(
            mask=mask,
            coarse=coarse,
            probability=prob,
            box=drawn[0].box,
            accepted=not reason,
            uncertainty=float(undecided[either].mean()) if either.any() else 0.0,
            iou=iou,
            reason=reason,
            refined=refined,
            coarse_probability=coarse_prob,
            image=image,
        )

    def _mean(
        self, logits: Sequence[Float[Tensor, "1 _ _"]], shape: tuple[int, int]
    ) -> tuple[Float32[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]:
        """The mean probability over the views, and the mask; of a single view exactly that of its logits."""
        probs = [logit.sigmoid()[0].cpu().numpy() for logit in logits]
        if len(probs) == 1:
            return probs[0], (logits[0][0] > 0).cpu().numpy()
        prob = mean([view.back(one, shape) for view, one in zip(self.views, probs, strict=True)])
        return prob, prob > 0.5

    def _frame(self, picture: UInt8[np.ndarray, "H W"], size: int) -> Float[Tensor, "1 1 S S"]:
        return as_tensor(to_square(picture, size))[None].to(self.device)

    def _coarse(self, mask: CoarseMask) -> Float[Tensor, "1 1 C C"]:
        prob = coarse_map(mask.astype(np.float32), self.coarse_size)
        return soft_logit(torch.tensor(prob)[None, None].to(self.device))


def _exported(networks: Mapping[str, Path]) -> tuple[Cascade, int, int]:
    """The networks in the files of `ultrarefiner.export`, and the sizes of their frames.

    Raises:
        UserError: a file is damaged, or does not say how its network is built.
    """
    said = {name: said_of(path) for name, path in networks.items()}
    cfg = OmegaConf.create(said.get(SAM, said.get(COARSE, {})).get("config"))
    if not isinstance(cfg, DictConfig) or not all(said.values()):
        raise UserError(f"{next(iter(networks.values()))} does not say how its network is built; export the run again")
    cfg.model.lora.rank = 0  # merged
    cascade = _untrained(cfg, networks, networks)
    if SAM in networks:
        load_gate(cascade.gate, networks[SAM])
    return cascade, cfg.model.image_size, cfg.model.coarse_size


def checkpoint_file(path: str | Path | None, backend: str = "torch") -> Path:
    """The file that says what a pipeline is, which may be given in all the ways that `Segmenter.load` takes.

    Raises:
        UserError: a directory without one, or there is no such backend.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend must be one of {', '.join(BACKENDS)}, got {backend}")
    path = located(path)
    if backend == "onnx":
        file = path / ONNX if path.is_dir() else path
        if not file.is_file() or file.suffix != Path(ONNX).suffix:
            name = "shipped" if path == SHIPPED else path
            how = f"python -m ultrarefiner.export checkpoint={name} output=DIR format=[onnx]"
            raise UserError(f"backend=onnx needs a .onnx file or a folder with {ONNX}, which {name} is not: {how}")
        return file
    if networks := exported(path):
        return networks.get(SAM, networks.get(COARSE, path))
    file = path / "checkpoints" / BEST if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise UserError(f"{path} is not the directory of a run: it holds no checkpoints/{BEST}")
    return file


def content_hash(file: Path) -> str:
    """By what the weights of a pipeline are known, whatever they are called; see `checkpoint_file`."""
    whole = file.suffix != Path(ONNX).suffix and exported(file.parent)
    return folder_sha256(file.parent) if whole else sha256(file)


def fastest_device() -> str:
    """An NVIDIA or Apple GPU where there is one, else the processor."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _device(name: str) -> torch.device:
    """A device of that name, which is there.

    Raises:
        UserError: it is not.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # of a name that is none, or of a torch without it
        raise UserError(f"device={name} is not there ({str(error).splitlines()[0]}); choose auto or cpu") from error


def _untrained(cfg: Any, parts: Collection[str], files: Mapping[str, Path] = MappingProxyType({})) -> Cascade:
    """The networks of a configuration, without a look for the files that they once started from.

    Args:
        cfg: of a run.
        parts: which networks.
        files: of their weights.
    """
    assert isinstance(cfg, DictConfig)
    with open_dict(cfg):
        cfg.model.coarse_weights = None
        cfg.phase.crops = None
        if cfg.model.sam._target_ == "ultrarefiner.models.sam.load_sam":
            cfg.model.sam = {**cfg.model.sam, "checkpoint": None, "random_init": True}
        coarse = cfg.model.coarse or {}
        for network in coarse.get("members", [coarse]):
            network.update({name: none for name, none in _FROM_FILES.items() if name in network})
    # Frozen, whatever was trained: SAM's image encoder then takes its fastest form.
    return build_cascade(cfg, parts, files).requires_grad_(False)


def _pixels(image: Given) -> Picture:
    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, Image.Image):
        return eight_bits(picture_pixels(image), Path("the image"))
    if not isinstance(image, str | Path):
        raise TypeError(f"an image must be a numpy array, a PIL image or a path, got {type(image).__name__}")
    if not Path(image).exists():
        raise UserError(f"{image} does not exist")
    return load_colours(Path(image))


def _grey(image: Picture) -> UInt8[np.ndarray, "H W"]:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"an image must be (H,W) or (H,W,3) of 8 bits, got {image.shape} of {image.dtype}")
    return luminance(image) if image.ndim == 3 else image


def _native(logit: Float[Tensor, "1 h w"], picture: UInt8[np.ndarray, "H W"]) -> Float[Tensor, "1 H W"]:
    return F.interpolate(logit[None].float(), size=picture.shape, mode="bilinear", align_corners=False)[0]


def apart(logit: Float[Tensor, "1 H W"], most: int = 8) -> Float[Tensor, "n 1 H W"]:
    """A map for each lesion of a coarse map, in which all that is nearer to another lesion is background.

    Args:
        logit: the coarse map; a lesion is where it exceeds 0.
        most: at most so many maps, of the largest lesions; what is smaller goes with the nearest of these.
    """
    from scipy.ndimage import distance_transform_edt

    labels, count = numbered((logit[0] > 0).cpu().numpy())
    if count < 2:
        return logit[None]
    far = (labels == 0) | (labels > most)
    rows, columns = distance_transform_edt(far, return_distances=False, return_indices=True)
    nearest = torch.from_numpy(labels[rows, columns]).to(logit.device)
    background = logit.clamp(max=_NOTHING)
    return torch.stack([torch.where(nearest == number, logit, background) for number in range(1, min(count, most) + 1)])
