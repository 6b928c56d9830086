"""Labels of a DICOM volume ⇄ a DICOM Segmentation object, through highdicom (extra `dicom`).

The segmentation type is BINARY, one segment for each label: every viewer reads it, but few read
LABELMAP (2023). Frames without a voxel of their segment are left out. If there is no voxel at all,
every frame is written, because a segmentation without frames is invalid. The patient and study are
copied from the source, as the standard requires: the segmentation belongs to the patient's record.
Each segment says what viewers need: codes, a colour, a tracking identifier, and the algorithm with
the bundle that computed it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.errors import ImageError, MedsaError, MissingDependencyError

from .dicom import decode_frame, functional_group
from .dicom_files import load, load_header
from .dicom_frames import check_all_frames, check_frames, frame_count
from .dicom_uids import derived_uid
from .file_texts import code_text, library_text, uid_name
from .files import logged_warnings, reading
from .labels import Labels
from .segments import Segment, SegmentationDetails
from .series import DicomSlices, slice_header
from .stacking import SAME_ORIENTATION, TO_NIFTI, SliceHeader
from .structure_codes import Code, StructureCodes
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
TYPES = frozenset((*READABLE, "FRACTIONAL"))


def check_dicom_source(path: Path, volume: Volume) -> None:
    """Make a segmentation of one voxel, so that an unusable source is refused before any work.

    ImageError if an attribute that a segmentation must copy is missing in the source, or invalid.
    `path` only appears in messages.
    """
    labels = np.zeros(volume.shape, np.uint8)
    labels[0, 0, 0] = 1
    segment = Segment(label=1, name="check", codes=StructureCodes(), colour=(0, 0, 0))
    segmentation(path, labels, volume, [segment], SegmentationDetails())


def segmentation(
    path: Path,
    labels: np.ndarray,
    volume: Volume,
    segments: Sequence[Segment],
    details: SegmentationDetails,
) -> Any:
    """A segmentation dataset of `labels`, (columns, rows, slices) uint8, one segment a label.

    `path` only appears in messages.
    """
    sources = source_headers(path, volume)
    headers = _slices(volume).headers
    planes = labels.transpose(2, 1, 0)
    if len(sources) == 1 and len(headers) > 1:  # frames of a multi-frame file: in file order
        planes = planes[np.argsort([header.number or 0 for header in headers])]
    with writing(path):
        return new_segmentation(
            sources,
            np.ascontiguousarray(planes),
            segments,
            details,
            omit_empty_frames=bool(labels.any()),
        )


def new_segmentation(
    sources: Sequence[Any],
    planes: np.ndarray,
    segments: Sequence[Segment],
    details: SegmentationDetails,
    *,
    omit_empty_frames: bool,
) -> Any:
    """A segmentation dataset of labels (planes, rows, columns) on images of the same places.

    Any exception of highdicom: see `writing`.
    """
    highdicom = _highdicom()
    origin = uid_origin(sources, details)
    dataset = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=planes,
        segmentation_type="BINARY",
        segment_descriptions=[
            _segment(highdicom, segment, details, origin[0]) for segment in segments
        ],
        series_instance_uid=_uid(highdicom, details, *origin, "series"),
        series_number=int(sources[0].get("SeriesNumber") or 0) % 10**6 + 1000,
        sop_instance_uid=_uid(highdicom, details, *origin, "segmentation"),
        instance_number=1,
        manufacturer=details.tool,
        manufacturer_model_name=details.tool,
        software_versions=package_version(),
        device_serial_number="0",
        content_label="SEGMENTATION",
        content_description=f"Segmentation by {details.tool}",
        series_description=f"Segmentation by {details.tool}",
        omit_empty_frames=omit_empty_frames,
    )
    _add_side(dataset, segments)
    dataset.SpecificCharacterSet = UTF_8  # for any class name
    return dataset


def uid_origin(sources: Sequence[Any], details: SegmentationDetails) -> tuple[str, ...]:
    """The texts that derived UIDs of a source's segmentation derive from; the series comes first.

    An instance is counted once, in whichever order the files are.
    """
    instances = sorted({str(source.SOPInstanceUID) for source in sources})
    series = str(sources[0].SeriesInstanceUID)
    return (series, *instances, details.bundle_sha256 or "", details.identity or "")


def segmentation_uid(path: Path, volume: Volume, details: SegmentationDetails) -> str:
    """The SOP Instance UID that the segmentation of a volume gets; `details` have an identity.

    >>> segmentation_uid(Path("seg.dcm"), volume, SegmentationDetails(identity="rule 1"))[:5]
    '2.25.'
    """
    return derived_uid(*uid_origin(source_headers(path, volume), details), "segmentation")


def tracking_uid(series: str, segment: Segment, details: SegmentationDetails) -> str:
    """The UID of a finding: the same for a structure of a series whenever a bundle segments it."""
    return derived_uid(series, details.bundle_sha256 or "", "tracking", segment.name)


def _uid(highdicom: Any, details: SegmentationDetails, *parts: str) -> str:
    """A derived UID if the details have an identity, and otherwise a new one."""
    return str(highdicom.UID()) if details.identity is None else derived_uid(*parts)


def save(dataset: Any, temporary: Path, path: Path) -> None:
    """Write a segmentation to `temporary`; messages name `path`."""
    with writing(path):
        dataset.save_as(temporary, enforce_file_format=True)


def read_segmentation(path: Path) -> Labels:
    """The segments of a DICOM segmentation as labels, on the slices that have frames.

    ImageError if the file is not a segmentation, its segments overlap, or its frames have no place
    in the patient.
    """
    dataset = load(path)
    with reading(path, "DICOM"):
        stored_kind = dataset.get("SegmentationType")
        kind = code_text(stored_kind, TYPES) if stored_kind else uid_name(dataset.SOPClassUID)
        if kind not in READABLE:
            raise ImageError(
                f"{path} is {kind}, expected a DICOM segmentation, {' or '.join(READABLE)}"
            )
        check_frames(path, dataset)
        check_all_frames(path, dataset)
        count = frame_count(dataset)
        headers = [slice_header(path, dataset, k) for k in range(count)]
        pixels = _frames(path, dataset, count)
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


def _frames(path: Path, dataset: Any, count: int) -> np.ndarray:
    """Stored values of all frames, (count, rows, columns)."""
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return np.stack([decode_frame(dataset, path, k)[0] for k in range(count)])
    pixels: np.ndarray = dataset.pixel_array
    return pixels.reshape(count, dataset.Rows, dataset.Columns)


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


def source_headers(path: Path, volume: Volume) -> list[Any]:
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
            complete(source, path, file, REQUIRED_ATTRIBUTES)
            if not source.get("SliceThickness") and "SharedFunctionalGroupsSequence" not in source:
                source.SliceThickness = f"{volume.spacing_mm[2]:.6g}"
        sources.append(source)
    return sources


def complete(
    source: Any,
    path: Path,
    file: Path,
    required: Sequence[str],
    *,
    instead: str = "write .npy or .nii.gz",
) -> None:
    """Give a source's header what a segmentation copies of it; ImageError if it lacks `required`.

    `path`, of the segmentation, and `file`, of the source, only appear in messages, as does what
    can be done `instead`.
    """
    if missing := [name for name in required if not source.get(name)]:
        raise ImageError(
            f"{path}: a DICOM segmentation needs {', '.join(missing)} of its source, which "
            f"{file} lacks; {instead}"
        )
    source.decode()  # text in the character sets of the series, to be written as UTF-8
    source.SpecificCharacterSet = UTF_8
    for name in MAY_BE_EMPTY:
        if name not in source:
            setattr(source, name, "")


def _segment(highdicom: Any, segment: Segment, details: SegmentationDetails, series: str) -> Any:
    """A segment's description."""
    from pydicom.sr.codedict import codes

    region = segment.codes.region
    return highdicom.seg.SegmentDescription(
        segment_number=segment.label,
        segment_label=one_line_label(segment.name),
        segmented_property_category=concept(highdicom, segment.codes.category),
        segmented_property_type=concept(highdicom, segment.codes.type),
        algorithm_type="AUTOMATIC" if details.automatic else "SEMIAUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=details.tool,
            family=codes.DCM.ArtificialIntelligence,
            version=package_version(),
            parameters=algorithm_parameters(details) or None,
        ),
        tracking_uid=tracking_uid(series, segment, details),
        tracking_id=one_line_label(segment.name),
        anatomic_regions=None if region is None else [concept(highdicom, region)],
        display_color=highdicom.color.CIELabColor.from_rgb(*segment.colour),
    )


def algorithm_parameters(details: SegmentationDetails) -> dict[str, str]:
    """The bundle and its SHA-256, as parameters of the algorithm."""
    facts = {"bundle": details.bundle, "bundle-sha256": details.bundle_sha256}
    return {name: text for name, text in facts.items() if text}


def _add_side(dataset: Any, segments: Sequence[Segment]) -> None:
    """Left or right, which highdicom's description has no parameter for."""
    highdicom = _highdicom()
    for item, segment in zip(dataset.SegmentSequence, segments, strict=True):
        if (side := segment.codes.modifier) is not None:
            kind = item.SegmentedPropertyTypeCodeSequence[0]
            kind.SegmentedPropertyTypeModifierCodeSequence = [concept(highdicom, side)]
        if (side := segment.codes.region_modifier) is not None:
            region = item.AnatomicRegionSequence[0]
            region.AnatomicRegionModifierSequence = [concept(highdicom, side)]


def concept(highdicom: Any, code: Code) -> Any:
    """A code as highdicom's coded concept."""
    return highdicom.sr.CodedConcept(code.value, code.scheme, code.meaning)


def package_version() -> str:
    """This package's version, from its installation: importing its root would be circular."""
    try:
        return version("medsa-deploy")
    except PackageNotFoundError:
        return "unknown"


def one_line_label(name: str) -> str:
    """A class name as a DICOM string: one line without backslashes, at most 64 characters."""
    return " ".join(name.replace("\\", "/").split())[:LABEL_LENGTH] or "unnamed"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise highdicom's errors as ImageError, and log its warnings.

    OSError and errors of this package pass through.
    """
    try:
        with logged_warnings(path):
            yield
    except (OSError, MedsaError):
        raise
    except Exception as e:
        raise ImageError(
            f"{path} cannot be written as a DICOM segmentation: {library_text(e)}; "
            "write .npy or .nii.gz"
        ) from e
