"""A bundle and the name of a backend → a session."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsa_deploy.bundle.files import check_file
from medsa_deploy.bundle.manifest import Manifest, Role, load_manifest
from medsa_deploy.errors import MissingDependencyError, UsageError
from medsa_deploy.nvidia import cuda
from medsa_deploy.nvidia.engines import find_engines
from medsa_deploy.nvidia.tensorrt_api import FLAVORS

from . import tuning
from .backends.fallback import FallbackBackend
from .backends.interface import PARTS, Backend
from .session import Session
from .tuning import MOST_THREADS, TUNED

if TYPE_CHECKING:
    from .backends.openvino import OpenVINOBackend

logger = logging.getLogger(__name__)

CPU_BACKENDS = TUNED
BACKENDS = (*CPU_BACKENDS, "onnxruntime-cuda", *FLAVORS)
DEFAULT = "onnxruntime"
AUTO = "auto"
"""What `medsa-deploy doctor --tune` found fastest here for this bundle; else the default."""
OWN_ENCODERS: dict[str, Role] = {
    "onnxruntime": "encoder-onnxruntime",
    "openvino": "encoder-openvino",
}
"""Backend → role of the encoder that is made for it."""
RUN = ("encoder", *OWN_ENCODERS.values(), "decoder", *PARTS, "weights")
"""Roles of the files that a backend on ONNX files reads."""
COMPUTED = {"bf16": "fp32", "int8-bf16": "int8-cpu"}
"""Precisions of the arithmetic alone → the precision of the files they run."""


def load(
    bundle: str | os.PathLike[str],
    *,
    backend: str = DEFAULT,
    precision: str = "fp32",
    threads: int | None = None,
    fallback: Sequence[str] = (),
    cuda_graphs: bool = True,
    portable: bool = False,
    time_layers: bool = False,
) -> Session:
    """Open a bundle. The files it runs are compared with their SHA-256 first.

    The decoder runs as its two parts where the bundle has them and a prompt has no mask.

    `backend`: `onnxruntime`, `openvino`, or `auto` for what `medsa-deploy doctor --tune` stored;
    on an NVIDIA GPU `tensorrt` and `rtx`, which run the bundle's engines, and `onnxruntime-cuda`.
    `precision`: of the files; `bf16` and `int8-bf16` have OpenVINO compute the encoder of float32
    files, or of `int8-cpu` what is not INT8 there, in bfloat16.
    `threads`: threads of one run, default all cores. `fallback`: backends that take over, in this
    order, where one cannot be opened or fails while it runs; their predictions are `degraded`.
    `cuda_graphs`: whether engines may be replayed as CUDA graphs. `portable`: have a backend run
    `encoder.onnx` although the bundle has an encoder of its own for it. `time_layers`: have the
    backend be a `TimesLayers`, which makes it slower. BundleError for a bundle that is missing,
    changed or of another version. MissingDependencyError for a backend that is not installed.
    EngineError where the bundle's engines do not fit this machine.
    """
    folder = Path(bundle)
    manifest = load_manifest(folder)
    chain = (backend, *([fallback] if isinstance(fallback, str) else fallback))
    for name in chain:
        check_options(name, threads, precision)
    if not (cuda_graphs or set(chain) & set(FLAVORS)):
        raise UsageError(
            f"CUDA graphs are what {' and '.join(FLAVORS)} replay: for {', '.join(chain)} leave "
            "--no-cuda-graphs (cuda_graphs=False) out"
        )
    held = files_precision(precision)
    for role in ("encoder", "decoder"):
        manifest.file(role, held)
    if not set(chain) <= set(FLAVORS):
        for entry in manifest.files:
            if entry.role in RUN and entry.precision == held:
                check_file(entry, folder)
    options = _Options(
        precision=precision,
        threads=threads,
        cuda_graphs=cuda_graphs,
        portable=portable,
        time_layers=time_layers,
    )
    openers = [(name, partial(_open, name, folder, manifest, options)) for name in chain]
    return Session(manifest, FallbackBackend(openers) if fallback else openers[0][1]())


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Of `load`, those that say how a backend is opened."""

    precision: str
    threads: int | None
    cuda_graphs: bool
    portable: bool
    time_layers: bool


def _open(name: str, folder: Path, manifest: Manifest, options: _Options) -> Backend:
    """A backend on files whose SHA-256 was compared."""
    held = files_precision(options.precision)
    if name in FLAVORS:
        from .backends.tensorrt import TensorRTBackend

        engines = find_engines(folder, name, held, cuda.device())
        graphs, timed = options.cuda_graphs, options.time_layers
        return TensorRTBackend(engines, manifest, name, cuda_graphs=graphs, time_layers=timed)
    threads = options.threads
    if name == AUTO:
        name, threads = _tuned(manifest, held, threads)

    def path(role: Role) -> Path:
        return folder / manifest.file(role, held).path

    files = (path("encoder"), path("decoder"), manifest.graphs)
    common: dict[str, Any] = {"threads": threads, "time_layers": options.time_layers}
    if name == "onnxruntime-cuda":
        from .backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        return OnnxRuntimeCudaBackend(*files, **common)
    if all(manifest.has(role, held) for role in PARTS):
        common["parts"] = [path(role) for role in PARTS]
    own = OWN_ENCODERS[name]
    if manifest.has(own, held) and not options.portable:
        files = (path(own), *files[1:])
    if name == "openvino":
        chunk, bf16 = manifest.network.chunk, options.precision in COMPUTED
        return _openvino()(*files, chunk=chunk, bf16=bf16, **common)
    from .backends.onnxruntime_cpu import OnnxRuntimeBackend

    return OnnxRuntimeBackend(*files, **common)


def check_options(backend: str, threads: int | None, precision: str = "fp32") -> None:
    """UsageError for a backend that is not there or has not that precision, or for no thread."""
    if backend not in (*BACKENDS, AUTO):
        raise UsageError(f"unknown backend {backend!r}; there are: {', '.join((*BACKENDS, AUTO))}")
    if precision in COMPUTED and backend != "openvino":
        raise UsageError(f"{precision} is what OpenVINO can compute in: add --backend openvino")
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MOST_THREADS):
        raise UsageError(
            f"threads is {threads!r}, expected a whole number from 1 to {MOST_THREADS}"
        )


def files_precision(precision: str) -> str:
    """The precision of the files that are run for a precision."""
    return COMPUTED.get(precision, precision)


def _tuned(manifest: Manifest, precision: str, threads: int | None) -> tuple[str, int | None]:
    """Backend and threads that were stored for this bundle and machine, else the defaults."""
    choice = tuning.stored(manifest.file("encoder", precision).sha256)
    if choice is None:
        logger.warning(
            "nothing is stored for this bundle on this machine: %s is used; "
            "medsa-deploy doctor --tune BUNDLE measures what is fastest",
            DEFAULT,
        )
        return DEFAULT, threads
    return choice.backend, threads or choice.threads


def _openvino() -> type[OpenVINOBackend]:
    """The backend, whose library is imported here; MissingDependencyError without it."""
    try:
        from .backends.openvino import OpenVINOBackend
    except ImportError as e:
        raise MissingDependencyError(
            "openvino", extra="openvino", purpose="the backend openvino"
        ) from e
    return OpenVINOBackend
