"""One engine and its inputs → its outputs: execution contexts, buffers and CUDA graphs."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.bundle.atomic import write_bytes
from medsa_deploy.bundle.manifest import GraphContract
from medsa_deploy.errors import DeviceError, DeviceMemoryError, EngineChangedError, MedsaError
from medsa_deploy.kernels.cubins import cache_folder
from medsa_deploy.nvidia import tensorrt_api
from medsa_deploy.nvidia.cuda import CapturedGraph as CudaGraph
from medsa_deploy.nvidia.cuda import Gpu
from medsa_deploy.nvidia.device_array import FLOAT32, DeviceArray
from medsa_deploy.nvidia.engines import EngineFile, Shape

from .interface import Array, TimedLayer
from .tensor_contract import axis_ranges, check_contract

logger = logging.getLogger(__name__)

GRAPHS = 8
"""CUDA graphs that an engine keeps, those used last: each has an execution context of its own."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What both engines of a backend are opened with."""

    library: Any
    gpu: Gpu
    flavor: tensorrt_api.Flavor
    cuda_graphs: bool
    time_layers: bool


@dataclass(frozen=True)
class _Buffer:
    """An input's or output's memory, for the optimization profile's largest shape."""

    address: int
    pinned: Array
    """(values,), what passes between host and GPU."""


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph, and the execution context it was captured from.

    TensorRT asks for a context of its own for every graph: another shape changes a context's state,
    which graphs captured from it refer to.
    """

    context: Any
    graph: CudaGraph


class EngineRun:
    """A deserialized engine, its buffers and its execution contexts, on a `Gpu` that is current.

    The `Gpu` owns the memory. It is used from one thread at a time.
    """

    def __init__(
        self,
        opening: Opening,
        folder: Path,
        file: EngineFile,
        graph: GraphContract,
        *,
        keeps: bool = False,
    ) -> None:
        """The files were compared with their description before.

        keeps: whether outputs stay on the GPU, at addresses that `run` is told.
        EngineChangedError if the engine is none, BundleError if it has other tensors than `graph`.
        """
        self._library, self._gpu, self._flavor = opening.library, opening.gpu, opening.flavor
        self._timer = tensorrt_api.layer_timer(self._library) if opening.time_layers else None
        self.cuda_graphs = opening.cuda_graphs
        """Whether CUDA graphs are replayed; no longer, once a capture failed."""
        self._graph, self._path = graph, folder / file.path
        self.smallest = {name: shapes[0] for name, shapes in file.profile.items()}
        """Input → its smallest shape in the optimization profile."""
        self.largest = {name: shapes[2] for name, shapes in file.profile.items()}
        """Input → its largest."""
        self._logger = tensorrt_api.error_logger(self._library)
        self._runtime = self._library.Runtime(self._logger)
        self._engine = self._call(self._runtime.deserialize_cuda_engine, self._path.read_bytes())
        if self._engine is None:
            raise self._failure(f"{self._path} was not loaded", EngineChangedError)
        ranges = axis_ranges(graph, self.smallest, self.largest)
        check_contract(self._path, self._tensors(), graph, ranges)
        self._runtime_cache: Any = None
        self._runtime_config: Any = None
        """TensorRT-RTX's; it lives as long as the context that was made with it."""
        self._cache_path = cache_folder().parent / "rtx" / f"{file.sha256}.cache"
        self._cached = b""
        self._seen: OrderedDict[tuple[Any, ...], _Captured | None] = OrderedDict()
        """Shapes and addresses of earlier runs → their CUDA graph, once they came twice."""
        if self._flavor == "tensorrt":
            self._scratch_size = int(self._engine.device_memory_size_v2)
            self._scratch = self._gpu.allocate(self._scratch_size)
        self._context = self._new_context()
        shapes = dict(self.largest)
        if not keeps:
            shapes |= self._outputs(max(shape[0] for shape in self.largest.values()))
        self._buffers = {name: self._buffer(shape) for name, shape in shapes.items()}

    def output_shapes(self, rows: int) -> list[Shape]:
        """Shapes of the outputs with `rows` entries in the first axis, in the contract's order."""
        return list(self._outputs(rows).values())

    def queue(
        self,
        inputs: dict[str, Array | DeviceArray],
        rows: int,
        addresses: Sequence[int] | None = None,
    ) -> list[int]:
        """Queue one run: where its outputs will be on the GPU, in the contract's order.

        Inputs on the GPU are used where they are. rows: entries in the first axis of the outputs.
        addresses: where to leave them, in place of memory that the next run writes over.
        """
        shapes = {name: tuple(values.shape) for name, values in inputs.items()}
        tensors = {name: self._place(name, values) for name, values in inputs.items()}
        names = [tensor.name for tensor in self._graph.outputs]
        outputs = list(addresses or (self._buffers[name].address for name in names))
        self._queue_engine(shapes, tensors | dict(zip(names, outputs, strict=True)))
        return outputs

    def fetch(self, rows: int) -> list[Array]:
        """Wait for the last run, and copy its outputs to the host."""
        outputs = []
        for name, shape in self._outputs(rows).items():
            buffer = self._buffers[name]
            part = buffer.pinned[: int(np.prod(shape))]
            self._gpu.download(part, buffer.address)
            outputs.append(part.reshape(shape))
        self._gpu.wait()
        return [values.copy() for values in outputs]  # the next run writes over these

    def layers(self) -> list[TimedLayer]:
        """Layers of all runs so far; none if not opened for it."""
        times = self._timer.times if self._timer is not None else {}
        return [
            TimedLayer(name=name, operator=tensorrt_api.operator(name), samples_ms=tuple(ms))
            for name, ms in times.items()
        ]

    def close(self) -> None:
        """Release graphs and contexts; the `Gpu` frees the memory."""
        with suppress(MedsaError):
            self._save_runtime_cache()
        with suppress(MedsaError), self._gpu.current():
            self._gpu.wait()  # for what an interrupt left in the stream
        with suppress(MedsaError), self._gpu.current():
            while self._seen:
                self._forget()
            self._context = self._runtime_config = self._runtime_cache = None
            self._engine = self._runtime = None

    def _queue_engine(self, shapes: dict[str, Shape], addresses: dict[str, int]) -> None:
        """Queue the engine, by replaying a graph where these shapes and addresses have one."""
        if self._flavor == "rtx" or not self.cuda_graphs:  # RTX keeps graphs of its own
            self._enqueue(self._context, shapes, addresses)
            return
        key = (*shapes.values(), *addresses.values())
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > GRAPHS:
                self._forget()
            self._enqueue(self._context, shapes, addresses)
            return
        self._seen.move_to_end(key)
        captured = self._seen[key]
        if captured is not None:
            captured.graph.launch()
            return
        try:
            context = self._new_context()
        except DeviceMemoryError as e:
            self._no_graphs(e)
            self._enqueue(self._context, shapes, addresses)
            return
        self._enqueue(context, shapes, addresses)  # settles the context's state for the capture
        self._gpu.wait()
        try:
            graph = self._gpu.capture(lambda: self._execute(context))
        except DeviceError as e:
            self._no_graphs(e)
        else:
            self._seen[key] = _Captured(context, graph)

    def _no_graphs(self, error: DeviceError) -> None:
        """Do without, from here on."""
        logger.warning("%s runs without CUDA graphs: %s", self._path, error)
        self.cuda_graphs = False

    def _forget(self) -> None:
        """Release the graph that was used longest ago."""
        _, captured = self._seen.popitem(last=False)
        if captured is not None:
            captured.graph.close()

    def _enqueue(self, context: Any, shapes: dict[str, Shape], addresses: dict[str, int]) -> None:
        """Queue the engine in a context."""
        for name, shape in shapes.items():
            if not self._call(context.set_input_shape, name, shape):
                raise self._failure(f"{name} cannot have the shape {shape}", DeviceError)
        for name, address in addresses.items():
            if not self._call(context.set_tensor_address, name, address):
                raise self._failure(f"{name} cannot lie at {address:#x}", DeviceError)
        self._execute(context)

    def _execute(self, context: Any) -> None:
        captures = self._flavor == "rtx" and self.cuda_graphs  # within the call
        with self._gpu.capturing() if captures else nullcontext():
            queued = self._call(context.execute_async_v3, self._gpu.stream)
        if not queued:
            raise self._failure(f"{self._path} failed", DeviceError)

    def _new_context(self) -> Any:
        """An execution context. TensorRT's share their scratch memory: one stream runs them all."""
        if self._flavor == "rtx":
            settings = self._runtime_config = self._new_runtime_config()
        else:
            settings = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._call(self._engine.create_execution_context, settings)
        if context is None:
            raise self._failure(f"{self._path} has no execution context", DeviceError)
        if self._flavor == "tensorrt":
            context.set_device_memory(self._scratch, self._scratch_size)
        if self._timer is not None:
            context.profiler = self._timer
        return context

    def _new_runtime_config(self) -> Any:
        """TensorRT-RTX's: its own CUDA graphs, and kernels it compiled for this GPU before.

        These are native code that comes without a SHA-256, so they lie in the user's cache folder
        and not in the bundle.
        """
        config = self._engine.create_runtime_config()
        strategies = self._library.CudaGraphStrategy
        config.cuda_graph_strategy = (
            strategies.WHOLE_GRAPH_CAPTURE if self.cuda_graphs else strategies.DISABLED
        )
        self._runtime_cache = config.create_runtime_cache()
        with suppress(OSError):
            self._cached = self._cache_path.read_bytes()
            self._runtime_cache.deserialize(self._cached)
        config.set_runtime_cache(self._runtime_cache)
        return config

    def _save_runtime_cache(self) -> None:
        """Keep the kernels that TensorRT-RTX compiled, where there are new ones."""
        if self._runtime_cache is None:
            return
        with self._gpu.current():
            data = bytes(self._runtime_cache.serialize() or b"")
        if data in (b"", self._cached):
            return
        try:
            self._cache_path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self._cache_path, data)
        except OSError as e:
            logger.info("kernels are not kept in %s: %s", self._cache_path, e.strerror)

    def _outputs(self, rows: int) -> dict[str, Shape]:
        """Output → its shape with `rows` entries in the first axis."""
        return {
            tensor.name: (rows, *(axis for axis in tensor.shape[1:] if isinstance(axis, int)))
            for tensor in self._graph.outputs
        }

    def _buffer(self, shape: Shape) -> _Buffer:
        length = max(1, int(np.prod(shape)))  # TensorRT wants an address of an empty tensor too
        return _Buffer(self._gpu.allocate(FLOAT32 * length), self._gpu.pinned(length))

    def _place(self, name: str, values: Array | DeviceArray) -> int:
        """Where an input is on the GPU; host values are queued to be copied there."""
        if isinstance(values, DeviceArray):
            return values.address
        buffer = self._buffers[name]
        part = buffer.pinned[: values.size]
        if values.size:
            np.copyto(part.reshape(values.shape), values)
            self._gpu.upload(buffer.address, part)
        return buffer.address

    def _tensors(self) -> list[tuple[str, str, list[int | None]]]:
        """Name, dtype and shape of the engine's tensors; None for a dynamic axis."""
        tensors = []
        for i in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(i)
            dtype = self._engine.get_tensor_dtype(name)
            word = "float32" if dtype == self._library.DataType.FLOAT else str(dtype)
            shape = [axis if axis >= 0 else None for axis in self._engine.get_tensor_shape(name)]
            tensors.append((name, word, shape))
        return tensors

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call of TensorRT's; errors that it reports from here on are this call's.

        It may report an error of an earlier call that it got over.
        """
        self._logger.errors.clear()
        return function(*arguments)

    def _failure(self, event: str, kind: type[Exception]) -> Exception:
        """The error for a call that TensorRT refused, with TensorRT's reason."""
        lines = self._logger.errors or ["no reason given"]
        reason = lines[0][:300]  # the others follow from it
        full = any("outofmemory" in line.lower().replace(" ", "") for line in lines)
        if full:
            return DeviceMemoryError(
                f"the GPU's memory is full ({reason}): close what else uses it, or build engines "
                "for fewer images and prompts with --batch and --prompts"
            )
        return kind(f"{event}: {reason}")
