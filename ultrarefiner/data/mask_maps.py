"""One mask or probability map of any other tool, from PNG, TIFF, NIfTI, .npy or .npz, as numbers at its own size."""

import zipfile
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float32, Num

from ultrarefiner.data.failures.shapes import signed_distance
from ultrarefiner.data.failures.softness import REFERENCE_SIDE, SIGMOID_10_90, Softness
from ultrarefiner.data.images import map_to_square
from ultrarefiner.errors import UserError
from ultrarefiner.extras import imported

ENDINGS = (".npz", ".npy", ".nii.gz", ".nii", ".png", ".tif", ".tiff", ".bmp")
"""What can be read; where a case has several files, as nnU-Net writes them, the first of these has the most to say."""
LARGEST = (1, 255, 65535)
"""What may stand for probability 1; a mask of labels has 1."""


def ending(path: Path) -> str | None:
    """Which of ENDINGS a file has."""
    return next((end for end in ENDINGS if path.name.lower().endswith(end)), None)


def read_map(path: Path) -> Float32[np.ndarray, "H W"]:
    """The numbers in a file, as they are, rows from the top.

    Of several classes (.npz with (K,H,W) or nnU-Net's (K,1,H,W)) it is the probability of all but the first, which is
    the background. NIfTI has the columns first, as nnU-Net writes it. Of colours the brightest channel counts.

    Raises:
        UserError: the file cannot be read, is no single image, or holds numbers that are negative or not finite.
    """
    try:
        values = _numbers(path)
    except UserError:
        raise
    except (OSError, ValueError, EOFError, TypeError, IndexError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as {ending(path)} ({error}); write it again") from error
    if values.ndim != 2 or not values.size:
        raise UserError(f"{path} holds {values.shape} numbers, not one mask of height × width")
    if not np.isfinite(values).all() or values.min() < 0:
        raise UserError(f"{path} holds numbers that are negative or not finite; give masks or probabilities, no logits")
    return np.asarray(values, dtype=np.float32)


def coarse_map(values: Float32[np.ndarray, "H W"], size: int) -> Float32[np.ndarray, "size size"]:
    """A map of any tool as a coarse network would give it: probabilities at `size` px.

    A mask of 0 and 1 would be sure of every pixel, and no mean with SAM's mask could move it: it becomes as soft as a
    network's output is (`Softness`), with its outline where it was. An empty one stays empty.
    """
    mask = values > 0.5
    if mask.any() and not ((values > 0) & (values < 1)).any():
        usual = Softness()
        steepness = SIGMOID_10_90 / usual.width * REFERENCE_SIDE / max(mask.shape)
        logit = np.clip(signed_distance(mask) * np.float32(steepness), -usual.outside, usual.inside)
        values = 1 / (1 + np.exp(-logit))
    return map_to_square(values, size)


def _numbers(path: Path) -> Num[np.ndarray, "..."]:
    kind = ending(path)
    if kind == ".npz":
        with np.load(path, allow_pickle=False) as file:
            if len(file.files) != 1:
                raise UserError(f"{path} holds {len(file.files)} arrays ({', '.join(file.files[:4])}); give one")
            return _lesion(np.asarray(file[file.files[0]]))
    if kind == ".npy":
        return _lesion(np.asarray(np.load(path, allow_pickle=False)))
    if kind in (".nii", ".nii.gz"):
        nibabel = imported("nibabel", "nibabel", "nifti")
        try:
            return np.asarray(np.asarray(nibabel.load(path).dataobj).squeeze().T)
        except nibabel.filebasedimages.ImageFileError as error:
            raise ValueError(str(error)) from error
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("it is damaged or no image")
    return np.asarray(pixels if pixels.ndim == 2 else pixels[..., :3].max(axis=2))


def _lesion(values: Num[np.ndarray, "..."]) -> Num[np.ndarray, "..."]:
    """What is not background, of one channel for each class; a single channel as it is."""
    if values.ndim > 2 and values.shape[0] > 1:
        values = 1 - values[0]
    return values.squeeze()
