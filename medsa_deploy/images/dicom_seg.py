"""Labels of a DICOM volume ⇄ a DICOM Segmentation object, through highdicom (extra `dicom`).

The segmentation type is BINARY, one segment for each label: every viewer reads it, but few read
LABELMAP (2023). Frames without a voxel of their segment are left out. If there is no voxel at all,
every frame is written, because a segmentation without frames is invalid. The patient and study are
copied from the source, as the standard requires: the segmentation belongs to the patient's record.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.errors import ImageError, MissingDependencyError, one_line

from .dicom import frame_count, functional_group, load, load_header
from .files import logged_warnings, reading
from .labels import Labels
from .series import DicomSlices, slice_header
from .stacking import SAME_ORIENTATION, TO_NIFTI, SliceHeader
from .volume import Volume

logger = logging.getLogger(__name__)

UTF_8 = "ISO_IR 192"
"""DICOM's name of the character set."""
REQUIRED_ATTRIBUTES = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID",
)  # fmt: skip
MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
"""Attributes that must be present but may be empty; anonymisers remove them."""
LABEL_LENGTH = 64
"""Longest segment label, in characters: DICOM's limit for long strings."""
READABLE = ("BINARY", "LABELMAP")
"""Segmentation types that hold labels; FRACTIONAL holds probabilities."""


def check_dicom_source(path: Path, volume: Volume) -> None:
    """Make a segmentation of one voxel, so that an unusable source is refused before any work.

    ImageError if an attribute that a segmentation must copy is missing in the source, or invalid.
    `path` only appears in messages.
    """
    labels = np.zeros(volume.shape, np.uint8)
    labels[0, 0, 0] = 1
    segmentation(path, labels, volume, names=(), tool="medsa-deploy")


def segmentation(
    path: Path, labels: np.ndarray, volume: Volume, *, names: Sequence[str], tool: str
) -> Any:
    """A segmentation dataset of `labels`, (columns, rows, slices) uint8.

    Label k becomes segment k, called `names[k - 1]`. `path` only appears in messages.
    """
    highdicom = _highdicom()
    sources = _sources(path, volume)
    headers = _slices(volume).headers
    planes = labels.transpose(2, 1, 0)
    if len(sources) == 1 and len(headers) > 1:  # frames of a multi-frame file: in file order
        planes = planes[np.argsort([header.number or 0 for header in headers])]
    with _writing(path):
        dataset = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=np.ascontiguousarray(planes),
            segmentation_type="BINARY",
            segment_descriptions=_segments(highdicom, int(labels.max()), names, tool),
            series_instance_uid=highdicom.UID(),
            series_number=int(sources[0].get("SeriesNumber") or 0) % 10**6 + 1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer=tool,
            manufacturer_model_name=tool,
            software_versions=_version(),
            device_serial_number="0",
            content_label="SEGMENTATION",
            content_description=f"Segmentation by {tool}",
            series_description=f"Segmentation by {tool}",
            omit_empty_frames=bool(labels.any()),
        )
        dataset.SpecificCharacterSet = UTF_8  # for any class name
    return dataset


def save(dataset: Any, temporary: Path, path: Path) -> None:
    """Write a segmentation to `temporary`; messages name `path`."""
    with _writing(path):
        dataset.save_as(temporary, enforce_file_format=True)


def read_segmentation(path: Path) -> Labels:
    """The segments of a DICOM segmentation as labels, on the slices that have frames.

    ImageError if the file is not a segmentation, its segments overlap, or its frames have no place
    in the patient.
    """
    dataset = load(path)
    with reading(path, "DICOM"):
        kind = str(dataset.get("SegmentationType") or dataset.get("SOPClassUID").name)
        if kind not in READABLE:
            raise ImageError(
                f"{path} is {kind}, expected a DICOM segmentation, {' or '.join(READABLE)}"
            )
        count = frame_count(dataset)
        headers = [slice_header(path, dataset, k) for k in range(count)]
        pixels = dataset.pixel_array.reshape(count, dataset.Rows, dataset.Columns)
        numbers = [
            functional_group(dataset, "SegmentIdentificationSequence", k).get(
                "ReferencedSegmentNumber", 1
            )
            for k in range(count)
        ]
        names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in dataset.SegmentSequence}
    affine, positions = _places(path, headers)
    normal = affine[:3, 2] / np.linalg.norm(affine[:3, 2])
    _, first, slices = np.unique(
        (positions @ normal).round(2), return_index=True, return_inverse=True
    )
    planes = np.zeros((len(first), *pixels.shape[1:]), np.uint16)
    for frame, number, k in zip(pixels, numbers, slices, strict=True):
        inside = frame != 0
        if (planes[k][inside] != 0).any():
            raise ImageError(
                f"{path}: segment {number} overlaps another segment, expected one label a voxel: "
                "write each segment to a file of its own"
            )
        planes[k][inside] = frame[inside] if kind == "LABELMAP" else number
    return Labels(
        path=path,
        values=planes.transpose(2, 1, 0),
        affine=affine,
        origins=positions[first],
        columns_first=True,
        names=names,
    )


def _places(path: Path, headers: Sequence[SliceHeader]) -> tuple[np.ndarray, np.ndarray]:
    """The affine (4, 4) that holds within each frame, and every frame's origin (N, 3), in mm."""
    first = headers[0]
    if first.spacing is None or any(h.position is None or h.orientation is None for h in headers):
        raise ImageError(
            f"{path}: its frames have no place in the patient, or no PixelSpacing; give its labels "
            "as NIfTI or PNG"
        )
    orientations = np.array([h.orientation for h in headers], np.float64)
    if np.abs(orientations - orientations[0]).max() > SAME_ORIENTATION:
        raise ImageError(
            f"{path} mixes orientations, expected slices of one stack; write each orientation to "
            "a file of its own"
        )
    rows, columns = first.spacing
    along_columns, along_rows = orientations[0].reshape(2, 3)
    normal = np.cross(along_columns, along_rows) * (first.thickness or 1.0)
    affine = np.eye(4)
    affine[:3, :3] = TO_NIFTI @ np.stack(
        [along_columns * columns, along_rows * rows, normal], axis=1
    )
    origins = np.array([h.position for h in headers], np.float64) @ TO_NIFTI
    affine[:3, 3] = origins[0]
    return affine, origins


def _highdicom() -> Any:
    """The library, imported for the first segmentation: the import takes a second."""
    try:
        import highdicom
    except ImportError as e:
        raise MissingDependencyError(
            "highdicom", extra="dicom", purpose="writing DICOM segmentations"
        ) from e
    return highdicom


def _slices(volume: Volume) -> DicomSlices:
    """The slices of a volume of kind "dicom"."""
    assert isinstance(volume.slices, DicomSlices)
    return volume.slices


def _sources(path: Path, volume: Volume) -> list[Any]:
    """The complete headers of the source files, in slice order; one for a multi-frame file."""
    first = _slices(volume).headers[0]
    if first.position is not None and first.spacing is None:
        raise ImageError(
            f"{path}: a DICOM segmentation needs the PixelSpacing of its source, and "
            f"{volume.path} has none; write .npy or .nii.gz"
        )
    if volume.affine is None:
        raise ImageError(
            f"{path}: a DICOM segmentation needs slices with a place in the patient, and "
            f"{volume.path} gives them none; write .npy or .nii.gz"
        )
    sources = []
    for file, uid in dict.fromkeys((h.path, h.uid) for h in _slices(volume).headers):
        source = load_header(file)
        with reading(file, "DICOM"):
            if str(source.get("SOPInstanceUID", "")) != uid:
                raise ImageError(f"{file} has changed since it was read: run again")
            if missing := [name for name in REQUIRED_ATTRIBUTES if not source.get(name)]:
                raise ImageError(
                    f"{path}: a DICOM segmentation needs {', '.join(missing)} of its source, which "
                    f"{file} lacks; write .npy or .nii.gz"
                )
            source.decode()  # text in the character sets of the series, to be written as UTF-8
            source.SpecificCharacterSet = UTF_8
            for name in MAY_BE_EMPTY:
                if name not in source:
                    setattr(source, name, "")
            if not source.get("SliceThickness") and "SharedFunctionalGroupsSequence" not in source:
                source.SliceThickness = f"{volume.spacing_mm[2]:.6g}"
        sources.append(source)
    return sources


def _segments(highdicom: Any, highest: int, names: Sequence[str], tool: str) -> list[Any]:
    """A description for every label up to the highest and for every name; at least one."""
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=tool,
        family=codes.DCM.ArtificialIntelligence,
        version=_version(),
    )
    return [
        highdicom.seg.SegmentDescription(
            segment_number=k + 1,
            segment_label=_label(names[k] if k < len(names) else f"segment {k + 1}"),
            # A class name says nothing in coded terms, so the codes are the widest that exist.
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type="SEMIAUTOMATIC",
            algorithm_identification=algorithm,
        )
        for k in range(max(highest, len(names), 1))
    ]


def _version() -> str:
    """This package's version, from its installation: importing its root would be circular."""
    try:
        return version("medsa-deploy")
    except PackageNotFoundError:
        return "unknown"


def _label(name: str) -> str:
    """A class name as a DICOM string: one line without backslashes, at most 64 characters."""
    return " ".join(name.replace("\\", "/").split())[:LABEL_LENGTH] or "unnamed"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise highdicom's errors as ImageError, and log its warnings; OSError passes through."""
    try:
        with logged_warnings(path):
            yield
    except OSError:
        raise
    except Exception as e:
        raise ImageError(
            f"{path} cannot be written as a DICOM segmentation: {one_line(e)}; "
            "write .npy or .nii.gz"
        ) from e
