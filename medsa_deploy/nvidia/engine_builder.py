"""An ONNX file → a serialized engine: TensorRT's or TensorRT-RTX's, on one path through Polygraphy.

`build` runs in a child process, so that the two never meet, and so that an interrupt ends a builder
that does not listen. Networks are strongly typed: the ONNX file's types are the engine's, and TF32
is the one precision flag there is.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from medsa_deploy.bundle.strict_json import decode
from medsa_deploy.child import ChildError, OnNote, run_in_child
from medsa_deploy.errors import BuildError, BundleError, MissingDependencyError

from . import tensorrt_api
from .engines import EngineOptions, Shape

GIB = 1 << 30
FUSED_KERNEL = b"fused_multihead"
"""Stands in a TensorRT-RTX engine for each fused attention kernel: it carries their sources."""

Attention = Literal["fused", "plain", "unknown"]
OnProgress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One engine to build."""

    onnx: str
    output: str
    options: EngineOptions
    profile: dict[str, tuple[Shape, Shape, Shape]]
    """Input → its smallest, optimal and largest shape."""
    timing_cache: str | None = None
    """TensorRT's record of how long kernels took, read and added to."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Facts of an engine that was written."""

    attention: Attention
    seconds: float


def build(job: Job, *, on_progress: OnProgress = lambda percent: None) -> Outcome:
    """Build one engine in a child process; `on_progress` is called with the percent done.

    BundleError if the ONNX file cannot be parsed, BuildError if it cannot be compiled,
    MissingDependencyError without a library, OSError if the engine cannot be written; `job.output`
    is then incomplete or absent.
    """
    try:
        return Outcome(**run_in_child(build_job, dataclasses.asdict(job), on_note=on_progress))
    except ChildError as e:
        reason = str(e)
        if e.killed:
            reason = (
                "it was killed, most likely for want of memory: give --workspace GB, or close "
                "other programs"
            )
        raise BuildError(f"the builder ended before its engine: {reason}") from e


def build_job(job: dict[str, Any], note: OnNote) -> dict[str, Any]:
    """The child's part of `build`."""
    return dataclasses.asdict(_build(decode(Job, job, "job"), note))


def _build(job: Job, on_progress: OnProgress) -> Outcome:
    """Build and write one engine, in this process."""
    start = perf_counter()
    options = job.options
    library = tensorrt_api.load(options.flavor)
    complaints = _prepare_polygraphy(options.flavor)
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    name = tensorrt_api.NAMES[options.flavor]
    if options.flavor == "tensorrt":
        _check_operators(job.onnx, library.__version__)
    try:
        network = network_from_onnx_path(job.onnx, strongly_typed=True)
    except PolygraphyException as e:
        raise BundleError(
            f"{job.onnx} cannot be parsed by {name}: {_first_complaint(complaints, e)}"
        ) from e
    if not options.fused_attention:
        _keep_attention_plain(library, network[1])
    try:
        config = _config(job, library, on_progress)
        plan = engine_bytes_from_network(network, config, save_timing_cache=job.timing_cache)
    except PolygraphyException as e:
        raise BuildError(
            f"{name} {library.__version__} cannot build {Path(job.onnx).name}: "
            f"{_first_complaint(complaints, e)}"
        ) from e
    attention = _attention(options, plan)
    try:
        Path(job.output).write_bytes(plan)
    except OSError as e:  # a failed write names no file
        raise OSError(e.errno, e.strerror, job.output) from e
    return Outcome(attention=attention, seconds=round(perf_counter() - start, 3))


def _check_operators(path: str, version: str) -> None:
    """BundleError if an ONNX file has operators that the parser of an old TensorRT lacks."""
    import onnx

    if lacking := tensorrt_api.lacking_operators(
        version, onnx.load(path, load_external_data=False)
    ):
        raise BundleError(
            f"{path} has {lacking}, which the parser of TensorRT {version} lacks: install TensorRT "
            "10.6 or newer, or export the checkpoint again"
        )


def _prepare_polygraphy(flavor: tensorrt_api.Flavor) -> list[str]:
    """Point Polygraphy at one library, before it is imported; the list fills with complaints."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if flavor == "rtx" else "0"
    try:
        from polygraphy.logger import G_LOGGER
    except ModuleNotFoundError as e:
        raise MissingDependencyError("polygraphy", extra=flavor, purpose="building engines") from e
    complaints: list[str] = []

    class Complaints(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            complaints.append(" ".join(record.getMessage().removeprefix("[E]").split()))

    G_LOGGER.module_severity = G_LOGGER.ERROR
    G_LOGGER.use_python_logging_system = True
    G_LOGGER.python_logger.addHandler(Complaints(logging.ERROR))
    G_LOGGER.python_logger.propagate = False
    return complaints


def _first_complaint(complaints: list[str], error: Exception) -> str:
    """The library's first complaint, which later ones follow from; else Polygraphy's."""
    text = complaints[0] if complaints else " ".join(str(error).split())
    return text if len(text) <= 300 else text[:299] + "…"


def _config(job: Job, library: Any, on_progress: OnProgress) -> Any:
    """Polygraphy's maker of the builder's configuration."""
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile

    options = job.options
    profile = Profile()
    for name, shapes in job.profile.items():
        profile.add(name, *shapes)
    common: dict[str, Any] = {
        "profiles": [profile],
        "progress_monitor": _monitor(library, on_progress),
    }
    if options.workspace_gb is not None:
        limit = int(options.workspace_gb * GIB)
        common["memory_pool_limits"] = {library.MemoryPoolType.WORKSPACE: limit}
    if options.flavor == "rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [divmod(int(target[2:]), 10) for target in options.targets]
        create = CreateConfigRTX(compute_capabilities=capabilities, **common)
    else:
        create = CreateConfig(
            builder_optimization_level=options.optimization_level,
            load_timing_cache=job.timing_cache,
            **common,
        )

    def set_tf32(builder: Any, network: Any, config: Any) -> None:
        change = config.set_flag if options.tf32 else config.clear_flag
        change(library.BuilderFlag.TF32)

    return PostprocessConfig(create, set_tf32)


def _monitor(library: Any, on_progress: OnProgress) -> Any:
    """The builder's nested phases as percent of the whole."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self.phases: list[list[Any]] = []  # name, steps done, steps; the innermost last
            self.reported = 0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.phases.append([phase, 0, max(steps, 1)])

        def step_complete(self, phase: str, step: int) -> bool:
            for entry in self.phases:
                if entry[0] == phase:
                    entry[1] = min(step + 1, entry[2])
            share, width = 0.0, 1.0
            for _, done, steps in self.phases:
                share, width = share + width * done / steps, width / steps
            if (percent := int(100 * share)) > self.reported:
                self.reported = percent
                on_progress(percent)
            return True

        def phase_finish(self, phase: str) -> None:
            self.phases = [entry for entry in self.phases if entry[0] != phase]

    return Monitor()


def _keep_attention_plain(library: Any, network: Any) -> None:
    """Put a Relu, which changes no probability, after every softmax of a parsed network.

    A fused attention kernel never has normalized probabilities to apply it to. Casts around the
    softmax or the products do not do: the compiler fuses across them.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    for softmax in (layer for layer in layers if layer.type == library.LayerType.SOFTMAX):
        probabilities = softmax.get_output(0)
        relu = network.add_activation(probabilities, library.ActivationType.RELU)
        relu.name = f"{softmax.name}_plain"
        for layer in layers:
            for i in range(layer.num_inputs):
                tensor = layer.get_input(i)
                if tensor is not None and tensor.name == probabilities.name:
                    layer.set_input(i, relu.get_output(0))


def _attention(options: EngineOptions, plan: Any) -> Attention:
    """Whether an engine holds fused attention; BuildError if the options forbid it."""
    if options.flavor != "rtx":
        return "unknown"
    if FUSED_KERNEL not in bytes(plan):
        return "plain"
    if not options.fused_attention:
        raise BuildError(
            "TensorRT-RTX fused attention in spite of --no-fused-attention: no engine was written"
        )
    return "fused"
