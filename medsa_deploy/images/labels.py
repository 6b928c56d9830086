"""Labels of a file → the same labels on the voxel grid of an image or of another label file.

Two files share a grid if their voxels lie at the same places, to a tenth of a voxel. The order and
direction of the stored axes may differ. Labels are never resampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medsa_deploy.errors import ImageError

from .volume import Volume

TOLERANCE = 0.1
"""Largest distance in voxels between the corners of two equal grids: files round their affines."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """A label for each pixel or voxel of a file; 0 is background."""

    path: Path
    values: np.ndarray
    """(H, W), or (X, Y, Z) in stored order (DICOM: columns, rows, slices); unsigned integers."""
    affine: np.ndarray | None = None
    """(4, 4) voxel → mm as in `Volume`; None if the file does not place its voxels."""
    origins: np.ndarray | None = None
    """(Z, 3) mm: each slice's first voxel, for a DICOM segmentation. It leaves out slices without
    labels, so its affine holds only within a slice."""
    columns_first: bool = False
    """A single slice is stored as (columns, rows, 1), as in DICOM; a picture is (rows, columns)."""
    names: Mapping[int, str] = field(default_factory=dict)
    """The file's names of its labels."""

    def present(self) -> list[int]:
        """The labels that occur, in ascending order, without background."""
        return [int(label) for label in np.unique(self.values) if label]


def on_one_grid(
    first: Labels, second: Labels
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...] | None]:
    """The values of two files as arrays of one shape, and the spacing in mm (None: unknown).

    Axes of length 1 are dropped. ImageError if the files do not share a grid.
    """
    if first.affine is None or second.affine is None:
        (a, spacing), (b, second_spacing) = _flat(first), _flat(second)
        if a.shape != b.shape:
            raise ImageError(
                f"{first.path} has shape {first.values.shape} and {second.path} "
                f"{second.values.shape}: labels and segmentation must be of one shape"
            )
        return a, b, spacing or second_spacing
    if first.origins is not None and second.origins is not None:
        shape, affine = _common_grid(first, second)
        name = second.path
    else:
        grid = second if first.origins is not None else first
        assert grid.affine is not None
        shape, affine, name = _shape(grid.values), grid.affine, grid.path
    spacing = _known_spacing(affine)
    a, kept_spacing = without_thin_axes(onto(first, shape, affine, second.path), spacing)
    b, _ = without_thin_axes(onto(second, shape, affine, name), spacing)
    return a, b, kept_spacing


def on_volume(labels: Labels, volume: Volume) -> tuple[np.ndarray, tuple[float, ...] | None]:
    """The values of `labels` in the stored order of `volume`, and its spacing in mm, if known.

    ImageError if the grids differ; if either file has no affine, only the shapes are compared. The
    labels of a picture fit a volume of one slice.
    """
    if labels.affine is not None and volume.affine is not None:
        placed = onto(labels, volume.shape, volume.affine, volume.path)
        return placed, _known_spacing(volume.affine)
    # A spacing of 1.0 in a file without an affine is only the default, not a measurement.
    unplaced = volume.affine is None and volume.spacing_mm[:2] == (1.0, 1.0)
    known = _known_spacing(labels.affine) if unplaced else volume.spacing_mm
    if len(volume) == 1:
        placed = np.zeros(volume.shape, labels.values.dtype)
        volume.plane(placed, 0)[:] = on_picture(labels, volume.slice_size, volume.path)[0]
        return placed, known
    if labels.values.shape != volume.shape:
        raise ImageError(
            f"{labels.path} has shape {labels.values.shape}, {volume.path} {volume.shape}: "
            "use the label file of this image"
        )
    return labels.values, known


def on_picture(
    labels: Labels, size: tuple[int, int], name: Path
) -> tuple[np.ndarray, tuple[float, ...] | None]:
    """The values of `labels` as (H, W), and their spacing in mm, if known.

    ImageError unless (H, W) is `size`, the size of the picture `name`.
    """
    values, spacing = _flat(labels)
    if values.shape != size:
        raise ImageError(
            f"{labels.path} has shape {labels.values.shape}, {name} {size}: "
            "use the label file of this image"
        )
    return values, spacing


def onto(labels: Labels, shape: tuple[int, int, int], affine: np.ndarray, name: Path) -> np.ndarray:
    """The values of `labels` on the grid of the file `name`: its `shape` (X, Y, Z) and `affine`.

    ImageError if the grids differ. `labels` must have an affine.
    """
    if abs(np.linalg.det(affine)) < 1e-12:
        raise ImageError(f"{name}: its affine does not place its voxels in space: export it again")
    to_grid = np.linalg.inv(affine)
    out = np.zeros(shape, labels.values.dtype)
    for block, block_affine in _blocks(labels):
        placed = _placed(block, to_grid @ block_affine)
        if placed is None:
            raise ImageError(
                f"{labels.path} and {name} do not lie on one voxel grid: spacing "
                f"{_text(spacing_of(block_affine))} mm against {_text(spacing_of(affine))} mm, "
                f"first voxel at {_text(block_affine[:3, 3])} against {_text(affine[:3, 3])}; "
                "use the label file of this image, or resample it to the image's grid"
            )
        turned, start = placed
        if labels.origins is None and turned.shape != shape:
            raise ImageError(
                f"{labels.path} has shape {labels.values.shape}, {name} {shape}: "
                "use the label file of this image"
            )
        _paste(out, turned, start, labels.path, name)
    return out


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """mm between voxels along each of the three axes."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return x, y, z


def _known_spacing(affine: np.ndarray | None) -> tuple[float, ...] | None:
    """mm between voxels; None without an affine, or with the identity, the default of tools."""
    if affine is None or np.array_equal(affine, np.eye(4)):
        return None
    return spacing_of(affine)


def without_thin_axes(
    values: np.ndarray, spacing: tuple[float, ...] | None = None
) -> tuple[np.ndarray, tuple[float, ...] | None]:
    """Values and spacing without axes of length 1: no surface distance runs along them."""
    axes = [k for k in range(values.ndim) if values.shape[k] > 1]
    return values.reshape([values.shape[k] for k in axes]), (
        None if spacing is None else tuple(spacing[k] for k in axes)
    )


def _flat(labels: Labels) -> tuple[np.ndarray, tuple[float, ...] | None]:
    """`without_thin_axes`, with a single DICOM slice turned to (rows, columns)."""
    values, spacing = labels.values, _known_spacing(labels.affine)
    if labels.columns_first and values.shape[2] == 1:
        values = values.transpose(1, 0, 2)
        spacing = None if spacing is None else (spacing[1], spacing[0], spacing[2])
    return without_thin_axes(values, spacing)


def _blocks(labels: Labels) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Evenly spaced parts of `labels` with their affines: all, or each slice of a DICOM SEG."""
    assert labels.affine is not None
    if labels.origins is None:
        yield labels.values.reshape(_shape(labels.values)), labels.affine
        return
    for k, origin in enumerate(labels.origins):
        affine = labels.affine.copy()
        affine[:3, 3] = origin
        yield labels.values[:, :, k : k + 1], affine


def _placed(block: np.ndarray, to_grid: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """A block in the grid's axis order and its first voxel there; None if the grids differ."""
    turn, origin = to_grid[:3, :3], to_grid[:3, 3]
    steps = np.rint(turn)
    long = [k for k in range(3) if block.shape[k] > 1]
    if not (np.abs(steps[:, long]).sum(axis=0) == 1).all():
        return None
    drift = np.abs(turn - steps)[:, long] * (np.array(block.shape)[long] - 1)
    if max(drift.sum(axis=1).max(initial=0), np.abs(origin - np.rint(origin)).max()) > TOLERANCE:
        return None
    # The grid's axis along which each of the block's axes runs. Axes of length 1 have no direction
    # and take the axes that remain.
    along = {k: int(np.flatnonzero(steps[:, k])[0]) for k in long}
    left = [axis for axis in range(3) if axis not in along.values()]
    if len(left) + len(long) != 3:
        return None
    along |= dict(zip((k for k in range(3) if k not in long), left, strict=True))
    start = np.rint(origin).astype(int)
    for k in long:
        if steps[along[k], k] < 0:
            block = np.flip(block, k)
            start[along[k]] -= block.shape[k] - 1
    axes = {axis: k for k, axis in along.items()}
    return block.transpose(axes[0], axes[1], axes[2]), start


def _paste(out: np.ndarray, block: np.ndarray, start: np.ndarray, path: Path, name: Path) -> None:
    """Copy a block into `out`; ImageError if the block has labels outside `out`."""
    low = np.maximum(start, 0)
    high = np.minimum(start + block.shape, out.shape)
    inside = tuple(slice(a, max(a, b)) for a, b in zip(low - start, high - start, strict=True))
    lost = int(np.count_nonzero(block)) - int(np.count_nonzero(block[inside]))
    if lost:
        raise ImageError(
            f"{lost} labelled voxels of {path} lie outside of {name}: use the label file of this "
            "image"
        )
    out[tuple(slice(a, max(a, b)) for a, b in zip(low, high, strict=True))] = block[inside]


def _common_grid(first: Labels, second: Labels) -> tuple[tuple[int, int, int], np.ndarray]:
    """The shape and affine of a grid that holds the slices of two DICOM segmentations."""
    assert first.affine is not None
    assert first.origins is not None
    assert second.origins is not None
    affine = first.affine.copy()
    normal = affine[:3, 2] / np.linalg.norm(affine[:3, 2])
    origins = np.concatenate([first.origins, second.origins])
    places = origins @ normal
    lowest, highest = origins[places.argmin()], origins[places.argmax()]
    gaps = np.diff(np.unique(places.round(3)))
    count = 1
    if gaps.size:
        # The smallest gap is the spacing, unless both files leave out every second slice.
        count = round((places.max() - places.min()) / gaps.min()) + 1
        affine[:3, 2] = (highest - lowest) / (count - 1)
    affine[:3, 3] = lowest
    columns, rows = first.values.shape[:2]
    return (columns, rows, count), affine


def _shape(values: np.ndarray) -> tuple[int, int, int]:
    """(X, Y, Z) of an array with two or three axes."""
    x, y, z = (*values.shape, 1)[:3]
    return x, y, z


def _text(values: np.ndarray | tuple[float, ...]) -> str:
    """`(0.8, 0.8, 2.5)`"""
    return f"({', '.join(f'{value:.4g}' for value in values)})"
