"""The name of a backend → what it needs, what it can compute, and the backend, opened.

One table, `BACKENDS`: a new backend is a module beside this one, a row and its opener.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from medsa_deploy.bundle.manifest import GraphContract, Manifest, Role
from medsa_deploy.errors import MissingDependencyError, UsageError
from medsa_deploy.nvidia import cuda, tensorrt_api
from medsa_deploy.nvidia.engines import find_engines

from .interface import PARTS, Backend

BackendName = Literal["onnxruntime", "openvino", "onnxruntime-cuda", "tensorrt", "rtx", "auto"]
"""A backend of `load`.

`onnxruntime` and `openvino` run on the CPU, the others on an NVIDIA GPU. `auto` is the backend that
`medsa-deploy doctor --tune` found fastest for the bundle on this machine.

>>> from typing import get_args
>>> from medsa_deploy import BackendName
>>> "openvino" in get_args(BackendName)
True
"""
Precision = Literal["fp32", "fp16", "int8", "int8-cpu", "bf16", "int8-bf16"]
"""A precision of `load`.

`fp32`, `fp16`, `int8` and `int8-cpu` are precisions of files, which a bundle may have. A backend
computes `bf16` from the files of fp32, and `int8-bf16` from those of int8-cpu.

>>> from typing import get_args
>>> from medsa_deploy import Precision
>>> "fp16" in get_args(Precision)
True
"""
DEFAULT: Literal["onnxruntime"] = "onnxruntime"
AUTO: Literal["auto"] = "auto"
MOST_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of `load` that are rarely needed.

    >>> from medsa_deploy import LoadOptions, load
    >>> with load("liver.medsa", options=LoadOptions(portable=True)) as session:
    ...     session.image_size
    256
    """

    portable: bool = False
    """Run `encoder.onnx`, even if the bundle has an encoder of the backend's own."""
    time_layers: bool = False
    """Open the backend so that it times its layers (`TimesLayers`), which makes it slower."""


@dataclass(frozen=True, kw_only=True)
class BackendSetup:
    """A bundle, and how a backend is to run it."""

    bundle: Path
    manifest: Manifest
    precision: Precision
    threads: int | None
    """None for all cores."""
    cuda_graphs: bool
    """Whether engines may be replayed as CUDA graphs."""
    options: LoadOptions

    def path(self, role: Role) -> Path:
        """The file of a role."""
        return self.bundle / self.manifest.file(role, files_precision(self.precision)).path

    def has(self, role: Role) -> bool:
        """Whether the bundle has a file of a role."""
        return self.manifest.has(role, files_precision(self.precision))

    def onnx_files(
        self, encoder_role: Role | None = None
    ) -> tuple[Path, Path, dict[str, GraphContract]]:
        """Encoder, decoder and their contracts. `encoder_role`: the encoder that is preferred."""
        encoder: Role = "encoder"
        if encoder_role is not None and self.has(encoder_role) and not self.options.portable:
            encoder = encoder_role
        return self.path(encoder), self.path("decoder"), self.manifest.graphs

    def onnx_options(self) -> dict[str, Any]:
        """Keyword arguments that every backend on ONNX files takes."""
        return {"threads": self.threads, "time_layers": self.options.time_layers}

    def parts(self) -> list[Path]:
        """The files of the split decoder; empty if the bundle does not have both."""
        return [self.path(role) for role in PARTS] if all(map(self.has, PARTS)) else []


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """A library that a backend needs."""

    name: str
    extra: str | None
    """The extra that installs it; None for the plain install."""
    installed: Callable[[], bool]

    def missing(self, purpose: str) -> str:
        """The library's name and how to install it, in words."""
        if self.extra is None:
            return f"{purpose} needs {self.name}, which is not installed: pip install medsa-deploy"
        return str(MissingDependencyError(self.name, extra=self.extra, purpose=purpose))


@dataclass(frozen=True, kw_only=True)
class BackendSpec:
    """A backend's row in the table."""

    name: BackendName
    needs: tuple[Requirement, ...]
    gpu: bool = False
    """It runs on an NVIDIA GPU; otherwise on the CPU."""
    engines: bool = False
    """It runs the bundle's engines; otherwise its ONNX files."""
    tunable: bool = False
    """`medsa-deploy doctor --tune` measures it, and `auto` may choose it."""
    encoder_role: Role | None = None
    """Role of the encoder that a bundle may have for this backend alone."""
    computes: Mapping[Precision, Precision] = field(default_factory=dict)
    """Precisions it computes beside those of files → the precision of the files they run."""
    opener: Callable[[BackendSpec, BackendSetup], Backend]
    """Opens it on files that were compared with their SHA-256."""


def _importable(module: str) -> bool:
    return find_spec(module) is not None


def _onnxruntime_has_cuda() -> bool:
    if not _importable("onnxruntime"):
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _open_onnxruntime(spec: BackendSpec, setup: BackendSetup) -> Backend:
    from .onnxruntime_cpu import OnnxRuntimeBackend

    files = setup.onnx_files(spec.encoder_role)
    return OnnxRuntimeBackend(*files, parts=setup.parts(), **setup.onnx_options())


def _open_openvino(spec: BackendSpec, setup: BackendSetup) -> Backend:
    try:
        from .openvino import OpenVINOBackend
    except ImportError as e:
        raise MissingDependencyError(
            "openvino", extra="openvino", purpose="the backend openvino"
        ) from e
    return OpenVINOBackend(
        *setup.onnx_files(spec.encoder_role),
        parts=setup.parts(),
        chunk=setup.manifest.network.chunk,
        bf16=setup.precision in spec.computes,
        **setup.onnx_options(),
    )


def _open_onnxruntime_cuda(spec: BackendSpec, setup: BackendSetup) -> Backend:
    from .onnxruntime_cuda import OnnxRuntimeCudaBackend

    return OnnxRuntimeCudaBackend(*setup.onnx_files(), **setup.onnx_options())


def _open_engines(flavor: tensorrt_api.Flavor, spec: BackendSpec, setup: BackendSetup) -> Backend:
    from .tensorrt import TensorRTBackend

    folder = find_engines(setup.bundle, flavor, files_precision(setup.precision), cuda.device())
    return TensorRTBackend(
        folder,
        setup.manifest,
        flavor,
        cuda_graphs=setup.cuda_graphs,
        time_layers=setup.options.time_layers,
    )


def _package(name: str, extra: str | None) -> Requirement:
    """A library whose module has its name."""
    return Requirement(name=name, extra=extra, installed=partial(_importable, name))


def _engines_spec(flavor: tensorrt_api.Flavor) -> BackendSpec:
    library = Requirement(
        name=tensorrt_api.NAMES[flavor],
        extra=flavor,
        installed=partial(tensorrt_api.installed, flavor),
    )
    return BackendSpec(
        name=flavor,
        needs=(library, _package("pycuda", "cuda")),
        gpu=True,
        engines=True,
        opener=partial(_open_engines, flavor),
    )


_ROWS = (
    BackendSpec(
        name="onnxruntime",
        needs=(_package("onnxruntime", None),),
        tunable=True,
        encoder_role="encoder-onnxruntime",
        opener=_open_onnxruntime,
    ),
    BackendSpec(
        name="openvino",
        needs=(_package("openvino", "openvino"),),
        tunable=True,
        encoder_role="encoder-openvino",
        computes={"bf16": "fp32", "int8-bf16": "int8-cpu"},
        opener=_open_openvino,
    ),
    BackendSpec(
        name="onnxruntime-cuda",
        needs=(Requirement(name="onnxruntime-gpu", extra="gpu", installed=_onnxruntime_has_cuda),),
        gpu=True,
        opener=_open_onnxruntime_cuda,
    ),
    _engines_spec("tensorrt"),
    _engines_spec("rtx"),
)
BACKENDS: Mapping[str, BackendSpec] = MappingProxyType({row.name: row for row in _ROWS})
"""Every backend by name, the default first; `auto` is one of these when it is opened."""
COMPUTED: Mapping[str, Precision] = MappingProxyType(
    {precision: files for row in _ROWS for precision, files in row.computes.items()}
)
"""Precisions that are computed, and not of files → the precision of the files they run."""
BACKEND_ENCODERS = tuple(row.encoder_role for row in _ROWS if row.encoder_role is not None)
"""Roles of the encoders that are made for one backend each."""
GRAPH_ROLES: tuple[Role, ...] = ("encoder", *BACKEND_ENCODERS, "decoder", *PARTS, "weights")
"""Roles of the files that backends on ONNX files read."""


def backends() -> dict[BackendName, str | None]:
    """Name of every backend → None if it can run here; else what is missing, and what to do.

    A backend on engines also needs a bundle with engines for this GPU.

    >>> import medsa_deploy
    >>> medsa_deploy.backends()["onnxruntime"] is None
    True
    >>> usable = [name for name, missing in medsa_deploy.backends().items() if missing is None]
    """
    return {spec.name: _missing(spec) for spec in BACKENDS.values()}


def _missing(spec: BackendSpec) -> str | None:
    for requirement in spec.needs:
        if not requirement.installed():
            return requirement.missing(f"the backend {spec.name}")
    if spec.gpu and cuda.device() is None:
        return f"the backend {spec.name} needs an NVIDIA GPU and its driver, which were not found"
    return None


def files_precision(precision: str) -> str:
    """The precision of the files that are run for a precision."""
    return COMPUTED.get(precision) or precision


def check_options(backend: str, threads: int | None, precision: str = "fp32") -> None:
    """UsageError for an unknown backend, a precision that it cannot compute, or unusable threads.

    A bundle may lack the precision: `Manifest.file` checks that.
    """
    names = get_args(BackendName)
    if backend not in names:
        raise UsageError(f"unknown backend {backend!r}; there are: {', '.join(names)}")
    if precision in COMPUTED:
        able = [row.name for row in _ROWS if precision in row.computes]
        if backend not in able:
            raise UsageError(
                f"{precision} is available only with {' and '.join(able)}: add --backend {able[0]}"
            )
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MOST_THREADS):
        raise UsageError(
            f"threads is {threads!r}, expected a whole number from 1 to {MOST_THREADS}"
        )
