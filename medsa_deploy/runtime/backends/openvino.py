"""ONNX files → masks by OpenVINO on the CPU, faster or slower than ONNX Runtime by the machine.

It computes in float32 unless asked for bfloat16, because OpenVINO's own default is the fastest type
of the processor. Only the encoder computes in bfloat16. The decoder takes little of the time, and
turns coordinates into phases, which bfloat16's 8 bits cannot hold.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.bundle.manifest import GraphContract
from medsa_deploy.errors import BundleError, DeviceError, UsageError

from .interface import Array, TimedLayer
from .onnx_files import OnnxFilesBackend
from .tensor_contract import check_contract

TELEMETRY = "openvino_telemetry"


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Hide OpenVINO's telemetry from it.

    With telemetry, importing OpenVINO reports to its vendor and leaves an identifier in the home
    folder.
    """
    before = sys.modules.get(TELEMETRY)
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[TELEMETRY]
        if before is not None:
            sys.modules[TELEMETRY] = before


with _without_telemetry():
    import openvino

DTYPES = {"f32": "float32"}
"""OpenVINO's names of the contract's types."""


@dataclass(frozen=True)
class _Compiled:
    """A graph, and its requests that no caller is using: a request runs one call at a time."""

    model: Any
    idle: list[Any] = field(default_factory=list)
    times: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """Layer's name and operator → milliseconds of each run, where layers are timed."""


class OpenVINOBackend(OnnxFilesBackend[_Compiled]):
    """The graphs of a bundle, compiled for this processor. Any number of threads may use it."""

    name = "openvino"

    def __init__(
        self,
        encoder: Path,
        decoder: Path,
        graphs: Mapping[str, GraphContract],
        *,
        parts: Sequence[Path] = (),
        chunk: int = 1,
        threads: int | None = None,
        bf16: bool = False,
        time_layers: bool = False,
    ) -> None:
        """See `OnnxFilesBackend`. UsageError for bfloat16 on a processor without it.

        `chunk`: number of slices that the encoder is compiled for, because OpenVINO fuses more
        nodes if shapes are fixed.
        """
        self._chunk, self._bf16 = chunk, bf16
        self._core = openvino.Core()
        if bf16 and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            name = self._core.get_property("CPU", "FULL_DEVICE_NAME")
            raise UsageError(
                f"this processor ({name}) does not compute in bf16: use fp32, or int8-cpu"
            )
        super().__init__(
            encoder, decoder, graphs, parts=parts, threads=threads, time_layers=time_layers
        )

    def encode(self, image: Array) -> Any:
        """image (B, 3, S, S) → image_embeddings (B, 256, g, g)."""
        starts = range(0, len(image), self._chunk)
        embeddings = [
            super(OpenVINOBackend, self).encode(image[i : i + self._chunk]) for i in starts
        ]
        return embeddings[0] if len(embeddings) == 1 else np.concatenate(embeddings)

    def facts(self) -> dict[str, Any]:
        """Version, arithmetic and threads."""
        model = self._graphs["encoder"].model
        return {
            "backend": self.name,
            "version": openvino.get_version(),
            "encoder_computes_in": model.get_property("INFERENCE_PRECISION_HINT").to_string(),
            "threads": self.threads or "all",
        }

    def close(self) -> None:
        """Release the graphs and the library's core."""
        super().close()
        del self._core

    def _open(self, role: str, path: Path, contract: GraphContract) -> _Compiled:
        bf16 = self._bf16 and role == "encoder"
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "EXECUTION_MODE_HINT": "PERFORMANCE" if bf16 else "ACCURACY",
            "PERF_COUNT": self._time_layers,
        }
        if self.threads is not None:
            options["INFERENCE_NUM_THREADS"] = self.threads
        try:
            model = self._core.read_model(path)
            tensors = [_described(tensor) for tensor in (*model.inputs, *model.outputs)]
            check_contract(path, tensors, contract)
            if role == "encoder":
                model.reshape([self._chunk, *contract.inputs[0].shape[1:]])
            return _Compiled(self._core.compile_model(model, "CPU", options))
        except BundleError:
            raise
        except Exception as e:  # RuntimeError and its own classes, from many layers
            raise BundleError(f"{path} is not a graph OpenVINO can load: {_line(e)}") from e

    def _run(self, graph: _Compiled, inputs: dict[str, Array]) -> dict[str, Array]:
        try:
            request = graph.idle.pop()
        except IndexError:
            request = graph.model.create_infer_request()
        try:
            # Read where they are: copies of the image part's outputs take a tenth of a click.
            outputs = request.infer(inputs, share_inputs=True)
            if self._time_layers:
                _add_times(graph.times, request.get_profiling_info())
        except Exception as e:  # RuntimeError and its own classes, from many layers
            raise DeviceError(f"OpenVINO failed: {_line(e)}") from e
        graph.idle.append(request)
        return {output.get_any_name(): array for output, array in outputs.items()}

    def _timed_layers(self, graph: _Compiled) -> list[TimedLayer]:
        return [
            TimedLayer(name=name, operator=operator, samples_ms=tuple(ms))
            for (name, operator), ms in graph.times.items()
        ]


def _add_times(times: dict[tuple[str, str], list[float]], layers: Any) -> None:
    """Add one run's times, as OpenVINO gives them."""
    for layer in layers:
        if layer.status == openvino.ProfilingInfo.Status.EXECUTED:
            key = (layer.node_name, layer.node_type)
            times.setdefault(key, []).append(layer.real_time.total_seconds() * 1e3)


def _described(tensor: Any) -> tuple[str, str, list[int | None]]:
    """Name, dtype and shape; None for a dynamic axis."""
    dtype = tensor.element_type.to_string()
    shape = [axis.get_length() if axis.is_static else None for axis in tensor.partial_shape]
    return tensor.get_any_name(), DTYPES.get(dtype, dtype), shape


def _line(error: BaseException) -> str:
    """The last line of OpenVINO's message; those before it name places in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
