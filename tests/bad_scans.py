"""Image files that cannot be read, and how each is made."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    MPEG4HP41,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from data_layouts import save, texture
from dicom_files import dicom_dataset, write_dicom

GREY = texture(1)


def cut(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bytes(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * (width + 1) * height)) if width * height < 1e4 else chunk(b"IDAT", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + body + chunk(b"IEND", b"")


def tiff(path: Path, width: int, *, frames: int = 1) -> None:
    """A TIFF whose last frame claims to be much larger than it is: what its strips inflate to fills any memory."""
    pictures = [Image.fromarray(GREY) for _ in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], compression="tiff_adobe_deflate")
    content = bytearray(path.read_bytes())
    for tag in (256, 257):  # width, height
        entry = content.rindex(
            struct.pack("<HH", tag, 4) if struct.pack("<HH", tag, 4) in content else struct.pack("<HH", tag, 3)
        )
        content[entry : entry + 12] = struct.pack("<HHII", tag, 4, 1, width)
    path.write_bytes(content)


def damaged_checksum(path: Path) -> None:
    content = bytearray(save(path, noise(48, 60)).read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def with_syntax(path: Path, syntax: str, content: bytes = b"\xff\xd8garbage\xff\xd9") -> None:
    data = dicom_dataset(GREY)
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = encapsulate([content])
    data["PixelData"].is_undefined_length = True
    data.save_as(path, enforce_file_format=True)


def without(path: Path, *names: str, **changed) -> None:
    data = dicom_dataset(GREY, **changed)
    for name in names:
        delattr(data, name)
    data.save_as(path, enforce_file_format=True)


def deflated(path: Path) -> None:
    data = dicom_dataset(np.zeros((1000, 1000), np.uint8))
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(path, enforce_file_format=True)


def run_length(path: Path, share: float = 1.0) -> Path:
    data = dicom_dataset(noise(48, 60))
    data.compress(RLELossless)
    data.save_as(path, enforce_file_format=True)
    if share < 1:
        cut(path, share)
    return path


def no_syntax(path: Path) -> None:
    write_dicom(path, GREY)
    content = path.read_bytes()
    at = content.index(b"\x02\x00\x10\x00UI")  # its tag becomes a private one that nobody knows
    path.write_bytes(content[:at] + b"\x02\x00\x11\x01UI" + content[at + 6 :])


REFUSED = {  # how it is made from its path, which has this suffix: a word of the sentence beside the file's name
    "zero bytes.png": (lambda p: p.write_bytes(b""), r"is empty \(0 bytes\)"),
    "zero bytes.dcm": (lambda p: p.write_bytes(b""), r"is empty \(0 bytes\)"),
    "text.png": (lambda p: p.write_text("not an image"), "cannot be read"),
    "HTML.bmp": (lambda p: p.write_text("<html></html>"), "cannot be read"),
    "SVG.png": (lambda p: p.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>'), "cannot be read"),
    "PostScript.jpg": (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "cannot be read"),
    "PDF.jpg": (lambda p: p.write_bytes(b"%PDF-1.4\n"), "cannot be read"),
    "zip archive.tif": (lambda p: p.write_bytes(b"PK\x03\x04" + b"\0" * 60), "cannot be read"),
    "GIF.png": (lambda p: save(p, GREY, format="GIF"), "cannot be read"),
    "truncated.png": (lambda p: cut(save(p, noise(90, 90))), "cannot be read"),
    "truncated.jpg": (lambda p: cut(save(p, noise(90, 90))), "cannot be read"),
    "truncated.tif": (lambda p: cut(save(p, noise(90, 90))), "cannot be read"),
    "truncated.bmp": (lambda p: cut(save(p, noise(90, 90))), "cannot be read"),
    "one byte.png": (lambda p: p.write_bytes(b"\x89"), "cannot be read"),
    "a wrong checksum.png": (damaged_checksum, "cannot be read"),
    "no width.png": (lambda p: p.write_bytes(png_bytes(0, 10)), "cannot be read"),
    "30 000 px.png": (lambda p: p.write_bytes(png_bytes(30_000, 30_000)), "pixels|px"),
    "9 500 px.png": (lambda p: p.write_bytes(png_bytes(9_500, 9_500)), "has 9500 × 9500 px"),
    "a bomb of text.png": (
        lambda p: p.write_bytes(png_bytes(9, 9, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 10**8)))),
        "cannot be read",
    ),
    "a bomb.tif": (lambda p: tiff(p, 12_000), "has 12000 × 12000 px"),
    "a bomb behind.tif": (lambda p: tiff(p, 12_000, frames=2), "has 12000 × 12000 px"),
    "a large bomb.tif": (lambda p: tiff(p, 2_000_000), "pixels|px"),
    "not a number.tif": (lambda p: save(p, np.full((48, 60), np.nan, np.float32)), "not finite"),
    "text.dcm": (lambda p: p.write_text("not an image " * 99), "cannot be read"),
    "random.dcm": (lambda p: p.write_bytes(b"\0" * 128 + b"DICM" + noise(4000).tobytes()), "cannot be read|how it is"),
    "a magic number alone.dcm": (lambda p: p.write_bytes(b"\0" * 128 + b"DICM"), "does not say how it is encoded"),
    "truncated in its header.dcm": (lambda p: cut(write_dicom(p, GREY), 0.1), "cannot be read|without an image"),
    "truncated.dcm": (lambda p: cut(write_dicom(p, GREY)), "cannot be read"),
    "truncated and compressed.dcm": (lambda p: run_length(p, 0.5), "cannot be read"),
    "a report.dcm": (
        lambda p: without(p, "Rows", "Columns", "PixelData", Modality="SR"),
        r"without an image \(SR",
    ),
    "no pixels.dcm": (lambda p: without(p, "PixelData"), "cannot be read"),
    "no rows.dcm": (lambda p: write_dicom(p, GREY, Rows=0), "frames of 60 × 0 px"),
    "no interpretation.dcm": (lambda p: without(p, "PhotometricInterpretation"), "cannot be read"),
    "strange bits.dcm": (lambda p: write_dicom(p, GREY, BitsAllocated=13), "cannot be read"),
    "no bits.dcm": (lambda p: without(p, "BitsAllocated"), "cannot be read"),
    "30 000 px.dcm": (lambda p: write_dicom(p, GREY, Rows=30_000, Columns=30_000), "has 30000 × 30000 px"),
    "larger than its file.dcm": (lambda p: write_dicom(p, GREY, Rows=5_000, Columns=5_000), "cannot be read"),
    "10⁹ frames.dcm": (lambda p: write_dicom(p, GREY, NumberOfFrames=10**9), "1000000000 frames"),
    "-1 frames.dcm": (lambda p: write_dicom(p, GREY, NumberOfFrames=-1), "-1 frames"),
    "more frames than it has.dcm": (
        lambda p: write_dicom(p, np.stack([GREY] * 3), frames=True, NumberOfFrames=500),
        "cannot be read",
    ),
    "a palette without colours.dcm": (lambda p: write_dicom(p, GREY, "PALETTE COLOR"), "cannot be read"),
    "garbage for JPEG.dcm": (lambda p: with_syntax(p, JPEGBaseline8Bit), "cannot be read"),
    "garbage for JPEG 2000.dcm": (lambda p: with_syntax(p, JPEG2000Lossless), "cannot be read"),
    "deflated.dcm": (deflated, "is a deflated DICOM file"),
    "a film.dcm": (lambda p: with_syntax(p, MPEG4HP41), "compressed as MPEG-4 .* not read"),
    "an unknown syntax.dcm": (lambda p: with_syntax(p, "1.2.3.4"), "compressed as 1.2.3.4, which is not read"),
    "no syntax.dcm": (no_syntax, "does not say how it is encoded"),
    "a broken link.png": (lambda p: p.symlink_to("nowhere.png"), "cannot be read"),
    "a circular link.png": (lambda p: p.symlink_to(p.name), "cannot be read"),
    "a broken link.dcm": (lambda p: p.symlink_to("nowhere.dcm"), "cannot be read"),
}
if hasattr(os, "mkfifo"):
    REFUSED["a pipe.png"] = (lambda p: os.mkfifo(p), "is empty")
