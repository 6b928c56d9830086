"""Memory on a GPU → arrays, whose memory is reused once nothing holds them."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from medsa_deploy.nvidia.cuda import Gpu
from medsa_deploy.nvidia.device_array import DeviceArray

SIZES = 8
"""Sizes in bytes whose free memory is kept, those used last."""


@dataclass(frozen=True, eq=False)
class Owner:
    """Held by an array and by all its parts."""

    gpu: Gpu


class MemoryPool:
    """Memory for arrays, allocated by a `Gpu` that is current, which frees it when it is closed.

    Where its memory is full, the `Gpu` has the pool release what nothing holds.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        gpu.release_idle = self.release_idle
        self._free: OrderedDict[int, list[int]] = OrderedDict()
        """Bytes → addresses of memory that nothing holds."""

    def array(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> DeviceArray:
        """An array of undefined values; its memory is free once nothing holds it or a part."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        free = self._free.setdefault(size, [])
        self._free.move_to_end(size)
        for old in list(self._free)[:-SIZES]:
            self._release(self._free[old])
        address = free.pop() if free else self._gpu.allocate(size)
        owner = Owner(self._gpu)
        weakref.finalize(owner, free.append, address)
        return DeviceArray(address, shape, owner, self._gpu.read, np.dtype(dtype))

    def release_idle(self) -> bool:
        """Release all memory that nothing holds; whether there was any."""
        return any([self._release(addresses) for addresses in self._free.values()])

    def _release(self, addresses: list[int]) -> bool:
        """Release memory at addresses; whether there was any."""
        released = bool(addresses)
        while addresses:
            self._gpu.free(addresses.pop())
        return released
