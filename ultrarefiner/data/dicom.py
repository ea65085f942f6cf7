"""DICOM files: what they hold, their frames one by one, and how large a pixel is; pydicom decodes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ultrarefiner.errors import UserError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MAX_FRAMES = 20_000  # a quarter of an hour at 22 frames a second: more is a damaged header
_MAGIC = b"DICM"  # at byte 128
_TWO_DIMENSIONAL, _CENTIMETRES = 1, 3  # codes of Region Spatial Format and of Physical Units


class Region(NamedTuple):
    """A part of a frame whose pixels have a known size."""

    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in px; 0 is the left and the top edge of the frame."""
    spacing: tuple[float, float]
    """(row, column): the height and the width of a pixel, mm."""

    @property
    def area(self) -> float:
        """In px."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    def holds(self, x: float, y: float) -> bool:
        """Whether a point lies in it, px."""
        return self.box[0] <= x <= self.box[2] and self.box[1] <= y <= self.box[3]


def spacing_at(
    regions: Sequence[Region], point: tuple[float, float], otherwise: tuple[float, float] | None
) -> tuple[float, float] | None:
    """(row, column) in mm at a point (x, y) px: that of the smallest region there.

    Args:
        otherwise: that of images without any region.
    """
    around = [region for region in regions if region.holds(*point)]
    smallest = min(around, key=lambda region: region.area, default=None)
    return smallest.spacing if smallest else None if regions else otherwise


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its name or, as scanners write files without a suffix, by its first bytes."""
    if path.suffix.lower() in (".dcm", ".dicom"):
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == _MAGIC


def read_header(path: Path) -> "Dataset":
    """Everything but the pixels.

    Raises:
        UserError: the file is no image, has too many frames, or is compressed in a way that nothing here decodes.
    """
    import pydicom
    from pydicom.filereader import read_file_meta_info
    from pydicom.pixels import get_decoder
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    advice = "export it uncompressed (Explicit VR Little Endian)"
    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax is None:
        raise UserError(f"{path} does not say how it is encoded (Transfer Syntax UID): {advice}.")
    # It is inflated as a whole before anything is known of its size.
    if syntax == DeflatedExplicitVRLittleEndian:
        raise UserError(f"{path} is a deflated DICOM file, which may fill the memory: {advice}.")
    header = pydicom.dcmread(path, stop_before_pixels=True)
    if "Rows" not in header or "Columns" not in header:
        raise UserError(f"{path} is DICOM without an image ({header.get('Modality', 'no modality')}): remove it.")
    frames = frame_count(header)
    if not 1 <= frames <= MAX_FRAMES or not int(header.Rows) or not int(header.Columns):
        size = f"{frames} frames of {header.Columns} × {header.Rows} px"
        raise UserError(f"{path} says that it holds {size}: export it again, with 1 to {MAX_FRAMES:,} frames.")
    try:
        known = get_decoder(syntax).is_available
    except NotImplementedError:  # of films
        raise UserError(f"{path} is compressed as {syntax.name}, which is not read: {advice}.") from None
    if not known:
        raise UserError(
            f"{path} is compressed as {syntax.name}, for which no decoder is installed: "
            f"pip install 'pylibjpeg[all]', or {advice}."
        )
    return header


def frame_count(header: "Dataset") -> int:
    """How many frames there are."""
    return int(header.get("NumberOfFrames") or 1)


def frames(path: Path, header: "Dataset", indices: Iterable[int] | None = None) -> Iterator[NDArray[Any]]:
    """Some frames, or all of them, decoded one after the other: (H, W) of any numeric type, or (H, W, 3) RGB.

    Lookup tables and windows of the file are applied, YBR is brought to RGB, and MONOCHROME1 is turned around. Grey
    values of 8 bits stay such, also where a window changes them.
    """
    from pydicom.pixels import apply_color_lut, iter_pixels
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    kind = str(header.PhotometricInterpretation)
    # A rescaling that changes nothing, as many files have, is left out: pydicom would make floating point of it.
    rescaled = (header.get("RescaleSlope", 1), header.get("RescaleIntercept", 0)) != (1, 0)
    rescaled |= "ModalityLUTSequence" in header
    for pixels in iter_pixels(path, indices=indices):
        if kind == "PALETTE COLOR":
            colours = apply_color_lut(pixels, header)[..., :3]
            yield (colours >> 8).astype(np.uint8) if colours.dtype == np.uint16 else colours
        elif pixels.ndim == 3:  # colour, which pydicom has brought to RGB
            yield pixels
        else:
            grey = apply_voi_lut(apply_modality_lut(pixels, header) if rescaled else pixels, header)
            if not rescaled and pixels.dtype == np.uint8 and grey.dtype.kind == "f":  # of a window
                grey = np.clip(np.round(grey), 0, 255).astype(np.uint8)
            top = 255 if grey.dtype == np.uint8 else grey.max()  # 8 bits are used whole, in all frames alike
            yield top - grey if kind == "MONOCHROME1" else grey  # there 0 is white


def calibration(header: "Dataset") -> list[Region]:
    """The parts of the frames in which the size of a pixel is known; empty where it is not.

    Ultrasound is calibrated for each of its regions (Sequence of Ultrasound Regions, 0018,6011), of which those count
    that are two-dimensional and in cm; where there is none, Pixel Spacing (0028,0030) holds everywhere.
    """
    whole = (0.0, 0.0, float(header.Columns), float(header.Rows))
    found = []
    for region in header.get("SequenceOfUltrasoundRegions") or ():
        units = {region.get("PhysicalUnitsXDirection"), region.get("PhysicalUnitsYDirection")}
        if region.get("RegionSpatialFormat") == _TWO_DIMENSIONAL and units == {_CENTIMETRES}:
            corners = [region.get(f"RegionLocation{name}") for name in ("MinX0", "MinY0", "MaxX1", "MaxY1")]
            x1, y1, x2, y2 = (float(corner or 0) for corner in corners)
            box = whole if None in corners else (x1, y1, x2 + 1, y2 + 1)
            deltas = [region.get(f"PhysicalDelta{axis}") for axis in "YX"]
            found.append((box, [10 * abs(delta or 0) for delta in deltas]))
    if not found:
        try:
            found.append((whole, [float(value) for value in header.get("PixelSpacing") or ()]))
        except (TypeError, ValueError):  # not two numbers
            return []
    return [Region(box, (s[0], s[1])) for box, s in found if len(s) == 2 and all(math.isfinite(v) and v > 0 for v in s)]
