"""A folder with one DICOM series, or a multi-frame DICOM → `Volume`."""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.errors import ImageError

from .dicom import (
    frame_count,
    frame_image,
    functional_group,
    load,
    load_header,
    number,
    rendering_of,
    rescale,
)
from .files import reading
from .image import Image
from .stacking import Frame, Stack, stack
from .volume import Volume

log = logging.getLogger(__name__)

HEADER = [
    "SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality",
    "SeriesDescription", "SliceThickness", "SeriesInstanceUID", "SeriesNumber",
    "ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "PixelSpacing",
    "BitsAllocated", "PixelRepresentation", "RescaleIntercept", "RescaleSlope",
    "ModalityLUTSequence",
]  # fmt: skip
DERIVED = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "a label map segmentation",
    "1.2.840.10008.5.1.4.1.1.30": "a parametric map",
    "1.2.840.10008.5.1.4.1.1.481.2": "a dose distribution",
}
"""Objects that hold pixels but are no images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DicomSlices:
    """Slices that are decoded when they are read."""

    frames: tuple[Frame, ...]
    dtype: np.dtype | None
    """float32 where some slices are rescaled and others not, or differently stored."""
    rendering: Any
    """Attributes of the LUT or window for all slices; empty without one."""
    dataset: Any = None
    """A multi-frame file, loaded once with its pixels as they are stored; None for a series."""

    def read(self, index: int) -> Image:
        """The slice as a picture, rows × columns."""
        frame = self.frames[index]
        dataset = load(frame.path) if self.dataset is None else self.dataset
        return frame_image(
            dataset, frame.path, frame.number or 0, dtype=self.dtype, rendering=self.rendering
        )


def is_dicom_volume(path: Path) -> bool:
    """Whether a DICOM file holds several frames of an image."""
    with reading(path, "DICOM"):
        header = load_header(path, HEADER)
        return _is_image(header) and frame_count(header) > 1


def is_derived_dicom(path: Path) -> bool:
    """Whether a DICOM file was made from images."""
    with reading(path, "DICOM"):
        return _is_derived(load_header(path, HEADER))


def is_series(files: Iterable[Path]) -> bool:
    """Whether two of these DICOM files are slices of one series, or one holds several frames.

    Stills without a position (ultrasound, X-ray) are no slices. What cannot be read does not count.
    """
    seen = set()
    for path in files:
        with contextlib.suppress(ImageError), reading(path, "DICOM"):
            header = load_header(path, HEADER)
            if not _is_image(header):
                continue
            uid = str(header.get("SeriesInstanceUID", ""))
            if frame_count(header) > 1 or uid in seen:
                return True
            if header.get("ImagePositionPatient"):
                seen.add(uid)
    return False


def read_series(folder: Path, files: Sequence[Path], *, axis: int | None) -> Volume:
    """The one series among `files` of a folder; objects that are no images are passed over."""
    members = _one_series(folder, files)
    if len(members) == 1:
        return read_dicom_volume(members[0][0], axis=axis)
    frames = []
    for path, header in members:
        with reading(path, "DICOM"):
            if frame_count(header) > 1:
                raise ImageError(
                    f"{folder}: {path.name} is one of {len(members)} files and holds several "
                    "frames itself; give one such file"
                )
            frames.append(frame_of(path, header))
    if all(frame.position is None for frame in frames):
        raise ImageError(
            f"{folder}: {frames[0].name} and {len(frames) - 1} more have no ImagePositionPatient, "
            "so that their order is unknown; segment them as single images"
        )
    return _volume(folder, stack(folder, frames), axis)


def read_dicom_volume(path: Path, *, axis: int | None) -> Volume:
    """The frames of one DICOM: sorted if they have positions, else in the order of the file."""
    dataset = load(path)
    with reading(path, "DICOM"):
        if not _is_image(dataset):
            what = DERIVED.get(str(dataset.get("SOPClassUID")), "an object without pixels")
            raise ImageError(f"{path} is {what}, not an image; give the image it was made from")
        count = frame_count(dataset)
        if count > path.stat().st_size:
            raise ImageError(f"{path} announces {count} frames, more than it can hold: damaged")
        if count == 1:
            frames = [frame_of(path, dataset)]
        else:
            frames = [frame_of(path, dataset, k) for k in range(count)]
        stacked = stack(path, frames)
    return _volume(path, stacked, axis, dataset)


def _one_series(folder: Path, files: Sequence[Path]) -> list[tuple[Path, Any]]:
    """The images of the only series, with their headers."""
    series: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    for path in files:
        with reading(path, "DICOM"):
            header = load_header(path, HEADER)
            if _is_image(header):
                series[str(header.get("SeriesInstanceUID", ""))].append((path, header))
            else:
                log.info("%s: passed over, it is no image", path)
    if not series:
        raise ImageError(f"{folder} holds no DICOM images; give the folder of one series")
    if len(series) > 1:
        with reading(folder, "DICOM"):
            names = _series_names(series.values())
        raise ImageError(
            f"{folder} holds {len(series)} series: {names}; put the files of one series in a "
            "folder of its own"
        )
    (members,) = series.values()
    return members


def _volume(path: Path, stacked: Stack, axis: int | None, dataset: Any = None) -> Volume:
    """Decode the middle slice, so that an unreadable series fails here, and learn from it."""
    if axis not in (None, 2):
        raise ImageError(
            f"{path}: axis {axis} was given; DICOM slices are taken as they were acquired, "
            "along axis 2"
        )
    frames = stacked.frames
    dtype = None if len({f.scaling for f in frames}) == 1 else np.dtype(np.float32)
    middle = frames[len(frames) // 2]
    held = load(middle.path) if dataset is None else dataset
    with reading(middle.path, "DICOM"):
        rendering = rendering_of(held, middle.number or 0)
    slices = DicomSlices(frames=frames, dtype=dtype, rendering=rendering, dataset=dataset)
    shown = slices.read(len(frames) // 2)
    stored = shown.pixels.dtype.newbyteorder("=")
    rows, columns = middle.size
    return Volume(
        path=path,
        kind="dicom",
        files=tuple(dict.fromkeys(f.path for f in frames)),
        shape=(columns, rows, len(frames)),
        axis=2,
        plane_axes=(1, 0),
        spacing_mm=stacked.spacing_mm,
        affine=stacked.affine,
        dtype=np.dtype(np.float32) if stored.kind == "f" else stored,
        colour=shown.pixels.ndim == 3,
        inverted=shown.inverted,
        rendered=shown.display is not None,
        slices=slices,
    )


def _is_image(header: Any) -> bool:
    has_pixels = bool(header.get("Rows")) and bool(header.get("Columns"))
    return has_pixels and not _is_derived(header)


def _is_derived(header: Any) -> bool:
    return str(header.get("SOPClassUID", "")) in DERIVED


def frame_of(path: Path, dataset: Any, frame: int | None = None) -> Frame:
    """What the header says of a file, or of one of its frames."""

    def group(name: str) -> Any:
        return functional_group(dataset, name, frame or 0)

    place, turn, measures = (
        group(f"{name}Sequence") for name in ("PlanePosition", "PlaneOrientation", "PixelMeasures")
    )
    # One position for a whole multi-frame file is none for its frames.
    placed = frame is None or place is not dataset
    spacing = _numbers(measures, "PixelSpacing", 2)
    thickness = number(measures, "SliceThickness")
    return Frame(
        path=path,
        number=frame,
        uid=str(dataset.get("SOPInstanceUID", "")),
        size=(int(dataset.Rows), int(dataset.Columns)),
        meaning=str(dataset.get("PhotometricInterpretation", "")),
        scaling=_scaling(dataset, group("PixelValueTransformationSequence")),
        reference=str(dataset.get("FrameOfReferenceUID") or ""),
        position=_numbers(place, "ImagePositionPatient", 3) if placed else None,
        orientation=_numbers(turn, "ImageOrientationPatient", 6),
        spacing=(spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None,
        thickness=thickness if thickness and thickness > 0 else None,
    )


def _scaling(dataset: Any, group: Any) -> tuple[object, ...]:
    """What decides the dtype of a frame's intensities."""
    if group.get("ModalityLUTSequence"):
        return ("lookup table",)
    if rescale(group) != (1.0, 0.0):
        return ("rescaled",)
    return (dataset.get("BitsAllocated"), dataset.get("PixelRepresentation"))


def _numbers(dataset: Any, name: str, count: int) -> tuple[float, ...] | None:
    """A numeric attribute of `count` finite values; None if it is absent or anything else."""
    values = dataset.get(name)
    if values is None or isinstance(values, str | float | int) or len(values) != count:
        return None
    numbers = tuple(float(value) for value in values)
    return numbers if np.isfinite(numbers).all() else None


def _series_names(series: Iterable[Sequence[tuple[Path, Any]]]) -> str:
    """`series 3 'Thorax' (CT, 120 images, such as IM0001), …`, at most five."""
    names = []
    for members in series:
        path, header = members[0]
        names.append(
            f"series {header.get('SeriesNumber') or '?'} "
            f"'{' '.join(str(header.get('SeriesDescription') or 'no description').split())}' "
            f"({header.get('Modality') or 'no modality'}, {len(members)} images, "
            f"such as {path.name})"
        )
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
