"""Readers find the right files and decode the right pixels."""

import unicodedata

import numpy as np
import pytest
from PIL import Image

from data_layouts import (
    SHARED,
    disc,
    needs_busbra,
    needs_busi,
    save,
    texture,
    write_busbra,
    write_busi,
    write_folder,
    write_table,
)
from ultrarefiner.data.images import load_image, load_mask, mask_to_square, to_square
from ultrarefiner.data.readers import Bus, BusBra, Busi, BusUc, BusUclm, Combined, FileReader, Folder, Udiat
from ultrarefiner.errors import UserError


def test_busbra(tmp_path):
    root = write_busbra(tmp_path / "BUSBRA")
    for given in (root, tmp_path):  # the folder itself, or the one around it
        cases = BusBra(given).cases()
        assert len(cases) == 40
        first = cases[0]
        assert (first.id, first.patient, first.label) == ("bus_0001-l", "1", "benign")
        assert first.roles == ("train", "test", "train", "train", "train")
    image, mask = BusBra(root).read(first)
    assert image.dtype == np.uint8 and mask.dtype == bool
    np.testing.assert_array_equal(image, texture(0))
    np.testing.assert_array_equal(mask, disc(1) > 0)


def test_busbra_rows_without_files_are_counted(tmp_path):
    root = write_busbra(tmp_path)
    for name in ("0003-l", "0003-r", "0004-l"):
        (root / "Images" / f"bus_{name}.png").unlink()
        (root / "Masks" / f"mask_{name}.png").unlink()
    reader = BusBra(root)
    assert len(reader.cases()) == 37
    assert reader.left_out[0].what == "3 rows of bus_data.csv"


def test_busi_merges_masks(tmp_path):
    reader = Busi(write_busi(tmp_path / "Dataset_BUSI_with_GT").parent)
    cases = {case.id: case for case in reader.cases()}
    assert len(cases) == 12
    two = cases["benign (1)"]
    assert len(two.masks) == 2 and two.patient is None and two.label == "benign"
    mask = reader.read(two)[1]
    assert mask[3, 3] and mask[24, 27] and mask.sum() == 16 + (disc(1) > 0).sum()
    assert not reader.read(cases["normal (2)"])[1].any()


@pytest.mark.parametrize(
    ("reader", "images", "masks"),
    [(Bus, "original", "GT"), (Udiat, "original", "GT"), (BusUc, "All/images", "All/masks")],
)
def test_plain_layouts(tmp_path, reader, images, masks):
    root = tmp_path / reader.folders[0]
    for number in (1, 2, 10):
        save(root / images / f"{number:06d}.png", texture(number))
        save(root / masks / f"{number:06d}.png", disc(number))
    cases = reader(tmp_path).cases()
    assert [case.id for case in cases] == ["000001", "000002", "000010"]
    assert cases[0].roles == (("test",) if reader is Udiat else ())


def test_bus_uclm_reads_class_and_patient(tmp_path):
    colours = {"ALWI_000": (0, 255, 0), "ALWI_001": (255, 0, 0), "BEPE_000": (0, 0, 0)}
    for number, (stem, colour) in enumerate(colours.items()):
        save(tmp_path / "images" / f"{stem}.png", texture(number), "RGB")
        save(tmp_path / "masks" / f"{stem}.png", (disc(number)[..., None] > 0) * np.array(colour, np.uint8))
    reader = BusUclm(tmp_path)
    cases = reader.cases()
    assert [(case.patient, case.label) for case in cases] == [
        ("ALWI", "benign"),
        ("ALWI", "malignant"),
        ("BEPE", "normal"),
    ]
    np.testing.assert_array_equal(reader.read(cases[0])[1], disc(0) > 0)
    np.testing.assert_array_equal(reader.read(cases[1])[1], disc(1) > 0)
    assert not reader.read(cases[2])[1].any()


def test_folder_with_table(tmp_path):
    root = write_folder(tmp_path, 3)
    (root / "table.csv").write_text("file;who;class\ncase_0.png;p1;benign\ncase_1;p1;\ncase_2.png;;malignant\n")
    reader = Folder(root, name="mine", table="table.csv", id_column="file", patient_column="who", label_column="class")
    assert [(case.dataset, case.patient, case.label) for case in reader.cases()] == [
        ("mine", "p1", "benign"),
        ("mine", "p1", ""),
        ("mine", None, "malignant"),
    ]


def test_folder_takes_the_names_of_nnunet(tmp_path):
    root = write_folder(tmp_path, 2)
    for number in range(2):
        (root / "images" / f"case_{number}.png").rename(root / "images" / f"case_{number}_0000.png")
    save(root / "masks" / "case_1_2.png", disc(2))
    assert [(case.id, [mask.name for mask in case.masks]) for case in Folder(root).cases()] == [
        ("case_0_0000", ["case_0.png"]),
        ("case_1_0000", ["case_1.png", "case_1_2.png"]),
    ]


def test_folder_joins_further_lesions(tmp_path):
    root = write_folder(tmp_path, 2)
    (root / "masks" / "case_1.png").rename(root / "masks" / "case_1_mask.png")
    save(root / "masks" / "case_1_2.png", np.pad(np.full((4, 4), 255, np.uint8), ((0, 44), (0, 56))))
    reader = Folder(root)
    one = reader.cases()[1]
    assert [path.name for path in one.masks] == ["case_1_2.png", "case_1_mask.png"]
    assert reader.read(one)[1][:4, :4].all()


def test_folder_matches_however_an_accent_is_encoded(tmp_path):
    save(tmp_path / "images" / (unicodedata.normalize("NFC", "läsion é") + ".png"), texture(0))
    save(tmp_path / "masks" / (unicodedata.normalize("NFD", "läsion é") + ".png"), disc(0))
    assert len(Folder(tmp_path).cases()) == 1


def test_combined(tmp_path):
    members = [Busi(write_busi(tmp_path / "a")), BusBra(write_busbra(tmp_path / "b"))]
    reader = Combined(members)
    cases = reader.cases()
    assert reader.name == "busi+busbra" and len(cases) == 52
    np.testing.assert_array_equal(reader.read(cases[-1])[0], texture(39))
    with pytest.raises(UserError, match="twice"):
        Combined([members[0], members[0]])


class Mine(FileReader):
    """A new data set is this much."""

    name = "mine"
    layout = ("pictures", "lesions")

    def scan(self, root):
        for id, image, mask in self.pairs(root, "pictures", "lesions"):
            yield self.case(id, image, [mask], patient=id.split("-")[0])


def test_a_new_data_set_is_a_few_lines(tmp_path):
    for number in range(4):
        save(tmp_path / "pictures" / f"p{number // 2}-{number}.png", texture(number))
        save(tmp_path / "lesions" / f"p{number // 2}-{number}.png", disc(number))
    assert [case.patient for case in Mine(tmp_path).cases()] == ["p0", "p0", "p1", "p1"]


@needs_busbra
def test_shared_busbra():
    reader = BusBra(SHARED)
    cases = reader.cases()
    assert len(cases) == 1517 and len({case.patient for case in cases}) == 852
    for case in cases[::150]:
        image, mask = reader.read(case)
        assert image.shape == mask.shape and 0 < mask.mean() < 0.7 and image.std() > 10


@needs_busi
def test_shared_busi():
    reader = Busi(SHARED / "BUSI_sample")
    cases = reader.cases()
    # 31 images; the further lesion of benign (4) was drawn on an image of another size
    assert len(cases) == 30 and "benign (4)" in reader.left_out[0].what
    for case in cases:
        assert reader.read(case)[1].any() == (case.label != "normal")


# ------------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_every_mode_gives_the_same_grey(tmp_path, suffix, mode):
    if (suffix, mode) == (".bmp", "RGBA"):
        pytest.skip("BMP without transparency")
    path = save(tmp_path / f"x{suffix}", texture(3), mode)
    np.testing.assert_allclose(load_image(path).astype(int), texture(3), atol=1)


def test_jpeg_and_cmyk_are_close(tmp_path):
    for mode in ("L", "RGB", "CMYK"):
        path = save(tmp_path / f"{mode}.jpg", texture(3), mode, quality=98)
        assert np.abs(load_image(path).astype(int) - texture(3)).mean() < 3


def test_sixteen_bits_are_scaled_to_the_brightest(tmp_path):
    deep = texture(3).astype(np.uint16) * 16  # twelve bits used
    for suffix in (".png", ".tif"):
        out = load_image(save(tmp_path / f"x{suffix}", deep))
        np.testing.assert_allclose(out, np.round(texture(3) * (255 / texture(3).max())), atol=1)
    assert load_image(save(tmp_path / "low.png", texture(3).astype(np.uint16))).max() == texture(3).max()


def test_transparency_lies_over_black(tmp_path):
    pixels = np.full((20, 20, 4), 200, np.uint8)
    pixels[:10, :, 3] = 0
    image = load_image(save(tmp_path / "x.png", pixels))
    assert not image[:10].any()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    save(tmp_path / "x.jpg", texture(3), exif=exif, quality=98)
    image = load_image(tmp_path / "x.jpg")
    assert image.shape == (60, 48)
    assert np.abs(image.astype(int) - np.rot90(texture(3), -1)).mean() < 3


def dicom(path, pixels, kind="MONOCHROME2", bits=8, frames=1):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, UltrasoundImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.Rows, data.Columns = pixels.shape[frames > 1 :][:2]
    data.SamplesPerPixel = 3 if pixels.ndim == 3 and frames == 1 else 1
    data.PhotometricInterpretation, data.PixelRepresentation = kind, 0
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    if frames > 1:
        data.NumberOfFrames = frames
    data.BitsAllocated, data.BitsStored, data.HighBit = (8, 8, 7) if bits == 8 else (16, bits, bits - 1)
    data.PixelData = pixels.astype(np.uint8 if bits == 8 else np.uint16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def test_dicom(tmp_path):
    grey = texture(3)
    np.testing.assert_array_equal(load_image(dicom(tmp_path / "a.dcm", grey)), grey)
    negative = load_image(dicom(tmp_path / "b.dcm", grey, "MONOCHROME1"))
    np.testing.assert_array_equal(negative, 255 - grey)
    deep = load_image(dicom(tmp_path / "c.dcm", grey.astype(np.uint16) * 16, bits=12))
    np.testing.assert_allclose(deep, np.round(grey * (255 / grey.max())), atol=1)
    colour = load_image(dicom(tmp_path / "d.dcm", np.repeat(grey[..., None], 3, 2), "RGB"))
    np.testing.assert_allclose(colour.astype(int), grey, atol=1)
    neutral = np.dstack([grey, np.full_like(grey, 128), np.full_like(grey, 128)])
    np.testing.assert_allclose(load_image(dicom(tmp_path / "e.dcm", neutral, "YBR_FULL")).astype(int), grey, atol=1)


@pytest.mark.parametrize("value", [1, 2, 128, 255])
def test_mask_values(tmp_path, value):
    lesion = disc(3) > 0
    np.testing.assert_array_equal(load_mask(save(tmp_path / "m.png", lesion.astype(np.uint8) * value)), lesion)


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (128, 0, 0), (255, 255, 255)])
def test_mask_colours(tmp_path, colour):
    lesion = disc(3) > 0
    pixels = lesion[..., None] * np.array(colour, np.uint8)
    for name, mode in (("a.png", None), ("b.png", "P"), ("c.png", "RGBA"), ("d.tif", "RGB")):
        np.testing.assert_array_equal(load_mask(save(tmp_path / name, pixels, mode)), lesion)


def test_mask_one_bit_and_jpeg(tmp_path):
    lesion = disc(3) > 0
    np.testing.assert_array_equal(load_mask(save(tmp_path / "a.png", disc(3), "1")), lesion)
    jpeg = load_mask(save(tmp_path / "a.jpg", disc(3), quality=60))
    assert (jpeg != lesion).sum() <= 4
    deep = save(tmp_path / "b.png", lesion.astype(np.uint16) * 65535)
    np.testing.assert_array_equal(load_mask(deep), lesion)


def test_a_soft_mask_is_cut_at_half_whatever_its_type(tmp_path):
    y, x = np.mgrid[:96, :100]
    distance = np.hypot(x - 50, y - 48) - 30
    soft = 1 / (1 + np.exp(distance))
    whole = {"a.png": np.round(soft * 255).astype(np.uint8), "b.png": np.round(soft * 65535).astype(np.uint16)}
    floating = {f"{largest}.tif": (soft * largest).astype(np.float32) for largest in (1, 255, 65535)}
    for name, pixels in {**whole, "c.tif": whole["b.png"], **floating}.items():
        wrong = load_mask(save(tmp_path / name, pixels)) != (distance < 0)
        assert not wrong[abs(distance) > 0.02].any(), name  # 127 and 128 of 255 lie around the half
    nothing = save(tmp_path / "e.tif", (soft * 0.4).astype(np.float32))  # a network that has found no lesion
    assert not load_mask(nothing).any()


@pytest.mark.parametrize(
    "label", [np.uint16(1), np.uint16(255), np.uint16(1000), np.uint16(40000), np.float32(1 / 255), np.float32(0.3)]
)
def test_a_mask_of_one_label_is_not_soft(tmp_path, label):
    lesion = disc(3) > 0
    np.testing.assert_array_equal(load_mask(save(tmp_path / "m.tif", lesion * label)), lesion)
    if label == 1000:
        several = np.where(np.arange(60) < 30, label, 2 * label).astype(np.uint16)
        np.testing.assert_array_equal(load_mask(save(tmp_path / "n.tif", lesion * several)), lesion)


# ---------------------------------------------------------------------------------------------------------- resampling


def test_to_square_is_edge_aligned():
    ramp = np.tile(np.round((np.arange(100) + 0.5) * 2.5).astype(np.uint8), (50, 1))
    for size in (25, 224):
        expected = np.clip((np.arange(size) + 0.5) / size * 250, 1.25, 248.75)
        inner = slice(size // 20, -size // 20)
        np.testing.assert_allclose(to_square(ramp, size)[0, inner], expected[inner], atol=1.5)


def test_to_square_does_not_alias():
    stripes = np.tile(np.array([0, 255], np.uint8), (400, 200))
    small = to_square(stripes, 50).astype(int)
    assert np.ptp(small[:, 2:-2]) <= 10 and abs(small.mean() - 127) < 4


def test_mask_to_square_keeps_area_and_specks():
    mask = disc(6, 300, 200) > 0
    assert mask_to_square(mask, 224).mean() == pytest.approx(mask.mean(), rel=0.05)
    for row, column in ((0, 0), (777, 1399), (400, 3)):
        speck = np.zeros((800, 1400), bool)
        speck[row, column] = True
        small = mask_to_square(speck, 64)
        assert small.sum() == 1
        y, x = np.argwhere(small)[0]
        assert abs(y - row / 800 * 64) <= 1 and abs(x - column / 1400 * 64) <= 1
    assert not mask_to_square(np.zeros((30, 30), bool), 8).any()


def test_cases_do_not_depend_on_the_order_of_the_folder(tmp_path, monkeypatch):
    from pathlib import Path

    root = write_folder(tmp_path)
    expected = [case.id for case in Folder(root).cases()]
    original = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(original(self))))
    assert [case.id for case in Folder(root).cases()] == expected


def test_what_else_the_publisher_says_goes_along(tmp_path):
    root = write_busbra(tmp_path / "BUSBRA")
    assert BusBra(root).cases()[0].about == ()  # a copy without these columns
    rows = [line.split(",") for line in (root / "bus_data.csv").read_text().split()]
    write_table(root / "bus_data.csv", [*rows[0], "BIRADS", "Device"], [[*row, 4, "GE"] for row in rows[1:]])
    assert BusBra(root).cases()[0].about == (("birads", "4"), ("device", "GE"))
    root = write_folder(tmp_path / "mine", 2)
    rows = [[f"case_{i}", 1, "", "A", 0.1] for i in (0, 1)]
    write_table(root / "t.csv", ["id", "patient", "label", "device", "spacing"], rows)
    (first, _) = Folder(root, table="t.csv", about_columns=["device", "spacing"]).cases()
    assert first.about == (("device", "A"), ("spacing", "0.1"))
    with pytest.raises(UserError, match="no column probe"):
        Folder(root, table="t.csv", about_columns=["probe"]).cases()
