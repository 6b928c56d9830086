"""Files that a backend will load → the same files, held open, and proved unchanged after the load.

A backend opens files by their names, before or after their SHA-256 is compared. A file that was
exchanged in between is found here: the names must still lead to the files that are hashed, and
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


@dataclass(kw_only=True)
class _HeldFile:
    """A file that is hashed, or will be, and stays open."""

    path: Path
    file: BufferedReader
    identity: tuple[int, ...]
    is_recent: bool
    digests: Collection[str]
    """Any of them is right; empty: all are."""
    sha256: str | None = None
    """None before it was hashed."""


class HeldFiles:
    """The files of one bundle that are hashed for one load."""

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        self._files: dict[str, _HeldFile] = {}
        self._stack = ExitStack()

    def add(self, path: str, digests: Collection[str] = (), size: int | None = None) -> None:
        """Open a file, compare its size, and keep it open; `check_digests` compares the content.

        `path`: relative to the bundle. `digests`: SHA-256, any of them; empty for a file whose
        reader knows its SHA-256. BundleError if it is missing, outside, or of another size.
        """
        if path in self._files:
            return
        resolved = resolve_inside(path, self._bundle)
        with self._readable(path):
            file = self._stack.enter_context(resolved.open("rb"))
            identity = _identity(os.fstat(file.fileno()))
        actual_size = identity[2]
        if size not in (None, actual_size):
            refuse_changed(resolved, actual_size, size, None)
        self._files[path] = _HeldFile(
            path=resolved,
            file=file,
            identity=identity,
            is_recent=time.time() - identity[-1] / 1e9 < CLOCK_SECONDS,
            digests=digests,
        )

    def check_digests(self) -> None:
        """Hash the files that were not hashed yet; BundleError for one that is another file."""
        for path, held_file in self._files.items():
            if held_file.sha256 is not None:
                continue
            with self._readable(path):
                held_file.sha256 = sha256_of(held_file.file)
            if held_file.digests and held_file.sha256 not in held_file.digests:
                size = held_file.identity[2]
                refuse_changed(held_file.path, size, size, held_file.sha256)

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
    def _readable(self, path: str) -> Iterator[None]:
        """An error of the system during the block as a BundleError."""
        try:
            yield
        except OSError as e:
            raise BundleError(
                f"{self._bundle}: {path!r} cannot be read ({e.strerror}): copy the bundle again"
            ) from e


@contextmanager
def held_files(bundle: Path) -> Iterator[HeldFiles]:
    """Files that stay open during the block.

    >>> with held_files(bundle) as files:
    ...     files.add("encoder.onnx", [manifest.file("encoder").sha256])
    ...     files.check_digests()
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
