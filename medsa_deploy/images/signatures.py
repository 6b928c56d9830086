"""The first bytes of a file, or else its suffix → the format it holds."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Literal

Format = Literal["raster", "npy", "nifti", "nrrd", "dicom"]

SUFFIXES: dict[str, Format] = {
    ".png": "raster",
    ".jpg": "raster",
    ".jpeg": "raster",
    ".tif": "raster",
    ".tiff": "raster",
    ".bmp": "raster",
    ".gif": "raster",
    ".webp": "raster",
    ".jp2": "raster",
    ".j2k": "raster",
    ".npy": "npy",
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".hdr": "nifti",
    ".img": "nifti",
    ".hdr.gz": "nifti",
    ".img.gz": "nifti",
    ".nrrd": "nrrd",
    ".seg.nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".mha": "nrrd",
    ".mhd": "nrrd",
    ".dcm": "dicom",
}
SIGNATURES: tuple[tuple[int, bytes, Format], ...] = (
    (128, b"DICM", "dicom"),
    (0, b"\x89PNG\r\n\x1a\n", "raster"),
    (0, b"\xff\xd8\xff", "raster"),
    (0, b"II*\0", "raster"),
    (0, b"MM\0*", "raster"),
    (0, b"GIF8", "raster"),
    (8, b"WEBP", "raster"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "raster"),
    (0, b"\xff\x4f\xff\x51", "raster"),
    (0, b"\x93NUMPY", "npy"),
    (0, b"NRRD000", "nrrd"),
    (0, b"ObjectType", "nrrd"),
)
"""(offset, bytes, format). DICOM is first, because its preamble may be the start of a TIFF."""

HEAD_BYTES = 4096
"""Bytes that tell a file's format, also of a compressed NIfTI."""
GZIP = b"\x1f\x8b"
NIFTI_HEADER_BYTES = 352
"""The header of a NIfTI-1 and the flag of its extensions."""
NIFTI_MAGIC = {348: 344, 540: 4}
"""Bytes of a header (NIfTI-1 and Analyze; NIfTI-2) → where its magic number is."""


def signature(path: Path) -> Format | None:
    """The format whose signature a file has; None for a file without a known signature."""
    with path.open("rb") as f:
        head = f.read(HEAD_BYTES)
    for offset, magic, file_format in SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return file_format
    return "nifti" if _looks_like_nifti(head) else None


def _looks_like_nifti(head: bytes) -> bool:
    """Whether a file that starts with `head` is a NIfTI or its header, compressed or not."""
    if head.startswith(GZIP):
        try:
            head = zlib.decompressobj(31).decompress(head, NIFTI_HEADER_BYTES)
        except zlib.error:
            return False
    return _magic(head)[:2] in (b"n+", b"ni")


def _magic(head: bytes) -> bytes:
    """The magic number of a header; empty if it is no header."""
    start = NIFTI_MAGIC.get(nifti_header_size(head))
    return b"" if start is None else head[start : start + 4]


def nifti_header_size(head: bytes) -> int:
    """The size that a header gives for itself, in either byte order; 0 if it is no header."""
    sizes = (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
    return next((size for size in sizes if size in NIFTI_MAGIC), 0)
