"""Files that a backend will load → the same files, held open, and proved unchanged after the load.

A backend opens files by their names, some time after their SHA-256 was compared. A file that was
exchanged in between is found here: the names must still lead to the files that were hashed, and
these must not have been written to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from medsa_deploy.errors import BundleError

from .files import refuse_changed, resolve_inside, sha256_of

CLOCK_SECONDS = 2.0
"""A file that was written so shortly before could change again without a new time: it is hashed a
second time."""


@dataclass(frozen=True, kw_only=True)
class _HeldFile:
    """A file that was hashed, still open."""

    path: Path
    file: BufferedReader
    identity: tuple[int, ...]
    sha256: str
    is_recent: bool


class HeldFiles:
    """The files of one bundle that were hashed for one load."""

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        self._files: dict[str, _HeldFile] = {}
        self._stack = ExitStack()

    def add(self, path: str, digests: Collection[str] = (), size: int | None = None) -> None:
        """Open a file, compare it with its size and SHA-256, and keep it open.

        `path`: relative to the bundle. `digests`: any of them; empty for a file whose reader knows
        its SHA-256. BundleError if it is missing, outside, or another file.
        """
        if path in self._files:
            return
        resolved = resolve_inside(path, self._bundle)
        try:
            file = self._stack.enter_context(resolved.open("rb"))
            identity = _identity(os.fstat(file.fileno()))
            is_recent = time.time() - identity[-1] / 1e9 < CLOCK_SECONDS
            actual_size = identity[2]
            digest = sha256_of(file) if size in (None, actual_size) else None
        except OSError as e:
            raise BundleError(
                f"{self._bundle}: {path!r} cannot be read ({e.strerror}): copy the bundle again"
            ) from e
        if digest is None or (digests and digest not in digests):
            refuse_changed(resolved, actual_size, size, digest)
        self._files[path] = _HeldFile(
            path=resolved, file=file, identity=identity, sha256=digest, is_recent=is_recent
        )

    def check_unchanged(self) -> None:
        """BundleError if a name leads to another file now, or a file was written to."""
        for held_file in self._files.values():
            try:
                now = _identity(os.stat(held_file.path))
                same = now == held_file.identity == _identity(os.fstat(held_file.file.fileno()))
                if same and held_file.is_recent:
                    with held_file.path.open("rb") as f:
                        same = sha256_of(f) == held_file.sha256
            except OSError:
                same = False
            if not same:
                raise BundleError(
                    f"{held_file.path} changed while it was loaded: nothing was run; load the "
                    "bundle again, and find out what writes to it"
                )

    def close(self) -> None:
        """Close the files."""
        self._stack.close()
        self._files.clear()


@contextmanager
def held_files(bundle: Path) -> Iterator[HeldFiles]:
    """Files that stay open during the block.

    >>> with held_files(bundle) as files:
    ...     files.add("encoder.onnx", [manifest.file("encoder").sha256])
    ...     files.check_unchanged()
    """
    files = HeldFiles(bundle)
    try:
        yield files
    finally:
        files.close()


def _identity(about: os.stat_result) -> tuple[int, ...]:
    """Device, number, size and times of a file: of these, no user can set the last."""
    return (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
