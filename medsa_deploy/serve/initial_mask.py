"""A mask that a client brought → mask prompts and boxes of its slices."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.images import Volume
from medsa_deploy.images.volume import VolumeBox
from medsa_deploy.transforms import Frame

MASK_LOGIT = 8.0
"""Logit of a pixel inside the mask, and its negative outside: probabilities 0.9997 and 0.0003."""


@dataclass(frozen=True, eq=False)
class InitialMask:
    """The mask of one object."""

    planes: NDArray[np.bool_]
    """(N, H, W): slices, rows, columns of the volume."""

    @cached_property
    def slices(self) -> Set[int]:
        """The slices with a voxel of the object."""
        return set(np.flatnonzero(self.planes.any(axis=(1, 2))).tolist())

    def box(self, index: int, volume: Volume) -> VolumeBox:
        """The box around the mask of a slice, which has a voxel."""
        low, high = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        low[volume.axis], high[volume.axis] = index, index + 1
        for axis, other in zip(volume.plane_axes, (1, 0), strict=True):
            inside = np.flatnonzero(self.planes[index].any(axis=other))
            low[axis], high[axis] = float(inside[0]), float(inside[-1]) + 1
        return (*low, *high)  # type: ignore[return-value]


def mask_logits(mask: NDArray[np.bool_], frame: Frame, side: int) -> NDArray[np.float32]:
    """A mask (H, W) → a mask prompt (side, side): the part of each pixel that it covers, as logits.

    The frame's padding is outside the mask.

    >>> frame = Frame(image_size=(1, 2), network_size=4, content_size=(2, 4))
    >>> mask_logits(np.array([[True, False]]), frame, 4)[:, :2].tolist()
    [[8.0, 8.0], [8.0, 8.0], [-8.0, -8.0], [-8.0, -8.0]]
    """
    part = mask.astype(np.float64)
    for length, content in zip(frame.image_size, frame.content_size, strict=True):
        step = frame.network_size / side * length / content  # image pixels in one of the prompt
        edges = np.minimum(np.arange(side + 1) * step, length)
        pixels = np.minimum(edges.astype(int), length - 1)
        before = np.cumsum(part, axis=0)[pixels] - part[pixels]
        part = np.diff(before + (edges - pixels)[:, None] * part[pixels], axis=0).T / step
    logits: NDArray[np.float32] = (MASK_LOGIT * (2 * part - 1)).astype(np.float32)
    return logits
