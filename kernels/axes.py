"""Taps of one axis → the table that a kernel reads; a kernel's entry, grid and parameters."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medsa_deploy.transforms.resampling import Taps

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = (32, 8, 1)
"""Threads of a block, for every entry."""

TILE = 32
"""Output pixels per side of what a block makes."""

FRACTION_BITS = 22
"""Of the weights in Pillow's 8-bit arithmetic."""

ALIGNMENT = 16
"""Bytes; of every part of a table."""


class AxisParameters(ctypes.Structure):
    """`Axis` of device.cuh."""

    _fields_ = (
        ("first", ctypes.c_uint64),
        ("weights", ctypes.c_uint64),
        ("inputs", ctypes.c_int),
        ("outputs", ctypes.c_int),
        ("taps", ctypes.c_int),
    )


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel, with blocks of `BLOCK` threads."""

    source: str
    """The file that has the entry: `preprocess` or `postprocess`."""
    entry: str
    grid: tuple[int, int, int]
    """Blocks along x, y, z."""
    parameters: ctypes.Structure
    """The entry's only argument, passed by value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AxisTable:
    """The taps of one axis, as `Axis` of device.cuh wants them."""

    inputs: int
    """n"""
    first: NDArray[np.int32]
    """(m,) the first input sample that an output sample reads; never decreasing."""
    weights: NDArray[Any]
    """(t, m) int32, float32 or float64; t ≤ n, and first + t ≤ n."""

    @property
    def bytes(self) -> bytes:
        """What has to be in device memory for `parameters`: `first`, then `weights`."""
        return _padded(self.first) + _padded(self.weights)

    def parameters(self, address: int) -> AxisParameters:
        """The axis, once `bytes` lie at a device's address."""
        taps, outputs = self.weights.shape
        weights = address + len(_padded(self.first))
        return AxisParameters(address, weights, self.inputs, outputs, taps)


def axis_table(taps: Taps, inputs: int, dtype: type[np.floating[Any]]) -> AxisTable:
    """Taps on an axis of `inputs` samples, as a run of neighbours with weights of `dtype`.

    Weights of a sample that is read more than once, as at mirrored ends, are added up.
    """
    read = taps.weights != 0
    low = np.where(read, taps.indices, inputs).min(axis=1)
    high = np.where(read, taps.indices, -1).max(axis=1) + 1
    low = np.minimum.accumulate(low[::-1])[::-1]
    width = int((high - low).max())
    first = np.minimum(low, inputs - width)
    weights = np.zeros((width, len(first)))
    outputs = np.broadcast_to(np.arange(len(first))[:, None], read.shape)
    offsets = taps.indices - first[:, None]
    np.add.at(weights, (offsets[read], outputs[read]), taps.weights[read])
    return AxisTable(inputs=inputs, first=first.astype(np.int32), weights=weights.astype(dtype))


def fixed_point(table: AxisTable) -> AxisTable:
    """A table of non-negative weights with FRACTION_BITS fractional bits, as Pillow rounds them."""
    weights = np.floor(table.weights * 2.0**FRACTION_BITS + 0.5).astype(np.int32)
    return AxisTable(inputs=table.inputs, first=table.first, weights=weights)


def pillow_taps(n: int, m: int) -> Taps:
    """Pillow's bilinear resize of an axis from n to m samples: a triangle as wide as the reduction.

    `precompute_coeffs` of Pillow's Resample.c, in its order of operations.
    """
    scale = n / m
    support = max(scale, 1.0)
    centre = (np.arange(m) + 0.5) * scale
    low = np.maximum(centre - support + 0.5, 0).astype(np.intp)
    high = np.minimum((centre + support + 0.5).astype(np.intp), n)
    indices = low[:, None] + np.arange(2 * math.ceil(support) + 1)
    distance = np.abs((indices - centre[:, None] + 0.5) / support)
    weights = np.where(indices < high[:, None], np.maximum(1 - distance, 0), 0)
    return Taps(
        indices=np.minimum(indices, n - 1),
        weights=weights / weights.sum(axis=1, keepdims=True),
    )


def tiles(width: int, height: int, layers: int) -> tuple[int, int, int]:
    """The grid for an output of (layers, height, width)."""
    return math.ceil(width / TILE), math.ceil(height / TILE), layers


def _padded(array: NDArray[Any]) -> bytes:
    data = array.tobytes()
    return data + bytes(-len(data) % ALIGNMENT)
