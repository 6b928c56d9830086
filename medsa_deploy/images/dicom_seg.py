"""Labels of a DICOM volume ⇄ a DICOM Segmentation object, through highdicom (extra `dicom`).

Of the two types BINARY is written, one segment for each label: every viewer and reader takes it,
LABELMAP (2023) few. A frame where a segment is empty is left out; only if there is not one voxel
are they all written, because a segmentation without frames is no valid object. It repeats the
patient and study of its source, as the standard wants: it belongs to that patient's record.
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
from .series import DicomSlices, frame_of
from .stacking import SAME_ORIENTATION, TO_NIFTI, Frame
from .volume import Volume

log = logging.getLogger(__name__)

NEEDED = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID",
)  # fmt: skip
MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
"""Attributes the standard wants present, if empty; anonymisers remove them."""
LABEL_LENGTH = 64
"""Of DICOM's long strings, in characters."""
READABLE = ("BINARY", "LABELMAP")
"""Segmentation types that hold labels; FRACTIONAL holds probabilities."""


def check_dicom_source(path: Path, volume: Volume) -> None:
    """Make a segmentation of one voxel for `path`, so that what would be refused is so at once.

    ImageError if the source lacks, or has a strange value in, what a segmentation must repeat.
    """
    labels = np.zeros(volume.shape, np.uint8)
    labels[0, 0, 0] = 1
    segmentation(path, labels, volume, names=(), tool="medsa-deploy")


def segmentation(
    path: Path, labels: np.ndarray, volume: Volume, *, names: Sequence[str], tool: str
) -> Any:
    """`labels` (columns, rows, slices) uint8 as a dataset for `path`, which only messages name.

    Label k is segment k, called `names[k - 1]`.
    """
    highdicom = _highdicom()
    sources = _sources(path, volume)
    frames = _slices(volume).frames
    planes = labels.transpose(2, 1, 0)
    if len(sources) == 1 and len(frames) > 1:  # of a multi-frame file, in the file's order
        planes = planes[np.argsort([frame.number or 0 for frame in frames])]
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
        dataset.SpecificCharacterSet = "ISO_IR 192"  # whatever the source has, for any class name
    return dataset


def save(dataset: Any, temporary: Path, path: Path) -> None:
    """Write a segmentation under a temporary name; messages say `path`."""
    with _writing(path):
        dataset.save_as(temporary, enforce_file_format=True)


def read_segmentation(path: Path) -> Labels:
    """The segments of a DICOM segmentation as labels, on the slices it has frames for.

    ImageError if it is none, or if segments overlap, or its frames have no place in the patient.
    """
    dataset = load(path)
    with reading(path, "DICOM"):
        kind = str(dataset.get("SegmentationType") or dataset.get("SOPClassUID").name)
        if kind not in READABLE:
            raise ImageError(
                f"{path} is {kind}, expected a DICOM segmentation, {' or '.join(READABLE)}"
            )
        count = frame_count(dataset)
        frames = [frame_of(path, dataset, k) for k in range(count)]
        pixels = dataset.pixel_array.reshape(count, dataset.Rows, dataset.Columns)
        numbers = [
            functional_group(dataset, "SegmentIdentificationSequence", k).get(
                "ReferencedSegmentNumber", 1
            )
            for k in range(count)
        ]
        names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in dataset.SegmentSequence}
    affine, positions = _places(path, frames)
    normal = affine[:3, 2] / np.linalg.norm(affine[:3, 2])
    _, first, slices = np.unique(
        (positions @ normal).round(2), return_index=True, return_inverse=True
    )
    planes = np.zeros((len(first), *pixels.shape[1:]), np.uint16)
    for frame, number, k in zip(pixels, numbers, slices, strict=True):
        mine = frame != 0
        if (planes[k][mine] != 0).any():
            raise ImageError(
                f"{path}: segment {number} overlaps another; one label a voxel is needed: write "
                "each of them to a file of its own"
            )
        planes[k][mine] = frame[mine] if kind == "LABELMAP" else number
    return Labels(
        path=path,
        values=planes.transpose(2, 1, 0),
        affine=affine,
        origins=positions[first],
        columns_first=True,
        names=names,
    )


def _places(path: Path, frames: Sequence[Frame]) -> tuple[np.ndarray, np.ndarray]:
    """Of a segmentation's frames: their affine within a slice, and their origins (N, 3)."""
    shared = frames[0]
    if shared.spacing is None or any(f.position is None or f.orientation is None for f in frames):
        raise ImageError(
            f"{path}: its frames have no place in the patient, or no PixelSpacing; give its labels "
            "as NIfTI or PNG"
        )
    turns = np.array([f.orientation for f in frames], np.float64)
    if np.abs(turns - turns[0]).max() > SAME_ORIENTATION:
        raise ImageError(f"{path} mixes orientations; expected slices of one stack")
    rows, columns = shared.spacing
    along_columns, along_rows = turns[0].reshape(2, 3)
    normal = np.cross(along_columns, along_rows) * (shared.thickness or 1.0)
    affine = np.eye(4)
    affine[:3, :3] = TO_NIFTI @ np.stack(
        [along_columns * columns, along_rows * rows, normal], axis=1
    )
    origins = np.array([f.position for f in frames], np.float64) @ TO_NIFTI
    affine[:3, 3] = origins[0]
    return affine, origins


def _highdicom() -> Any:
    """The library, imported when the first segmentation is written: it takes a second."""
    try:
        import highdicom
    except ImportError as e:
        raise MissingDependencyError(
            "highdicom", extra="dicom", purpose="writing DICOM segmentations"
        ) from e
    return highdicom


def _slices(volume: Volume) -> DicomSlices:
    assert isinstance(volume.slices, DicomSlices)  # what makes a volume's kind "dicom"
    return volume.slices


def _sources(path: Path, volume: Volume) -> list[Any]:
    """The headers of the source images, in slice order, complete; a single multi-frame is one."""
    first = _slices(volume).frames[0]
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
    for file, frame in dict.fromkeys((f.path, f.uid) for f in _slices(volume).frames):
        source = load_header(file)
        with reading(file, "DICOM"):
            if str(source.get("SOPInstanceUID", "")) != frame:
                raise ImageError(f"{file} has changed since it was read: run again")
            if missing := [name for name in NEEDED if not source.get(name)]:
                raise ImageError(
                    f"{path}: a DICOM segmentation needs {', '.join(missing)} of its source, which "
                    f"{file} lacks; write .npy or .nii.gz"
                )
            for name in MAY_BE_EMPTY:
                if name not in source:
                    setattr(source, name, "")
            if not source.get("SliceThickness") and "SharedFunctionalGroupsSequence" not in source:
                source.SliceThickness = f"{volume.spacing_mm[2]:.6g}"
        sources.append(source)
    return sources


def _segments(highdicom: Any, highest: int, names: Sequence[str], tool: str) -> list[Any]:
    """One description for every label up to the highest, and for every name; at least one."""
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
            # What a class is called does not say what it is in coded terms: the widest there are.
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type="SEMIAUTOMATIC",
            algorithm_identification=algorithm,
        )
        for k in range(max(highest, len(names), 1))
    ]


def _version() -> str:
    """This package's, from its installation: its root knows modules this one must not import."""
    try:
        return version("medsa-deploy")
    except PackageNotFoundError:
        return "unknown"


def _label(name: str) -> str:
    """A class name as DICOM can hold it: one line without backslashes, at most 64 characters."""
    return " ".join(name.replace("\\", "/").split())[:LABEL_LENGTH] or "unnamed"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn whatever highdicom refuses into one ImageError; its warnings go to the log."""
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
