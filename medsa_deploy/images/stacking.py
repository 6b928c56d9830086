"""Headers of DICOM slices → the slices in order, and the place of their stack in the patient.

Slices are sorted by position along the normal of the image plane, never by file name or instance
number. All gaps between neighbouring slices must be equal, to 1 % of the spacing. Positions are
often written in hundredths of a millimetre, so a difference of 0.03 mm is always accepted, unless
that is more than a tenth of the spacing. A uniform sideways shift (a tilted gantry) is kept, as a
sheared affine.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsa_deploy.errors import ImageError

from .volume import warn_of_spacing

logger = logging.getLogger(__name__)

SAME_ORIENTATION = 1e-4
Groups = list[tuple[object, list["SliceHeader"]]]
"""Direction cosines this close are the same; files write them with 4 to 6 decimals."""
SAME_PLACE_MM = 1e-3
LEAST_TOLERANCE_MM = 0.03
TO_NIFTI = np.diag([-1.0, -1.0, 1.0])
"""DICOM's axes point to left and posterior, NIfTI's to right and anterior."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SliceHeader:
    """The header of one slice: of a file, or of one frame of a multi-frame file."""

    path: Path
    number: int | None = None
    """Index of the frame, from 0; None for a single-frame file."""
    uid: str
    """SOP Instance UID."""
    size: tuple[int, int]
    """(rows, columns)"""
    photometric: str
    """Photometric interpretation."""
    scaling: tuple[object, ...]
    """The source of the intensities' dtype: a lookup table, a rescale, or the stored type."""
    reference: str = ""
    """Frame of Reference UID: positions are comparable only within the same one."""
    position: tuple[float, ...] | None = None
    """(3,) mm, the centre of the first pixel."""
    orientation: tuple[float, ...] | None = None
    """(6,) directions of increasing column, then row, index."""
    spacing: tuple[float, float] | None = None
    """mm between rows, and between columns."""
    thickness: float | None = None
    """mm; slices may overlap or leave gaps, so it places no slice that has a position."""
    acquired: tuple[float, ...] = ()
    """Sorts the images of one place: time in the cycle, echo, acquisition, number."""
    between_slices: float | None = None
    """mm from the centre of a slice to the next, as the header declares it."""

    @property
    def name(self) -> str:
        """The slice's name in messages; frames are counted from 1, as DICOM does."""
        return self.path.name if self.number is None else f"frame {self.number + 1}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """Slices in order."""

    headers: tuple[SliceHeader, ...]
    spacing_mm: tuple[float, float, float]
    """Along columns, rows and slices; 1.0 for a spacing the files do not give."""
    affine: np.ndarray | None
    """(4, 4) float64: voxel (column, row, slice, 1) → mm along NIfTI's axes; None without positions
    or without the size of a pixel."""


def stack(path: Path, headers: Sequence[SliceHeader]) -> Stack:
    """Order the slices of one series; ImageError names slices that do not belong together."""
    _require_same(path, headers, "image sizes", [f"{h.size[1]}×{h.size[0]}" for h in headers])
    _require_same(path, headers, "kinds of pixels", [h.photometric for h in headers])
    _require_same(path, headers, "pixel spacings", [h.spacing or () for h in headers], 1e-4)
    if all(header.position is None for header in headers):
        return Stack(headers=tuple(headers), spacing_mm=_spacing(headers[0], None), affine=None)
    unplaced = [h for h in headers if h.position is None or h.orientation is None]
    if unplaced:
        raise ImageError(
            f"{path}: ImagePositionPatient or ImageOrientationPatient is missing in "
            f"{_names(unplaced)}; their place among the slices is unknown: take them out"
        )
    _require_same(path, headers, "frames of reference", [h.reference for h in headers])
    choose_orientation(path, headers, None)
    normal = _normal(path, headers[0])
    along = np.array([h.position for h in headers]) @ normal
    ordered = [headers[k] for k in np.argsort(along, kind="stable")]
    _check_places(path, ordered, normal)
    return _place_stack(path, ordered, normal)


def choose_orientation(
    path: Path, headers: Sequence[SliceHeader], number: int | None
) -> Sequence[SliceHeader]:
    """The headers of one orientation, counted from that of most images; all if there is one.

    A series may hold its own localizers. ImageError for several without a choice, and for a choice
    that does not exist.
    """
    orientations = [header.orientation or () for header in headers]
    groups = _grouped(headers, orientations, SAME_ORIENTATION)
    if number is None and len(groups) == 1:
        return headers
    if len(groups) == 1:
        raise ImageError(f"{path} has images of one orientation: leave the orientation out")
    if number is None or not 0 <= number < len(groups):
        choice = "none was given" if number is None else f"{number} was given"
        raise ImageError(
            f"{_mixed(path, 'orientations', groups)}; keep the slices of one stack, or choose an "
            f"orientation (--orientation) 0…{len(groups) - 1}; {choice}"
        )
    return groups[number][1]


def _place_stack(path: Path, ordered: list[SliceHeader], normal: np.ndarray) -> Stack:
    """The stack of ordered, evenly spaced slices, with its spacing and affine."""
    positions = np.array([h.position for h in ordered])
    spacing = _spacing(ordered[0], None)
    step = normal * spacing[2]
    if len(ordered) > 1:
        step = (positions[-1] - positions[0]) / (len(ordered) - 1)
        distance = float(np.linalg.norm(step))
        spacing = _spacing(ordered[0], distance)
        declared = ordered[0].between_slices or 0.0
        warn_of_spacing(path, "SpacingBetweenSlices", [declared], "positions", [distance])
    columns, rows = _directions(ordered[0])
    if ordered[0].spacing is None:
        logger.warning(
            "%s gives the positions of its slices but no size of a pixel (PixelSpacing): masks "
            "are not placed in the patient",
            path,
        )
        return Stack(headers=tuple(ordered), spacing_mm=spacing, affine=None)
    affine = np.eye(4)
    affine[:3, :3] = TO_NIFTI @ np.stack([columns * spacing[0], rows * spacing[1], step], axis=1)
    affine[:3, 3] = TO_NIFTI @ positions[0]
    return Stack(headers=tuple(ordered), spacing_mm=spacing, affine=affine)


def _spacing(header: SliceHeader, between_slices: float | None) -> tuple[float, float, float]:
    """mm along columns, rows and slices; 1.0 for a spacing that is unknown."""
    rows, columns = header.spacing or (1.0, 1.0)
    return columns, rows, between_slices or header.between_slices or header.thickness or 1.0


def _directions(header: SliceHeader) -> np.ndarray:
    """(2, 3) float64: the directions of increasing column and of increasing row."""
    return np.array(header.orientation, np.float64).reshape(2, 3)


def _normal(path: Path, header: SliceHeader) -> np.ndarray:
    """(3,) float64: the unit normal of the image plane, along which slices are counted."""
    columns, rows = _directions(header)
    lengths = np.linalg.norm(columns), np.linalg.norm(rows)
    if not np.allclose([*lengths, columns @ rows], [1, 1, 0], atol=1e-2):
        raise ImageError(
            f"{path}: {header.name} has ImageOrientationPatient "
            f"{_text(header.orientation or ())}, "
            "expected two perpendicular directions of length 1; export the series again"
        )
    normal = np.cross(columns, rows)
    return np.asarray(normal / np.linalg.norm(normal))


def _check_places(path: Path, ordered: list[SliceHeader], normal: np.ndarray) -> None:
    """ImageError for two slices at the same place, missing slices, or slices out of line."""
    if len(ordered) < 2:
        return
    steps = np.diff(np.array([h.position for h in ordered]), axis=0)
    gaps = steps @ normal
    pairs = np.flatnonzero(gaps < SAME_PLACE_MM)
    if pairs.size:
        first, second = ordered[pairs[0]], ordered[pairs[0] + 1]
        copies = first.uid == second.uid and first.number is None
        why = "are copies of one image" if copies else "lie at the same place"
        raise ImageError(
            f"{path}: {first.name} and {second.name} {why} (pairs of this kind: {len(pairs)}); "
            "keep one image for each place (one phase, one echo)"
        )
    _check_even(path, ordered, steps, normal)


def _check_even(
    path: Path, ordered: list[SliceHeader], steps: np.ndarray, normal: np.ndarray
) -> None:
    """ImageError unless the steps between slices, (N - 1, 3) mm, are all equal."""
    gaps = steps @ normal
    # The lower median is a gap that occurs; the mean of two gaps might not be.
    spacing = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    tolerance = max(0.01 * spacing, min(LEAST_TOLERANCE_MM, 0.1 * spacing))
    sideways = steps - gaps[:, None] * normal
    shifts = np.linalg.norm(sideways - np.median(sideways, axis=0), axis=1)
    odd = np.flatnonzero((np.abs(gaps - spacing) > tolerance) | (shifts > tolerance))
    if not odd.size:
        return
    first, second, gap = ordered[odd[0]], ordered[odd[0] + 1], gaps[odd[0]]
    between = f"{path}: between {first.name} and {second.name} "
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


def _require_same(
    path: Path,
    headers: Sequence[SliceHeader],
    attribute: str,
    values: Sequence[object],
    tolerance: float = 0,
) -> None:
    """ImageError unless all `values` are equal; it names the slices with the rarer values."""
    groups = _grouped(headers, values, tolerance)
    if len(groups) > 1:
        raise ImageError(f"{_mixed(path, attribute, groups)}; keep the slices of one stack")


def _grouped(headers: Sequence[SliceHeader], values: Sequence[object], tolerance: float) -> Groups:
    """The headers by equal values, the most frequent first."""
    groups: Groups = []
    for header, value in zip(headers, values, strict=True):
        for known, members in groups:
            if known == value or (tolerance and _close(known, value, tolerance)):
                members.append(header)
                break
        else:
            groups.append((value, [header]))
    return sorted(groups, key=lambda group: -len(group[1]))


def _mixed(path: Path, attribute: str, groups: Groups) -> str:
    """`FOLDER mixes orientations: A in 120 images, B in scout.dcm`"""
    (usual, members), *rarer = groups
    odd = ", ".join(f"{_text(value)} in {_names(slices)}" for value, slices in rarer[:3])
    more = f" and {len(rarer) - 3} more" if len(rarer) > 3 else ""
    return f"{path} mixes {attribute}: {_text(usual)} in {len(members)} images, {odd}{more}"


def _close(first: object, second: object, tolerance: float) -> bool:
    """Whether two tuples of numbers have one length and differ by at most `tolerance`."""
    a, b = np.asarray(first), np.asarray(second)
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= tolerance))


def _text(value: object) -> str:
    """A value as DICOM tools print it: numbers joined by backslashes."""
    if isinstance(value, tuple):
        return "\\".join(f"{part:g}" for part in value) or "none"
    return str(value) or "none"


def _names(headers: Sequence[SliceHeader]) -> str:
    """`a.dcm, b.dcm, c.dcm and 4 more`"""
    more = f" and {len(headers) - 3} more" if len(headers) > 3 else ""
    return ", ".join(header.name for header in headers[:3]) + more
