"""A bundle and the name of a backend → a session."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsa_deploy.errors import MissingDependencyError, UsageError
from medsa_deploy.manifest import Manifest, check_file
from medsa_deploy.manifest import load as load_manifest

from . import tuning
from .backend import PARTS
from .session import Session

if TYPE_CHECKING:
    from .openvino import OpenVINOBackend

logger = logging.getLogger(__name__)

BACKENDS = ("onnxruntime", "openvino")
DEFAULT = "onnxruntime"
AUTO = "auto"
"""What `medsa-deploy doctor --tune` found fastest here for this bundle; else the default."""
COMPUTED = {"bf16": "fp32"}
"""Precisions of the arithmetic alone → the precision of the files they run."""


def load(
    bundle: str | os.PathLike[str],
    *,
    backend: str = DEFAULT,
    precision: str = "fp32",
    threads: int | None = None,
    time_layers: bool = False,
) -> Session:
    """Open a bundle. The files it runs are compared with the manifest's SHA-256 first.

    The decoder runs as its two parts where the bundle has them and a prompt has no mask.

    `backend`: `onnxruntime`, `openvino`, or `auto` for what `medsa-deploy doctor --tune` stored.
    `precision`: of the files; and `bf16`, in which OpenVINO computes the encoder of float32 files.
    `threads`: threads of one run, default all cores. `time_layers`: have the backend be a
    `TimesLayers`, which makes it slower. BundleError for a bundle that is missing,
    changed or of another version. MissingDependencyError for a backend that is not installed.
    """
    folder = Path(bundle)
    manifest = load_manifest(folder)
    check_options(backend, threads, precision)
    held = files_precision(precision)
    paths = {role: check_file(manifest.file(role, held), folder) for role in ("encoder", "decoder")}
    there = [manifest.file(role, held) for role in PARTS if manifest.has(role, held)]
    parts = [check_file(entry, folder) for entry in there] if len(there) == len(PARTS) else []
    for entry in manifest.files:
        if entry.role == "weights" and entry.precision == held:
            check_file(entry, folder)
    if backend == AUTO:
        backend, threads = _tuned(manifest, held, threads)
    options: dict[str, Any] = {"parts": parts, "threads": threads, "time_layers": time_layers}
    files = (paths["encoder"], paths["decoder"], manifest.graphs)
    if backend == "openvino":
        return Session(manifest, _openvino()(*files, bf16=precision == "bf16", **options))
    from .ort import OnnxRuntimeBackend

    return Session(manifest, OnnxRuntimeBackend(*files, **options))


def check_options(backend: str, threads: int | None, precision: str = "fp32") -> None:
    """UsageError for a backend that is not there or has not that precision, or for no thread."""
    if backend not in (*BACKENDS, AUTO):
        raise UsageError(f"unknown backend {backend!r}; there are: {', '.join((*BACKENDS, AUTO))}")
    if precision in COMPUTED and backend != "openvino":
        raise UsageError(f"{precision} is what OpenVINO can compute in: add --backend openvino")
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}, expected 1 or more")


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
        from .openvino import OpenVINOBackend
    except ImportError as e:
        raise MissingDependencyError(
            "openvino", extra="openvino", purpose="the backend openvino"
        ) from e
    return OpenVINOBackend
