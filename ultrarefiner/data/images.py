"""One image file to one array: decoding, and the one function that resamples an image to a square.

Pillow decodes (PNG, JPEG, TIFF, BMP) and pydicom (DICOM). What comes out is always one grey channel of 8 bits,
upright (EXIF orientation applied), at the native size.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ultrarefiner.data import dicom
from ultrarefiner.errors import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom"})
MIN_SIDE = 16  # px: below it there is no lesion to draw; such cases are left out and reported
MAX_PIXELS = 80_000_000  # 20 000 × 4 000: more is no ultrasound frame, and decoding it would fill the memory

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_SUMMARY = "PNG, JPEG, TIFF, BMP or DICOM"


def load_image(path: Path) -> UInt8[np.ndarray, "H W"]:
    """The image in ``path`` as grey values 0…255 at its native size.

    Colour becomes luminance (ITU-R 601), transparency is laid over black. More than 8 bits are scaled linearly so that
    the brightest pixel becomes 255 (floating point: so that the range becomes 0…255); 8 bits stay as they are.

    Raises:
        UserError: the file is empty, damaged, of another format, of several frames, or larger than MAX_PIXELS.
    """
    pixels = _decode(path)
    return luminance(pixels) if pixels.ndim == 3 else eight_bits(pixels, path)


def load_mask(path: Path) -> Bool[np.ndarray, "H W"]:
    """The lesion in ``path`` as a boolean array at its native size.

    A pixel belongs to the lesion if its brightest colour channel exceeds 127, or 32767 in files with any value above
    that (16 bits), or 0 in files without any value above 127: this reads masks of 0/1, 0/255, 0/65535, 0/label, soft
    and coloured masks, and JPEG masks with ringing around the edge. Floating point up to 1 is a probability, cut at
    0.5, unless it has one value beside 0.

    Raises:
        UserError: as in `load_image`.
    """
    pixels = _decode(path)
    brightest = pixels.max(axis=2) if pixels.ndim == 3 else pixels
    values = brightest[brightest > 0]
    top = values.max(initial=0)
    if brightest.dtype.kind == "f" and top <= 1 and (values < top).any():
        return brightest > 0.5
    return brightest > next((half for half in (32767, 127) if top > half), 0)


def load_colours(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """The image in ``path`` with its colours; a grey one three times the same."""
    pixels = _decode(path)
    return pixels if pixels.ndim == 3 else np.repeat(eight_bits(pixels, path)[..., None], 3, axis=2)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in px of a PNG, JPEG, TIFF or BMP file, from its header.

    Raises:
        UserError: the header cannot be read.
    """
    with decoding(path), open_picture(path) as opened:
        width, height = opened.size
        return width, height


def to_square(image: UInt8[np.ndarray, "H W"], size: int) -> UInt8[np.ndarray, "size size"]:
    """Resample an image to ``size`` × ``size`` px, its aspect ratio given up.

    Edge-aligned (pixel centres at (j+0.5)/W) and linear; where it shrinks the kernel widens with the step, so that
    nothing aliases. Every image that reaches a model, in training and in prediction, went through here.
    """
    if image.shape == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def map_to_square(values: Float32[np.ndarray, "H W"], size: int) -> Float32[np.ndarray, "size size"]:
    """Resample a map of numbers, such as probabilities, like `to_square`."""
    if values.shape == (size, size):
        return values
    return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.BILINEAR))


def mask_to_square(mask: Bool[np.ndarray, "H W"], size: int) -> Bool[np.ndarray, "size size"]:
    """Resample a mask like `to_square`: lesion where at least half of a pixel is lesion.

    A lesion never vanishes: one that covers half of no pixel keeps the pixel it covers most.
    """
    if mask.shape == (size, size):
        return mask
    coverage = to_square(mask.astype(np.uint8) * 255, size)
    resampled = coverage >= 128
    if mask.any() and not resampled.any():
        resampled.flat[_most_covered(mask, coverage)] = True
    return resampled


def _most_covered(mask: NDArray[Any], coverage: NDArray[Any]) -> int:
    if coverage.any():
        return int(coverage.argmax())
    size = coverage.shape[0]  # a speck too faint for 8 bits: the pixel its centre falls into
    rows, columns = np.nonzero(mask)
    row = int((rows.mean() + 0.5) / mask.shape[0] * size)
    column = int((columns.mean() + 0.5) / mask.shape[1] * size)
    return int(row * size + column)


@contextlib.contextmanager
def decoding(path: Path, advice: str = "restore the file or remove it together with its partner") -> Iterator[None]:
    """Whatever a decoder raises inside, SyntaxError included, becomes one sentence about the file and what to do.

    Raises:
        UserError: that sentence.
    """
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes): {advice}.")
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as {_SUMMARY} ({reason}): {advice}.") from error


def _decode(path: Path) -> NDArray[Any]:
    """The pixels of ``path``: (H, W) of any numeric type, or (H, W, 3) uint8."""
    with decoding(path):
        return _decode_dicom(path) if path.suffix.lower() in (".dcm", ".dicom") else _decode_picture(path)


def _decode_picture(path: Path) -> NDArray[Any]:
    with open_picture(path) as opened:
        check_size(path, opened.width, opened.height)
        if (frames := picture_frames(opened)) > 1:
            raise UserError(f"{path} holds {frames} frames: export the one you need as a file of its own.")
        return picture_pixels(opened)


def open_picture(path: Path) -> Image.Image:
    """A PNG, JPEG, TIFF or BMP file, of which only the header is read."""
    # the list of formats keeps Pillow's riskier decoders (EPS and others) away from unknown files
    return Image.open(path, formats=_FORMATS)


def picture_frames(opened: Image.Image) -> int:
    """How many frames an opened picture has; the second one of an MPO is a preview of the first."""
    return 1 if opened.format == "MPO" else int(getattr(opened, "n_frames", 1))


def picture_pixels(opened: Image.Image) -> NDArray[Any]:
    """The upright pixels of an opened picture: (H, W) of any numeric type, or (H, W, 3) uint8."""
    picture = ImageOps.exif_transpose(opened)
    assert picture is not None  # None only with in_place=True
    if picture.mode in ("1", "L"):
        return np.asarray(picture.convert("L"))
    if picture.mode in ("F", "I") or picture.mode.startswith("I;"):
        return np.asarray(picture)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    return np.asarray(picture.convert("RGB"))


def _decode_dicom(path: Path) -> NDArray[Any]:
    header = dicom.read_header(path)
    frames = dicom.frame_count(header)
    if frames > 1:
        raise UserError(f"{path} holds {frames} frames: export the one you need as a file of its own.")
    check_size(path, int(header.Columns), int(header.Rows))
    pixels = next(dicom.frames(path, header))
    return eight_bits(pixels, path) if pixels.ndim == 3 else pixels


def check_size(path: Path, width: int, height: int) -> None:
    """Refuse what would fill the memory, before it is decoded.

    Raises:
        UserError: more than MAX_PIXELS.
    """
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{path} has {width} × {height} px, more than the {MAX_PIXELS:,} a frame may have: "
            "crop it to the ultrasound frame."
        )


def luminance(pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W"]:
    """Colour as grey (ITU-R 601)."""
    return np.asarray(Image.fromarray(pixels).convert("L"))


def eight_bits(pixels: NDArray[Any], path: Path) -> UInt8[np.ndarray, "H W *colours"]:
    """Grey values or colours of any numeric type as 0…255; see `load_image`.

    Raises:
        UserError: values that are not finite.
    """
    if pixels.dtype == np.uint8:
        return pixels
    values = pixels.astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds values that are not finite numbers: export it again as 8-bit PNG.")
    low = values.min() if pixels.dtype.kind == "f" else min(0.0, values.min())
    high = values.max()
    if low == 0 and high <= 255 and pixels.dtype.kind != "f":
        return pixels.astype(np.uint8)
    return np.asarray(np.round((values - low) * (255 / max(high - low, 1e-12))), dtype=np.uint8)
