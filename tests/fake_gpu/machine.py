"""GPU memory, streams and counts, which the stand-ins of all libraries share."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from medsa_deploy.nvidia import cuda

DEVICE = cuda.Device(name="NVIDIA Orin", capability="sm87", driver_cuda="12.6")
Function = Callable[..., dict[str, np.ndarray]]
ALIGNMENT = 256
"""Bytes: CUDA aligns what it allocates, and TensorRT wants scratch memory aligned."""


class CudaError(Exception):
    pass


class CudaMemoryError(CudaError):
    pass


class CudaLogicError(CudaError):
    pass


class Machine:
    """What the stand-ins share, and what a test sees."""

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        """Address → GPU memory."""
        self.pinned = 0
        """Arrays of pinned memory."""
        self.streams: dict[int, Stream] = {}
        self.graphs = 0
        """Executable graphs."""
        self.captured = self.replayed = self.enqueued = self.waited = self.joined = 0
        self.awaited: list[int] = []
        """Streams of others that were waited for."""
        self.launched: list[str] = []
        """Entries of kernels, in order."""
        self.downloaded = 0
        """Bytes that came to the host."""
        self.capacity = self.pinnable = math.inf
        """Bytes of GPU memory, and arrays of pinned memory, that there may be."""
        self.functions: dict[str, Function] = {}
        """The name in an engine's file → what it computes."""
        self.uploaded: dict[int, np.dtype[Any]] = {}
        """Address → dtype of the values that were copied there last."""
        self.elsewhere: dict[int, str] = {}
        """Address of memory on another GPU, and what that GPU is called."""
        self.current = threading.local()
        self.on_wait: Callable[[], None] = lambda: None
        """Called where the GPU is waited for: raises what a test wants."""
        self.on_capture: Callable[[], None] = lambda: None
        """Called while a stream captures."""
        self.loaded: set[str] = set()
        """Kernels that were launched before, which the driver has loaded."""
        self.refuses: str | None = None
        """What TensorRT says in place of running."""
        self.recovers: str | None = None
        """An error that TensorRT reports, and gets over."""
        self.uncapturable = self.unlaunchable = False
        """Whether graphs cannot be captured; whether those there are cannot be launched."""
        self.runtime_cache: bytes | None = None
        self.strategy: str | None = None
        """TensorRT-RTX's CUDA graphs."""

    @property
    def used(self) -> int:
        return sum(block.nbytes for block in list(self.blocks.values()))

    def check(self) -> None:
        assert getattr(self.current, "depth", 0) > 0, "no current context"

    def allocate(self, size: int) -> int:
        """The address of `size` bytes, which are NaN until something is written.

        CUDA refuses to allocate nothing.
        """
        assert size > 0
        block = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        start = -block.ctypes.data % ALIGNMENT
        address = block.ctypes.data + start
        self.blocks[address] = block[start : start + size]
        return address

    def wait_for_all(self) -> None:
        """Wait for every stream, as the libraries do while they load; that breaks captures."""
        self.check()
        streams = list(self.streams.values())
        assert all(stream.capturing is None for stream in streams), "capture broken"

    def view(self, address: int, size: int) -> np.ndarray:
        """Bytes at an address, all of one allocation."""
        for start, block in list(self.blocks.items()):  # another thread may allocate
            if start <= address and address + size <= start + block.nbytes:
                return block[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated")

    def array(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        return self.view(address, 4 * math.prod(shape)).view(np.float32).reshape(shape)

    def put(self, values: np.ndarray) -> SimpleNamespace:
        """Another library's array on the GPU."""
        base = values if values.base is None else values.base
        data = np.frombuffer(base.tobytes(), np.uint8)
        address = self.allocate(max(1, len(data)))
        block = self.view(address, len(data))
        block[:] = data
        interface = {
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (address, False),
            "strides": None if values.flags.c_contiguous else values.strides,
            "version": 3,
            "stream": 1,
        }
        return SimpleNamespace(__cuda_array_interface__=interface, block=block)


class Stream:
    def __init__(self, machine: Machine, flags: int) -> None:
        machine.check()
        assert flags == cuda.NON_BLOCKING, "the default stream's users would break its captures"
        self.machine, self.queue, self.capturing = machine, [], None
        self.handle = 1000 + len(machine.streams)
        machine.streams[self.handle] = self

    def add(self, work: Callable[[], None]) -> None:
        (self.queue if self.capturing is None else self.capturing).append(work)

    def wait_for_event(self, event: Any) -> None:
        self.machine.check()
        assert event.stream is None
        assert self.capturing is None
        self.machine.joined += 1

    def synchronize(self) -> None:
        self.machine.check()
        assert self.capturing is None, "waiting for a stream breaks its capture"
        self.machine.waited += 1
        self.machine.on_wait()
        while self.queue:
            self.queue.pop(0)()
