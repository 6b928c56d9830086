"""Files → a bundle folder that is there whole or not at all, or new files in an existing bundle.

A new bundle is built under a temporary name and then renamed. Files are added to a bundle together
with the manifest that lists them: both change, or neither.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from medsa_deploy.errors import UsageError

from .manifest import MANIFEST_FILENAME, Manifest, save_manifest


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

    An earlier folder at `target` stays until then. If the block fails or is interrupted, the
    temporary folder is removed and `target` stays as it was. UsageError if no folder can be made.

    >>> with new_bundle(Path("liver.medsa")) as folder:
    ...     save_manifest(manifest, folder)
    """
    folder = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
    try:
        try:
            folder.mkdir()  # here, so that an interrupt at any moment leaves no folder
        except OSError as e:
            reason = f"{target} cannot be written ({e.strerror}): name another output"
            raise UsageError(reason) from e
        yield folder
        _replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def work_folder(bundle: Path) -> Iterator[Path]:
    """A temporary folder inside `bundle` for files that `add_files` will move into the bundle.

    The folder and everything still in it are removed at the end. UsageError if it cannot be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=".new-", suffix=".tmp", dir=bundle))
    except OSError as e:
        raise UsageError(
            f"{bundle} cannot be written to ({e.strerror}): change its permissions, or copy it to "
            "a folder of yours"
        ) from e
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def add_files(bundle: Path, files: Sequence[Path], manifest: Manifest) -> None:
    """Move `files` from a work folder into `bundle` and save its new `manifest`.

    Files of the same name are replaced. If a step fails, the earlier files and the earlier manifest
    are put back.
    """
    moves: list[tuple[Path, Path]] = []
    try:
        for file in files:
            target, aside = bundle / file.name, file.with_name(f"{file.name}.earlier")
            if target.exists():
                target.replace(aside)
            moves.append((target, aside))
            file.replace(target)
        save_manifest(manifest, bundle)
    except BaseException:
        for target, aside in moves:
            if aside.exists():
                aside.replace(target)
            else:
                target.unlink(missing_ok=True)
        raise


def _is_bundle(path: Path) -> bool:
    """Whether `path` is surely a bundle, of any schema version: only then may it be replaced."""
    try:
        data = json.loads((path / MANIFEST_FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and {"schema", "files"} <= set(data)


def _replace(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; an earlier folder is kept aside until the rename succeeds."""
    if not target.exists():
        folder.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    earlier = aside / target.name
    try:
        target.rename(earlier)
        folder.rename(target)
    except BaseException:
        if os.path.lexists(earlier) and not os.path.lexists(target):
            earlier.rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
