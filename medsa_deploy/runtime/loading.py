"""A bundle and the name of a backend → a session."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from medsa_deploy.bundle.checked import CheckedBundle, check_bundle
from medsa_deploy.bundle.opened import HeldFiles, held_files
from medsa_deploy.bundle.trusted_keys import KeyPaths
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
    BackendSpec,
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
    trusted: KeyPaths | None = None,
) -> Session:
    """Open a bundle. The files it runs are compared with their SHA-256 while they are opened.

    They are held open, and the load fails if one was exchanged before the backend had read it.
    Where keys are configured, and for engines, they are compared before they are opened.

    If the bundle has the decoder in two parts, prompts without a mask run these.

    `backend`: see `BackendName`; `backends()` says which can run here. The engines of a bundle run
    on `tensorrt` and `rtx`. `precision`: see `Precision`. `threads`: threads of one run; None for
    all cores. `fallback`: backends that take over, in this order, if the one before cannot be
    opened or fails while it runs; their predictions are `degraded`. `cuda_graphs`: whether engines
    may be replayed as CUDA graphs. `options`: rarely needed ones. `trusted`: files and folders of
    public keys (PEM), one of which must have signed the bundle; None for those that the machine's
    policy or $MEDSA_TRUSTED_KEYS names, if they do.

    UsageError for an option that cannot be used. BundleError for a bundle that is missing, changed,
    of another version, or without the precision. SignatureError for one that no trusted key has
    signed. MissingDependencyError for a backend that is not
    installed. EngineError if the bundle's engines do not fit this machine.

    >>> from medsa_deploy import load, read_image
    >>> with load("liver.medsa", threads=2) as session:
    ...     embedding = session.encode(read_image("slice.png"))
    ...     prediction = session.segment(embedding, points=[(120, 88)])
    >>> prediction.masks.shape
    (1, 1, 240, 320)
    """
    checked = check_bundle(Path(bundle), trusted)
    manifest = checked.manifest
    chain = (backend, *([fallback] if isinstance(fallback, str) else fallback))
    for name in chain:
        check_options(name, threads, precision)
    _check_cuda_graphs(chain, cuda_graphs)
    for role in ("encoder", "decoder"):
        manifest.file(role, files_precision(precision))
    setup = BackendSetup(
        bundle=checked.path,
        manifest=manifest,
        precision=precision,
        threads=threads,
        cuda_graphs=cuda_graphs,
        options=options or LoadOptions(),
    )
    openers = [(name, partial(_open, name, setup, checked)) for name in chain]
    if not fallback:
        return Session(manifest, openers[0][1]())
    _check_all(chain, setup, checked)
    return Session(manifest, FallbackBackend(openers))


def _check_cuda_graphs(chain: Sequence[BackendName], cuda_graphs: bool) -> None:
    """UsageError if CUDA graphs are turned off for backends that have none."""
    on_engines = [name for name, spec in BACKENDS.items() if spec.engines]
    if not (cuda_graphs or set(chain) & set(on_engines)):
        raise UsageError(
            f"{', '.join(chain)} replays no CUDA graphs, only {' and '.join(on_engines)} do: leave "
            "out --no-cuda-graphs (cuda_graphs=False)"
        )


def _check_all(chain: Sequence[BackendName], setup: BackendSetup, checked: CheckedBundle) -> None:
    """Compare every backend's files now: none must step in for a file that was changed."""
    with held_files(checked.path) as files:
        for name in chain:
            _hold(files, BACKENDS[DEFAULT if name == AUTO else name], setup, checked)
        files.check_digests()


def _open(name: BackendName, setup: BackendSetup, checked: CheckedBundle) -> Backend:
    """A backend on files that were compared with their SHA-256, and did not change meanwhile."""
    if name == AUTO:
        name, threads = _tuned(setup)
        setup = replace(setup, threads=threads)
    spec = BACKENDS[name]
    with held_files(checked.path) as files:
        _hold(files, spec, setup, checked)
        if spec.engines or checked.trust.signers:  # nothing of an untrusted file is parsed
            files.check_digests()
        backend = _open_while_hashing(files, partial(spec.opener, spec, setup))
        try:
            files.check_unchanged()
        except BaseException:
            backend.close()
            raise
    return backend


def _open_while_hashing(files: HeldFiles, opener: Callable[[], Backend]) -> Backend:
    """A backend that opened its files while they were hashed; BundleError if one is another."""
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(files.check_digests)
        try:
            backend = opener()
        except Exception:
            hashing.result()  # a file that was changed is why it cannot be opened
            raise
        try:
            hashing.result()
        except BaseException:
            backend.close()
            raise
    return backend


def _hold(files: HeldFiles, spec: BackendSpec, setup: BackendSetup, checked: CheckedBundle) -> None:
    """Keep the files open that a backend will read."""
    if spec.engines:  # `check_loadable` compares them with their description
        checked.hold_native_code(files)
        return
    precision = files_precision(setup.precision)
    for file in setup.manifest.files:
        if file.role in GRAPH_ROLES and file.precision == precision:
            files.add(file.path, [file.sha256], file.bytes)


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
