"""Files → a bundle folder that is there whole or not at all.

A new bundle is built under a temporary name and then renamed. `bundle/additions.py` adds files to
an existing one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medsa_deploy.errors import UsageError

from .durable import exchange, sync_folder, sync_tree
from .leftovers import temporary_name
from .lock import changing
from .manifest_text import MANIFEST_FILENAME
from .recovery import tidy


def check_target(target: Path, *, force: bool) -> None:
    """UsageError if no bundle can be written at `target`, or if it exists and `force` is off.

    Only a bundle is ever replaced; any other file or folder at `target` is refused.
    """
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is not a folder: make it, or name another output")
    if not os.access(target.parent, os.W_OK):
        raise UsageError(f"{target.parent} cannot be written to: name another output with -o")
    if not os.path.lexists(target):
        return
    if not _is_bundle(target):
        raise UsageError(
            f"{target} exists and is not a bundle: delete it, or name another output with -o"
        )
    if not force:
        raise UsageError(f"{target} exists: replace it with --force, or name another with -o")


@contextmanager
def new_bundle(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends without error.

    An earlier folder at `target` stays until then, and no other command may change it. Everything
    is on the disk before it gets its name. If the block fails or is interrupted, the temporary
    folder is removed and `target` stays as it was. UsageError if no folder can be made, or if
    another command is changing `target`.

    >>> with new_bundle(Path("liver.medsa")) as folder:
    ...     save_manifest(manifest, folder)
    """
    tidy(target.parent)
    folder = target.parent / temporary_name(".tmp")
    with changing(target):
        try:
            try:
                folder.mkdir()  # here, so that an interrupt at any moment leaves no folder
                _check_name(folder, target)
            except OSError as e:
                reason = f"{target} cannot be written ({e.strerror}): name another output"
                raise UsageError(reason) from e
            yield folder
            sync_tree(folder)
            _replace(folder, target)
            sync_folder(target.parent)
        finally:
            _remove(folder)


def _is_bundle(path: Path) -> bool:
    """Whether `path` is surely a bundle, of any schema version: only then may it be replaced."""
    try:
        data = json.loads((path / MANIFEST_FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and {"schema", "files"} <= set(data)


def _check_name(folder: Path, target: Path) -> None:
    """OSError if the file system cannot hold the name of `target`."""
    trial = folder / target.name
    trial.mkdir()
    trial.rmdir()


def _replace(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`, in one step where the system can.

    Elsewhere an earlier folder is kept aside until the rename succeeds.
    """
    if not os.path.lexists(target):
        folder.rename(target)
        return
    if exchange(folder, target):
        return  # the earlier bundle now has the temporary name
    aside = target.parent / temporary_name(".old")
    aside.mkdir()
    earlier = aside / target.name
    try:
        target.rename(earlier)
        folder.rename(target)
    except BaseException:
        if os.path.lexists(earlier) and not os.path.lexists(target):
            earlier.rename(target)
        raise
    finally:
        if os.path.lexists(target):
            _remove(earlier)
            shutil.rmtree(aside, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a folder, or a link to one."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
