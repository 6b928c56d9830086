"""OpenVINO on the CPU: an alternative to ONNX Runtime, measured machine by machine.

Float32 unless asked for bfloat16: OpenVINO's own default is whatever is fastest on the processor.
In bfloat16 only the encoder is; the decoder turns coordinates into phases, which 8 bits cannot
hold, and takes little of the time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.bundle.manifest import GraphContract
from medsa_deploy.errors import BundleError, DeviceError, UsageError

from .interface import PARTS, Array, ImagePart, TimedLayer
from .tensor_contract import check_contract, decoder_inputs, mask_shape

TELEMETRY = "openvino_telemetry"


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Have OpenVINO take its telemetry for not installed.

    Importing it would report that to its vendor, and leave an identifier in the home folder.
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


class OpenVINOBackend:
    """The graphs of a bundle, compiled for this processor."""

    name = "openvino"

    def __init__(
        self,
        encoder: Path,
        decoder: Path,
        graphs: dict[str, GraphContract],
        *,
        parts: Sequence[Path] = (),
        chunk: int = 1,
        threads: int | None = None,
        bf16: bool = False,
        time_layers: bool = False,
    ) -> None:
        """UsageError for bfloat16 on a processor without it. `chunk`: slices encoded together, for
        which the encoder is compiled: OpenVINO fuses more where shapes are fixed."""
        self.threads, self._time_layers = threads, time_layers
        self._chunk = chunk
        self._core = openvino.Core()
        if bf16 and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            name = self._core.get_property("CPU", "FULL_DEVICE_NAME")
            raise UsageError(
                f"this processor ({name}) does not compute in bf16: use fp32, or int8-cpu"
            )
        self._mask_shape = mask_shape(graphs["decoder"])
        self._encoder = self._open(encoder, graphs["encoder"], batch=chunk, bf16=bf16)
        self._decoder = self._open(decoder, graphs["decoder"])
        roles = PARTS if parts else ()
        self._parts = [self._open(p, graphs[r]) for r, p in zip(roles, parts, strict=True)]
        self.splits = bool(parts)

    def encode(self, image: Array) -> Array:
        """image (B, 3, S, S) → image_embeddings (B, 256, g, g)."""
        chunks = [image[i : i + self._chunk] for i in range(0, len(image), self._chunk)]
        found = [self._run(self._encoder, {"image": one})["image_embeddings"] for one in chunks]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def decode(
        self, image_embeddings: Array, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """See `Backend.decode`."""
        inputs = decoder_inputs(
            image_embeddings, point_coords, point_labels, mask, self._mask_shape
        )
        found = self._run(self._decoder, inputs)
        return found["low_res_masks"], found["iou_predictions"]

    def decode_image(self, image_embeddings: Array) -> ImagePart:
        """See `SplitsDecoder.decode_image`."""
        return self._run(self._parts[0], {"image_embeddings": image_embeddings})

    def decode_click(
        self, image_part: ImagePart, point_coords: Array, point_labels: Array
    ) -> tuple[Array, Array]:
        """See `SplitsDecoder.decode_click`."""
        prompts = {"point_coords": point_coords, "point_labels": point_labels}
        found = self._run(self._parts[1], {**image_part, **prompts})
        return found["low_res_masks"], found["iou_predictions"]

    def facts(self) -> dict[str, Any]:
        """Version, arithmetic and threads."""
        model = self._encoder.model
        return {
            "backend": self.name,
            "version": openvino.get_version(),
            "encoder_computes_in": model.get_property("INFERENCE_PRECISION_HINT").to_string(),
            "threads": self.threads or "all",
        }

    def layers(self) -> dict[str, list[TimedLayer]]:
        """See `TimesLayers.layers`; empty if not opened for it."""
        graphs = {"encoder": self._encoder, "decoder": self._decoder}
        if self.splits:
            graphs |= dict(zip(PARTS, self._parts, strict=True))
        return {
            name: [
                TimedLayer(name=layer, operator=operator, samples_ms=tuple(ms))
                for (layer, operator), ms in graph.times.items()
            ]
            for name, graph in graphs.items()
            if graph.times
        }

    def close(self) -> None:
        """Release the graphs."""
        del self._encoder, self._decoder, self._parts, self._core

    def _open(
        self, path: Path, graph: GraphContract, *, batch: int | None = None, bf16: bool = False
    ) -> _Compiled:
        """A compiled graph whose tensors are the contract's. `batch`: of its one input, fixed."""
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
            check_contract(path, tensors, graph)
            if batch is not None:
                model.reshape([batch, *graph.inputs[0].shape[1:]])
            return _Compiled(self._core.compile_model(model, "CPU", options))
        except BundleError:
            raise
        except Exception as e:  # RuntimeError and its own classes, from many layers
            raise BundleError(f"{path} is not a graph OpenVINO can load: {_line(e)}") from e

    def _run(self, graph: _Compiled, inputs: dict[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        try:
            request = graph.idle.pop()
        except IndexError:
            request = graph.model.create_infer_request()
        try:
            found = request.infer(inputs)
            if self._time_layers:
                _note(request.get_profiling_info(), graph.times)
        except Exception as e:  # as above
            raise DeviceError(f"OpenVINO failed: {_line(e)}") from e
        graph.idle.append(request)
        return {output.get_any_name(): value for output, value in found.items()}


def _note(found: Any, times: dict[tuple[str, str], list[float]]) -> None:
    """Add the times of one run's layers."""
    for layer in found:
        if layer.status == openvino.ProfilingInfo.Status.EXECUTED:
            key = (layer.node_name, layer.node_type)
            times.setdefault(key, []).append(layer.real_time.total_seconds() * 1e3)


def _described(tensor: Any) -> tuple[str, str, list[int | None]]:
    """Name, dtype and shape; None for a dynamic axis."""
    dtype = tensor.element_type.to_string()
    shape = [axis.get_length() if axis.is_static else None for axis in tensor.partial_shape]
    return tensor.get_any_name(), DTYPES.get(dtype, dtype), shape


def _line(error: BaseException) -> str:
    """What OpenVINO said: the last line, after those that say where in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
