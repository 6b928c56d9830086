"""ONNX files → masks by ONNX Runtime on the CPU: the backend that every install has."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property
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

from .interface import Array, TimedLayer
from .onnx_files import OnnxFilesBackend
from .tensor_contract import check_contract

DTYPES = {"tensor(float)": "float32"}
"""ONNX Runtime's names of the contract's types."""
MEMORY_IS_FULL = ("out of memory", "failed to allocate memory", "bad_alloc", "bad allocation")
"""Words in the errors of a full memory."""
LOOP = "Scan"
NO_CUDA = (
    "ONNX Runtime could not start its CUDA provider: a GPU, its driver or the libraries of CUDA "
    "and cuDNN are missing (pip install 'onnxruntime-gpu[cuda,cudnn]'); the bundle also runs with "
    "--backend onnxruntime"
)
KERNEL = "_kernel_time"
"""Suffix that the profiler adds to the name of a node that ran."""


class OnnxRuntimeBackend(OnnxFilesBackend[ort.InferenceSession]):
    """The graphs of a bundle as ONNX Runtime sessions. Any number of threads may use it."""

    name = "onnxruntime"
    providers: Sequence[Any] = ("CPUExecutionProvider",)
    slower_fusions = "SkipLayerNormFusion"
    """Left out: on a CPU, addition and norm in one kernel take longer than in two."""

    @cached_property
    def _profiles(self) -> Path:
        """Folder into which ONNX Runtime writes layer times."""
        return Path(tempfile.mkdtemp(prefix="medsa-"))

    def encode(self, image: Array) -> Any:
        """image (B, 3, S, S) → image_embeddings (B, 256, g, g)."""
        # A copy: the output itself would keep the memory of the encoder's next runs.
        return super().encode(image).copy()

    def facts(self) -> dict[str, Any]:
        """Version, provider and threads."""
        return {
            "backend": self.name,
            "version": ort.__version__,
            "providers": self._graphs["encoder"].get_providers(),
            "threads": self.threads or "all",
        }

    def close(self) -> None:
        """Release the sessions."""
        super().close()
        if self._time_layers:
            shutil.rmtree(self._profiles, ignore_errors=True)

    def _open(self, role: str, path: Path, contract: GraphContract) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # failures are raised; the log would repeat them
        # A memory plan that stays between runs doubles the memory: without it a chunk of 4 slices
        # at 1024 takes 1.4 GB instead of 2.8, in the same time.
        options.enable_mem_pattern = False
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        options.add_session_config_entry(
            "optimization.disable_specified_optimizers", self.slower_fusions
        )
        if self._time_layers:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._profiles / path.stem)
        try:
            session = ort.InferenceSession(
                path, options, providers=list(self.providers), enable_fallback=0
            )
        except Exception as e:  # onnxruntime raises classes of its own that share no base
            if _is_full_memory(e):
                raise DeviceMemoryError(f"{path} does not fit the memory: {_line(e)}") from e
            if "CUDA" in str(e):
                raise EngineDeviceError(f"{NO_CUDA}: {_line(e)}") from e
            raise BundleError(f"{path} is not a graph ONNX Runtime can load: {_line(e)}") from e
        tensors = (*session.get_inputs(), *session.get_outputs())
        opened = [(t.name, DTYPES.get(t.type, t.type), t.shape) for t in tensors]
        check_contract(path, opened, contract)
        return session

    def _run(self, graph: ort.InferenceSession, inputs: dict[str, Array]) -> dict[str, Array]:
        try:
            outputs: list[Array] = graph.run(None, inputs)
        except Exception as e:  # onnxruntime raises classes of its own that share no base
            raise failure(e) from e
        return {node.name: array for node, array in zip(graph.get_outputs(), outputs, strict=True)}

    def _timed_layers(self, graph: ort.InferenceSession) -> list[TimedLayer]:
        return read_layers(Path(graph.end_profiling()))


def read_layers(path: Path) -> list[TimedLayer]:
    """Layers in a file of ONNX Runtime's profiler: events of one kernel each, in microseconds.

    A kernel in a loop has one sample per run of the loop: the sum over its turns. The loop's own
    sample is the time that its kernels leave.
    """
    samples: dict[tuple[str, str], list[float]] = {}
    events = json.loads(path.read_text(encoding="utf-8"))
    kernels = [e for e in events if e["cat"] == "Node" and e["name"].endswith(KERNEL)]
    # of the outermost loop: its end, its samples, and the layers that ran in it so far
    loop_end, loop_samples, in_loop = 0, [0.0], set()
    for event in sorted(kernels, key=lambda e: (e["ts"], -e["dur"])):
        operator, ms = event["args"]["op_name"], event["dur"] / 1e3
        layer = (event["name"].removesuffix(KERNEL), operator)
        inside = event["ts"] + event["dur"] <= loop_end
        if inside and operator == LOOP:
            continue
        layer_samples = samples.setdefault(layer, [])
        if layer in in_loop and inside:
            layer_samples[-1] += ms
        else:
            layer_samples.append(ms)
        if inside:
            loop_samples[-1] -= ms
            in_loop.add(layer)
        elif operator == LOOP:
            loop_end, loop_samples, in_loop = event["ts"] + event["dur"], layer_samples, set()
    return [
        TimedLayer(name=name, operator=operator, samples_ms=tuple(ms))
        for (name, operator), ms in samples.items()
    ]


def failure(error: BaseException) -> DeviceError:
    """ONNX Runtime's error during a run, as the class of `errors` that fits."""
    if _is_full_memory(error):
        return DeviceMemoryError(f"ONNX Runtime's memory is full: {_line(error)}")
    if "CUDA failure" in str(error):
        return DeviceLostError(f"the GPU failed, start the program again: {_line(error)}")
    return DeviceError(f"ONNX Runtime failed: {_line(error)}")


def _is_full_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a GPU."""
    return any(words in str(error).lower() for words in MEMORY_IS_FULL)


def _line(error: BaseException) -> str:
    """The first line of ONNX Runtime's message; the error's type if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]
