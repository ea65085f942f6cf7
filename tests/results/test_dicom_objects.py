"""DICOM segmentations and measurement reports: read back, they say what the PNG masks and the tables say."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from dicom_files import ultrasound_region, write_dicom
from ultrarefiner.data.scans import find_scans
from ultrarefiner.errors import UserError
from ultrarefiner.files import read_csv
from ultrarefiner.results import dicom_objects
from ultrarefiner.results.dicom_objects import check_installed, write_objects
from ultrarefiner.results.prediction import Predictions, predict
from ultrarefiner.results.segmentation import Segmentation

hd = pytest.importorskip("highdicom")
from pydicom.sr.codedict import codes  # noqa: E402

SETTINGS = {"checkpoint": "ab" * 32, "coarse": "network", "lesions": "together", "safety": {"min_dice": 0.5}}
PATIENT = {
    "PatientID": "P7",
    "PatientName": "Müller^Zoë",
    "PatientBirthDate": "19610203",
    "PatientSex": "F",
    "StudyDate": "20240105",
    "StudyTime": "101112.5",
    "AccessionNumber": "A1",
    "StudyID": "S1",
    "ReferringPhysicianName": "",
    "SpecificCharacterSet": "ISO_IR 192",
    "StudyInstanceUID": "1.2.3.4",
    "SeriesInstanceUID": "1.2.3.4.5",
    "Laterality": "L",
    "InstanceNumber": 3,
}
REGION = ultrasound_region((0, 0, 100, 100), (0.02, 0.03))
CLIP_CLASS = "1.2.840.10008.5.1.4.1.1.3.1"


def found(image: np.ndarray) -> Segmentation:
    """A "network": whatever is brighter than 200 is a lesion."""
    mask = (image if image.ndim == 2 else image.max(axis=2)) > 200
    prob = mask.astype(np.float32)
    return Segmentation(mask, mask, prob, None, True, 0.0, None, "", mask, prob, image)


def frame(*boxes: tuple[int, int, int, int], shape: tuple[int, int] = (41, 53)) -> np.ndarray:
    """An image with some bright boxes, x1, y1, x2, y2; its size is odd, so that bits do not end with a row."""
    image = np.full(shape, 50, np.uint8)
    for x1, y1, x2, y2 in boxes:
        image[y1:y2, x1:x2] = 255
    image[0, :5] = range(0, 200, 40)  # so that no image is of one grey
    return image


def run(folder: Path, output: Path) -> tuple[Predictions, tuple[int, list[str]]]:
    """Masks, tables and DICOM objects of all images in a folder."""
    output.mkdir(exist_ok=True)
    scans = find_scans(folder, output).scans
    results = Predictions(output, SETTINGS)
    assert not predict(lambda images, _: [found(image) for image in images], scans, results, 2)
    problems: list[str] = []
    others = write_objects(scans, results, SETTINGS, problems)
    return results, (others, problems)


@pytest.fixture
def scans(tmp_path) -> Path:
    """An image with two lesions, one without any, a clip of four frames of which two have some, and a PNG."""
    folder = tmp_path / "scans"
    write_dicom(folder / "two.dcm", frame((3, 4, 9, 12), (30, 20, 50, 31)),
                SequenceOfUltrasoundRegions=[REGION], **PATIENT)  # fmt: skip
    write_dicom(folder / "inner" / "none.dcm", frame(), **PATIENT)
    clip = np.stack([frame(), frame((5, 5, 25, 20)), frame(), frame((6, 5, 25, 21), (40, 30, 44, 35))])
    path = write_dicom(folder / "clip.dcm", clip, frames=True, SOPClassUID=CLIP_CLASS, **PATIENT)
    data = pydicom.dcmread(path)
    data.file_meta.MediaStorageSOPClassUID = CLIP_CLASS
    data.save_as(path)
    Image.fromarray(frame((3, 4, 9, 12))).save(folder / "plain.png")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.dcm")}


def groups(path: Path) -> list:
    report = hd.sr.srread(path).content
    return report.get_planar_roi_measurement_groups()


def mask_of(results: Predictions, name: str) -> np.ndarray:
    with Image.open(results.folder / "masks" / f"{name}.png") as opened:
        return np.asarray(opened) > 0


def test_which_objects_there_are(scans, tmp_path):
    results, (others, problems) = run(scans, tmp_path / "out")
    assert others == 1 and problems == []
    kinds = {"two.seg", "two.sr", "clip.seg", "clip.sr", "inner/none.sr"}
    assert set(content(results.folder)) == {f"dicom/{kind}.dcm" for kind in kinds}


@pytest.mark.parametrize("name", ["two", "clip"])
def test_segmentation_is_the_png_mask_pixel_by_pixel(scans, tmp_path, name):
    results, _ = run(scans, tmp_path / "out")
    path, source = results.folder / "dicom" / f"{name}.seg.dcm", pydicom.dcmread(scans / f"{name}.dcm")
    names = [name] if name == "two" else [f"clip/{number:04d}" for number in range(1, 5)]
    expected = np.stack([mask_of(results, each) for each in names])
    lesions = [(position, row) for position, each in enumerate(names) for row in results.lesions[each]]

    plain = pydicom.dcmread(path)  # one reader: pydicom alone
    pixels = plain.pixel_array.reshape(-1, *expected.shape[1:])
    united = np.zeros_like(expected)
    assert len(pixels) == len(plain.SegmentSequence) == len(lesions) == plain.NumberOfFrames
    for number, (item, mask, (position, row)) in enumerate(
        zip(plain.PerFrameFunctionalGroupsSequence, pixels, lesions, strict=True), 1
    ):
        (reference,) = item.DerivationImageSequence[0].SourceImageSequence
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert reference.ReferencedSOPClassUID == source.SOPClassUID
        assert int(reference.get("ReferencedFrameNumber", 0)) == (0 if name == "two" else position + 1)
        segment = item.get("SegmentIdentificationSequence")[0].ReferencedSegmentNumber
        assert segment == number and mask.sum() == int(row["area_px2"])
        united[position] |= mask > 0
    assert np.array_equal(united, expected)

    image = hd.seg.segread(path)  # another one: highdicom's
    segments = image.get_pixels_by_source_instance([source.SOPInstanceUID]) if name == "two" else None
    if segments is not None:
        assert np.array_equal(segments[0].any(axis=-1), expected[0])
    assert image.segmentation_type is hd.seg.SegmentationTypeValues.BINARY


def test_it_refers_to_patient_study_and_series_of_its_source(scans, tmp_path):
    results, _ = run(scans, tmp_path / "out")
    source = pydicom.dcmread(scans / "two.dcm")
    seg, report = (pydicom.dcmread(results.folder / "dicom" / f"two.{kind}.dcm") for kind in ("seg", "sr"))
    for made, modality in ((seg, "SEG"), (report, "SR")):
        for key in (
            "PatientID",
            "PatientName",
            "PatientBirthDate",
            "PatientSex",
            "StudyInstanceUID",
            "AccessionNumber",
        ):
            assert made[key].value == source[key].value, key
        assert made.Modality == modality and made.InstanceNumber == 3
        assert (made.ContentDate, made.ContentTime) == ("20240105", "101112")
        assert made.SeriesInstanceUID not in (source.SeriesInstanceUID, "")
    assert seg.SeriesInstanceUID != report.SeriesInstanceUID
    (series,) = seg.ReferencedSeriesSequence  # without it OHIF shows nothing
    assert series.SeriesInstanceUID == source.SeriesInstanceUID
    assert [item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence] == [source.SOPInstanceUID]
    for segment in seg.SegmentSequence:
        assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "52988006"  # SCT Lesion
        assert segment.AnatomicRegionSequence[0].CodeValue == "76752008"  # SCT Breast
        algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert algorithm.AlgorithmName == "UltraRefiner" and SETTINGS["checkpoint"] in algorithm.AlgorithmParameters
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    evidence = {
        item.ReferencedSOPInstanceUID for part in study.ReferencedSeriesSequence for item in part.ReferencedSOPSequence
    }
    assert evidence == {source.SOPInstanceUID, seg.SOPInstanceUID}
    assert report.VerificationFlag == "UNVERIFIED" and "FrameOfReferenceUID" not in seg


@pytest.mark.parametrize(("name", "unit"), [("two", "mm"), ("clip", "px")])
def test_report_has_the_figures_of_the_table(scans, tmp_path, name, unit):
    results, _ = run(scans, tmp_path / "out")
    rows = [row for row in read_csv(results.folder / "lesions.csv") if row["id"].startswith(name)]
    seg = pydicom.dcmread(results.folder / "dicom" / f"{name}.seg.dcm")
    measured = groups(results.folder / "dicom" / f"{name}.sr.dcm")
    assert len(measured) == len(rows) > 1
    units = {"mm": ["mm2", "mm", "mm"], "px": ["{pixels}"] * 3}[unit]
    for number, (group, row) in enumerate(zip(measured, rows, strict=True), 1):
        names = [codes.SCT.Area, codes.SCT.LongAxis, codes.SCT.ShortAxis]
        measures = [group.get_measurements(each)[0] for each in names]
        cells = [row[f"area_{unit}2"], row[f"longest_{unit}"], row[f"perpendicular_{unit}"]]
        assert [measure.value for measure in measures] == [float(cell) for cell in cells]
        assert [measure.unit.value for measure in measures] == units
        segment = group.referenced_segmentation_frame[0].ReferencedSOPSequence[0]
        assert segment.ReferencedSOPInstanceUID == seg.SOPInstanceUID
        assert segment.ReferencedFrameNumber == number and "ReferencedSegmentNumber" not in segment  # one or the other
        assert group.tracking_uid == seg.SegmentSequence[number - 1].TrackingUID
        assert group.finding_sites[0].laterality == codes.SCT.Left


@pytest.mark.parametrize(("name", "without"), [("inner/none", None), ("clip", [1, 3])])
def test_report_says_where_no_lesion_is(scans, tmp_path, name, without):
    results, _ = run(scans, tmp_path / "out")
    report = hd.sr.srread(results.folder / "dicom" / f"{name}.sr.dcm").content
    (group,) = report.get_image_measurement_groups()
    (evaluation,) = group.get_qualitative_evaluations()
    assert (evaluation.name, evaluation.value) == (codes.SCT.Lesion, codes.SCT.Absent)
    (source,) = group.source_images
    assert source.referenced_frame_numbers == without
    assert source.referenced_sop_instance_uid == pydicom.dcmread(scans / f"{name}.dcm").SOPInstanceUID


def test_the_same_again_gives_the_same_bytes_and_writes_nothing(scans, tmp_path, monkeypatch):
    results, _ = run(scans, tmp_path / "out")
    again, _ = run(scans, tmp_path / "again")
    whole = content(results.folder)
    assert content(again.folder) == whole
    made = [pydicom.dcmread(path) for path in results.folder.rglob("*.dcm")]
    assert len({data.SOPInstanceUID for data in made}) == len(made)
    assert len({data.SeriesInstanceUID for data in made}) == 2  # one series for each kind

    (results.folder / "dicom" / "clip.sr.dcm").unlink()  # as after a kill
    written = []
    write = dicom_objects.write_atomically
    monkeypatch.setattr(
        dicom_objects, "write_atomically", lambda path, data: (written.append(path.name), write(path, data))
    )
    run(scans, tmp_path / "out")
    assert set(written) == {"clip.seg.dcm", "clip.sr.dcm"}
    assert content(results.folder) == whole


def test_an_image_that_has_changed_gets_other_objects(scans, tmp_path):
    results, _ = run(scans, tmp_path / "out")
    before = content(results.folder)
    data = pydicom.dcmread(scans / "two.dcm")
    data.PixelData = frame((3, 4, 9, 13)).tobytes() + b"\0"
    data.save_as(scans / "two.dcm")
    run(scans, tmp_path / "out")
    seg = pydicom.dcmread(results.folder / "dicom" / "two.seg.dcm")
    assert len(seg.SegmentSequence) == 1 and seg.pixel_array.sum() == 54
    assert seg.SOPInstanceUID.encode() not in before["dicom/two.seg.dcm"]
    data.PixelData = frame().tobytes() + b"\0"
    data.save_as(scans / "two.dcm")
    run(scans, tmp_path / "out")
    assert "dicom/two.seg.dcm" not in content(results.folder)
    assert not groups(results.folder / "dicom" / "two.sr.dcm")


def test_what_may_be_blank_is_blank(tmp_path):
    needed = {key: PATIENT[key] for key in ("StudyInstanceUID", "SeriesInstanceUID")}
    write_dicom(tmp_path / "scans" / "bare.dcm", frame((3, 4, 9, 12)), **needed)
    with pytest.warns(UserWarning, match="Invalid value"):
        write_dicom(tmp_path / "scans" / "odd.dcm", frame((3, 4, 9, 12)), **needed, PatientSex="W", InstanceNumber=0,
                    PatientBirthDate="1961-02", StudyDate="20241399", StudyTime="noon",
                    FrameOfReferenceUID="1.2")  # fmt: skip
    results, (_, problems) = run(tmp_path / "scans", tmp_path / "out")
    assert problems == []
    for path in results.folder.rglob("*.dcm"):
        made = pydicom.dcmread(path)
        keys = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
                "AccessionNumber", "ReferringPhysicianName")  # fmt: skip
        assert all(key in made and not made[key].value for key in keys), path
        assert made.ContentDate == "19000101" and made.InstanceNumber == 1
    assert len(content(results.folder)) == 4


@pytest.mark.parametrize("missing", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"])
def test_what_cannot_be_referred_to_is_named(scans, tmp_path, missing):
    data = pydicom.dcmread(scans / "two.dcm")
    del data[missing]
    data.save_as(scans / "two.dcm")
    results, (others, problems) = run(scans, tmp_path / "out")
    (problem,) = problems
    assert str(scans / "two.dcm") in problem and " UID" in problem and "masks are written" in problem
    assert "dicom/clip.seg.dcm" in content(results.folder) and "dicom/two.sr.dcm" not in content(results.folder)
    assert mask_of(results, "two").any() and others == 1


def test_too_large_a_clip_is_named(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_objects, "MAX_PIXELS", 41 * 53 * 2)
    _, (_, problems) = run(scans, tmp_path / "out")
    (problem,) = problems
    assert "clip.dcm has 3 lesions" in problem


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(UserError, match=r"highdicom.*ultrarefiner\[dicom\]"):
        check_installed()


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dicom3tools")
def test_the_validator_of_dicom3tools_finds_no_error(scans, tmp_path):
    results, _ = run(scans, tmp_path / "out")
    for path in results.folder.rglob("*.dcm"):
        said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True).stderr
        assert not [line for line in said.splitlines() if line.startswith("Error")], f"{path.name}\n{said}"


DCMJS = """
const dcmjs = require("dcmjs"), fs = require("fs");
if (process.argv.length > 2) {
  const file = dcmjs.data.DicomMessage.readFile(new Uint8Array(fs.readFileSync(process.argv[2])).buffer);
  const data = dcmjs.data.DicomMetaDictionary.naturalizeDataset(file.dict);
  const bits = new Uint8Array(data.PixelData[0] || data.PixelData);
  const groups = [].concat(data.PerFrameFunctionalGroupsSequence);
  console.log(JSON.stringify({
    shape: [data.NumberOfFrames, data.Rows, data.Columns].map(Number),
    pixels: Array.from(dcmjs.data.BitArray.unpack(bits)),
    segments: [].concat(data.SegmentSequence).map((segment) => segment.SegmentLabel),
    frames: groups.map((item) => item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber),
  }));
}
"""


def has_dcmjs() -> bool:
    """Whether node finds it (`npm install dcmjs`, NODE_PATH)."""
    return bool(shutil.which("node")) and not subprocess.run(["node", "-e", DCMJS], capture_output=True).returncode


@pytest.mark.skipif(not has_dcmjs(), reason="needs node and dcmjs")
def test_dcmjs_reads_the_same_masks(scans, tmp_path):
    results, _ = run(scans, tmp_path / "out")
    (tmp_path / "read.js").write_text(DCMJS)
    for name, names, frames in (("two", ["two"], [None, None]), ("clip", ["clip/0002", "clip/0004"], [2, 4, 4])):
        path = results.folder / "dicom" / f"{name}.seg.dcm"
        done = subprocess.run(["node", str(tmp_path / "read.js"), str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        read = json.loads(done.stdout[done.stdout.index("{") :])
        count, rows, columns = read["shape"]
        pixels = np.array(read["pixels"][: count * rows * columns]).reshape(count, rows, columns) > 0
        assert [frame if frame is None else int(frame) for frame in read["frames"]] == frames
        united = [pixels[:2].any(0)] if name == "two" else [pixels[0], pixels[1:].any(0)]
        for mask, each in zip(united, names, strict=True):
            assert np.array_equal(mask, mask_of(results, each))
        assert len(read["segments"]) == len(frames)
