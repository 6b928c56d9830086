"""pycuda.driver on a machine in host memory; kernels are the package's own, as host C++."""

from __future__ import annotations

import struct
import threading
from time import perf_counter
from types import ModuleType, SimpleNamespace

import cuda_on_host
import numpy as np

from medsa_deploy.kernels import postprocess, preprocess
from medsa_deploy.kernels.axes import BLOCK, Launch

from .machine import CudaError, CudaLogicError, CudaMemoryError, Machine, Stream

PARAMETERS = {"preprocess": preprocess.Parameters, "postprocess": postprocess.Parameters}
"""Source of kernels → what they are launched with."""
KERNELS = threading.Lock()
"""Held while a kernel runs: the host's fibers are one thread's at a time."""


def run_kernel(launch: Launch) -> None:
    with KERNELS:
        cuda_on_host.run(launch)


def pycuda_driver(machine: Machine) -> ModuleType:
    """pycuda.driver."""
    driver = ModuleType("pycuda.driver")
    driver.Error, driver.MemoryError, driver.LogicError = CudaError, CudaMemoryError, CudaLogicError
    driver.init = lambda: None

    class Context:
        def push(self) -> None:
            machine.current.depth = getattr(machine.current, "depth", 0) + 1

        @staticmethod
        def pop() -> None:
            machine.current.depth -= 1

    class Device:
        def __init__(self, index: int) -> None:
            assert index == 0

        def retain_primary_context(self) -> Context:
            return Context()

    class Allocation:
        def __init__(self, size: int) -> None:
            machine.check()
            assert size > 0
            if machine.used + size > machine.capacity:
                raise CudaMemoryError("cuMemAlloc failed: out of memory")
            self._address = machine.allocate(size)

        def __int__(self) -> int:
            return self._address

        def free(self) -> None:
            machine.check()
            del machine.blocks[self._address]
            machine.uploaded.pop(self._address, None)

    class Pinned:
        def __init__(self, length: int) -> None:
            machine.check()
            if machine.pinned >= machine.pinnable:
                raise CudaMemoryError("cuMemHostAlloc failed: out of memory")
            machine.pinned += 1
            self.memory = np.full(length, np.nan, np.float32)
            self.__array_interface__ = self.memory.__array_interface__

        def free(self) -> None:
            machine.check()
            machine.pinned -= 1

    def pagelocked_empty(length: int, dtype: type) -> np.ndarray:
        assert dtype is np.float32
        assert length > 0
        return np.asarray(Pinned(length))

    def htod(address: int, values: np.ndarray, stream: Stream) -> None:
        machine.check()
        target = machine.view(address, values.nbytes).view(values.dtype)
        machine.uploaded[address] = values.dtype
        stream.add(lambda: np.copyto(target, values.reshape(-1)))

    def dtoh(values: np.ndarray, address: int, stream: Stream) -> None:
        machine.check()
        machine.downloaded += values.nbytes
        source = machine.view(address, values.nbytes).view(values.dtype).reshape(values.shape)
        stream.add(lambda: np.copyto(values, source))

    def dtoh_now(values: np.ndarray, address: int) -> None:
        machine.check()
        np.copyto(
            values, machine.view(address, values.nbytes).view(values.dtype).reshape(values.shape)
        )

    driver.Context, driver.Device = Context, Device
    driver.Stream = lambda flags: Stream(machine, flags)
    driver.mem_alloc, driver.pagelocked_empty = Allocation, pagelocked_empty
    driver.memcpy_htod_async, driver.memcpy_dtoh_async = htod, dtoh
    driver.memcpy_dtoh = dtoh_now
    driver.memcpy_htod = lambda address, data: np.copyto(
        machine.view(address, len(data)), np.frombuffer(data, np.uint8)
    )
    driver.memset_d8_async = lambda address, value, size, stream: stream.add(
        lambda: machine.view(address, size).fill(value)
    )

    def dtod(target: int, source: int, size: int, stream: Stream) -> None:
        machine.check()
        stream.add(lambda: np.copyto(machine.view(target, size), machine.view(source, size)))

    class Event:
        """The host's clock, read when the stream comes to it."""

        def __init__(self, flags: int = 0) -> None:
            pass

        def record(self, stream: Stream | None = None) -> None:
            self.stream = stream
            if stream is None:  # the default stream, where nothing is late here
                return
            stream.add(lambda: setattr(self, "time", perf_counter()))

        def synchronize(self) -> None:
            self.stream.synchronize()

        def time_till(self, other: Event) -> float:
            return 1e3 * (other.time - self.time)

    class Function:
        def __init__(self, source: str, entry: str) -> None:
            self._source, self._entry, self._format = source, entry, None

        def prepare(self, arg_types: tuple[str, ...]) -> Function:
            self._format = "".join(arg_types)
            return self

        def prepared_async_call(
            self, grid: tuple[int, ...], block: tuple[int, ...], stream: Stream, *args: bytes
        ) -> None:
            machine.check()
            assert block == BLOCK
            parameters = PARAMETERS[self._source].from_buffer_copy(struct.pack(self._format, *args))
            launch = Launch(
                source=self._source, entry=self._entry, grid=grid, parameters=parameters
            )
            machine.launched.append(self._entry)
            if stream.capturing is not None and self._entry not in machine.loaded:
                raise CudaLogicError("cuLaunchKernel failed: a capture allows no lazy loading")
            machine.loaded.add(self._entry)
            stream.add(lambda: run_kernel(launch))

    class Module:
        """A source of kernels, as host C++. A cubin is its name."""

        def __init__(self, cubin: bytes) -> None:
            machine.check()
            self.source = cubin.decode()

        def get_function(self, entry: str) -> Function:
            return Function(self.source, entry)

    driver.event_flags = SimpleNamespace(DISABLE_TIMING=2)
    driver.module_from_buffer, driver.Event, driver.memcpy_dtod_async = Module, Event, dtod
    return driver
