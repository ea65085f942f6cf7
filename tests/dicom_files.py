"""DICOM files made with pydicom, as scanners write them and as nobody should."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid


def dicom_dataset(
    pixels: np.ndarray, kind: str = "MONOCHROME2", frames: bool = False, **attributes: Any
) -> FileDataset:
    """A data set around native pixels (frames?, H, W, colours?); attributes by their DICOM keywords."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, UltrasoundImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    shape = pixels.shape[1:] if frames else pixels.shape
    if frames:
        data.NumberOfFrames = len(pixels)
    data.Rows, data.Columns = shape[:2]
    data.SamplesPerPixel = 3 if len(shape) == 3 else 1
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    bits = pixels.dtype.itemsize * 8
    data.PhotometricInterpretation, data.PixelRepresentation, data.Modality = kind, 0, "US"
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit = bits - 1
    data.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(data, name, value)
    return data


def write_dicom(
    path: Path, pixels: np.ndarray, kind: str = "MONOCHROME2", frames: bool = False, **attributes: Any
) -> Path:
    """`dicom_dataset` as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dicom_dataset(pixels, kind, frames, **attributes).save_as(path, enforce_file_format=True)
    return path


def write_encoded(path: Path, pixels: np.ndarray, syntax: str, kind: str, codec: str, **options: Any) -> Path:
    """One frame (H, W[, 3]), compressed by Pillow: JPEG or JPEG2000."""
    data = dicom_dataset(pixels, kind)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, codec, **options)
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = encapsulate([stream.getvalue()])
    data["PixelData"].is_undefined_length = True
    data.save_as(path, enforce_file_format=True)
    return path


def ultrasound_region(box: tuple[int, int, int, int], delta: tuple[float, float], **more: Any) -> Dataset:
    """An ultrasound region: x1, y1, x2, y2 (the last pixels inside), and the size x, y of a pixel in cm."""
    region = Dataset()
    names = ("RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1")
    values = dict(zip(names, box, strict=True)) | {"PhysicalDeltaX": delta[0], "PhysicalDeltaY": delta[1]}
    units = {"RegionSpatialFormat": 1, "PhysicalUnitsXDirection": 3, "PhysicalUnitsYDirection": 3}
    for name, value in {**values, **units, **more}.items():
        setattr(region, name, value)
    return region
