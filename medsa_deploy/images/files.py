"""Library exceptions → `ImageError`; and the checks of paths that readers and writers share."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from medsa_deploy.bundle.atomic import whole_file
from medsa_deploy.errors import ImageError, MedsaError, UsageError, one_line

from .file_texts import library_text

logger = logging.getLogger(__name__)

MOST_GZIP = 1032
"""The highest compression ratio of gzip."""
DOUBLE_SUFFIXES = (".nii.gz", ".hdr.gz", ".img.gz", ".seg.nrrd")


def suffix(path: Path) -> str:
    """The suffix that decides the format, in lower case; `.nii.gz` and `.seg.nrrd` are one suffix.

    >>> suffix(Path("Mask.NII.GZ")), suffix(Path("slice.0.png"))
    ('.nii.gz', '.png')
    """
    name = path.name.lower()
    return next((end for end in DOUBLE_SUFFIXES if name.endswith(end)), path.suffix.lower())


def check_suffix(path: Path, suffixes: tuple[str, ...], kind: str) -> None:
    """UsageError unless `path` ends in one of `suffixes`; `kind` says what is written there."""
    if suffix(path) not in suffixes:
        raise UsageError(
            f"{path}: no {kind} can be written as '{suffix(path)}'; "
            f"use one of: {', '.join(suffixes)}"
        )


def check_writable(path: Path) -> None:
    """UsageError if no file can be written at `path`; call it before any work."""
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not a folder: make it, or name another output")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file: name another output")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path.parent} cannot be written to: name another output")


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Raise any exception of an image library as ImageError: "PATH cannot be read as KIND: …".

    Image libraries raise nearly anything when bytes are missing or wrong (struct.error, KeyError,
    MemoryError, …), so every Exception is caught: keep the block to the library's own calls. Their
    warnings, mostly about metadata, are logged.
    """
    try:
        with logged_warnings(path):
            yield
    except MedsaError:
        raise
    except Exception as e:
        raise ImageError(f"{path} cannot be read as {kind}: {library_text(e)}") from e


@contextlib.contextmanager
def logged_warnings(path: Path) -> Iterator[None]:
    """Log a library's warnings about a file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        logger.info("%s: %s", path, library_text(warning.message))


@contextlib.contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` at the end; ImageError if it cannot be written.

    See `bundle.atomic.whole_file`: the file is written whole or not at all. Errors of the block
    name `path`, not the temporary path.
    """
    if not path.parent.is_dir():
        raise ImageError(f"{path} cannot be written: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ImageError(f"{path} cannot be written: it is a folder")
    try:
        with whole_file(path) as temporary:
            try:
                yield temporary
            except ImageError as e:
                raise ImageError(str(e).replace(str(temporary), str(path))) from e
    except OSError as e:
        raise ImageError(f"{path} cannot be written: {e.strerror or one_line(e)}") from e
