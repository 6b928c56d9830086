"""Folders that appear whole or not at all: a bundle is built under a temporary name and renamed.

So are files that are added to a bundle: they and the manifest that lists them change together.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from medsa_deploy.errors import UsageError

from .manifest import MANIFEST_FILENAME, Manifest, save_manifest


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that cannot be written, or that exists and is not to be replaced."""
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

    An earlier bundle at `target` stays until then. Whatever ends the block early, an interrupt
    included, leaves neither folder nor change.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as e:
        raise UsageError(f"{target} cannot be written ({e.strerror}): name another output") from e
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        _replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def work_folder(bundle: Path) -> Iterator[Path]:
    """A temporary folder inside `bundle`, where files are made before they are added to it."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".new-", suffix=".tmp", dir=bundle))
    except OSError as e:
        raise UsageError(
            f"{bundle} cannot be written to ({e.strerror}): copy it to where it can, or change its "
            "permissions"
        ) from e
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def add_files(bundle: Path, files: Sequence[Path], made: Manifest) -> None:
    """Move `files` from a work_folder into `bundle`, and make `made` its manifest.

    Files of the same name are replaced. Whatever fails in between, the bundle is what it was.
    """
    done: list[tuple[Path, Path]] = []
    try:
        for file in files:
            target, aside = bundle / file.name, file.with_name(f"{file.name}.earlier")
            if target.exists():
                target.replace(aside)
            done.append((target, aside))
            file.replace(target)
        save_manifest(made, bundle)
    except BaseException:
        for target, aside in done:
            if aside.exists():
                aside.replace(target)
            else:
                target.unlink(missing_ok=True)
        raise


def _is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle of any version, and so may be replaced; a guess must not be."""
    try:
        data = json.loads((path / MANIFEST_FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and {"schema", "files"} <= set(data)


def _replace(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`, setting an earlier bundle aside until that is done."""
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


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
