"""A GPU in host memory: as much of pycuda, cuda-bindings and TensorRT's runtime as a session uses.

Nothing that is queued in a stream happens before the stream is waited for, addresses are checked
against what is allocated, and every call wants its context current. An engine is a function on
arrays, and its contexts refuse what TensorRT's refuse. `Machine` counts what is allocated and
injects faults. tests/test_stand_ins.py compares names and arities with the real libraries.
"""

from __future__ import annotations

import enum
import json
import math
import re
import struct
import sys
import threading
import weakref
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from time import perf_counter
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_on_host
import numpy as np
import pytest

from medsa_deploy.kernels import postprocess, preprocess
from medsa_deploy.kernels.axes import BLOCK, Launch
from medsa_deploy.nvidia import cuda
from medsa_deploy.runtime.backends import tensorrt

DEVICE = cuda.Device(name="NVIDIA Orin", capability="sm87", driver_cuda="12.6")
Function = Callable[..., dict[str, np.ndarray]]
DTYPES = {"FLOAT": np.dtype(np.float32), "HALF": np.dtype(np.float16)}
PARAMETERS = {"preprocess": preprocess.Parameters, "postprocess": postprocess.Parameters}
"""Source of kernels → what they are launched with."""
LAYERS = ("patch_embed/node_Conv_0", "{ForeignNode[blocks.0/node_Add_1...blocks.1/node_Mul_2]}")
"""Of every engine, where they are timed."""
ALIGNMENT = 256
"""Bytes: CUDA aligns what it allocates, and TensorRT wants scratch memory aligned."""


KERNELS = threading.Lock()
"""Held while a kernel runs: the host's fibers are one thread's at a time."""


def run_kernel(launch: Launch) -> None:
    with KERNELS:
        cuda_on_host.run(launch)


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
        """The address of `size` bytes, which are NaN until something is written."""
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
        whole = values if values.base is None else values.base
        data = np.frombuffer(whole.tobytes(), np.uint8)
        address = self.allocate(len(data))
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


def bindings_driver(machine: Machine) -> ModuleType:
    """cuda.bindings.driver: calls give a status first."""
    driver = ModuleType("cuda.bindings.driver")
    driver.CUresult = enum.Enum(
        "CUresult",
        {
            "CUDA_SUCCESS": 0,
            "CUDA_ERROR_INVALID_VALUE": 1,
            "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": 901,
        },
    )
    driver.CUstreamCaptureMode = enum.Enum(
        "CUstreamCaptureMode", {"CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": 1}
    )
    driver.CUpointer_attribute = enum.Enum(
        "CUpointer_attribute", {"CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL": 9}
    )
    done = driver.CUresult.CUDA_SUCCESS

    def cuPointerGetAttribute(attribute: enum.Enum, ptr: int) -> tuple[Any, ...]:
        assert attribute is driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        if ptr in machine.elsewhere:
            return done, 1
        blocks = list(machine.blocks.items())
        if any(start <= ptr <= start + block.nbytes for start, block in blocks):
            return done, 0
        return driver.CUresult.CUDA_ERROR_INVALID_VALUE, None

    def cuDeviceGetName(length: int, dev: int) -> tuple[Any, ...]:
        names = [DEVICE.name, *machine.elsewhere.values()]
        return done, names[dev].encode().ljust(length, b"\0")

    class CUstream:
        def __init__(self, init_value: int = 0) -> None:
            self._handle = init_value

        def __int__(self) -> int:
            return self._handle

    driver.CUstream = CUstream

    def cuStreamBeginCapture(stream: CUstream, mode: enum.Enum) -> tuple[Any, ...]:
        machine.check()
        assert mode is driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        machine.streams[int(stream)].capturing = []
        machine.on_capture()
        return (done,)

    def cuStreamSynchronize(stream: CUstream) -> tuple[Any, ...]:
        machine.awaited.append(int(stream))
        return (done,)

    def cuStreamEndCapture(stream: CUstream) -> tuple[Any, ...]:
        captured = machine.streams[int(stream)]
        graph, captured.capturing = captured.capturing, None
        if machine.uncapturable:
            return driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        machine.captured += 1
        return done, graph

    def cuGraphInstantiate(graph: list[Any], flags: int) -> tuple[Any, ...]:
        machine.graphs += 1
        return done, list(graph)

    def cuGraphDestroy(graph: list[Any]) -> tuple[Any, ...]:
        graph.clear()
        return (done,)

    def cuGraphLaunch(executable: list[Any], stream: CUstream) -> tuple[Any, ...]:
        if machine.unlaunchable:
            return (driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,)
        machine.replayed += 1
        for work in executable:
            machine.streams[int(stream)].add(work)
        return (done,)

    def cuGraphExecDestroy(executable: list[Any]) -> tuple[Any, ...]:
        machine.graphs -= 1
        return (done,)

    for function in (
        *(cuStreamBeginCapture, cuStreamEndCapture, cuStreamSynchronize, cuGraphInstantiate),
        *(cuGraphDestroy, cuGraphLaunch, cuGraphExecDestroy),
        *(cuPointerGetAttribute, cuDeviceGetName),
    ):
        setattr(driver, function.__name__, function)
    return driver


def engine_shapes(
    tensors: dict[str, tuple[int | str, ...]], profile: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """A graph's tensors, axes by number or name → their shapes in an engine; dynamic axes are -1.

    An axis whose smallest and largest size are the same in the only optimization profile is static.
    So is an output's axis that follows from such axes alone: `max(E,P)`.
    """
    sizes = {
        axis: {smallest, largest}
        for name, shapes in profile.items()
        for axis, smallest, largest in zip(tensors[name], shapes[0], shapes[2], strict=True)
    }

    def size(axis: int | str) -> int:
        if isinstance(axis, int):
            return axis
        parts = [sizes[part] for part in re.findall(r"\w+", axis) if part in sizes]
        is_static = parts and all(len(part) == 1 for part in parts)
        return max(max(part) for part in parts) if is_static else -1

    return {name: tuple(size(axis) for axis in shape) for name, shape in tensors.items()}


def tensorrt_runtime(machine: Machine, name: str, version: str) -> ModuleType:
    """What runs engines of tensorrt or tensorrt_rtx. An engine's file names one of the functions.

    A context's shapes are those of its last `set_input_shape`, for graphs captured from it too.
    """
    library = ModuleType(name)
    library.__spec__ = ModuleSpec(name, None)
    library.__version__ = version
    library.DataType = enum.Enum("DataType", ("FLOAT", "HALF"))
    library.ExecutionContextAllocationStrategy = enum.Enum("Strategy", ("STATIC", "USER_MANAGED"))

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

        def __init__(self) -> None:
            pass

        def log(self, severity: int, msg: str) -> None:
            raise NotImplementedError

    class IProfiler:
        def __init__(self) -> None:
            pass

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            raise NotImplementedError

    class IRuntimeCache:
        def deserialize(self, blob: bytes) -> bool:
            machine.runtime_cache = blob
            return True

        def serialize(self) -> bytes:
            return b"compiled kernels"

    class IRuntimeConfig:
        cuda_graph_strategy = None

        def __setattr__(self, field: str, value: Any) -> None:
            assert field == "cuda_graph_strategy"
            machine.strategy = value.name

        def create_runtime_cache(self) -> IRuntimeCache:
            return IRuntimeCache()

        def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
            return True

    class IExecutionContext:
        profiler = None

        def __init__(self, engine: ICudaEngine, has_memory: bool) -> None:
            self._engine, self._has_memory = engine, has_memory
            self._configured: Callable[[], object] = lambda: self
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}

        def _refuse(self, reason: str) -> bool:
            self._engine._logger.log(ILogger.ERROR, reason)
            return False

        def set_device_memory(self, memory: int, size: int) -> None:
            if memory % ALIGNMENT or size < self._engine.device_memory_size_v2:
                self._refuse(f"{size} bytes at {memory:#x} cannot be scratch memory")
                return
            machine.view(memory, size)
            self._has_memory = True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            if name not in self._engine._profile:
                return self._refuse(f"no input {name}")
            smallest, _, largest = self._engine._profile[name]
            inside = (a <= n <= b for a, n, b in zip(smallest, shape, largest, strict=False))
            if len(shape) != len(smallest) or not all(inside):
                return self._refuse(f"{name}: {shape} is not in the optimization profile")
            self._shapes[name] = shape
            return True

        def set_tensor_address(self, name: str, memory: int) -> bool:
            if name not in self._engine._tensors:
                return self._refuse(f"no tensor {name}")
            self._addresses[name] = memory
            return True

        def _problem(self) -> str | None:
            """Why the engine cannot be queued now."""
            if machine.refuses is not None:
                return machine.refuses
            if self._configured() is None:
                return "its runtime configuration is gone"
            if not self._has_memory:
                return "no scratch memory"
            if unset := self._engine._profile.keys() - self._shapes.keys():
                return f"no shape for {', '.join(sorted(unset))}"
            if unset := self._engine._tensors.keys() - self._addresses.keys():
                return f"no address for {', '.join(sorted(unset))}"
            for name, address in self._addresses.items():
                dtype = DTYPES[self._engine.get_tensor_dtype(name).name]
                if name in self._shapes and machine.uploaded.get(address, dtype) != dtype:
                    return f"{name} holds {machine.uploaded[address]}, expected {dtype}"
            return None

        def execute_async_v3(self, stream_handle: int) -> bool:
            machine.check()
            if machine.recovers is not None:
                self._refuse(machine.recovers)
            if problem := self._problem():
                return self._refuse(problem)
            machine.enqueued += 1
            addresses, shapes = dict(self._addresses), dict(self._shapes)

            def work() -> None:
                inputs = {n: machine.array(addresses[n], s) for n, s in shapes.items()}
                for n, values in self._engine._function(**inputs).items():
                    assert values.dtype == np.float32
                    np.copyto(machine.array(addresses[n], values.shape), values)

            stream = machine.streams[stream_handle]
            if machine.strategy == "WHOLE_GRAPH_CAPTURE":  # within this call
                stream.capturing = []
                machine.on_capture()
                stream.capturing = None
            stream.add(work)
            if self.profiler is not None:
                assert machine.strategy != "WHOLE_GRAPH_CAPTURE"
                for layer in LAYERS:
                    self.profiler.report_layer_time(layer, 0.25)
            return True

    class ICudaEngine:
        device_memory_size_v2 = 1 << 10

        def __init__(self, logger: Any, function: Function, profile: dict[str, Any]) -> None:
            self._logger, self._function, self._profile = logger, function, profile
            self._tensors = function.tensors

        num_io_tensors = property(lambda self: len(self._tensors))

        def get_tensor_name(self, index: int) -> str:
            return list(self._tensors)[index]

        def get_tensor_dtype(self, name: str) -> Any:
            return library.DataType[getattr(self._function, "dtypes", {}).get(name, "FLOAT")]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return engine_shapes(self._tensors, self._profile)[name]

        def create_runtime_config(self) -> IRuntimeConfig:
            return IRuntimeConfig()

        def create_execution_context(self, strategy: Any) -> IExecutionContext | None:
            machine.wait_for_all()
            if machine.refuses is not None:
                self._logger.log(ILogger.ERROR, machine.refuses)
                return None
            context = IExecutionContext(self, isinstance(strategy, IRuntimeConfig))
            if isinstance(strategy, IRuntimeConfig):
                context._configured = weakref.ref(strategy)
            return context

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            machine.wait_for_all()
            try:
                plan = json.loads(serialized_engine)
                return ICudaEngine(self._logger, machine.functions[plan["name"]], plan["profile"])
            except (ValueError, KeyError):
                self._logger.log(ILogger.ERROR, "magic tag does not match")
                return None

    for kind in (ILogger, IProfiler, Runtime, ICudaEngine, IExecutionContext):
        setattr(library, kind.__name__, kind)
    if name == "tensorrt_rtx":
        library.IRuntimeConfig, library.IRuntimeCache = IRuntimeConfig, IRuntimeCache
        library.CudaGraphStrategy = enum.Enum("Graphs", ("DISABLED", "WHOLE_GRAPH_CAPTURE"))
    return library


def install(
    monkeypatch: pytest.MonkeyPatch, *, name: str = "tensorrt", version: str = "10.13.0"
) -> Machine:
    """Put the stand-ins where imports find them; the other flavor is hidden."""
    machine = Machine()
    pycuda, bindings = ModuleType("pycuda"), ModuleType("cuda.bindings")
    pycuda.driver, bindings.driver = pycuda_driver(machine), bindings_driver(machine)
    package = ModuleType("cuda")
    package.bindings = bindings
    for module in (pycuda, pycuda.driver, package, bindings, bindings.driver):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for other in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, other, raising=False)
    monkeypatch.setitem(sys.modules, name, tensorrt_runtime(machine, name, version))
    monkeypatch.setattr(cuda, "device", lambda: DEVICE)

    def load_kernels(
        source: str, target: str, load_module: Callable[[bytes], Any], **_: Any
    ) -> Any:
        return load_module(source.encode())

    monkeypatch.setattr(tensorrt, "load_kernels", load_kernels)
    cuda._primary_context.cache_clear()
    return machine
