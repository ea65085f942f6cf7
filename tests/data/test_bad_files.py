"""What users bring: every bad file ends in one clear sentence or a reported exclusion, every odd one is read."""

import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_layouts import disc, save, texture, write_busbra, write_busi, write_folder, write_table
from ultrarefiner.data.datamodule import DataModule
from ultrarefiner.data.inspect import inspect_dataset
from ultrarefiner.data.readers import BusBra, Busi, BusUclm, Combined, Folder
from ultrarefiner.data.store import Store
from ultrarefiner.errors import UserError

COUNT = 8  # good cases beside the bad one


def load_everything(reader, tmp_path: Path, **options) -> DataModule:
    """What training does with a data set, from the search for files to the last batch."""
    options = {"fold": 0, "folds": 2, "seed": 0, "batch_size": 3, "image_size": 32, "coarse_size": 16, **options}
    data = DataModule(Store(reader, tmp_path / "cache"), **options)
    data.prepare_data()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            assert batch["image"].isfinite().all()
    return data


def refusal(reader, tmp_path: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_everything(reader, tmp_path, **options)
    text = str(caught.value)
    assert ("\n" not in text and text.endswith(".")) or text.endswith(")") or "choose" in text
    assert len(text) < 500
    return text


def image(root: Path, name: str = "bad.png") -> Path:
    """Where a bad image goes; its mask is good."""
    save(root / "masks" / f"{Path(name).stem}.png", disc(2))
    return root / "images" / name


def mask(root: Path, name: str = "bad.png") -> Path:
    """Where a bad mask goes; its image is good."""
    save(root / "images" / f"{Path(name).stem}.png", texture(50))
    return root / "masks" / name


def cut(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def detailed(width: int = 120, height: int = 100) -> np.ndarray:
    """An image that does not compress to nothing, so that cutting the file cuts pixels."""
    return np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.uint8)


def truncated(suffix: str):
    def make(root: Path) -> None:
        save(root / "masks" / "bad.png", disc(2, 120, 100))
        cut(save(root / "images" / f"bad{suffix}", detailed()))

    return make


def damaged_checksum(root: Path) -> None:
    path = save(image(root), detailed(60, 48))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def many_frames(root: Path) -> None:
    frames = [Image.fromarray(texture(number)) for number in (60, 61, 62)]
    frames[0].save(image(root, "bad.tif"), save_all=True, append_images=frames[1:])


def turned(root: Path, upright_mask: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "images" / "bad.jpg", texture(50), exif=exif)
    save(root / "masks" / "bad.png", np.rot90(disc(2), -1) if upright_mask else disc(2))


def link(root: Path, target: str) -> None:
    save(root.parent / "elsewhere" / "bad.png", texture(50))
    save(root / "masks" / "bad.png", disc(2))
    (root / "images" / "bad.png").symlink_to(target)


def linked_folder(root: Path) -> None:
    (root / "images").rename(root.parent / "elsewhere")
    (root / "images").symlink_to(root.parent / "elsewhere")


def named(name: str):
    def make(root: Path) -> None:
        for folder, pixels in (("images", texture(50)), ("masks", disc(2))):
            save(root / folder / "new.png", pixels).rename(root / folder / name)

    return make


def dicom_without_pixels(root: Path) -> None:
    import pydicom
    from test_readers import dicom

    data = pydicom.dcmread(dicom(image(root, "bad.dcm"), texture(50)))
    del data.PixelData
    data.save_as(root / "images" / "bad.dcm")


def dicom_of_frames(root: Path) -> None:
    from test_readers import dicom

    dicom(image(root, "bad.dcm"), np.stack([texture(50)] * 3), frames=3)


REFUSED = {  # what is wrong: (how it is made, a word of the sentence beside the file's name)
    "image of zero bytes": (lambda r: image(r).write_bytes(b""), r"bad\.png is empty \(0 bytes\)"),
    "truncated PNG": (truncated(".png"), r"bad\.png cannot be read"),
    "truncated JPEG": (truncated(".jpg"), r"bad\.jpg cannot be read"),
    "truncated BMP": (truncated(".bmp"), r"bad\.bmp cannot be read"),
    "truncated TIFF": (truncated(".tif"), r"bad\.tif cannot be read"),
    "PNG cut in its header": (lambda r: cut(save(image(r), texture(50)), 0.002), r"bad\.png"),
    "PNG with a wrong checksum": (damaged_checksum, r"bad\.png cannot be read"),
    "text named PNG": (lambda r: image(r).write_text("not an image"), r"bad\.png cannot be read"),
    "GIF named PNG": (lambda r: save(image(r), texture(50), format="GIF"), r"bad\.png cannot be read"),
    "no DICOM": (lambda r: image(r, "bad.dcm").write_bytes(b"DICM" * 99), r"bad\.dcm does not say how it is encoded"),
    "DICOM without pixels": (dicom_without_pixels, r"bad\.dcm cannot be read"),
    "DICOM of several frames": (dicom_of_frames, r"bad\.dcm holds 3 frames"),
    "TIFF of several frames": (many_frames, r"bad\.tif holds 3 frames"),
    "TIFF with NaN": (
        lambda r: save(image(r, "bad.tif"), np.full((48, 60), np.nan, np.float32)),
        r"bad\.tif .*not finite",
    ),
    "40 000 × 40 000 px": (lambda r: image(r).write_bytes(png_that_claims(40_000, 40_000)), r"bad\.png .*pixels|px"),
    "9 000 × 9 500 px": (lambda r: image(r).write_bytes(png_that_claims(9_000, 9_500)), r"bad\.png has 9000 × 9500 px"),
    "mask drawn before the EXIF rotation": (lambda r: turned(r, False), r"masks/bad\.png has 60 × 48 px .*EXIF"),
    "mask of another size": (lambda r: save(mask(r), disc(2, 61, 48)), r"masks/bad\.png has 61 × 48 px"),
    "mask of zero bytes": (lambda r: mask(r).write_bytes(b""), r"masks/bad\.png is empty"),
    "truncated mask": (lambda r: cut(save(mask(r), detailed(60, 48))), r"masks/bad\.png cannot be read"),
    "image without mask": (lambda r: save(r / "images" / "bad.png", texture(50)), r"bad\.png is an image without its"),
    "mask without image": (lambda r: save(r / "masks" / "bad.png", disc(2)), r"bad\.png is a mask without its image"),
    "an image and a mask that belong to nothing": (
        lambda r: (save(r / "images" / "bad.png", texture(50)), save(r / "masks" / "worse.png", disc(2))),
        r"bad\.png is an image without its mask .*worse\.png is a mask without its image",
    ),
    "names that differ in case": (named("CASE_1.png"), r"CASE_1\.png|case_1\.png have the same name"),
    "names that differ in suffix": (
        lambda r: save(r / "images" / "case_1.bmp", texture(50)),
        r"case_1\.(png|bmp) and case_1\.(png|bmp) have the same name",
    ),
    "names that differ in accents": (
        lambda r: (named("é.png")(r), save(r / "images" / "e\u0301.png", texture(51))),
        "have the same name",
    ),
    "line break in a name": (named("bad\nname.png"), r"'bad\\nname\.png' has a line break"),
    "tab in a name": (named("bad\tname.png"), r"control character"),
    "invalid byte in a name": (named(os.fsdecode(b"bad\xff.png")), r"invalid byte"),
    "link out of the folder": (lambda r: link(r, str(r.parent / "elsewhere" / "bad.png")), r"bad\.png is a link that"),
    "relative link out of the folder": (
        lambda r: link(r, "../../elsewhere/bad.png"),
        r"bad\.png is a link that leaves",
    ),
    "folder that is a link elsewhere": (linked_folder, r"case_0\.png is a link that leaves"),
    "broken link": (lambda r: link(r, "nowhere.png"), r"bad\.png is a broken link"),
    "circular link": (lambda r: link(r, "bad.png"), r"bad\.png is a broken link"),
    "folder named like an image": (lambda r: image(r).mkdir(), r"bad\.png has the name of an image but is no file"),
    "a second lesion of another size": (
        lambda r: save(r / "masks" / "case_1_2.png", disc(2, 20, 20)),
        r"case_1_2\.png has 20 × 20 px",
    ),
}

READ = {  # odd but sound: how it is made
    "16-bit PNG": lambda r: save(image(r), texture(50).astype(np.uint16) * 257),
    "16-bit TIFF": lambda r: save(image(r, "bad.tiff"), texture(50).astype(np.uint16) * 16),
    "floating-point TIFF": lambda r: save(image(r, "bad.tif"), texture(50).astype(np.float32) / 255),
    "palette": lambda r: save(image(r), texture(50), "P"),
    "RGBA": lambda r: save(image(r), texture(50), "RGBA"),
    "grey with transparency": lambda r: save(image(r), texture(50), "LA"),
    "CMYK JPEG": lambda r: save(image(r, "bad.jpeg"), texture(50), "CMYK"),
    "1-bit": lambda r: save(image(r), texture(50), "1"),
    "upper-case suffix": lambda r: save(image(r, "bad.PNG"), texture(50)),
    "PNG named JPEG": lambda r: save(image(r, "bad.jpg"), texture(50), format="PNG"),
    "20 000 px wide": lambda r: (
        save(r / "images" / "bad.png", texture(50, 20_000, 40)),
        save(r / "masks" / "bad.png", disc(2, 20_000, 40)),
    ),
    "EXIF-rotated": lambda r: turned(r, True),
    "constant": lambda r: save(image(r), np.full((48, 60), 90, np.uint8)),
    "mask of 0 and 1": lambda r: save(mask(r), disc(2) // 255),
    "coloured mask": lambda r: save(mask(r), (disc(2)[..., None] > 0) * np.array((0, 255, 0), np.uint8)),
    "palette mask": lambda r: save(mask(r), (disc(2)[..., None] > 0) * np.array((255, 0, 0), np.uint8), "P"),
    "JPEG mask": lambda r: save(mask(r, "bad.jpg"), disc(2)),
    "16-bit mask": lambda r: save(mask(r), (disc(2) > 0).astype(np.uint16) * 65535),
    "transparent mask": lambda r: save(mask(r), np.dstack([np.full((48, 60, 3), 255, np.uint8), disc(2)])),
    "spaces and brackets": named("a (1) [x] {y}, 100 %.png"),
    "quotes and a leading dash": named('-it\'s "quoted".png'),
    "not ASCII": named("病变 äöü é.png"),
    "link inside the folder": lambda r: link(r, "../../folder/more/bad.png"),
    "hidden files": lambda r: [
        (r / "images" / name).write_text("") for name in (".DS_Store", "._case_1.png", "Thumbs.db")
    ],
}

LEFT_OUT = {  # how it is made, and what the report says
    "one pixel": (
        lambda r: (save(r / "images" / "bad.png", texture(5, 1, 1)), save(r / "masks" / "bad.png", disc(2, 1, 1))),
        "bad: the image has 1 × 1 px, less than 16 on a side",
    ),
    "a line of 300 × 3 px": (
        lambda r: (save(r / "images" / "bad.png", texture(5, 300, 3)), save(r / "masks" / "bad.png", disc(2, 300, 3))),
        "bad: the image has 300 × 3 px, less than 16 on a side",
    ),
    "full mask": (lambda r: save(mask(r), np.full((48, 60), 255, np.uint8)), "bad: the mask covers the whole image"),
    "another file": (lambda r: (r / "images" / "notes.txt").write_text("x"), "images/notes.txt: no image (.txt)"),
    "no suffix": (lambda r: (r / "masks" / "README").write_text("x"), "masks/README: no image (no suffix)"),
    "a folder inside": (lambda r: (r / "images" / "old").mkdir(), "images/old: a folder"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(tmp_path, what):
    make, sentence = REFUSED[what]
    root = write_folder(tmp_path / "folder", COUNT)
    make(root)
    text = refusal(Folder(root), tmp_path)
    assert re.search(sentence, text), text
    assert not list((tmp_path / "cache").glob("*/*.npy"))  # nothing half-written


@pytest.mark.parametrize("what", READ)
def test_read(tmp_path, what):
    root = write_folder(tmp_path / "folder", COUNT)
    if what == "link inside the folder":
        save(root / "more" / "bad.png", texture(50))
    READ[what](root)
    data = load_everything(Folder(root), tmp_path)
    placed = sum(len(data.split.part(part)) for part in ("train", "val", "test"))
    assert placed == COUNT + (what != "hidden files") and not data.left_out


@pytest.mark.parametrize("what", LEFT_OUT)
def test_left_out_and_reported(tmp_path, what):
    make, line = LEFT_OUT[what]
    root = write_folder(tmp_path / "folder", COUNT)
    make(root)
    data = load_everything(Folder(root), tmp_path)
    assert data.describe()["left_out"] == [line]
    assert line in str(inspect_dataset(Folder(root), tmp_path / "cache", (16, 32)))


def test_empty_masks_are_counted(tmp_path):
    root = write_folder(tmp_path / "folder", COUNT)
    save(mask(root), np.zeros((48, 60), np.uint8))
    facts = load_everything(Folder(root), tmp_path).describe()
    assert facts["without_lesion"] == {"cases": 1, "used": False}
    kept = load_everything(Folder(root), tmp_path, include_normal=True)
    assert sum(len(kept.split.part(part)) for part in ("train", "val", "test")) == COUNT + 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda t: None, r"dataset=busbra needs data_root=…"),
        (lambda t: "", r"needs data_root=…"),
        (lambda t: t / "nowhere", r"nowhere does not exist"),
        (lambda t: (t / "empty").mkdir() or t / "empty", r"empty is empty"),
        (lambda t: save(t / "file.png", texture(1)), r"file\.png is a file, not a folder"),
        (lambda t: write_folder(t / "other"), r"is not busbra in its original layout, .*bus_data\.csv missing"),
        (lambda t: write_busi(t / "BUSBRA"), r"is not busbra in its original layout"),
    ],
    ids=["None", "blank", "missing", "empty", "a file", "another layout", "another data set of this name"],
)
def test_data_root(tmp_path, make, sentence):
    with pytest.raises(UserError, match=sentence):
        BusBra(make(tmp_path)).cases()


def test_layout_with_a_file_for_a_folder(tmp_path):
    root = write_folder(tmp_path / "folder")
    (root / "masks").rename(root / "old")
    (root / "masks").write_text("")
    with pytest.raises(UserError, match="masks is a file where a folder should be"):
        Folder(root).cases()


def test_images_and_masks_empty(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="images holds no image"):
        Folder(tmp_path).cases()


def test_unreadable_folder(tmp_path, monkeypatch):
    """By a patch: the tests may run as root, who may read everything."""
    root = write_folder(tmp_path / "folder")
    original = Path.iterdir

    def iterdir(self):
        if self.name == "masks":
            raise PermissionError(13, "Permission denied")
        return original(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match=r"masks may not be read: give yourself read permission"):
        Folder(root).cases()


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path):
    root = write_folder(tmp_path / "folder", COUNT)
    (root / "images" / "case_2.png").chmod(0)
    assert "case_2.png cannot be read (Permission denied)" in refusal(Folder(root), tmp_path)


TABLES = {
    "missing column": ("id,label\ncase_0,b\n", r"table\.csv has no column patient \(it has id and label\)"),
    "unknown ID": ("id,patient,label\ncase_0,1,b\nghost,2,b\n", r"names an unknown image 'ghost'"),
    "image without a row": ("id,patient,label\ncase_0,1,b\n", r"case_1\.png has no row in .*table\.csv"),
    "ID twice": ("id,patient,label\ncase_0,1,b\ncase_0,2,b\n", r"line 3, names id 'case_0' a second time"),
    "column twice": ("id,patient,label,patient\ncase_0,1,b,2\n", r"table\.csv has the column patient more than once"),
    "a field without end": (f"id,patient,label\ncase_0,{'x' * 140_000},b\n", r"table\.csv, after line \d, is no CSV"),
    "a header without end": (f"id,patient,label,{'x' * 140_000}\n", r"table\.csv has no header that CSV allows"),
    "ragged": ("id,patient,label\ncase_0,1\n", r"line 2, has not as many values as columns"),
    "too many values": ("id,patient,label\ncase_0,1,b,x\n", r"line 2, has not as many values as columns"),
    "no rows": ("id,patient,label\n", r"table\.csv has no rows"),
    "empty": ("", r"table\.csv has no column id, patient and label \(it has none\)"),
    "not UTF-8": (b"id,patient,label\ncase_0,M\xfcller,b\n", r"table\.csv is not UTF-8 text"),
    "two-byte text": ("id,patient,label\n".encode("utf-16"), r"table\.csv is not UTF-8 text"),
    "missing": (None, r"table\.csv cannot be read \(No such file"),
}


@pytest.mark.parametrize("what", TABLES)
def test_table(tmp_path, what):
    content, sentence = TABLES[what]
    root = write_folder(tmp_path / "folder", 2)
    if content is not None:
        (root / "table.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=sentence):
        Folder(root, table="table.csv").cases()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


BUSBRA = {
    "patient in two folds": (
        lambda r: edit(r / "5-fold-cv.csv", "bus_0005-l,benign,1,NaN,1", "bus_0005-l,benign,2,1,NaN"),
        r"5-fold-cv\.csv tests patient 5 in folds 2 and 1 \(ID bus_0005-r\)",
    ),
    "kFold against valid": (
        lambda r: edit(r / "5-fold-cv.csv", "bus_0005-l,benign,1,", "bus_0005-l,benign,3,"),
        r"ID bus_0005-l: kFold 3 and the valid_ columns disagree",
    ),
    "value of valid": (
        lambda r: edit(r / "5-fold-cv.csv", "bus_0005-l,benign,1,NaN,1", "bus_0005-l,benign,1,NaN,7"),
        r"ID bus_0005-l: .*are not all 1, 0 or NaN",
    ),
    "partition missing": (lambda r: (r / "5-fold-cv.csv").unlink(), r"5-fold-cv\.csv cannot be read"),
    "partition of other images": (
        lambda r: edit(r / "5-fold-cv.csv", "bus_0005-l", "bus_9999-l"),
        r"do not name the same images \('bus_0005-l'\)",
    ),
    "image without a row": (
        lambda r: [edit(r / name, "bus_0005-l", "bus_9999-l") for name in ("5-fold-cv.csv", "bus_data.csv")],
        r"bus_0005-l\.png is not in bus_data\.csv",
    ),
    "image without mask": (
        lambda r: (r / "Masks/mask_0007-r.png").unlink(),
        r"bus_0007-r\.png is an image without its",
    ),
    "mask without image": (lambda r: (r / "Images/bus_0007-r.png").unlink(), r"mask_0007-r\.png is a mask without its"),
    "stray name": (lambda r: save(r / "Images" / "x.png", texture(5)), r"x\.png does not start with 'bus_'"),
    "column missing": (lambda r: edit(r / "bus_data.csv", "Case", "Patient"), r"bus_data\.csv has no column Case"),
}


@pytest.mark.parametrize("what", BUSBRA)
def test_busbra(tmp_path, what):
    make, sentence = BUSBRA[what]
    root = write_busbra(tmp_path / "BUSBRA")
    make(root)
    with pytest.raises(UserError, match=sentence):
        BusBra(root).cases()


def test_busi_mask_without_image(tmp_path):
    root = write_busi(tmp_path)
    (root / "benign" / "benign (2).png").unlink()
    with pytest.raises(UserError, match=r"benign \(2\)_mask\.png is a mask without its image"):
        Busi(root).cases()


def test_bus_uclm_name_without_patient(tmp_path):
    save(tmp_path / "images" / "scan.png", texture(1))
    save(tmp_path / "masks" / "scan.png", disc(1))
    with pytest.raises(UserError, match=r"scan\.png does not name its patient"):
        BusUclm(tmp_path).cases()


def test_same_id_in_two_classes(tmp_path):
    root = write_busi(tmp_path / "busi")
    save(root / "malignant" / "benign (1).png", texture(80))
    save(root / "malignant" / "benign (1)_mask.png", disc(1))
    assert "two cases named 'benign (1)'" in refusal(Busi(root), tmp_path)


def test_combined_without_members():
    with pytest.raises(UserError, match=r"dataset\.members"):
        Combined([])


def test_fewer_patients_than_folds(tmp_path):
    root = write_folder(tmp_path / "folder", 6)
    write_table(root / "table.csv", ["id", "patient", "label"], [[f"case_{n}", n // 2, "benign"] for n in range(6)])
    text = refusal(Folder(root, table="table.csv"), tmp_path, folds=5)
    assert "has 3 patients" in text and "fewer than the 6" in text


def test_every_fault_is_listed(tmp_path):
    root = write_folder(tmp_path / "folder", COUNT)
    for number in (1, 3, 5):
        (root / "images" / f"case_{number}.png").write_bytes(b"")
    assert "(2 more files to correct" in refusal(Folder(root), tmp_path)
    assert len(inspect_dataset(Folder(root), tmp_path / "cache").errors) == 3
