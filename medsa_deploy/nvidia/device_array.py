"""Values on a GPU ⇄ arrays of other libraries: PyTorch, CuPy, pycuda, numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from medsa_deploy.errors import UsageError

if TYPE_CHECKING:
    from .cuda import Gpu

DTYPE = np.dtype(np.float32)
"""Type of the graphs' inputs and outputs."""
FLOAT32 = DTYPE.itemsize


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """Values on the GPU, row by row. PyTorch, CuPy and pycuda take them without a copy.

    `np.asarray` copies them to the host. They live as long as `owner`, and no longer than what
    allocated them: a view that another library made of them must not outlive either.
    """

    address: int
    shape: tuple[int, ...]
    owner: object
    read: Callable[[int, tuple[int, ...], DTypeLike], NDArray[Any]]
    """Copies values at an address to the host; an error once they are released."""
    dtype: np.dtype[Any] = DTYPE

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),  # PyTorch takes nothing that is read-only
            "strides": None,
            "stream": None,  # they were waited for before they were handed out
            "version": 3,
        }

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * int(np.prod(self.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> DeviceArray:
        """Neighbouring entries of the first axis, without a copy."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise UsageError("values on a GPU can be taken in steps of 1 only")
        shape = (max(stop - start, 0), *self.shape[1:])
        entry_bytes = self.nbytes // max(len(self), 1)
        return replace(self, address=self.address + start * entry_bytes, shape=shape)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("values on a GPU cannot be had without a copy")
        values = self.read(self.address, self.shape, self.dtype)
        return values.astype(dtype or self.dtype, copy=False)


def on_device(values: object, gpu: Gpu) -> DeviceArray | None:
    """Another library's array on this GPU, without a copy; None for what lies on the host.

    `gpu` must be current; see `Gpu.wait_for_owner`. UsageError unless it is float32 and contiguous.
    """
    if isinstance(values, DeviceArray) and values.dtype == np.float32:
        return values
    interface = getattr(values, "__cuda_array_interface__", None)
    if interface is None:
        return None
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    rows = tuple(int(FLOAT32 * np.prod(shape[i + 1 :])) for i in range(len(shape)))
    if interface["typestr"] != "<f4" or (strides is not None and tuple(strides) != rows):
        raise UsageError(
            f"the array on the GPU is {interface['typestr']} with strides {strides}, expected "
            "contiguous float32"
        )
    gpu.wait_for_owner(interface)
    return DeviceArray(int(interface["data"][0]), shape, values, gpu.read)
