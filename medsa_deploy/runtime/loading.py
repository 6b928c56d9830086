"""A bundle and the name of a backend → a session."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from medsa_deploy.bundle.files import check_file
from medsa_deploy.bundle.manifest import Manifest, load_manifest
from medsa_deploy.errors import UsageError

from . import tuning
from .backends.fallback import FallbackBackend
from .backends.interface import Backend
from .backends.registry import (
    AUTO,
    BACKENDS,
    DEFAULT,
    GRAPH_ROLES,
    BackendName,
    BackendSetup,
    LoadOptions,
    Precision,
    check_options,
    files_precision,
)
from .session import Session

logger = logging.getLogger(__name__)


def load(
    bundle: str | os.PathLike[str],
    *,
    backend: BackendName = DEFAULT,
    precision: Precision = "fp32",
    threads: int | None = None,
    fallback: BackendName | Sequence[BackendName] = (),
    cuda_graphs: bool = True,
    options: LoadOptions | None = None,
) -> Session:
    """Open a bundle. The files it runs are compared with their SHA-256 first.

    If the bundle has the decoder in two parts, prompts without a mask run these.

    `backend`: see `BackendName`; `backends()` says which can run here. The engines of a bundle run
    on `tensorrt` and `rtx`. `precision`: see `Precision`. `threads`: threads of one run; None for
    all cores. `fallback`: backends that take over, in this order, if the one before cannot be
    opened or fails while it runs; their predictions are `degraded`. `cuda_graphs`: whether engines
    may be replayed as CUDA graphs. `options`: rarely needed ones.

    UsageError for an option that cannot be used. BundleError for a bundle that is missing, changed,
    of another version, or without the precision. MissingDependencyError for a backend that is not
    installed. EngineError if the bundle's engines do not fit this machine.

    >>> from medsa_deploy import load, read_image
    >>> with load("liver.medsa", threads=2) as session:
    ...     embedding = session.encode(read_image("slice.png"))
    ...     prediction = session.segment(embedding, points=[(120, 88)])
    >>> prediction.masks.shape
    (1, 1, 240, 320)
    """
    folder = Path(bundle)
    manifest = load_manifest(folder)
    chain = (backend, *([fallback] if isinstance(fallback, str) else fallback))
    for name in chain:
        check_options(name, threads, precision)
    on_engines = [name for name, spec in BACKENDS.items() if spec.engines]
    if not (cuda_graphs or set(chain) & set(on_engines)):
        raise UsageError(
            f"{', '.join(chain)} replays no CUDA graphs, only {' and '.join(on_engines)} do: leave "
            "out --no-cuda-graphs (cuda_graphs=False)"
        )
    only_engines = set(chain) <= set(on_engines)
    _check_files(manifest, folder, files_precision(precision), only_engines=only_engines)
    setup = BackendSetup(
        bundle=folder,
        manifest=manifest,
        precision=precision,
        threads=threads,
        cuda_graphs=cuda_graphs,
        options=options or LoadOptions(),
    )
    openers = [(name, partial(_open, name, setup)) for name in chain]
    return Session(manifest, FallbackBackend(openers) if fallback else openers[0][1]())


def _check_files(manifest: Manifest, folder: Path, precision: str, *, only_engines: bool) -> None:
    """BundleError unless the files that will run are the manifest's."""
    for role in ("encoder", "decoder"):
        manifest.file(role, precision)
    if only_engines:  # they are compared with theirs when they are loaded
        return
    for file in manifest.files:
        if file.role in GRAPH_ROLES and file.precision == precision:
            check_file(file, folder)


def _open(name: BackendName, setup: BackendSetup) -> Backend:
    """A backend on files whose SHA-256 was compared."""
    if name == AUTO:
        name, threads = _tuned(setup)
        setup = replace(setup, threads=threads)
    spec = BACKENDS[name]
    return spec.opener(spec, setup)


def _tuned(setup: BackendSetup) -> tuple[BackendName, int | None]:
    """Backend and threads that were stored for this bundle and machine, else the defaults."""
    encoder = setup.manifest.file("encoder", files_precision(setup.precision))
    choice = tuning.stored(encoder.sha256)
    if choice is None:
        logger.warning(
            "nothing is stored for this bundle on this machine: %s is used; "
            "medsa-deploy doctor --tune BUNDLE measures what is fastest",
            DEFAULT,
        )
        return DEFAULT, setup.threads
    return choice.backend, setup.threads or choice.threads
