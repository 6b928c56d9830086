"""Two masks → how much they agree: Dice, IoU, Hausdorff distance.

A mask is a bool array of two or three dimensions. Distances are between surfaces: of a mask, the
pixels with a neighbour across an edge (2D) or a face (3D) that is not in the mask. Pixels beyond
the array are outside. Only distances need SciPy (extra `metrics`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.errors import MissingDependencyError, UsageError

Mask = NDArray[np.bool_]


def dice(first: Mask, second: Mask) -> float:
    """2 |A ∩ B| / (|A| + |B|) (Dice 1945); 1 for two empty masks, 0 if only one is empty."""
    _check(first, second)
    total = int(np.count_nonzero(first)) + int(np.count_nonzero(second))
    return 2 * int(np.count_nonzero(first & second)) / total if total else 1.0


def iou(first: Mask, second: Mask) -> float:
    """|A ∩ B| / |A ∪ B| (Jaccard 1912); 1 for two empty masks, 0 if only one is empty."""
    _check(first, second)
    union = int(np.count_nonzero(first | second))
    return int(np.count_nonzero(first & second)) / union if union else 1.0


def hausdorff(
    first: Mask, second: Mask, spacing: Sequence[float], *, percentile: float = 95
) -> float:
    """The larger of the two directed percentiles of surface distances, in the unit of `spacing`.

    A directed distance goes from each surface pixel of one mask to the nearest of the other;
    `percentile` (linear between ranks) of them for each direction, then the larger of the two.
    MONAI's HausdorffDistanceMetric and DeepMind's surface-distance define it so too, the latter
    with pixels weighted by the area of their surface; other tools (medpy) pool both directions
    before the percentile. 100 is the Hausdorff distance itself (Huttenlocher et al. 1993).
    `spacing`: between pixels along each axis. 0 for two empty masks, infinite if only one is empty.
    """
    _check(first, second)
    if len(spacing) != first.ndim or not all(0 < step < math.inf for step in spacing):
        raise UsageError(f"the spacing is {tuple(spacing)}: expected {first.ndim} positive numbers")
    if not (first.any() and second.any()):
        return 0.0 if first.any() == second.any() else math.inf
    spatial = _scipy("spatial")
    points = [_surface(mask) * np.asarray(spacing, np.float64) for mask in (first, second)]
    forward, _ = spatial.KDTree(points[1]).query(points[0])
    backward, _ = spatial.KDTree(points[0]).query(points[1])
    return float(max(np.percentile(forward, percentile), np.percentile(backward, percentile)))


def depth(mask: Mask) -> NDArray[np.float64]:
    """Distance of every pixel of a mask from the nearest pixel outside it, in pixels; 0 outside.

    Pixels beyond the array are outside. The largest value is at the mask's innermost pixel.
    """
    padded = _scipy("ndimage").distance_transform_edt(np.pad(mask, 1))
    return np.asarray(padded[(slice(1, -1),) * mask.ndim], np.float64)


def require_scipy() -> None:
    """MissingDependencyError without SciPy. Call it before anything is computed."""
    _scipy("ndimage")


def _surface(mask: Mask) -> NDArray[np.intp]:
    """(N, D) indices of the surface pixels of a mask that is not empty."""
    bounds = []
    for axis in range(mask.ndim):
        other_axes = tuple(k for k in range(mask.ndim) if k != axis)
        occupied = np.flatnonzero(mask.any(axis=other_axes))
        bounds.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    cropped = mask[tuple(bounds)]
    inner = _scipy("ndimage").binary_erosion(cropped)  # with the neighbours across edges or faces
    indices = np.argwhere(cropped & ~inner) + [part.start for part in bounds]
    return np.asarray(indices, np.intp)


def _check(first: Mask, second: Mask) -> None:
    if first.shape != second.shape or first.dtype != np.bool_ or second.dtype != np.bool_:
        raise UsageError(
            f"two masks of {first.dtype} {first.shape} and {second.dtype} {second.shape} cannot "
            "be compared: expected bool arrays of one shape"
        )


def _scipy(module: str) -> Any:
    """A part of SciPy, imported when it is first needed: the import takes 0.2 s."""
    try:
        return import_module(f"scipy.{module}")
    except ImportError as e:
        raise MissingDependencyError("scipy", extra="metrics", purpose="measuring distances") from e
