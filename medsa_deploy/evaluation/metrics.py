"""Two masks → how much they agree: Dice, IoU, Hausdorff distance.

A mask is a bool array of two or three dimensions. Distances are between surfaces: of a mask, the
pixels with a neighbour across an edge (2D) or a face (3D) that is not in it; beyond the array
nothing is. Only distances need SciPy (extra `metrics`).
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


def dice(one: Mask, other: Mask) -> float:
    """2 |A ∩ B| / (|A| + |B|) (Dice 1945); 1 for two empty masks, 0 if only one is empty."""
    _check(one, other)
    total = int(np.count_nonzero(one)) + int(np.count_nonzero(other))
    return 2 * int(np.count_nonzero(one & other)) / total if total else 1.0


def iou(one: Mask, other: Mask) -> float:
    """|A ∩ B| / |A ∪ B| (Jaccard 1912); 1 for two empty masks, 0 if only one is empty."""
    _check(one, other)
    union = int(np.count_nonzero(one | other))
    return int(np.count_nonzero(one & other)) / union if union else 1.0


def hausdorff(one: Mask, other: Mask, spacing: Sequence[float], *, percentile: float = 95) -> float:
    """The larger of the two directed percentiles of surface distances, in the unit of `spacing`.

    A directed distance goes from each surface pixel of one mask to the nearest of the other;
    `percentile` (linear between ranks) of them for each direction, then the larger of the two. So
    MONAI's HausdorffDistanceMetric and DeepMind's surface-distance have it, the latter weighting
    pixels with their surface's area; other tools (medpy) pool both directions before the
    percentile. 100 is the Hausdorff distance itself (Huttenlocher et al. 1993). `spacing`: between
    pixels along each axis. 0 for two empty masks, infinite if only one is empty.
    """
    _check(one, other)
    if len(spacing) != one.ndim or not all(0 < step < math.inf for step in spacing):
        raise UsageError(f"the spacing {tuple(spacing)} should be {one.ndim} positive numbers")
    if not (one.any() and other.any()):
        return 0.0 if one.any() == other.any() else math.inf
    spatial = _scipy("spatial")
    points = [_surface(mask) * np.asarray(spacing, np.float64) for mask in (one, other)]
    there, _ = spatial.KDTree(points[1]).query(points[0])
    back, _ = spatial.KDTree(points[0]).query(points[1])
    return float(max(np.percentile(there, percentile), np.percentile(back, percentile)))


def depth(mask: Mask) -> NDArray[np.float64]:
    """How far every pixel of a mask is from the nearest one outside it, in pixels; 0 outside.

    Beyond the array everything is outside. The largest value is at the mask's innermost pixel.
    """
    padded = _scipy("ndimage").distance_transform_edt(np.pad(mask, 1))
    return np.asarray(padded[(slice(1, -1),) * mask.ndim], np.float64)


def require_scipy() -> None:
    """MissingDependencyError without SciPy; for before anything is computed."""
    _scipy("ndimage")


def _surface(mask: Mask) -> NDArray[np.intp]:
    """(N, D) indices of a mask's surface pixels; the mask is not empty."""
    bounds = []
    for axis in range(mask.ndim):
        others = tuple(k for k in range(mask.ndim) if k != axis)
        occupied = np.flatnonzero(mask.any(axis=others))
        bounds.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    cropped = mask[tuple(bounds)]
    inner = _scipy("ndimage").binary_erosion(cropped)  # with the neighbours across edges or faces
    found = np.argwhere(cropped & ~inner) + [part.start for part in bounds]
    return np.asarray(found, np.intp)


def _check(one: Mask, other: Mask) -> None:
    if one.shape != other.shape or one.dtype != np.bool_ or other.dtype != np.bool_:
        raise UsageError(
            f"two masks of {one.dtype} {one.shape} and {other.dtype} {other.shape} cannot be "
            "compared: expected bool arrays of one shape"
        )


def _scipy(module: str) -> Any:
    """A part of SciPy, imported when it is first needed: it takes a fifth of a second."""
    try:
        return import_module(f"scipy.{module}")
    except ImportError as e:
        raise MissingDependencyError("scipy", extra="metrics", purpose="measuring distances") from e
