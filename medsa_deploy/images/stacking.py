"""What the headers of DICOM slices say → their order, and where the stack lies in the patient.

Slices are sorted by position along the normal of the image plane, never by file name or instance
number. Two neighbouring slices must lie apart like all others: to 1 % of the spacing, or 0.03 mm
where that is more, because positions are often written in hundredths of a millimetre; never more
than a tenth of the spacing. A uniform sideways shift (a tilted gantry) is kept, as a sheared
affine.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsa_deploy.errors import ImageError

logger = logging.getLogger(__name__)

SAME_ORIENTATION = 1e-4
"""Direction cosines this close are the same; files write them with 4 to 6 decimals."""
SAME_PLACE_MM = 1e-3
LEAST_TOLERANCE_MM = 0.03
TO_NIFTI = np.diag([-1.0, -1.0, 1.0])
"""DICOM's axes point to left and posterior, NIfTI's to right and anterior."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """What a header says about one slice: a file, or one frame of a file."""

    path: Path
    number: int | None = None
    """Of a frame, counted from 0; None for a file that holds one."""
    uid: str
    """SOP Instance UID."""
    size: tuple[int, int]
    """(rows, columns)"""
    meaning: str
    """Photometric interpretation."""
    scaling: tuple[object, ...]
    """What decides the dtype of intensities: a lookup table, a rescale, or the stored type."""
    reference: str = ""
    """Frame of Reference UID: positions are comparable within one."""
    position: tuple[float, ...] | None = None
    """(3,) mm, the centre of the first pixel."""
    orientation: tuple[float, ...] | None = None
    """(6,) directions of increasing column, then row, index."""
    spacing: tuple[float, float] | None = None
    """mm between rows, and between columns."""
    thickness: float | None = None
    """mm"""

    @property
    def name(self) -> str:
        """How messages call it; frames are counted from 1, as DICOM does."""
        return self.path.name if self.number is None else f"frame {self.number + 1}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """Slices in order."""

    frames: tuple[Frame, ...]
    spacing_mm: tuple[float, float, float]
    """Along columns, rows and slices; 1.0 where the files say nothing."""
    affine: np.ndarray | None
    """(4, 4) voxel (column, row, slice, 1) → mm, NIfTI's axes; None without positions, or without
    the size of a pixel."""


def stack(path: Path, frames: Sequence[Frame]) -> Stack:
    """Order the slices of one series; ImageError names those that do not belong together."""
    _require_one(path, frames, "image sizes", [f"{f.size[1]}×{f.size[0]}" for f in frames])
    _require_one(path, frames, "kinds of pixels", [f.meaning for f in frames])
    _require_one(path, frames, "pixel spacings", [f.spacing or () for f in frames], 1e-4)
    if all(frame.position is None for frame in frames):
        return Stack(frames=tuple(frames), spacing_mm=_spacing(frames[0], None), affine=None)
    unplaced = [f for f in frames if f.position is None or f.orientation is None]
    if unplaced:
        raise ImageError(
            f"{path}: ImagePositionPatient or ImageOrientationPatient is missing in "
            f"{_names(unplaced)}, whose place among the slices is unknown; take them out"
        )
    _require_one(path, frames, "frames of reference", [f.reference for f in frames])
    orientations = [f.orientation or () for f in frames]
    _require_one(path, frames, "orientations", orientations, SAME_ORIENTATION)
    normal = _normal(path, frames[0])
    along = np.array([f.position for f in frames]) @ normal
    ordered = [frames[k] for k in np.argsort(along, kind="stable")]
    _check_places(path, ordered, normal)
    return _placed(path, ordered, normal)


def _placed(path: Path, ordered: list[Frame], normal: np.ndarray) -> Stack:
    """The affine of slices that are known to lie evenly."""
    positions = np.array([f.position for f in ordered])
    spacing = _spacing(ordered[0], None)
    step = normal * spacing[2]
    if len(ordered) > 1:
        step = (positions[-1] - positions[0]) / (len(ordered) - 1)
        spacing = _spacing(ordered[0], float(np.linalg.norm(step)))
    columns, rows = _directions(ordered[0])
    if ordered[0].spacing is None:
        logger.warning(
            "%s says where its slices lie, but not how large a pixel is (PixelSpacing): masks are "
            "not placed in the patient",
            path,
        )
        return Stack(frames=tuple(ordered), spacing_mm=spacing, affine=None)
    affine = np.eye(4)
    affine[:3, :3] = TO_NIFTI @ np.stack([columns * spacing[0], rows * spacing[1], step], axis=1)
    affine[:3, 3] = TO_NIFTI @ positions[0]
    return Stack(frames=tuple(ordered), spacing_mm=spacing, affine=affine)


def _spacing(frame: Frame, between_slices: float | None) -> tuple[float, float, float]:
    rows, columns = frame.spacing or (1.0, 1.0)
    return columns, rows, between_slices or frame.thickness or 1.0


def _directions(frame: Frame) -> np.ndarray:
    """(2, 3) directions of increasing column, and of increasing row."""
    return np.array(frame.orientation, np.float64).reshape(2, 3)


def _normal(path: Path, frame: Frame) -> np.ndarray:
    """(3,) The unit normal of the image plane, along which slices are counted."""
    columns, rows = _directions(frame)
    lengths = np.linalg.norm(columns), np.linalg.norm(rows)
    if not np.allclose([*lengths, columns @ rows], [1, 1, 0], atol=1e-2):
        raise ImageError(
            f"{path}: {frame.name} has ImageOrientationPatient {_text(frame.orientation or ())}, "
            "expected two perpendicular directions of length 1; export the series again"
        )
    normal = np.cross(columns, rows)
    return np.asarray(normal / np.linalg.norm(normal))


def _check_places(path: Path, ordered: list[Frame], normal: np.ndarray) -> None:
    """Refuse two slices at one place, missing slices, and slices out of line, in `ordered`."""
    if len(ordered) < 2:
        return
    steps = np.diff(np.array([f.position for f in ordered]), axis=0)
    gaps = steps @ normal
    same = np.flatnonzero(gaps < SAME_PLACE_MM)
    if same.size:
        one, other = ordered[same[0]], ordered[same[0] + 1]
        copies = one.uid == other.uid and one.number is None
        why = "are copies of one image" if copies else "lie at the same place"
        raise ImageError(
            f"{path}: {one.name} and {other.name} {why} (pairs of this kind: {len(same)}); "
            "keep one image for each place (one phase, one echo)"
        )
    _check_even(path, ordered, steps, normal)


def _check_even(path: Path, ordered: list[Frame], steps: np.ndarray, normal: np.ndarray) -> None:
    """Refuse steps (N - 1, 3) between slices that are not all alike."""
    gaps = steps @ normal
    # The lower median is a gap that occurs, and no sum of two.
    spacing = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    tolerance = max(0.01 * spacing, min(LEAST_TOLERANCE_MM, 0.1 * spacing))
    sideways = steps - gaps[:, None] * normal
    shifts = np.linalg.norm(sideways - np.median(sideways, axis=0), axis=1)
    odd = np.flatnonzero((np.abs(gaps - spacing) > tolerance) | (shifts > tolerance))
    if not odd.size:
        return
    one, other, gap = ordered[odd[0]], ordered[odd[0] + 1], gaps[odd[0]]
    between = f"{path}: between {one.name} and {other.name} "
    more = f"; {len(odd) - 1} more such places" if len(odd) > 1 else ""
    if abs(gap - spacing) <= tolerance:
        raise ImageError(
            f"{between}the slices are shifted sideways, unlike the others{more}; "
            "keep slices of one stack in the folder"
        )
    missing = round(gap / spacing) - 1
    count = f" ({missing} missing)" if missing > 0 else ""
    raise ImageError(
        f"{between}there are {gap:.4g} mm, elsewhere {spacing:.4g} mm{count}{more}; "
        "complete the series, or resample it to even slices"
    )


def _require_one(
    path: Path, frames: Sequence[Frame], what: str, values: Sequence[object], near: float = 0
) -> None:
    """ImageError unless all values are one; it names the frames of the rarer ones."""
    groups: list[tuple[object, list[Frame]]] = []
    for frame, value in zip(frames, values, strict=True):
        for known, members in groups:
            if known == value or (near and _close(known, value, near)):
                members.append(frame)
                break
        else:
            groups.append((value, [frame]))
    if len(groups) == 1:
        return
    groups.sort(key=lambda group: -len(group[1]))
    (usual, members), *others = groups
    odd = ", ".join(f"{_text(value)} in {_names(of)}" for value, of in others[:3])
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    raise ImageError(
        f"{path} mixes {what}: {_text(usual)} in {len(members)} images, {odd}{more}; "
        "keep the slices of one stack"
    )


def _close(one: object, other: object, near: float) -> bool:
    a, b = np.asarray(one), np.asarray(other)
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= near))


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "\\".join(f"{part:g}" for part in value) or "none"
    return str(value) or "none"


def _names(frames: Sequence[Frame]) -> str:
    """`a.dcm, b.dcm, c.dcm and 4 more`"""
    more = f" and {len(frames) - 3} more" if len(frames) > 3 else ""
    return ", ".join(frame.name for frame in frames[:3]) + more
