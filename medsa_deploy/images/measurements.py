"""Labels of a volume → the volume and the longest diameter of each label's structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .volume import Volume


@dataclass(frozen=True, kw_only=True)
class StructureMeasurements:
    """The size of one label's structure."""

    label: int
    millilitres: float
    diameter_mm: float
    """The longest straight line within one slice, from edge to edge; 0 without a voxel."""
    diameter_slice: int | None
    """The slice that holds it."""


def voxel_millilitres(volume: Volume) -> float | None:
    """The volume of a voxel in ml; None if the file does not place its voxels.

    The determinant, since a tilted gantry shears the volume: slices are closer than their centres.
    """
    if volume.affine is None:
        return None
    return float(abs(np.linalg.det(volume.affine[:3, :3])) / 1000)


def measure(labels: NDArray[np.uint8], volume: Volume, label: int) -> StructureMeasurements:
    """The measurements of one label of `labels`, (X, Y, Z) in the volume's stored order.

    >>> measure(labels, volume, 1).diameter_mm
    48.0
    """
    rows, columns = volume.plane_axes
    spacing = np.array([volume.spacing_mm[columns], volume.spacing_mm[rows]])
    longest, place, voxels = 0.0, None, 0
    for index in range(len(volume)):
        mask = volume.plane(labels, index) == label
        if not (count := int(np.count_nonzero(mask))):
            continue
        voxels += count
        diameter = longest_diameter(mask, spacing)
        if diameter > longest:
            longest, place = diameter, index
    return StructureMeasurements(
        label=label,
        millilitres=voxels * (voxel_millilitres(volume) or 0.0),
        diameter_mm=longest,
        diameter_slice=place,
    )


def longest_diameter(mask: np.ndarray, spacing: np.ndarray) -> float:
    """The longest distance in mm between two points on the outline of a mask (H, W) bool.

    The outline runs through the middles of pixel edges, so n pixels in a row measure n · spacing.
    `spacing`: (2,) mm along columns and rows, as x and y. 0 for an empty mask.

    >>> longest_diameter(np.ones((1, 5), bool), np.array([0.5, 0.1]))
    2.5
    """
    edges = list(_edges(mask))
    if not edges:
        return 0.0
    corners = np.array(_hull(np.array(edges, np.float64) * spacing))
    apart = corners[:, None] - corners[None]
    return float(np.sqrt((apart**2).sum(axis=2).max()))


def _edges(mask: np.ndarray) -> Iterator[tuple[float, float]]:
    """Middles of the outermost pixel edges (x, y) of each row and each column of a mask."""
    for y in np.flatnonzero(mask.any(axis=1)).tolist():
        inside = np.flatnonzero(mask[y])
        yield inside[0] - 0.5, y
        yield inside[-1] + 0.5, y
    for x in np.flatnonzero(mask.any(axis=0)).tolist():
        inside = np.flatnonzero(mask[:, x])
        yield x, inside[0] - 0.5
        yield x, inside[-1] + 0.5


def _hull(points: np.ndarray) -> list[np.ndarray]:
    """The corners of the convex hull of points (N, 2): Andrew's monotone chain."""
    ordered = points[np.lexsort((points[:, 1], points[:, 0]))]
    corners: list[np.ndarray] = []
    for chain in (ordered, ordered[::-1]):
        start = len(corners)
        for point in chain:
            while len(corners) >= start + 2 and _turns_right(corners[-2], corners[-1], point):
                corners.pop()
            corners.append(point)
        corners.pop()
    return corners or [ordered[0]]


def _turns_right(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> bool:
    """Whether the way from a over b to c does not turn left."""
    return bool((b[0] - a[0]) * (c[1] - a[1]) <= (b[1] - a[1]) * (c[0] - a[0]))
