"""The NVIDIA driver → the GPU of this machine, its memory and its work. All calls of CUDA.

`device` asks the driver's own library, which every machine with an NVIDIA GPU has, Jetsons
included. `Gpu` works through pycuda, and captures graphs through cuda-bindings; both are imported
when one is made.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from medsa_deploy.errors import (
    BuildError,
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    MedsaError,
    MissingDependencyError,
    UsageError,
)

Array = NDArray[np.float32]
LEGACY_STREAM = 1
"""CUDA's default stream, by its handle and in `__cuda_array_interface__`."""
NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING of cuda.h: what others do in the default stream disturbs no capture."""

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
DEVICE_INDEX = 0
"""The GPU that sessions use, of those that CUDA shows."""
LOADING = threading.RLock()
"""Held in this process while work is captured, and while engines are opened or closed: libraries
wait for the whole GPU then, which breaks every capture. It is taken before a `Gpu`'s own lock."""

MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU."""

    name: str
    capability: str
    """Compute capability as compilers write it: `sm86` for 8.6."""
    driver_cuda: str
    """Newest version of CUDA that the driver can run."""


def device() -> Device | None:
    """The first GPU that CUDA shows; None without an NVIDIA driver or GPU."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    handle, version, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    calls = (
        (driver.cuInit, 0),
        (driver.cuDriverGetVersion, ctypes.byref(version)),
        (driver.cuDeviceGet, ctypes.byref(handle), DEVICE_INDEX),
        (driver.cuDeviceGetName, name, len(name), handle),
        (driver.cuDeviceGetAttribute, ctypes.byref(major), MAJOR, handle),
        (driver.cuDeviceGetAttribute, ctypes.byref(minor), MINOR, handle),
    )
    if any(function(*arguments) for function, *arguments in calls):  # 0, or an error's number
        return None
    return Device(
        name=name.value.decode(errors="replace"),
        capability=f"sm{major.value}{minor.value}",
        driver_cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


class Gpu:
    """The first GPU: one stream, and everything that is allocated for it.

    It works in the primary context, which PyTorch, CuPy and ONNX Runtime use as well, so that
    addresses mean the same to all. `close` frees what was allocated here; the context itself stays
    for the others. Everything but `read` and `close` happens in a `with gpu.current():`, from any
    thread, but from one at a time.
    """

    def __init__(self) -> None:
        """MissingDependencyError without pycuda; DeviceError without a GPU, or with a full one."""
        self._driver = _pycuda()
        self._lost: str | None = None
        self._closed = False
        self._device: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self.release_idle: Callable[[], bool] = lambda: False
        """Frees memory that nothing uses, where there is none left; whether there was any."""
        with self._translate_errors():
            self._context = _primary_context()
        self._capture_lock = threading.Lock()
        """Held while work is captured, when nothing may wait for the stream."""
        with self.current():
            self._stream = self._driver.Stream(NON_BLOCKING)

    @property
    def stream(self) -> int:
        """The handle of the stream."""
        return int(self._stream.handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU this thread's; CUDA's errors meanwhile are raised as DeviceError."""
        if self._closed:
            raise UsageError("what was on the GPU was released with its session: load it again")
        if self._lost is not None:
            raise DeviceLostError(self._lost)
        with self._translate_errors():
            self._context.push()
            try:
                yield
            finally:
                self._driver.Context.pop()

    def allocate(self, size: int) -> int:
        """The address of `size` bytes, which stay allocated until `free` or `close`.

        Where memory is full, `release_idle` makes room once.
        """
        try:
            memory = self._driver.mem_alloc(max(size, 1))
        except self._driver.MemoryError:
            if not self.release_idle():
                raise
            memory = self._driver.mem_alloc(max(size, 1))
        self._device[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        """Release what `allocate` gave, once nothing that is queued uses it."""
        self.wait()
        self._device.pop(address).free()

    def pinned(self, length: int) -> Array:
        """Page-locked host memory, (length,) float32, which the GPU copies from and to directly."""
        memory: Array = self._driver.pagelocked_empty(length, np.float32)
        self._pinned[memory.ctypes.data] = memory
        return memory

    def unpin(self, memory: NDArray[Any]) -> None:
        """Release what `pinned` gave, once nothing that is queued uses it."""
        self.wait()
        self._pinned.pop(memory.ctypes.data).base.free()

    def upload(self, address: int, values: Array) -> None:
        """Queue a copy of pinned values to the GPU."""
        self._driver.memcpy_htod_async(address, values, self._stream)

    def download(self, values: NDArray[Any], address: int) -> None:
        """Queue a copy into pinned memory."""
        self._driver.memcpy_dtoh_async(values, address, self._stream)

    def read(
        self, address: int, shape: tuple[int, ...], dtype: DTypeLike = np.float32
    ) -> NDArray[Any]:
        """A copy of values on the GPU, after everything that was queued."""
        values = np.empty(shape, dtype)
        with self._capture_lock, self.current():
            self.wait()
            self._driver.memcpy_dtoh(values, address)
        return values

    def write(self, address: int, data: bytes) -> None:
        """Copy bytes to the GPU, now."""
        self._driver.memcpy_htod(address, data)
        self.join_default_stream()  # the copy goes through it, and may not have arrived

    def clear(self, address: int, size: int) -> None:
        """Queue zeros."""
        self._driver.memset_d8_async(address, 0, size, self._stream)

    def module(self, cubin: bytes) -> Any:
        """Kernels that were compiled for this GPU; BuildError if its driver does not take them."""
        try:
            return self._driver.module_from_buffer(cubin)
        except self._driver.MemoryError:
            raise
        except self._driver.Error as e:
            raise BuildError(
                f"the driver does not take the kernels ({_line(e)}): compile them with a CUDA "
                "no newer than the driver's"
            ) from e

    def launch(
        self,
        module: Any,
        entry: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: bytes,
    ) -> None:
        """Queue a kernel, whose one argument is a structure by value."""
        function = module.get_function(entry)
        function.prepare((f"{len(parameters)}s",))  # no pycuda refuses bytes of a declared length
        function.prepared_async_call(grid, block, self._stream, parameters)

    def wait(self) -> None:
        """Wait until everything that was queued is done."""
        self._stream.synchronize()

    def join_default_stream(self) -> None:
        """Make later work of this stream wait for earlier work of others in the default stream."""
        event = self._driver.Event(self._driver.event_flags.DISABLE_TIMING)
        event.record()
        self._stream.wait_for_event(event)

    def wait_for_owner(self, interface: dict[str, Any]) -> None:
        """Wait for the stream that an array's `__cuda_array_interface__` names.

        For the default stream see `join_default_stream`. PyTorch names no stream: its caller waits
        for work in any other. UsageError for an array on another GPU, or on none.
        """
        check_owner(int(interface["data"][0] or 0))
        stream = interface.get("stream")
        if stream not in (None, LEGACY_STREAM):
            driver = _bindings()
            _call(driver, driver.cuStreamSynchronize, driver.CUstream(stream))

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """While a library captures work of this stream: nothing waits for it, or for the GPU."""
        with LOADING, self._capture_lock:
            yield

    def capture(self, queue: Callable[[], None]) -> CapturedGraph:
        """The work that `queue` puts into the stream, as a graph; it is not run."""
        with self.capturing():
            return CapturedGraph(self.stream, queue)

    def close(self) -> None:
        """Wait for the stream, then free everything; a lost GPU has freed it already."""
        device, self._device = list(self._device.values()), {}
        pinned, self._pinned = list(self._pinned.values()), {}
        with suppress(MedsaError), self.current():
            self.wait()
            for memory in device:
                memory.free()
            for values in pinned:
                values.base.free()
            del self._stream
        self._closed = True

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise pycuda's errors as errors of this package."""
        try:
            yield
        except self._driver.MemoryError as e:
            raise DeviceMemoryError(
                f"the GPU's memory is full ({_line(e)}): close what else uses it, or build engines "
                "for fewer images and prompts with --batch and --prompts"
            ) from e
        except self._driver.Error as e:
            if "captur" in str(e):  # another thread's, and over soon
                raise DeviceError(f"the GPU was busy with a capture ({_line(e)})") from e
            self._lost = (
                f"the GPU cannot be used any more ({_line(e)}): start the program again, and if "
                "that fails, the machine"
            )
            raise DeviceLostError(self._lost) from e


class CapturedGraph:
    """Work that was queued in a stream once, to be queued again in one call.

    It owns its executable form, until `close`. Addresses and shapes are those of the capture.
    """

    def __init__(self, stream: int, queue: Callable[[], None]) -> None:
        """DeviceError if the work cannot be captured. Uses the current context."""
        self._driver = driver = _bindings()
        self._stream = driver.CUstream(stream)
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _call(driver, driver.cuStreamBeginCapture, self._stream, mode)
        try:
            queue()
        except BaseException:
            driver.cuStreamEndCapture(self._stream)
            raise
        graph = _call(driver, driver.cuStreamEndCapture, self._stream)
        try:
            self._executable = _call(driver, driver.cuGraphInstantiate, graph, 0)
        finally:
            driver.cuGraphDestroy(graph)

    def launch(self) -> None:
        """Queue the work."""
        _call(self._driver, self._driver.cuGraphLaunch, self._executable, self._stream)

    def close(self) -> None:
        """Release the executable form."""
        self._driver.cuGraphExecDestroy(self._executable)


@cache
def _primary_context() -> Any:
    """The first GPU's primary context, retained until the process ends.

    pycuda can release one only in the thread that retained it.
    """
    driver = _pycuda()
    driver.init()
    return driver.Device(DEVICE_INDEX).retain_primary_context()


def _pycuda() -> Any:
    try:
        import pycuda.driver
    except ImportError as e:
        raise MissingDependencyError("pycuda", extra="cuda", purpose="running engines") from e
    return pycuda.driver


def check_graphs() -> None:
    """MissingDependencyError without the library that captures graphs."""
    _bindings()


def check_owner(address: int) -> None:
    """UsageError unless an address is memory of the GPU that sessions use.

    A kernel that reads another's ends the context, for PyTorch as well.
    """
    if not address:  # of an array without values
        return
    driver = _bindings("taking arrays that are on the GPU")
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    status, owner = driver.cuPointerGetAttribute(attribute, address)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise UsageError(
            f"the array's address {address:#x} is not memory of a GPU: {status.name}: copy its "
            "values to the GPU first"
        )
    if int(owner) != DEVICE_INDEX:
        theirs, ours = (_device_name(driver, index) for index in (int(owner), DEVICE_INDEX))
        raise UsageError(
            f"the array is on {theirs} (GPU {int(owner)}), this session on {ours} "
            f"(GPU {DEVICE_INDEX}): copy it there"
        )


def _device_name(driver: Any, index: int) -> str:
    """What a GPU is called."""
    name: bytes = _call(driver, driver.cuDeviceGetName, 256, index)
    return name.partition(b"\0")[0].decode(errors="replace")


def _bindings(purpose: str = "replaying CUDA graphs (cuda_graphs=False: none)") -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as e:
        raise MissingDependencyError("cuda-bindings", extra="cuda", purpose=purpose) from e
    return driver


def _call(driver: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function of cuda-bindings; DeviceError for a status other than success."""
    status, *results = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"{function.__name__} failed: {status.name}")
    return results[0] if results else None


def _line(error: BaseException) -> str:
    """CUDA's message, as one line."""
    return " ".join(str(error).split()) or type(error).__name__
