"""A bundle's folder → the files that are in it, each of them listed, added by a stage, or refused.

The manifest lists the files of an export. Stages add engines, kernels and pages later, in folders
of their own; those describe their files themselves. Anything else in the folder is refused, because
a graph could read it as its weights.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from medsa_deploy.errors import BundleError

from .leftovers import is_temporary
from .manifest import Manifest
from .manifest_text import MANIFEST_FILENAME

ADDED = {
    "engines": (".engine", ".json"),
    "kernels": (".cubin", ".ptx", ".json"),
    "reports": (".html",),
}
"""Folder that stages add to a bundle → the suffixes of its files."""


def check_contents(manifest: Manifest, bundle: Path) -> list[str]:
    """Paths of the files that stages have added, after every file of the folder was accounted for.

    BundleError names a file that is neither listed nor added by a stage, and a link that leads out
    of the bundle. Temporary files of other commands are passed over.
    """
    listed = {file.path for file in manifest.files} | {MANIFEST_FILENAME}
    added = []
    for path in bundle_files(bundle):
        if path in listed:
            continue
        top, suffix = path.split("/")[0], PurePosixPath(path).suffix
        if "/" not in path or suffix not in ADDED.get(top, ()):
            raise BundleError(
                f"{bundle} has a file that its manifest does not list, {path!r}: delete it, or "
                "copy the bundle again"
            )
        added.append(path)
    return added


def bundle_files(bundle: Path) -> list[str]:
    """Path of every file in a bundle, with `/`, except temporary files of commands.

    BundleError for a link that leads out of the bundle, and for what is neither file nor folder.
    """
    try:
        return sorted(_walk(bundle, ""))
    except OSError as e:
        raise BundleError(f"{bundle} cannot be read ({e.strerror}): copy the bundle again") from e


def _walk(bundle: Path, folder: str) -> Iterator[str]:
    root = bundle.resolve()
    with os.scandir(bundle / folder) as entries:
        for entry in entries:
            if is_temporary(entry.name):
                continue
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
                raise BundleError(
                    f"{bundle} has a link that leads out of it, {path!r}: replace it with the file"
                )
            mode = entry.stat().st_mode
            if stat.S_ISDIR(mode) and not entry.is_symlink():
                yield from _walk(bundle, path)
            elif stat.S_ISREG(mode):
                yield path
            else:
                raise BundleError(
                    f"{bundle} holds {path!r}, which is neither a file nor a folder: delete it"
                )
