"""Pixel values of structures, slice by slice in any order → the label map of a volume."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.images.volume import Volume
from medsa_deploy.runtime.backends.interface import Array


class LabelMap:
    """Every voxel has the label of the highest value so far that is above a threshold.

    Values are those of `transforms.pixel_values`. Of equal values the lower label wins, so the
    order in which they are added does not matter.
    """

    def __init__(self, volume: Volume, threshold: float, *, revisited: bool) -> None:
        """`threshold`: the value that must be exceeded. `revisited`: slices are added to more
        than once. The highest values are kept for that, 4 bytes per voxel of the added slices."""
        axes = (volume.axis, *volume.plane_axes)  # a slice's voxels are neighbours in memory
        slices = np.zeros([volume.shape[axis] for axis in axes], np.uint8)
        self.labels: NDArray[np.uint8] = slices.transpose(np.argsort(axes))
        """(X, Y, Z) in the volume's stored order; 0 is background."""
        self._volume = volume
        self._threshold = threshold
        self._highest: dict[int, Array] | None = {} if revisited else None

    def plane(self, index: int) -> NDArray[np.uint8]:
        """The labels of a slice, a view (H, W)."""
        return self._volume.plane(self.labels, index)

    def add(self, index: int, values: Array, labels: Sequence[int]) -> None:
        """Add the values (n, H, W) of a slice, and the label of each of the n."""
        plane = self.plane(index)
        highest = None if self._highest is None else self._highest.get(index)
        if highest is None:
            highest = np.full(plane.shape, self._threshold, np.float32)
        for candidate, label in zip(values, labels, strict=True):
            wins = candidate > highest
            wins |= (candidate == highest) & (label < plane)
            np.copyto(highest, candidate, where=wins)
            np.copyto(plane, label, where=wins)
        if self._highest is not None:
            self._highest[index] = highest
