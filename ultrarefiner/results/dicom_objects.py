"""What was found, as DICOM: for each DICOM source a segmentation (SEG) and a measurement report (SR, TID 1500).

Both are made of the masks and tables that are already written, so they say the same, and an interrupted call continues.
Nothing in them is chance or a clock: the same source, networks and settings give the same bytes and the same UIDs.
"""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from ultrarefiner import __version__
from ultrarefiner.data import dicom
from ultrarefiner.data.images import decoding
from ultrarefiner.data.scans import Scan
from ultrarefiner.errors import UserError
from ultrarefiner.extras import imported
from ultrarefiner.files import write_atomically
from ultrarefiner.results.measures import numbered
from ultrarefiner.results.prediction import Predictions

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

FOLDER = "dicom"
NAME = "UltraRefiner"
MAX_PIXELS = 2**30
"""Of all segments of one object together: highdicom holds them as bytes, some times over."""
_ADVICE = "its masks are written, its DICOM objects are not"
_REFERRED = {  # without them nothing can refer to an image
    "SOPClassUID": "SOP Class UID",
    "SOPInstanceUID": "SOP Instance UID",
    "StudyInstanceUID": "Study Instance UID",
    "SeriesInstanceUID": "Series Instance UID",
}
_TEXTS = ("PatientID", "PatientName", "PatientSex", "AccessionNumber", "StudyID", "ReferringPhysicianName")
_DATES = {"PatientBirthDate": "%Y%m%d", "StudyDate": "%Y%m%d", "StudyTime": "%H%M%S"}  # of these, too, blank is allowed
_MOMENTS = ("Content", "Acquisition", "Series", "Study")


class _Found(NamedTuple):
    """A lesion of a frame."""

    frame: int  # from 1
    number: int  # in this frame, from 1
    mask: Bool[np.ndarray, "H W"]
    row: Mapping[str, str]  # of lesions.csv

    def label(self, clip: bool) -> str:
        """What it is called; never by the name of its file, which may be that of a patient."""
        return f"Frame {self.frame}, lesion {self.number}" if clip else f"Lesion {self.number}"


def check_installed(wanted: bool = True) -> None:
    """Called before any work is done.

    Raises:
        UserError: DICOM objects are wanted, and highdicom is missing.
    """
    if not wanted:
        return
    imported("highdicom", "highdicom", "dicom")
    logging.getLogger("highdicom").setLevel(logging.ERROR)  # what it warns of are names of patients


def write_objects(scans: Sequence[Scan], results: Predictions, settings: Mapping[str, Any], problems: list[str]) -> int:
    """Write ``dicom/NAME.seg.dcm`` and ``dicom/NAME.sr.dcm`` for each DICOM source whose frames are all done.

    A source without a lesion gets the report alone, which says so: a segmentation must have a segment.

    Args:
        scans: the images.
        results: what was found in them.
        settings: what defines a result; "checkpoint" is the hash of the weights.
        problems: takes a sentence for each source that cannot have objects.

    Returns:
        How many images are no DICOM files.
    """
    others = 0
    for scan in scans:
        names = [scan.frame_name(index) for index in range(scan.frames)]
        if any(name not in results.rows for name in names):
            continue  # it could not be read, which was said
        try:
            with decoding(scan.path, _ADVICE):
                if dicom.is_dicom(scan.path):
                    _write(scan, names, results, settings)
                else:
                    others += 1
        except UserError as error:
            problems.append(str(error))
    return others


def _write(scan: Scan, names: Sequence[str], results: Predictions, settings: Mapping[str, Any]) -> None:
    header = dicom.read_header(scan.path)
    for keyword, attribute in _REFERRED.items():
        if not header.get(keyword):
            raise UserError(f"{scan.path} has no {attribute}, without which nothing can refer to it: {_ADVICE}.")
    masks = [(results.folder / str(results.rows[name]["mask"])).read_bytes() for name in names]
    marks = [results.rows[name][key] for name in names for key in ("image_sha256", "coarse_sha256")]
    writer = _Writer(scan, header, settings, [__version__, *marks, *masks])
    segmentation, report = (results.folder / FOLDER / f"{scan.name}.{kind}.dcm" for kind in ("seg", "sr"))
    any_lesion = any(results.lesions[name] for name in names)
    if _uid(segmentation) == (writer.uid("SEG") if any_lesion else None) and _uid(report) == writer.uid("SR"):
        return
    found = [
        lesion
        for frame, (name, mask) in enumerate(zip(names, masks, strict=True), 1)
        for lesion in _lesions(frame, mask, results.lesions[name])
    ]
    if sum(lesion.mask.size for lesion in found) > MAX_PIXELS:
        size = f"{len(found)} lesions in its frames of {header.Columns} × {header.Rows} px"
        raise UserError(f"{scan.path} has {size}, too many for one segmentation: export fewer frames; {_ADVICE}.")
    made = writer.segmentation(found) if found else None
    if made is None:
        segmentation.unlink(missing_ok=True)  # of an image that had a lesion, and has changed
    else:
        write_atomically(segmentation, _encoded(made))
    write_atomically(report, _encoded(writer.report(found, made)))  # last: it refers to the other


def _lesions(frame: int, png: bytes, rows: Sequence[Mapping[str, str]]) -> list[_Found]:
    if not rows:
        return []
    from PIL import Image

    labels, _ = numbered(np.asarray(Image.open(io.BytesIO(png))) > 0)
    return [_Found(frame, number, labels == number, row) for number, row in enumerate(rows, 1)]


class _Writer:
    """Makes the objects of one source.

    Args:
        scan: the source. header: its attributes; changed here so that highdicom takes them.
        settings: see `write_objects`.
        content: all that the objects depend on beside these.
    """

    def __init__(self, scan: Scan, header: "Dataset", settings: Mapping[str, Any], content: Sequence[Any]) -> None:
        self.clip, self.frames = scan.frames > 1, scan.frames
        self.source = _completed(header)
        self.settings = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
        self.weights = self.settings["checkpoint"][:64]
        self.content = [str(header.SOPInstanceUID), *(c if isinstance(c, bytes) else str(c) for c in content)]

    def uid(self, what: str) -> str:
        """That of a part of the objects: always the same for the same content."""
        return _derived(what, json.dumps(self.settings), *self.content)

    def segmentation(self, found: "Sequence[_Found]") -> "Dataset":
        """A binary segmentation, each lesion a segment of one frame.

        Ultrasound has no place in space: segments refer to the frame of their source, whose pixels theirs are.
        """
        import highdicom as hd
        from pydicom.sr.codedict import codes

        algorithm = hd.AlgorithmIdentificationSequence(
            NAME, codes.DCM.ArtificialIntelligence, __version__, NAME, self.settings
        )
        segments = [
            hd.seg.SegmentDescription(
                number,
                lesion.label(self.clip),
                codes.SCT.MorphologicallyAbnormalStructure,
                codes.SCT.Lesion,
                hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm,
                *self._tracking(lesion),
                anatomic_regions=[codes.SCT.Breast],
            )
            for number, lesion in enumerate(found, 1)
        ]
        made = hd.seg.Segmentation(
            [self.source],
            np.stack([lesion.mask for lesion in found], axis=-1)[None].astype(np.uint8),
            hd.seg.SegmentationTypeValues.BINARY,
            segments,
            content_description="Lesions found by UltraRefiner; not for diagnosis",
            content_label="LESIONS",
            manufacturer_model_name=NAME,
            software_versions=__version__,
            device_serial_number=self.weights,
            **self._general("SEG", 9001),
        )
        organization = self.uid("dimensions")
        for item in (*made.DimensionOrganizationSequence, *made.DimensionIndexSequence):
            item.DimensionOrganizationUID = organization
        made.PatientOrientation = self.source.get("PatientOrientation", "")
        shared = made.SharedFunctionalGroupsSequence[0]
        if not any(shared.get("PixelMeasuresSequence", ())):  # empty items
            shared.pop("PixelMeasuresSequence", None)
        if self.clip:  # highdicom knows no clips outside of a patient's space: for it, the source has one frame
            for lesion, item in zip(found, made.PerFrameFunctionalGroupsSequence, strict=True):
                item.DerivationImageSequence = deepcopy(item.DerivationImageSequence)  # all frames share one
                item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber = lesion.frame
        return self._dated(made)

    def report(self, found: "Sequence[_Found]", segmentation: "Dataset | None") -> "Dataset":
        """A group of measurements for each lesion, and one that names the frames that have none."""
        import highdicom as hd
        from pydicom.sr.codedict import codes

        algorithm = hd.sr.AlgorithmIdentification(
            NAME, __version__, [f"{key}={value}" for key, value in self.settings.items()]
        )
        sides = {"L": codes.SCT.Left, "R": codes.SCT.Right}
        side = sides.get(str(self.source.get("ImageLaterality") or self.source.get("Laterality")))
        site = hd.sr.FindingSite(codes.SCT.Breast, side)
        image = (self.source.SOPClassUID, self.source.SOPInstanceUID)
        common = {"finding_type": codes.SCT.Lesion, "algorithm_id": algorithm, "finding_sites": [site]}
        groups: list[Any] = []
        for number, lesion in enumerate(found, 1):
            assert segmentation is not None
            source = hd.sr.SourceImageForSegmentation(*image, [lesion.frame] if self.clip else None)
            region = hd.sr.ReferencedSegmentationFrame(
                segmentation.SOPClassUID, segmentation.SOPInstanceUID, number, number, source
            )
            # Its frame says which segment; the standard forbids to name both (PS3.3 C.18.4).
            del region[0].ReferencedSOPSequence[0].ReferencedSegmentNumber
            groups.append(
                hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
                    hd.sr.TrackingIdentifier(*self._tracking(lesion)),
                    referenced_segment=region,
                    measurements=[hd.sr.Measurement(*values) for values in _measurements(lesion.row)],
                    **common,
                )
            )
        if without := sorted(set(range(1, self.frames + 1)) - {lesion.frame for lesion in found}):
            absent = hd.sr.SourceImageForMeasurementGroup(*image, without if self.clip else None)
            groups.append(
                hd.sr.MeasurementsAndQualitativeEvaluations(
                    hd.sr.TrackingIdentifier(self.uid("none"), "No lesion"),
                    qualitative_evaluations=[hd.sr.QualitativeEvaluation(codes.SCT.Lesion, codes.SCT.Absent)],
                    source_images=[absent],
                    **common,
                )
            )
        device = hd.sr.DeviceObserverIdentifyingAttributes(
            _derived("device", self.weights), NAME, NAME, f"{NAME} {__version__}", self.weights
        )
        context = hd.sr.ObservationContext(observer_device_context=hd.sr.ObserverContext(codes.DCM.Device, device))
        evidence = [self.source] if segmentation is None else [self.source, segmentation]
        made = hd.sr.ComprehensiveSR(
            evidence,
            hd.sr.MeasurementReport(context, codes.SCT.UltrasonographyOfBreast, groups)[0],
            is_complete=True,
            manufacturer_model_name=NAME,
            software_versions=__version__,
            device_serial_number=self.weights,
            **self._general("SR", 9002),
        )
        return self._dated(made)

    def _tracking(self, lesion: _Found) -> tuple[str, str]:
        label = lesion.label(self.clip)
        return self.uid(label), label

    def _general(self, kind: str, series: int) -> dict[str, Any]:
        """What both objects have; one series for all of its kind that the same networks made of a source's series."""
        settings = json.dumps(self.settings)
        return {
            "sop_instance_uid": self.uid(kind),
            "instance_number": max(1, int(self.source.get("InstanceNumber") or 1)),
            "series_instance_uid": _derived(kind, str(self.source.SeriesInstanceUID), settings, __version__),
            "series_number": series,
            "series_description": f"{NAME} {'segmentation' if kind == 'SEG' else 'measurements'}",
            "manufacturer": NAME,
        }

    def _dated(self, made: "Dataset") -> "Dataset":
        """With the source's date in place of today's: one UID must not stand for two different objects."""
        for item in (made, *made.get("ContributingEquipmentSequence", ())):
            for name in ("InstanceCreationDate", "InstanceCreationTime", "ContributionDateTime"):
                item.pop(name, None)
        made.ContentDate, made.ContentTime = _moment(self.source)
        return made


def _completed(header: "Dataset") -> "Dataset":
    """The source as highdicom needs it: what may be blank is there, and blank where it breaks the standard.

    Its place in space, which ultrasound hardly has, is left out: the segmentation is bound to the frames themselves.
    """
    from pydicom.dataset import Dataset

    for keyword in _TEXTS:
        if header.get(keyword) is None:
            setattr(header, keyword, "")
    if header.PatientSex not in ("M", "F", "O"):
        header.PatientSex = ""
    for keyword, form in _DATES.items():
        setattr(header, keyword, _valid(header, keyword, form))
    header.pop("FrameOfReferenceUID", None)
    if "NumberOfFrames" in header:
        header.NumberOfFrames = 1
    shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]  # highdicom asks clips for theirs
    shared[0].setdefault("PixelMeasuresSequence", [Dataset()])
    header.SharedFunctionalGroupsSequence = shared
    return header


def _moment(source: "Dataset") -> tuple[str, str]:
    """When the source was made: its first valid date, with the time that belongs to it."""
    for kind in _MOMENTS:
        if date := _valid(source, f"{kind}Date", "%Y%m%d"):
            return date, _valid(source, f"{kind}Time", "%H%M%S") or "000000"
    return "19000101", "000000"  # unknown, as of a file that was made anonymous; a date must be there


def _valid(source: "Dataset", keyword: str, form: str) -> str:
    """A date or a time to the second; blank where there is none or it breaks the standard."""
    text = str(source.get(keyword) or "").strip().partition(".")[0]
    try:
        if len(text) != len(datetime.strptime(text, form).strftime(form)):  # it takes "202411" as well
            return ""
    except ValueError:
        return ""
    return text


def _measurements(row: Mapping[str, str]) -> list[tuple[Any, float, Any]]:
    """Area, long axis and short axis as in the table, with their units: mm where they are known, else pixels."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    pixels = CodedConcept("{pixels}", "UCUM", "pixels")
    known = bool(row["area_mm2"])
    area, length = (codes.UCUM.SquareMillimeter, codes.UCUM.Millimeter) if known else (pixels, pixels)
    unit = "mm" if known else "px"
    return [
        (codes.SCT.Area, float(row[f"area_{unit}2"]), area),
        (codes.SCT.LongAxis, float(row[f"longest_{unit}"]), length),
        (codes.SCT.ShortAxis, float(row[f"perpendicular_{unit}"]), length),
    ]


def _derived(*content: str | bytes) -> str:
    """A UID that is always the same for the same content."""
    from hashlib import sha256

    from pydicom.uid import generate_uid

    parts = [sha256(part if isinstance(part, bytes) else part.encode()).hexdigest() for part in content]
    return str(generate_uid(entropy_srcs=parts))


def _uid(path: Path) -> str | None:
    """That of a file which an earlier call wrote."""
    from pydicom.filereader import read_file_meta_info

    return str(read_file_meta_info(path).get("MediaStorageSOPInstanceUID")) if path.is_file() else None


def _encoded(made: "Dataset") -> bytes:
    stream = io.BytesIO()
    made.save_as(stream, enforce_file_format=True)
    return stream.getvalue()
