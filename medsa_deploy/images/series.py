"""A folder with one DICOM series, or one multi-frame DICOM file → `Volume`.

The headers of all slices are read first, and `stacking` puts them in order. Pixels are decoded
slice by slice, when a slice is read.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.errors import ImageError

from .dicom import (
    check_is_image,
    frame_image,
    functional_group,
    functional_groups,
    is_derived,
    is_image,
    number,
    rendering_of,
    rescale,
)
from .dicom_files import load, load_header
from .dicom_frames import check_frames, frame_count
from .file_texts import MODALITIES, code_text, number_text, uid_text
from .files import reading
from .image import Image
from .phases import choose_phase
from .stacking import SliceHeader, Stack, choose_orientation, stack
from .volume import Volume, warn_of_spacing

logger = logging.getLogger(__name__)

ACQUISITION = (
    "TemporalPositionIdentifier", "TriggerTime", "EchoTime", "AcquisitionNumber", "InstanceNumber",
)  # fmt: skip
"""Numbers that tell images of one place apart, the most telling first."""
HEADER = [
    "SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality",
    "SliceThickness", "SpacingBetweenSlices", "SeriesInstanceUID", "SeriesNumber",
    "ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "PixelSpacing",
    "BitsAllocated", "PixelRepresentation", "RescaleIntercept", "RescaleSlope",
    "ModalityLUTSequence", *ACQUISITION,
]  # fmt: skip
"""Attributes that are read from every file of a folder, before any pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DicomSlices:
    """The slices of a DICOM volume, each decoded when it is read."""

    headers: tuple[SliceHeader, ...]
    dtype: np.dtype | None
    """float32 if the slices differ in rescale or stored type; None to keep each slice's dtype."""
    rendering: Any
    """Attributes with the LUT or window for all slices; empty without one."""
    dataset: Any = None
    """A multi-frame file, loaded once with its pixels still encoded; None for a series."""

    def read(self, index: int) -> Image:
        """The slice as a picture, rows × columns."""
        header = self.headers[index]
        dataset = load(header.path) if self.dataset is None else self.dataset
        return frame_image(
            dataset, header.path, header.number or 0, dtype=self.dtype, rendering=self.rendering
        )


def is_dicom_volume(path: Path) -> bool:
    """Whether a DICOM file holds several frames of an image."""
    with reading(path, "DICOM"):
        header = load_header(path, HEADER)
        return is_image(header) and frame_count(header) > 1


def is_derived_dicom(path: Path) -> bool:
    """Whether a DICOM file was computed from images, as a segmentation is."""
    with reading(path, "DICOM"):
        return is_derived(load_header(path, HEADER))


def is_series(files: Iterable[Path]) -> bool:
    """Whether two of these DICOM files are slices of one series, or one holds several frames.

    Stills without a position (ultrasound, X-ray) are not slices. Unreadable files are ignored.
    """
    uids = set()
    for path in files:
        with contextlib.suppress(ImageError), reading(path, "DICOM"):
            header = load_header(path, HEADER)
            if not is_image(header):
                continue
            uid = str(header.get("SeriesInstanceUID", ""))
            if frame_count(header) > 1 or uid in uids:
                return True
            if header.get("ImagePositionPatient"):
                uids.add(uid)
    return False


def read_series(
    folder: Path,
    files: Sequence[Path],
    *,
    axis: int | None,
    series: str | None = None,
    orientation: int | None = None,
    phase: int | None = None,
) -> Volume:
    """A series among `files` of a folder; objects that are not images are skipped.

    `series`: its UID; None for the only one. `orientation`: which of those that it mixes. `phase`:
    which image of those that share a place.
    ImageError if there is nothing to choose from, or no choice, or no stack of slices.
    """
    members = _choose_series(folder, files, series)
    if len(members) == 1:
        return read_dicom_volume(members[0][0], axis=axis, orientation=orientation, phase=phase)
    headers = []
    for path, dataset in members:
        with reading(path, "DICOM"):
            if frame_count(dataset) > 1:
                raise ImageError(
                    f"{folder}: {path.name} is one of {len(members)} files of a series and holds "
                    "several frames itself; expected one multi-frame file alone: give that file"
                )
            headers.append(slice_header(path, dataset))
    if all(header.position is None for header in headers):
        raise ImageError(
            f"{folder}: {headers[0].name} and {len(headers) - 1} more have no "
            "ImagePositionPatient, so their order is unknown; segment them as single images"
        )
    return _volume(folder, _chosen_stack(folder, headers, orientation, phase), axis)


def _chosen_stack(
    path: Path, headers: Sequence[SliceHeader], orientation: int | None, phase: int | None
) -> Stack:
    """The stack of one orientation and one phase. Images of one size are of one stack."""
    if orientation is not None:
        headers = choose_orientation(path, headers, orientation)
    return stack(path, choose_phase(path, headers, phase))


def read_dicom_volume(
    path: Path, *, axis: int | None, orientation: int | None = None, phase: int | None = None
) -> Volume:
    """The frames of one DICOM file: sorted by position, or in file order if they have none.

    ImageError if the file is not an image, is damaged, or its frames do not form a stack.
    """
    dataset = load(path)
    with reading(path, "DICOM"):
        check_is_image(path, dataset)
        check_frames(path, dataset)
        count = frame_count(dataset)
        if count == 1:
            headers = [slice_header(path, dataset)]
        else:
            headers = [slice_header(path, dataset, k) for k in range(count)]
        stacked = _chosen_stack(path, headers, orientation, phase)
    return _volume(path, stacked, axis, dataset)


def _choose_series(
    folder: Path, files: Sequence[Path], chosen: str | None
) -> list[tuple[Path, Any]]:
    """The images of the series `chosen`, or of the only one, each with its header."""
    series: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    for path in files:
        with reading(path, "DICOM"):
            header = load_header(path, HEADER)
            if is_image(header):
                series[str(header.get("SeriesInstanceUID", ""))].append((path, header))
            else:
                logger.info("%s is skipped: it is not an image", path)
    if not series:
        raise ImageError(f"{folder} holds no DICOM images; give the folder of one series")
    if chosen is not None and chosen in series:
        return series[chosen]
    if chosen is not None or len(series) > 1:
        with reading(folder, "DICOM"):
            names = _series_names(series)
        choice = "none was given" if chosen is None else f"{chosen} was given"
        raise ImageError(
            f"{folder} holds {len(series)} series: {names}: choose one by its UID (--series); "
            f"{choice}"
        )
    (members,) = series.values()
    return members


def _volume(path: Path, stacked: Stack, axis: int | None, dataset: Any = None) -> Volume:
    """The volume of a stack. The middle slice is decoded, so that an unreadable series fails now.

    Dtype, colour and rendering of the volume are those of the middle slice.
    """
    if axis not in (None, 2):
        raise ImageError(
            f"{path}: axis {axis} was given, expected 2: DICOM slices are used as they were "
            "acquired; leave the axis out"
        )
    headers = stacked.headers
    dtype = None if len({h.scaling for h in headers}) == 1 else np.dtype(np.float32)
    middle = headers[len(headers) // 2]
    middle_dataset = load(middle.path) if dataset is None else dataset
    with reading(middle.path, "DICOM"):
        rendering = rendering_of(middle_dataset, middle.number or 0)
    slices = DicomSlices(headers=headers, dtype=dtype, rendering=rendering, dataset=dataset)
    image = slices.read(len(headers) // 2)
    stored = image.pixels.dtype.newbyteorder("=")
    rows, columns = middle.size
    return Volume(
        path=path,
        kind="dicom",
        files=tuple(dict.fromkeys(h.path for h in headers)),
        shape=(columns, rows, len(headers)),
        axis=2,
        plane_axes=(1, 0),
        spacing_mm=stacked.spacing_mm,
        affine=stacked.affine,
        dtype=np.dtype(np.float32) if stored.kind == "f" else stored,
        colour=image.pixels.ndim == 3,
        inverted=image.inverted,
        rendered=image.display is not None,
        slices=slices,
    )


def slice_header(path: Path, dataset: Any, frame: int | None = None) -> SliceHeader:
    """The header of a single-frame file, or of frame `frame` (from 0) of a multi-frame file."""

    def group(name: str) -> Any:
        return functional_group(dataset, name, frame or 0)

    plane_position = group("PlanePositionSequence")
    # A position for the whole multi-frame file says nothing about its frames.
    has_position = frame is None or plane_position is not dataset
    spacing = _pixel_spacing(path, dataset, frame or 0)
    measures = functional_groups(dataset, "PixelMeasuresSequence", frame or 0)
    thickness, between_slices = (
        next((length for each in measures if (length := abs(number(each, name) or 0.0))), 0.0)
        for name in ("SliceThickness", "SpacingBetweenSlices")  # the latter is negative in NM
    )
    return SliceHeader(
        path=path,
        number=frame,
        uid=str(dataset.get("SOPInstanceUID", "")),
        size=(int(dataset.Rows), int(dataset.Columns)),
        photometric=str(dataset.get("PhotometricInterpretation", "")),
        scaling=_scaling(dataset, group("PixelValueTransformationSequence")),
        reference=str(dataset.get("FrameOfReferenceUID") or ""),
        position=_numbers(plane_position, "ImagePositionPatient", 3) if has_position else None,
        orientation=_numbers(group("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
        spacing=spacing,
        thickness=thickness if 0 < thickness < np.inf else None,
        acquired=(*(number(dataset, name) or 0.0 for name in ACQUISITION), float(frame or 0)),
        between_slices=between_slices if 0 < between_slices < np.inf else None,
    )


def _pixel_spacing(path: Path, dataset: Any, frame: int) -> tuple[float, float] | None:
    """mm between rows, and between columns, from the innermost group that gives both.

    That is the frame's own, else the one all frames share, else the file's. A file whose first
    frame has another spacing further out is reported.
    """
    declared = [
        (spacing[0], spacing[1])
        for group in functional_groups(dataset, "PixelMeasuresSequence", frame)
        if (spacing := _numbers(group, "PixelSpacing", 2)) and min(spacing) > 0
    ]
    if frame == 0:
        for outer in declared[1:]:
            warn_of_spacing(path, "outer PixelSpacing", outer, "innermost group", declared[0])
    return declared[0] if declared else None


def _scaling(dataset: Any, group: Any) -> tuple[object, ...]:
    """The source of the dtype of a frame's intensities; equal for frames of equal dtype."""
    if group.get("ModalityLUTSequence"):
        return ("lookup table",)
    if rescale(group) != (1.0, 0.0):
        return ("rescaled",)
    return (str(dataset.get("BitsAllocated")), str(dataset.get("PixelRepresentation")))


def _numbers(dataset: Any, name: str, count: int) -> tuple[float, ...] | None:
    """The value of an attribute with `count` finite numbers; None for anything else."""
    values = dataset.get(name)
    if values is None or isinstance(values, str | float | int) or len(values) != count:
        return None
    numbers = tuple(float(value) for value in values)
    return numbers if np.isfinite(numbers).all() else None


def _series_names(series: Mapping[str, Sequence[tuple[Path, Any]]]) -> str:
    """`series 3 (CT, 120 images of 512×512 pixels, such as IM0001, UID 1.2.3), …`, at most five.

    Descriptions are free text, in which names of patients occur, and are left out.
    """
    names = []
    for uid, members in series.items():
        path, header = members[0]
        names.append(
            f"series {number_text(header.get('SeriesNumber'))} "
            f"({code_text(header.get('Modality'), MODALITIES)}, {len(members)} images of "
            f"{number_text(header.get('Columns'))}×{number_text(header.get('Rows'))} pixels, such "
            f"as {path.name}, "
            f"UID {uid_text(uid)})"
        )
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
