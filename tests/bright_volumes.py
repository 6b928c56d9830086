"""Volumes of boxes that are bright, and structures that prompt them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.images import Volume
from medsa_deploy.images.npy import ArraySlices
from medsa_deploy.images.volume import VolumeBox
from medsa_deploy.runtime import Structure

ROWS, COLUMNS = 12, 20
ALL_VOXELS: VolumeBox = (0, 0, 0, 99, ROWS, COLUMNS)


def volume_of(array: np.ndarray) -> Volume:
    """(N, H, W) as N slices; a point (x, y, z) is at slice x, row y, column z."""
    path = Path("array.npy")
    n, h, w = array.shape
    return Volume(
        path=path,
        kind="npy",
        files=(path,),
        shape=(n, h, w),
        axis=0,
        plane_axes=(1, 2),
        spacing_mm=(1, 1, 1),
        affine=None,
        dtype=array.dtype,
        slices=ArraySlices(path=path, array=array, axis=0),
    )


def bright(n: int, *boxes: VolumeBox, value: int = 255) -> np.ndarray:
    """(n, ROWS, COLUMNS) uint8 with bright boxes."""
    array = np.zeros((n, ROWS, COLUMNS), np.uint8)
    for x0, y0, z0, x1, y1, z1 in boxes:
        array[x0:x1, y0:y1, z0:z1] = value
    return array


def boxed(*box: float, **options: Any) -> Structure:
    """A structure of one box."""
    return Structure(boxes=(tuple(box),), **options)  # type: ignore[arg-type]


def clicked(*points: tuple[float, float, float], labels: Sequence[int] = (), **options: Any):
    return Structure(points=points, labels=tuple(labels) or (1,) * len(points), **options)
