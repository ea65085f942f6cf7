"""DICOM in, DICOM out, with the command: what it writes, read by others than the library that made it."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.uid import UltrasoundMultiFrameImageStorage

from data_layouts import disc, save, texture
from dicom_files import ultrasound_region, write_dicom
from ultrarefiner import predict
from ultrarefiner.files import read_csv

pytest.importorskip("highdicom")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)


def test_dicom_in_and_dicom_out(execute, finished_runs, tmp_path):
    """With pydicom and, where it is there, dicom3tools: the objects hold the masks and the figures of the tables."""
    uids = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.4", "PatientID": "P7", "PatientName": "A^B"}
    folder, region = tmp_path / "scans", ultrasound_region((0, 0, 69, 49), (0.02, 0.03))
    write_dicom(folder / "in" / "one.dcm", texture(1, 70, 50), SequenceOfUltrasoundRegions=[region], **uids)
    clip = write_dicom(folder / "clip.dcm", np.stack([texture(2), texture(3)]), frames=True, **uids)
    multi = dcmread(clip)
    multi.SOPClassUID = multi.file_meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    multi.save_as(clip)
    write_dicom(folder / "nobody.dcm", texture(4))
    save(folder / "plain.png", texture(5))
    masks, out = tmp_path / "masks", tmp_path / "out"
    given = {"in/one": disc(3, 70, 50), "clip/0001": disc(1), "clip/0002": disc(6), "nobody": disc(4), "plain": disc(5)}
    for name, mask in given.items():
        save(masks / f"{name}.png", mask)
    (pair,) = finished_runs.glob("phantom/tiny/e2e-*/*")
    call = [f"images={folder}", f"output={out}", f"masks={masks}", f"checkpoint={pair}", "lesions=each"]
    call.append("safety.min_dice=1")  # what a pair redraws that has learnt next to nothing is not taken
    done = execute(predict.main, *call, "dicom=true")
    assert done.status == 1 and "nobody.dcm" in done.err and "1 files are not DICOM" in done.out
    made = {path.relative_to(out / "dicom").as_posix(): path for path in (out / "dicom").rglob("*.dcm")}
    assert set(made) == {"clip.seg.dcm", "clip.sr.dcm", "in/one.seg.dcm", "in/one.sr.dcm"}
    rows = read_csv(out / "lesions.csv")
    for source, frames in (("in/one", ["in/one"]), ("clip", ["clip/0001", "clip/0002"])):
        seg, report = dcmread(made[f"{source}.seg.dcm"]), dcmread(made[f"{source}.sr.dcm"])
        drawn = np.stack([picture(out / "masks" / f"{name}.png") > 0 for name in frames])
        pixels = seg.pixel_array.reshape(-1, *drawn.shape[1:]) > 0
        assert np.array_equal(pixels, drawn)  # a lesion in each frame, so a segment too
        for name, mask in zip(frames, drawn, strict=True):
            assert 2 * (mask & (given[name] > 0)).sum() > 0.9 * (mask.sum() + (given[name] > 0).sum())
        assert seg.PatientID == report.PatientID == "P7" and seg.StudyInstanceUID == report.StudyInstanceUID == "1.2.3"
        areas = [value for name, value in numbers(report) if "Area" in name]
        column = "area_mm2" if source == "in/one" else "area_px2"
        assert areas == [float(row[column]) for row in rows if row["id"] in frames]
    if shutil.which("dciodvfy"):
        for path in made.values():
            said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True).stderr
            assert not [line for line in said.splitlines() if line.startswith("Error")], said
    # Asked for afterwards, they are the same bytes.
    whole = content(out / "dicom")
    shutil.rmtree(out / "dicom")
    assert execute(predict.main, *call).status == 0 and not (out / "dicom").exists()
    assert execute(predict.main, *call, "dicom=true").status == 1 and content(out / "dicom") == whole


def numbers(item: Dataset) -> list[tuple[str, float]]:
    """All measured values of a report with their names, in order."""
    below = [found for child in item.get("ContentSequence", []) for found in numbers(child)]
    if item.get("ValueType") != "NUM":
        return below
    value = float(item.MeasuredValueSequence[0].NumericValue)
    return [(str(item.ConceptNameCodeSequence[0].CodeMeaning), value), *below]
