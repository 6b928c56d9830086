"""A frame on the GPU → the encoder's input beside it, by the kernels; none of it leaves the GPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from medsa_deploy.bundle.manifest import Conventions
from medsa_deploy.errors import ImageError, MedsaError
from medsa_deploy.kernels.axes import BLOCK
from medsa_deploy.kernels.preprocess import (
    EXTREMES_BYTES,
    UNUSABLE,
    Element,
    FrameFormat,
    Intensities,
    Preprocessing,
    preprocessing,
)
from medsa_deploy.nvidia.cuda import Gpu
from medsa_deploy.nvidia.device_array import FLOAT32, DeviceArray
from medsa_deploy.transforms import Frame

ELEMENTS: dict[str, Element] = {
    "|u1": "uint8",
    "<u2": "uint16",
    "<i2": "int16",
    "<f4": "float32",
}
"""`typestr` of `__cuda_array_interface__` → what the kernels call it."""
FORMATS = 8
"""Formats of frames, with their windows, whose tables are kept on the GPU."""


@dataclass(frozen=True)
class _Planned:
    """The kernels' plan for one format, and the GPU memory it needs."""

    plan: Preprocessing
    tables: int
    scratch: int
    """Addresses, of one allocation at `tables`."""


class FramePreprocessor:
    """Runs the preprocessing kernels on a `Gpu` that is current, which owns the memory."""

    def __init__(self, gpu: Gpu, size: int, load_module: Callable[[], Any]) -> None:
        """`size`: S of the network. `load_module`: gives the kernels, loaded; called once."""
        self._gpu, self._size, self._load_module = gpu, size, load_module
        self._module: Any = None
        self._output = 0
        self._planned: OrderedDict[tuple[Any, ...], _Planned] = OrderedDict()

    def run(
        self, frame: Any, conventions: Conventions, window: tuple[float, float] | None
    ) -> tuple[DeviceArray, Frame]:
        """Queue the kernels: (1, 3, S, S) float32, until the next frame, and how the frame lies.

        `frame`: (H, W) or (H, W, 3) of uint8, uint16, int16 or float32 with
        `__cuda_array_interface__`; rows may be apart. uint8 without a `window` are display values.
        ImageError for another frame, or one with NaN or infinite values; UsageError for values that
        need a window.
        """
        interface = frame.__cuda_array_interface__
        layout = _format(interface)
        self._gpu.wait_for_owner(interface)
        if self._module is None:
            self._module = self._load_module()
        if not self._output:
            self._output = self._gpu.allocate(FLOAT32 * 3 * self._size**2)
        planned = self._plan(layout, conventions, window)
        if planned.plan.scratch_bytes:
            self._gpu.clear(planned.scratch, EXTREMES_BYTES)
        for launch in planned.plan.launches(
            frame=int(interface["data"][0]),
            output=self._output,
            tables=planned.tables,
            scratch=planned.scratch,
        ):
            parameters = bytes(launch.parameters)
            self._gpu.launch(self._module, launch.entry, launch.grid, BLOCK, parameters)
        if layout.element == "float32":
            (unusable,) = self._gpu.read(planned.scratch + UNUSABLE, (1,), np.uint32)
            if unusable:
                raise ImageError("the frame on the GPU has NaN or infinite values: replace them")
        shape = (1, 3, self._size, self._size)
        return DeviceArray(self._output, shape, self, self._gpu.read), planned.plan.frame

    def close(self) -> None:
        """Unload the kernels; the `Gpu` frees the memory."""
        with suppress(MedsaError), self._gpu.current():
            self._module = None

    def _plan(
        self,
        layout: FrameFormat,
        conventions: Conventions,
        window: tuple[float, float] | None,
    ) -> _Planned:
        """The plan for frames like this, with its memory; made once."""
        key = (layout, window)
        if key in self._planned:
            self._planned.move_to_end(key)
            return self._planned[key]
        plan = preprocessing(layout, conventions.preprocess, self._size, Intensities(window=window))
        tables = self._gpu.allocate(len(plan.tables) + plan.scratch_bytes)
        self._gpu.write(tables, plan.tables)
        self._planned[key] = planned = _Planned(plan, tables, tables + len(plan.tables))
        if len(self._planned) > FORMATS:
            _, old = self._planned.popitem(last=False)
            self._gpu.free(old.tables)
        return planned


def _format(interface: dict[str, Any]) -> FrameFormat:
    """How another library's frame lies in memory; ImageError if the kernels cannot read it."""
    shape, element = tuple(interface["shape"]), ELEMENTS.get(interface["typestr"])
    if len(shape) not in (2, 3) or shape[2:] not in ((), (3,)) or element is None:
        raise ImageError(
            f"the frame on the GPU has shape {shape} and type {interface['typestr']}, expected "
            f"(H, W) or (H, W, 3) and one of {', '.join(ELEMENTS)}"
        )
    size = np.dtype(element).itemsize
    inner = (size,) if len(shape) == 2 else (3 * size, size)
    strides = tuple(interface.get("strides") or (shape[1] * inner[0], *inner))
    if strides[1:] != inner:
        raise ImageError(
            f"the frame on the GPU has strides {strides}, expected pixels side by side: {inner}"
        )
    return FrameFormat(
        element=element,
        height=shape[0],
        width=shape[1],
        channels=1 if len(shape) == 2 else 3,
        pitch=strides[0],
    )
