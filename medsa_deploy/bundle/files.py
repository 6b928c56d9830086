"""The files of a bundle ⇄ their entries in its manifest: path, role, size, SHA-256."""

from __future__ import annotations

import hashlib
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

from medsa_deploy.errors import BundleError

from .manifest import File, Manifest, Role

EXTERNAL_DATA_BYTES = 1_500_000_000
"""A larger graph has its weights in a second file: a protobuf message is at most 2 GiB."""

IR_VERSION = 9
"""Version of the ONNX file format that graphs are written in: ONNX Runtime 1.17 reads it, and not
the exporter's 10. The operators' version is the opset's."""


def check_files(manifest: Manifest, bundle: Path) -> None:
    """BundleError names the first file that is missing or changed. Reads every byte."""
    for entry in manifest.files:
        check_file(entry, bundle)


def check_file(entry: File, bundle: Path) -> Path:
    """The path of one file, after its size and SHA-256 were compared with the manifest's.

    BundleError if the file is missing, changed, unreadable or outside the bundle.
    """
    path = resolve_inside(entry.path, bundle)
    try:
        size = path.stat().st_size
        digest = sha256(path) if size == entry.bytes else None
    except OSError as e:
        raise BundleError(
            f"{bundle}: {entry.path!r} cannot be read ({e}): copy the bundle again"
        ) from e
    if digest != entry.sha256:
        refuse_changed(path, size, entry.bytes, digest)
    return path


def resolve_inside(name: str, bundle: Path) -> Path:
    """The path of a bundle's file; BundleError if it is missing or outside the bundle."""
    path = bundle / name
    try:
        if not path.resolve().is_relative_to(bundle.resolve()):
            raise BundleError(
                f"{bundle}: its manifest names a file outside the bundle, {name!r}: "
                "use only bundles that medsa-deploy has written"
            )
        if not path.is_file():
            raise BundleError(
                f"{bundle} lacks {name!r}, which its manifest lists: copy the bundle again "
                "or export it again"
            )
    except (OSError, ValueError, RuntimeError) as e:  # not a valid path, or a loop of links
        raise BundleError(f"{bundle}: {name!r} cannot be read ({e}): copy the bundle again") from e
    return path


def refuse_changed(path: Path, size: int, expected: int | None, digest: str | None) -> NoReturn:
    """BundleError about a file of another size, or, with a `digest`, of another content."""
    difference = f"{size} bytes, expected {expected}" if digest is None else "its SHA-256 differs"
    raise BundleError(
        f"{path} is not the file the manifest describes ({difference}): copy the bundle again "
        "or export it again"
    )


def describe_file(
    path: Path, bundle: Path, *, role: Role, precision: str, opset: int | None = None
) -> File:
    """The manifest's entry for a file inside `bundle`, with the size and SHA-256 it has now.

    >>> describe_file(bundle / "encoder.onnx", bundle, role="encoder", precision="fp32").bytes
    5
    """
    return File(
        path=path.relative_to(bundle).as_posix(),
        role=role,
        precision=precision,
        bytes=path.stat().st_size,
        sha256=sha256(path),
        opset=opset,
    )


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: BufferedReader) -> str:
    """The hexadecimal SHA-256 of the rest of an open file.

    `hashlib.file_digest` does this from Python 3.11 on.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 18))
    while size := file.readinto(buffer):
        digest.update(buffer[:size])
    return digest.hexdigest()
