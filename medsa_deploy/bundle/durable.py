"""Files and folders → the disk, so that a power cut after a rename leaves the old or the new ones.

A rename may reach the disk before the content of what it names: content is flushed first, then the
name is given, then the folder that holds the name is flushed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_WITHOUT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)
"""Errors of file systems that flush no folders, and of folders that may not be read."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Constants of Linux's renameat2."""


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk; OSError if the disk refuses it."""
    with path.open("rb" if os.name == "posix" else "rb+") as f:
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk. Windows does it by itself."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as e:
        if e.errno not in _WITHOUT_FLUSH:
            raise


def sync_tree(folder: Path) -> None:
    """Flush everything in a folder, and the folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            sync_tree(path)
        elif path.is_file():
            sync_file(path)
    sync_folder(folder)


def exchange(first: Path, second: Path) -> bool:
    """Give two paths each other's names in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library from before 2018
        return False
    paths = (os.fsencode(first), os.fsencode(second))
    failed: int = rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    return not failed
