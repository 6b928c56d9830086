"""The files of a bundle ⇄ their entries in its manifest: path, role, size, SHA-256."""

from __future__ import annotations

import hashlib
from pathlib import Path

from medsa_deploy.errors import BundleError

from .manifest import File, Manifest, Role


def check_files(manifest: Manifest, bundle: Path) -> None:
    """Refuse a bundle with a missing or changed file, naming it. Reads every byte."""
    for entry in manifest.files:
        check_file(entry, bundle)


def check_file(entry: File, bundle: Path) -> Path:
    """Path of one file of the bundle, its size and SHA-256 compared with the manifest's."""
    path = bundle / entry.path
    try:
        if not path.resolve().is_relative_to(bundle.resolve()):
            raise BundleError(
                f"{bundle}: its manifest names a file outside the bundle, {entry.path!r}: "
                "use only bundles that medsa-deploy made"
            )
        if not path.is_file():
            raise BundleError(
                f"{bundle} lacks {entry.path!r}, which its manifest lists: copy the bundle again "
                "or export it again"
            )
        size = path.stat().st_size
        digest = sha256(path) if size == entry.bytes else None
    except (OSError, ValueError, RuntimeError) as e:  # no path at all, or a loop of links
        raise BundleError(f"{bundle}: {entry.path!r} cannot be read ({e})") from e
    if digest != entry.sha256:
        found = f"{size} bytes, expected {entry.bytes}" if digest is None else "its SHA-256 differs"
        raise BundleError(
            f"{path} is not the file the manifest describes ({found}): copy the bundle again or "
            "export it again"
        )
    return path


def describe_file(
    path: Path, bundle: Path, *, role: Role, precision: str, opset: int | None = None
) -> File:
    """The manifest's entry for a file that was just written into `bundle`."""
    return File(
        path=path.relative_to(bundle).as_posix(),
        role=role,
        precision=precision,
        bytes=path.stat().st_size,
        sha256=sha256(path),
        opset=opset,
    )


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
