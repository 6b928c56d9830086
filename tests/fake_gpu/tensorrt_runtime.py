"""TensorRT's runtime on a machine in host memory; an engine is a function on arrays."""

from __future__ import annotations

import enum
import json
import re
import weakref
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

from .machine import ALIGNMENT, Function, Machine

DTYPES = {"FLOAT": np.dtype(np.float32), "HALF": np.dtype(np.float16)}
LAYERS = ("patch_embed/node_Conv_0", "{ForeignNode[blocks.0/node_Add_1...blocks.1/node_Mul_2]}")
"""Of every engine, where they are timed."""


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
