"""Small data sets written to disk in their publishers' layouts, for the tests of data/."""

import csv
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

SHARED = Path(os.environ.get("ULTRAREFINER_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
needs_busbra = pytest.mark.skipif(not (SHARED / "BUSBRA").is_dir(), reason=f"no BUS-BRA in {SHARED}")
needs_busi = pytest.mark.skipif(not (SHARED / "BUSI_sample").is_dir(), reason=f"no sample of BUSI in {SHARED}")


def texture(number: int, width: int = 60, height: int = 48) -> np.ndarray:
    """An image that resembles no other number's."""
    noise = np.random.default_rng([7, number]).integers(0, 256, (6, 6)).astype(np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def disc(number: int, width: int = 60, height: int = 48) -> np.ndarray:
    """A lesion whose size depends on the number; uint8 0/255."""
    y, x = np.mgrid[:height, :width]
    radius = 5 + number % 7
    return (255 * ((x - width * 0.45) ** 2 + (y - height * 0.5) ** 2 <= radius**2)).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture = picture.quantize(256)
    elif mode:
        picture = picture.convert(mode)
    picture.save(path, **options)
    return path


def write_table(path: Path, header: list[str], rows: list[list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_folder(root: Path, count: int = 6) -> Path:
    """images/case_0.png, masks/case_0.png, …"""
    for number in range(count):
        save(root / "images" / f"case_{number}.png", texture(number))
        save(root / "masks" / f"case_{number}.png", disc(number))
    return root


def write_busbra(root: Path, patients: int = 20, folds: int = 5) -> Path:
    """Two views a patient; the official val part tears some patients apart, as the real one does."""
    ids = [(f"{patient:04d}-{side}", patient) for patient in range(1, patients + 1) for side in "lr"]
    data, parts = [], []
    for place, (stem, patient) in enumerate(ids):
        save(root / "Images" / f"bus_{stem}.png", texture(place))
        save(root / "Masks" / f"mask_{stem}.png", disc(patient))
        label = "malignant" if patient % 3 == 0 else "benign"
        data.append([f"bus_{stem}", patient, label])
        tested = patient % folds + 1
        valid = ["NaN" if k == tested else int((place + k) % 6 != 0) for k in range(1, folds + 1)]
        parts.append([f"bus_{stem}", label, tested, *valid])
    write_table(root / "bus_data.csv", ["ID", "Case", "Pathology"], data)
    header = ["ID", "Pathology", "kFold", *(f"valid_{k}" for k in range(1, folds + 1))]
    write_table(root / f"{folds}-fold-cv.csv", header, parts)
    return root


def write_busi(root: Path, count: int = 4) -> Path:
    """``count`` images of each class; the first benign one has two lesions."""
    number = 0
    for label in ("benign", "malignant", "normal"):
        for place in range(1, count + 1):
            stem = f"{label} ({place})"
            number += 1
            save(root / label / f"{stem}.png", texture(number), "RGB")
            mask = disc(number) if label != "normal" else np.zeros((48, 60), np.uint8)
            save(root / label / f"{stem}_mask.png", mask, "1")
    second = np.zeros((48, 60), np.uint8)
    second[2:6, 2:6] = 255
    save(root / "benign" / "benign (1)_mask_1.png", second, "RGB")
    return root
