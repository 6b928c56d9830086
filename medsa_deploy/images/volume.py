"""A volume → its slices along one axis; a voxel or a box in voxels ⇄ its place in those slices.

One rule holds for every format: x, y, z are indices along the three stored axes, so the point
(x, y, z) is the voxel [x, y, z] of the array. In DICOM these axes are column, row, slice: the array
has the shape (columns, rows, slices), and slices are counted along the normal of the image plane
(from the feet to the head in an axial series). Nothing is flipped or turned to look anatomical.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np

from medsa_deploy.errors import ImageError, PromptError

from .image import Image, Nan, check_values
from .tissue import TissueRange, robust_window, tissue_range

logger = logging.getLogger(__name__)

Kind: TypeAlias = Literal["nifti", "npy", "dicom", "nrrd", "tiff"]
SAMPLED_SLICES = 32
"""Slices that percentiles are computed from, spread over the volume."""
Box: TypeAlias = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of a slice."""
VolumeBox: TypeAlias = tuple[float, float, float, float, float, float]
"""x0, y0, z0, x1, y1, z1 in voxels."""


class Slices(Protocol):
    """The source of a volume's slices; each is read and scaled only when it is needed."""

    def read(self, index: int) -> Image:
        """The slice with the values its file holds, unchecked."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """Slices along one axis, with the geometry that a mask of the volume must have."""

    path: Path
    """The file, or the folder of a series."""
    kind: Kind
    files: tuple[Path, ...] = field(repr=False)
    """Every file that holds voxels."""
    shape: tuple[int, int, int]
    """(X, Y, Z) in stored order; for DICOM (columns, rows, slices)."""
    axis: int
    """The axis along which slices are taken; 2 for DICOM."""
    plane_axes: tuple[int, int]
    """The stored axes that become rows and columns of a slice. NIfTI and .npy: rows are the first
    of the two axes that remain, as in `read_image`. DICOM: (1, 0), so that slices look as acquired.
    """
    spacing_mm: tuple[float, float, float]
    """Along the three stored axes; 1.0 for a file without spacing."""
    affine: np.ndarray | None
    """(4, 4) float64: voxel (x, y, z, 1) → mm towards right, anterior, superior, as in NIfTI; None
    if the file does not place its voxels."""
    dtype: np.dtype
    """Type of the slices' pixels: uint8 for display values, any other for raw intensities."""
    colour: bool = False
    """Slices are (H, W, 3)."""
    inverted: bool = False
    """Low intensities are bright, as in `Image`."""
    rendered: bool = False
    """Slices have a `display`: the file defines a rendering. If each slice of a series has its own
    window, the middle slice's is used for all, so that equal tissue looks equal."""
    nan: Nan = "refuse"
    """Whether NaN in a slice is a fault, or background."""
    slices: Slices = field(repr=False)

    def __len__(self) -> int:
        """The number of slices."""
        return self.shape[self.axis]

    @property
    def slice_size(self) -> tuple[int, int]:
        """(H, W) of every slice."""
        rows, columns = self.plane_axes
        return self.shape[rows], self.shape[columns]

    def slice(self, index: int) -> Image:
        """One slice, (H, W) or (H, W, 3); ImageError for infinite values, and NaN if it is a fault.

        Unlike a single image, a slice may have one value everywhere: volumes end in air.
        """
        if not 0 <= index < len(self):
            raise ImageError(
                f"{self.path} has no slice {index} along axis {self.axis}: give 0…{len(self) - 1}"
            )
        name = f"{self.path}: slice {index}"
        image = check_values(self.slices.read(index), name, nan=self.nan)
        if image.pixels.shape[:2] != self.slice_size:
            raise ImageError(
                f"{self.path}: slice {index} has shape {image.pixels.shape[:2]}, expected "
                f"{self.slice_size}: the file has changed since it was opened; run again"
            )
        return image

    def plane(self, labels: np.ndarray, index: int) -> np.ndarray:
        """Slice `index` of `labels` (X, Y, Z), as a view (H, W) oriented like `slice(index)`."""
        if labels.shape != self.shape:
            raise ImageError(
                f"the labels have shape {labels.shape}, {self.path} has {self.shape}: give the "
                "labels of this volume"
            )
        view: np.ndarray = labels.transpose(self.axis, *self.plane_axes)[index]
        return view

    def intensity_range(self) -> tuple[float, float]:
        """(lowest, highest) of all pixels that are no padding, after scaling.

        The first call reads every slice. ImageError for values that `slice` refuses.
        """
        return self.tissue.low, self.tissue.high

    @cached_property
    def tissue(self) -> TissueRange:
        """The range, and what was left out of it. Reads every slice."""
        return tissue_range(self.slice(index) for index in range(len(self)))

    def robust_window(self) -> tuple[float, float]:
        """Intensities of black and white: percentiles of some slices, without padding."""
        step = 1 + len(self) // SAMPLED_SLICES
        slices = (self.slice(index) for index in range(step // 2, len(self), step))
        return robust_window(slices, self.tissue)

    def locate(self, point: Sequence[float]) -> tuple[int, float, float]:
        """The voxel (x, y, z) → (slice index, x, y in pixels of that slice).

        The coordinate along the slices must be a whole number. PromptError if it is not, or if the
        voxel is outside the volume.

        >>> volume = read_volume("head.npy")  # (3, 4, 5), sliced along x
        >>> volume.locate((2, 1, 4))
        (2, 4.0, 1.0)
        """
        if len(point) != 3:
            raise PromptError(f"the point {_numbers(point)} should be x,y,z in voxels")
        name = f"the point {_numbers(point)}"
        if not all(0 <= value < size for value, size in zip(point, self.shape, strict=True)):
            raise PromptError(f"{name} lies outside the volume: {self._range(end=-1)}")
        index = point[self.axis]
        if index != int(index):
            raise PromptError(
                f"{name} lies between two slices: give a whole {'xyz'[self.axis]}, "
                f"0…{len(self) - 1}"
            )
        rows, columns = self.plane_axes
        return int(index), float(point[columns]), float(point[rows])

    def locate_box(self, box: Sequence[float]) -> tuple[range, Box]:
        """The box (x0, y0, z0, x1, y1, z1) → its slices, and its box in pixels of each slice.

        The corners are edges, as in an image: the box holds the voxels x0 ≤ x < x1 along every
        axis, and the whole volume is (0, 0, 0, X, Y, Z). PromptError if the box is empty or
        outside the volume.

        >>> volume = read_volume("head.npy")  # (3, 4, 5), sliced along x
        >>> volume.locate_box((0, 1, 2, 2, 3, 5))
        (range(0, 2), (2.0, 1.0, 5.0, 3.0))
        """
        if len(box) != 6:
            raise PromptError(f"the box {_numbers(box)} should be x0,y0,z0,x1,y1,z1 in voxels")
        low, high = box[:3], box[3:]
        name = f"the box {_numbers(box)}"
        if not all(a < b for a, b in zip(low, high, strict=True)):
            raise PromptError(
                f"{name} is empty or inverted: give x0,y0,z0,x1,y1,z1 with each first < second"
            )
        if not all(a >= 0 and b <= c for a, b, c in zip(low, high, self.shape, strict=True)):
            raise PromptError(f"{name} lies outside the volume: {self._range(end=0)}")
        slices = range(math.ceil(low[self.axis]), math.ceil(high[self.axis]))
        if not slices:
            raise PromptError(
                f"{name} lies between two slices: give whole numbers along {'xyz'[self.axis]}, "
                "the second one past the last slice"
            )
        rows, columns = self.plane_axes
        x0, x1, y0, y1 = (float(part[k]) for k in (columns, rows) for part in (low, high))
        return slices, (x0, y0, x1, y1)

    def voxel(self, index: int, x: float, y: float) -> tuple[float, float, float]:
        """The inverse of `locate`: a pixel of a slice → its voxel (x, y, z)."""
        return self._stored(index, x, y)

    def voxel_box(self, slices: range, box: Box) -> VolumeBox:
        """The inverse of `locate_box`: a box in each of `slices` → the box in voxels."""
        x0, y0, x1, y1 = box
        return (*self._stored(slices.start, x0, y0), *self._stored(slices.stop, x1, y1))

    def _stored(self, index: float, x: float, y: float) -> tuple[float, float, float]:
        """Pixel x, y of slice `index` as coordinates along the stored axes."""
        rows, columns = self.plane_axes
        along = {self.axis: float(index), columns: float(x), rows: float(y)}
        return along[0], along[1], along[2]

    def _range(self, end: int) -> str:
        """`x 0…196, y 0…232, z 0…188`: the valid coordinates; `end` is added to the sizes."""
        sizes = zip("xyz", self.shape, strict=True)
        return ", ".join(f"{name} 0…{size + end}" for name, size in sizes)


def default_axis(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> int:
    """The axis of size 1, else the axis of largest spacing; among equals, the last."""
    if 1 in shape:
        return max(k for k in range(3) if shape[k] == 1)
    spacing = np.asarray(spacing_mm)
    # Equal spacings computed from an affine differ in the last digits.
    return int(np.flatnonzero(spacing >= spacing.max() * (1 - 1e-4))[-1])


def usable_affine(path: Path, affine: np.ndarray) -> np.ndarray | None:
    """`affine` itself; None, with a warning, if NaN or infinity in it places no voxel."""
    if np.isfinite(affine).all():
        return affine
    logger.warning("%s: its affine holds NaN or infinity and is ignored", path)
    return None


def warn_of_spacing(
    path: Path, field: str, declared: Sequence[float], source: str, spacing_mm: Sequence[float]
) -> None:
    """Warn if a header field declares another spacing than the one that is used.

    `declared` and `spacing_mm` in mm, axis by axis. A declared value that is no length (0, NaN)
    declares nothing. Up to 1 % is rounding.
    """
    pairs = list(zip(declared, spacing_mm, strict=False))
    if any(0 < a < math.inf and abs(a - b) > 0.01 * b for a, b in pairs):
        logger.warning(
            "%s: the spacing is %s mm by its %s, which is used, and %s mm by its %s",
            path,
            _lengths(spacing_mm),
            source,
            _lengths(declared),
            field,
        )


def check_volume(volume: Volume) -> Volume:
    """`volume` itself; ImageError if all voxels are equal. Reads slices until two voxels differ."""
    first = None
    for index in range(len(volume)):
        pixels = volume.slice(index).pixels
        first = pixels.flat[0] if first is None else first
        if (pixels != first).any():
            return volume
    value = None if first is None else first.tolist()
    raise ImageError(f"{volume.path}: every voxel is {value}: nothing to segment")


def _lengths(values: Sequence[float]) -> str:
    """`0.8 × 0.8 × 2.5`"""
    return " × ".join(f"{value:.4g}" for value in values)


def _numbers(values: Sequence[float]) -> str:
    """`(12, 40.5, 7)`"""
    return f"({', '.join(f'{value:g}' for value in values)})"
