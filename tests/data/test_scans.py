"""What people want to have segmented: every kind of image is read, every bad file ends in one sentence."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from bad_scans import GREY, REFUSED, noise, run_length, with_syntax
from PIL import Image
from pydicom.pixels import convert_color_space
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
)

from data_layouts import save, texture
from dicom_files import ultrasound_region, write_dicom, write_encoded
from ultrarefiner.data.dicom import calibration, read_header
from ultrarefiner.data.scans import CoarseMasks, Scan, find_scans, load_coarse, safe_names
from ultrarefiner.errors import UserError

COLOURS = np.stack([texture(1), texture(2), texture(3)], axis=2)


def read_all(folder: Path) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """The frames of each scan by its name, and what cannot be read."""
    found = find_scans(folder, folder / "results")
    frames, problems = {}, list(found.problems)
    for scan in found.scans:
        try:
            frames[scan.name] = [pixels for pixels, _ in scan.read(range(scan.frames))]
            assert len(frames[scan.name]) == scan.frames
        except UserError as error:
            problems.append(str(error))
    return frames, problems


def only(folder: Path) -> np.ndarray:
    frames, problems = read_all(folder)
    assert not problems and len(frames) == 1
    ((pixels,),) = frames.values()
    return pixels


# ------------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_sentence(tmp_path, what):
    make, words = REFUSED[what]
    path = tmp_path / f"bad{Path(what).suffix}"
    make(path)
    save(tmp_path / "good.png", GREY)
    frames, problems = read_all(tmp_path)
    assert list(frames) == ["good"] and np.array_equal(frames["good"][0], GREY)
    (sentence,) = problems
    assert sentence.startswith(str(path)) and re.search(words, sentence) and "\n" not in sentence
    assert sentence.endswith(".") and len(sentence) < 600, sentence


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless])
def test_a_syntax_without_a_decoder(tmp_path, monkeypatch, syntax):
    """Whether or not there is one on this machine."""
    from pydicom.pixels.decoders.base import Decoder

    monkeypatch.setattr(Decoder, "is_available", property(lambda self: False))
    with_syntax(tmp_path / "bad.dcm", syntax)
    _, (sentence,) = read_all(tmp_path)
    assert re.search(r"bad\.dcm is compressed as JPEG.*no decoder is installed: pip install 'pylibjpeg", sentence)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file(tmp_path):
    save(tmp_path / "bad.png", GREY).chmod(0)
    assert "Permission denied" in read_all(tmp_path)[1][0]


# ------------------------------------------------------------------------------------------------- odd but sound files


def palette(path: Path, bits: int) -> None:
    """A colour table that makes red of the values, and green of their negative."""
    values = np.arange(256, dtype=np.uint16)
    dtype, shift = (np.uint16, 8) if bits == 16 else (np.uint8, 0)
    tables = {"Red": values, "Green": 255 - values, "Blue": 0 * values}
    more = {
        f"{name}PaletteColorLookupTableData": (table << shift).astype(dtype).tobytes() for name, table in tables.items()
    }
    more |= {f"{name}PaletteColorLookupTableDescriptor": [256, 0, bits] for name in tables}
    write_dicom(path, GREY, "PALETTE COLOR", **more)


def close(expected: np.ndarray, tolerance: int):
    return lambda found: np.abs(found.astype(int) - expected.astype(int)).max() <= tolerance


def exactly(expected: np.ndarray):
    return lambda found: found.dtype == np.uint8 and np.array_equal(found, expected)


def smooth(*shape: int) -> np.ndarray:
    y, x = np.mgrid[:48, :60]
    grey = (2 * x + y).astype(np.uint8)
    return np.stack([grey, 255 - grey, grey // 2], axis=2) if shape else grey


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(path, smooth(), exif=exif, quality=95)


SOUND = {  # how it is made, and what the pixels must be
    "grey.png": (lambda p: save(p, GREY), exactly(GREY)),
    "colour.png": (lambda p: save(p, COLOURS), exactly(COLOURS)),
    "colour.bmp": (lambda p: save(p, COLOURS), exactly(COLOURS)),
    "colour.tiff": (lambda p: save(p, COLOURS), exactly(COLOURS)),
    "grey.JPG": (lambda p: save(p, smooth(), quality=95), close(smooth(), 6)),
    "CMYK.jpeg": (lambda p: save(p, smooth(), "CMYK", quality=95), close(np.dstack([smooth()] * 3), 9)),
    "16 bits.png": (lambda p: save(p, GREY.astype(np.uint16) * 257), close(GREY * (255 / GREY.max()), 1)),
    "floating point.tif": (lambda p: save(p, GREY / np.float32(255)), lambda found: found.max() == 255),
    "a palette.png": (lambda p: save(p, GREY, "P"), close(np.dstack([GREY] * 3), 8)),
    "transparent.png": (lambda p: save(p, np.dstack([COLOURS, np.full_like(GREY, 255)])), exactly(COLOURS)),
    "invisible.png": (lambda p: save(p, np.dstack([COLOURS, 0 * GREY])), exactly(0 * COLOURS)),
    "1 bit.png": (lambda p: save(p, GREY, "1"), lambda found: set(np.unique(found)) == {0, 255}),
    "one pixel.png": (lambda p: save(p, GREY[:1, :1]), exactly(GREY[:1, :1])),
    "a line.png": (lambda p: save(p, texture(2, 3000, 3)), exactly(texture(2, 3000, 3))),
    "turned.jpg": (rotated, close(np.rot90(smooth(), -1), 6)),
    "a PNG.jpg": (lambda p: save(p, GREY, format="PNG"), exactly(GREY)),
    "grey.dcm": (lambda p: write_dicom(p, GREY), exactly(GREY)),
    "negative.dcm": (lambda p: write_dicom(p, GREY, "MONOCHROME1"), exactly(255 - GREY)),
    "12 bits.dcm": (
        lambda p: write_dicom(p, GREY.astype(np.uint16) * 16, BitsStored=12, HighBit=11),
        close(GREY * (255 / GREY.max()), 1),
    ),
    "a window.dcm": (
        lambda p: write_dicom(p, smooth(), WindowCenter=100, WindowWidth=100),
        lambda found: found.min() == 0 and found.max() == 255 and (found[smooth() < 50] == 0).all(),
    ),
    "a rescaling of nothing.dcm": (
        lambda p: write_dicom(p, GREY // 2, RescaleSlope=1, RescaleIntercept=0),
        exactly(GREY // 2),
    ),
    "a window of everything.dcm": (
        lambda p: write_dicom(p, GREY // 2, WindowCenter=128, WindowWidth=256, RescaleSlope=1, RescaleIntercept=0),
        exactly(GREY // 2),
    ),
    "a wide window.dcm": (
        lambda p: write_dicom(p, GREY, WindowCenter=256, WindowWidth=512),
        close(GREY // 2, 1),
    ),
    "12 bits and a rescaling of nothing.dcm": (
        lambda p: write_dicom(
            p, GREY.astype(np.uint16) + 99, BitsStored=12, HighBit=11, RescaleSlope=1, RescaleIntercept=0
        ),
        close((GREY + 99.0) * (255 / (int(GREY.max()) + 99)), 1),
    ),
    "a rescaling.dcm": (
        lambda p: write_dicom(p, GREY, RescaleSlope=2, RescaleIntercept=-9),
        close((GREY - GREY.min()) * (255 / np.ptp(GREY)), 1),
    ),
    "RGB.dicom": (lambda p: write_dicom(p, COLOURS, "RGB"), exactly(COLOURS)),
    "RGB plane by plane.dcm": (
        lambda p: write_dicom(p, COLOURS, "RGB", PlanarConfiguration=1, PixelData=COLOURS.transpose(2, 0, 1).tobytes()),
        exactly(COLOURS),
    ),
    "YBR_FULL.dcm": (
        lambda p: write_dicom(p, convert_color_space(COLOURS, "RGB", "YBR_FULL"), "YBR_FULL"),
        close(COLOURS, 3),
    ),
    "JPEG.dcm": (
        lambda p: write_encoded(p, smooth(3), JPEGBaseline8Bit, "YBR_FULL_422", "JPEG", quality=95),
        close(smooth(3), 16),
    ),
    "JPEG 2000.dcm": (
        lambda p: write_encoded(
            p, COLOURS, JPEG2000Lossless, "YBR_RCT", "JPEG2000", no_jp2=True, mct=1, irreversible=False
        ),
        exactly(COLOURS),
    ),
    "RLE.dcm": (run_length, exactly(noise(48, 60))),
    "colours of 8 bits.dcm": (lambda p: palette(p, 8), exactly(np.dstack([GREY, 255 - GREY, 0 * GREY]))),
    "colours of 16 bits.dcm": (lambda p: palette(p, 16), exactly(np.dstack([GREY, 255 - GREY, 0 * GREY]))),
    "IM_0001": (lambda p: write_dicom(p, GREY), exactly(GREY)),
    "1.2.840.113619.2": (lambda p: write_dicom(p, GREY), exactly(GREY)),
}


@pytest.mark.parametrize("what", SOUND)
def test_read(tmp_path, what):
    make, good = SOUND[what]
    make(tmp_path / what)
    assert good(only(tmp_path))


def test_a_window_treats_all_frames_alike(tmp_path):
    """What one frame holds changes no grey value of another."""
    clip = np.stack([GREY // 2, GREY // 2])
    clip[1, 0, 0] = 255
    path = write_dicom(tmp_path / "clip.dcm", clip, frames=True, WindowCenter=120, WindowWidth=200)
    first, second = (pixels for pixels, _ in Scan(path, "clip.dcm", "clip", 2).read([0, 1]))
    assert second[0, 0] == 255 and (first != second).sum() == 1


def test_negative_frames_are_turned_around_alike(tmp_path):
    clip = np.stack([GREY, GREY // 2])
    path = write_dicom(tmp_path / "clip.dcm", clip, "MONOCHROME1", frames=True)
    for (found, _), given in zip(Scan(path, "clip.dcm", "clip", 2).read([0, 1]), clip, strict=True):
        np.testing.assert_array_equal(found, 255 - given)


def test_frames_come_one_by_one(tmp_path):
    """Of a clip and of a TIFF; in whichever selection."""
    clip = np.stack([texture(number) for number in range(500)])
    write_dicom(tmp_path / "clip.dcm", clip, frames=True)
    pictures = [Image.fromarray(one) for one in clip[:3]]
    pictures[0].save(tmp_path / "pages.tif", save_all=True, append_images=pictures[1:])
    for scan, length in zip(find_scans(tmp_path, tmp_path / "out").scans, (500, 3), strict=True):
        assert scan.frames == length and scan.frame_name(2) == f"{scan.name}/0003"
        for chosen in (range(length), [1, 2], []):
            found = [pixels for pixels, _ in scan.read(chosen)]
            assert len(found) == len(chosen)
            assert all(np.array_equal(one, clip[index]) for one, index in zip(found, chosen, strict=True))


# ------------------------------------------------------------------------------------------------------- size of pixels


def regions(tmp_path, **attributes):
    return calibration(read_header(write_dicom(tmp_path / "a.dcm", GREY, **attributes)))


def test_regions_of_ultrasound_come_first(tmp_path):
    left, right = ultrasound_region((0, 0, 29, 47), (0.01, 0.02)), ultrasound_region((30, 0, 59, 47), (0.005, -0.006))
    doppler = ultrasound_region((0, 0, 59, 47), (0.1, 0.1), RegionSpatialFormat=3)
    seconds = ultrasound_region((0, 0, 59, 47), (0.1, 0.1), PhysicalUnitsXDirection=4)
    found = regions(tmp_path, SequenceOfUltrasoundRegions=[doppler, left, seconds, right], PixelSpacing=[9, 9])
    assert [region.box for region in found] == [(0, 0, 30, 48), (30, 0, 60, 48)]
    np.testing.assert_allclose([region.spacing for region in found], [(0.2, 0.1), (0.06, 0.05)])


def test_pixel_spacing_is_row_then_column(tmp_path):
    ((box, spacing),) = regions(tmp_path, PixelSpacing=[0.2, 0.1])
    assert box == (0, 0, 60, 48) and spacing == (0.2, 0.1)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"PixelSpacing": [0, 0]},
        {"PixelSpacing": [0.1]},
        {"PixelSpacing": None},
        {"PixelSpacing": [-1, -1]},
        {"SequenceOfUltrasoundRegions": []},
        {"SequenceOfUltrasoundRegions": [ultrasound_region((0, 0, 9, 9), (0.0, 0.1))]},
        {"SequenceOfUltrasoundRegions": [ultrasound_region((0, 0, 9, 9), (float("nan"), 0.1))]},
    ],
)
def test_a_size_that_is_not_known(tmp_path, attributes):
    assert regions(tmp_path, **attributes) == []


# ------------------------------------------------------------------------------------------------------- names, folders


def test_names_are_safe_and_nobody_elses():
    ids = [
        "x.png",
        "x.jpg",
        "X.PNG.bmp",
        "a/x.png",
        "a.png",
        "y.png",
        "é.png",
        "e\u0301.png",
        "x.png.png",
        "b/../c.png",
    ]
    ids += [
        "..\\..\\up.png",
        "=cmd()|a.png",
        "<script>alert(1)</script>.png",
        "a\nb.png",
        "ä" * 120 + ".png",
        "....png",
    ]
    ids += ["bad\udcff.png", "-rf.png", "con:.png", "trailing .png", "1.2.840.1", "1.2.840.2", "con_.png"]
    names = safe_names(ids)
    assert names[ids.index("y.png")] == "y" and names[ids.index("a/x.png")] == "a/x"
    assert names[:2] == ["x.png", "x.jpg"] and names[ids.index("a.png")] == "a.png"  # there is a folder a
    assert names[ids.index("1.2.840.1")] == "1.2.840.1" and names[ids.index("=cmd()|a.png")] == "=cmd()_a"
    lowered = [name.casefold() for name in names]
    assert len(set(lowered)) == len(ids)
    folders = {parent.as_posix().casefold() for name in names for parent in Path(name).parents}
    assert not folders & set(lowered)
    for name in names:
        name.encode()
        assert (
            not re.search(r'[\x00-\x1f<>:"|?*\\]', name) and max(len(part.encode()) for part in Path(name).parts) < 150
        )
        assert not Path(name).is_absolute() and not any(
            re.fullmatch(r"\.*|.*[. ]", part) for part in Path(name).parts[:-1]
        )


def test_a_folder_is_searched_whole_and_results_are_not(tmp_path):
    for name in ("b10.png", "b2.png", "inner/deep/c.png", "results/masks/b2.png", ".hidden.png", ".git/x.png"):
        save(tmp_path / name, GREY)
    for name in ("notes.txt", "inner/table.csv", "Thumbs.db", "DICOMDIR", "long"):
        (tmp_path / name).write_bytes(b"\0" * 128 + (b"DICM" if name == "DICOMDIR" else b"xxxx"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "again").symlink_to(tmp_path / "inner")
    (tmp_path / "inner" / "loop").symlink_to(tmp_path)
    found = find_scans(tmp_path, tmp_path / "results")
    names = [scan.name for scan in found.scans]
    assert names[:2] == ["b2", "b10"] and len(names) == 3 and names[2].endswith("deep/c")
    assert found.others == 4 and not found.problems
    (alone,) = find_scans(tmp_path / "inner" / "deep" / "c.png", tmp_path / "results").scans
    assert (alone.id, alone.name, alone.frames) == ("c.png", "c", 1)


@pytest.mark.parametrize(
    ("images", "words"), [(None, "is needed"), ("nowhere", "does not exist"), ("empty", "no image"), (".", "output")]
)
def test_no_images(tmp_path, monkeypatch, images, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        find_scans(images, tmp_path)


# ------------------------------------------------------------------------------------------------- masks of other tools


def scan(name: str, frames: int = 1) -> Scan:
    return Scan(Path(f"{name}.png"), f"{name}.png", name, frames)


def test_masks_are_found_by_the_name_of_their_image(tmp_path):
    for name in ("a/x.png", "y_mask.tif", "case_7.png", "case_8_0000.png", "case_8.png", "clip/0002.png", "é.png"):
        save(tmp_path / "masks" / name, GREY)
    masks = CoarseMasks(tmp_path / "masks", tmp_path)
    expected = {"a/x": "a/x.png", "y": "y_mask.tif", "case_7_0000": "case_7.png", "case_8_0000": "case_8_0000.png"}
    for name, file in {**expected, "e\u0301": "é.png"}.items():
        assert masks.find(scan(name), 0) == tmp_path / "masks" / file
    assert masks.find(scan("clip", 3), 1) == tmp_path / "masks" / "clip" / "0002.png"
    with pytest.raises(UserError, match=r"z\.png has no mask z\.png in .*masks"):
        masks.find(scan("z"), 0)
    save(tmp_path / "masks" / "a" / "x.bmp", GREY)
    with pytest.raises(UserError, match=r"x\.(bmp|png) and x\.(bmp|png) are both masks"):
        CoarseMasks(tmp_path / "masks", tmp_path).find(scan("a/x"), 0)
    image = save(tmp_path / "one.png", GREY)
    assert CoarseMasks(image, image).find(scan("anything"), 0) == image
    for wrong in (tmp_path / "nowhere", image):
        with pytest.raises(UserError, match="is no folder"):
            CoarseMasks(wrong, tmp_path)
    for name in ("2024-01-01T10:30:00", "a:b/a?c", "ä" * 70, "a_d"):  # in both folders
        save(tmp_path / "scans" / f"{name}.png", GREY)
        save(tmp_path / "same" / f"{name}{'_mask' if name[0] == 'ä' else ''}.png", GREY)
    save(tmp_path / "same" / "a:d.png", GREY)
    found = find_scans(tmp_path / "scans", tmp_path).scans
    masks = CoarseMasks(tmp_path / "same", tmp_path / "scans")
    assert len(found) == 4 and all(masks.find(one, 0).stem.removesuffix("_mask") == one.path.stem for one in found)
    save(tmp_path / "scans" / "a_d.jpg", GREY)  # which of the two the mask is of cannot be known
    for one in (one for one in find_scans(tmp_path / "scans", tmp_path).scans if one.path.stem == "a_d"):
        with pytest.raises(UserError, match=r"a_d\.\w+ has no mask a_d\.\w+\.png in"):
            masks.find(one, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no mask"):
        CoarseMasks(tmp_path / "empty", tmp_path)


def test_a_mask_of_sixteen_bits_is_a_probability_unless_it_holds_labels(tmp_path):
    prob = np.linspace(0, 65535, 48 * 60).reshape(48, 60).round().astype(np.uint16)
    found = load_coarse(save(tmp_path / "p.png", prob), (48, 60))
    np.testing.assert_allclose(found, prob / 65535, atol=1e-6)
    lesion = GREY > 100
    for name, pixels in {
        "a.png": lesion * np.uint8(255),
        "b.png": lesion * np.uint8(1),
        "c.png": lesion * np.uint16(2),
    }.items():
        found = load_coarse(save(tmp_path / name, pixels), (48, 60))
        assert found.dtype == bool and np.array_equal(found, lesion)
    assert np.array_equal(load_coarse(write_dicom(tmp_path / "d.dcm", lesion * np.uint8(1)), (48, 60)), lesion)
    with pytest.raises(UserError, match=r"p\.png has 60 × 48 px but its image 48 × 60"):
        load_coarse(tmp_path / "p.png", (60, 48))
