"""Outlines of masks as text that a browser draws, and small pictures to lay them over."""

import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from ultrarefiner.files import write_atomically

PATH = re.compile(r"(M\d+ \d+(L\d+ \d+)*Z)*")
"""What `path_of` writes; anything else in a file is no outline."""


def path_of(mask: Bool[np.ndarray, "H W"]) -> str:
    """The outlines of a mask as the `d` of an SVG path, through the centres of its outermost pixels (px)."""
    import cv2

    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    return "".join("M" + "L".join(f"{x} {y}" for x, y in line[:, 0]) + "Z" for line in found)


def mask_of(path: str, width: int, height: int) -> Bool[np.ndarray, "height width"]:
    """The mask that has these outlines."""
    import cv2

    mask = np.zeros((height, width), np.uint8)
    lines = [np.array(re.findall(r"\d+", line), dtype=np.int32).reshape(-1, 2) for line in path.split("Z") if line]
    if lines:
        cv2.fillPoly(mask, lines, 1)
    return mask.astype(bool)


def write_jpeg(image: UInt8[np.ndarray, "H W"], longest: int, out: Path) -> None:
    """Write an image as JPEG, made smaller where a side has more than ``longest`` px."""
    import cv2

    scale = min(1.0, longest / max(image.shape))
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = image if scale == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    done, content = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 75])
    assert done
    write_atomically(out, content.tobytes())
