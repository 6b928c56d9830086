"""ONNX Runtime on the CPU: the backend that every install has."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from medsa_deploy.bundle.manifest import GraphContract
from medsa_deploy.errors import (
    BundleError,
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    EngineDeviceError,
)

from .interface import PARTS, Array, ImagePart, TimedLayer
from .tensor_contract import check_contract, decoder_inputs, mask_shape

DTYPES = {"tensor(float)": "float32"}
"""ONNX Runtime's names of the contract's types."""
FULL = ("out of memory", "failed to allocate memory", "bad_alloc", "bad allocation")
"""What it says when memory is full."""
LOOP = "Scan"
NO_CUDA = (
    "ONNX Runtime could not start its CUDA provider, for want of a GPU, a driver or CUDA's and "
    "cuDNN's libraries (pip install 'onnxruntime-gpu[cuda,cudnn]'); the bundle runs with --backend "
    "onnxruntime"
)
KERNEL = "_kernel_time"
"""What its profiler adds to the name of a node that ran."""


class OnnxRuntimeBackend:
    """The graphs of a bundle as ONNX Runtime sessions."""

    name = "onnxruntime"
    providers: Sequence[Any] = ("CPUExecutionProvider",)

    def __init__(
        self,
        encoder: Path,
        decoder: Path,
        graphs: dict[str, GraphContract],
        *,
        parts: Sequence[Path] = (),
        threads: int | None = None,
        time_layers: bool = False,
    ) -> None:
        self.threads = threads
        self._times = Path(tempfile.mkdtemp(prefix="medsa-")) if time_layers else None
        """Folder ONNX Runtime writes layer times into."""
        self._mask_shape = mask_shape(graphs["decoder"])
        self._encoder = self._open(encoder, graphs["encoder"])
        self._decoder = self._open(decoder, graphs["decoder"])
        roles = PARTS if parts else ()
        self._parts = [self._open(p, graphs[r]) for r, p in zip(roles, parts, strict=True)]
        self.splits = bool(parts)

    def encode(self, image: Array) -> Array:
        """image (B, 3, S, S) → image_embeddings (B, 256, g, g)."""
        (embeddings,) = self._run(self._encoder, {"image": image})
        return embeddings.copy()  # or, kept, they hold up the memory of the encoder's next runs

    def decode(
        self, image_embeddings: Array, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """See `Backend.decode`."""
        inputs = decoder_inputs(
            image_embeddings, point_coords, point_labels, mask, self._mask_shape
        )
        masks, iou = self._run(self._decoder, inputs)
        return masks, iou

    def decode_image(self, image_embeddings: Array) -> ImagePart:
        """See `SplitsDecoder.decode_image`."""
        image, _ = self._parts
        found = self._run(image, {"image_embeddings": image_embeddings})
        return dict(zip([o.name for o in image.get_outputs()], found, strict=True))

    def decode_click(
        self, image_part: ImagePart, point_coords: Array, point_labels: Array
    ) -> tuple[Array, Array]:
        """See `SplitsDecoder.decode_click`."""
        _, click = self._parts
        prompts = {"point_coords": point_coords, "point_labels": point_labels}
        masks, iou = self._run(click, {**image_part, **prompts})
        return masks, iou

    def facts(self) -> dict[str, Any]:
        """Version, provider and threads."""
        return {
            "backend": self.name,
            "version": ort.__version__,
            "providers": self._encoder.get_providers(),
            "threads": self.threads or "all",
        }

    def layers(self) -> dict[str, list[TimedLayer]]:
        """See `TimesLayers.layers`; empty if not opened for it."""
        if self._times is None:
            return {}
        sessions = {"encoder": self._encoder, "decoder": self._decoder}
        if self.splits:
            sessions |= dict(zip(PARTS, self._parts, strict=True))
        found = {name: read_layers(Path(s.end_profiling())) for name, s in sessions.items()}
        return {name: layers for name, layers in found.items() if layers}

    def close(self) -> None:
        """Release the sessions."""
        del self._encoder, self._decoder, self._parts
        if self._times is not None:
            shutil.rmtree(self._times, ignore_errors=True)

    def _open(self, path: Path, graph: GraphContract) -> ort.InferenceSession:
        """A session whose tensors are the contract's."""
        options = ort.SessionOptions()
        options.log_severity_level = 4  # failures are raised; the log would say them twice
        # A plan of the first run's memory, made for the second, is memory once more: without it a
        # chunk of 4 slices at 1024 takes 1.4 GB instead of 2.8, in the same time.
        options.enable_mem_pattern = False
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if self._times is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._times / path.stem)
        try:
            session = ort.InferenceSession(
                path, options, providers=list(self.providers), enable_fallback=0
            )
        except Exception as e:  # onnxruntime raises classes of its own that share no base
            if _memory_is_full(e):
                raise DeviceMemoryError(f"{path} does not fit the memory: {_line(e)}") from e
            if "CUDA" in str(e):
                raise EngineDeviceError(f"{NO_CUDA}: {_line(e)}") from e
            raise BundleError(f"{path} is not a graph ONNX Runtime can load: {_line(e)}") from e
        tensors = (*session.get_inputs(), *session.get_outputs())
        opened = [(t.name, DTYPES.get(t.type, t.type), t.shape) for t in tensors]
        check_contract(path, opened, graph)
        return session

    def _run(self, session: ort.InferenceSession, inputs: dict[str, Array]) -> list[Array]:
        try:
            outputs: list[Array] = session.run(None, inputs)
        except Exception as e:  # as above
            raise failure(e) from e
        return outputs


def read_layers(path: Path) -> list[TimedLayer]:
    """Layers in a file of ONNX Runtime's profiler: events of one kernel each, in microseconds.

    A kernel in a loop has one sample, of all turns together; the loop itself what they leave of it.
    """
    samples: dict[tuple[str, str], list[float]] = {}
    events = json.loads(path.read_text(encoding="utf-8"))
    kernels = [e for e in events if e["cat"] == "Node" and e["name"].endswith(KERNEL)]
    end, around, turned = 0, [0.0], set()  # of the outermost loop: end, samples, layers seen in it
    for event in sorted(kernels, key=lambda e: (e["ts"], -e["dur"])):
        operator, ms = event["args"]["op_name"], event["dur"] / 1e3
        key = (event["name"].removesuffix(KERNEL), operator)
        inside = event["ts"] + event["dur"] <= end
        if inside and operator == LOOP:
            continue
        found = samples.setdefault(key, [])
        if key in turned and inside:
            found[-1] += ms
        else:
            found.append(ms)
        if inside:
            around[-1] -= ms
            turned.add(key)
        elif operator == LOOP:
            end, around, turned = event["ts"] + event["dur"], found, set()
    return [
        TimedLayer(name=n, operator=op, samples_ms=tuple(ms)) for (n, op), ms in samples.items()
    ]


def failure(error: BaseException) -> DeviceError:
    """What ONNX Runtime said during a run, by name."""
    if _memory_is_full(error):
        return DeviceMemoryError(f"ONNX Runtime's memory is full: {_line(error)}")
    if "CUDA failure" in str(error):
        return DeviceLostError(f"the GPU failed, start the program again: {_line(error)}")
    return DeviceError(f"ONNX Runtime failed: {_line(error)}")


def _memory_is_full(error: BaseException) -> bool:
    """Whether it was an allocation that failed, on the host or on a GPU."""
    return any(words in str(error).lower() for words in FULL)


def _line(error: BaseException) -> str:
    """The first line of what ONNX Runtime said; its type where it said nothing."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]
