"""A path → an `Image` or a `Volume`: which format a file holds, and the reader of that format."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

from medsa_deploy.errors import ImageError, MissingDependencyError

from .files import suffix
from .image import Image, check_image
from .volume import Volume, check_volume

logger = logging.getLogger(__name__)

Format = Literal["raster", "npy", "nifti", "dicom"]

SUFFIXES: dict[str, Format] = {
    ".png": "raster",
    ".jpg": "raster",
    ".jpeg": "raster",
    ".tif": "raster",
    ".tiff": "raster",
    ".bmp": "raster",
    ".npy": "npy",
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".dcm": "dicom",
}
# DICOM first: a DICOM's preamble may itself be the start of a TIFF.
SIGNATURES: tuple[tuple[int, bytes, Format], ...] = (
    (128, b"DICM", "dicom"),
    (0, b"\x89PNG\r\n\x1a\n", "raster"),
    (0, b"\xff\xd8\xff", "raster"),
    (0, b"II*\0", "raster"),
    (0, b"MM\0*", "raster"),
    (0, b"\x93NUMPY", "npy"),
)


def read_image(
    path: str | os.PathLike[str], *, axis: int | None = None, index: int | None = None
) -> Image:
    """The image in a file; ImageError if it cannot be read or there is nothing to segment in it.

    What a file is, its content says; its suffix decides only where the content does not.

    `axis` and `index` choose a slice of a NIfTI or of a three-dimensional .npy. The slice keeps the
    stored order of the two axes that remain: rows are the first, columns the second. So in a volume
    (X, Y, Z) sliced along axis 2, the pixel at row r and column c is voxel (r, c, index), and a
    point given as x, y is voxel (y, x, index). Nothing is flipped or turned to look anatomical.
    """
    path = Path(path)
    file_format = format_of(path)
    if file_format in ("raster", "dicom") and not (axis is None and index is None):
        raise ImageError(
            f"{path} is a single image: an axis or a slice can be chosen only in a NIfTI "
            "or a three-dimensional .npy"
        )
    return check_image(_read(path, file_format, axis, index))


def read_volume(
    path: str | os.PathLike[str], *, axis: int | None = None, volume: int | None = None
) -> Volume:
    """The volume in a NIfTI, .npy or DICOM file, or in a folder that holds one DICOM series.

    `axis` is the one slices are taken along: by default the one of largest spacing in a NIfTI (the
    last among equals), the first of an .npy, and always the third, the slices, of a DICOM. `volume`
    chooses one of a 4-D NIfTI. A lone image is a volume of one slice. ImageError if it cannot be
    read, is no volume, or has the same value everywhere; NaN and infinite values are refused when
    their slice is read.
    """
    path = Path(path)
    file_format = "series" if path.is_dir() else format_of(path)
    if file_format == "raster":
        raise ImageError(f"{path} is a picture; expected a NIfTI, a DICOM series or a .npy volume")
    if volume is not None and file_format != "nifti":
        raise ImageError(f"{path}: volume {volume} was given; only a 4-D NIfTI holds several")
    return check_volume(_read_volume(path, file_format, axis, volume))


def is_volume(path: str | os.PathLike[str]) -> bool:
    """Whether `read_volume` is the reader for a path, judged by headers alone.

    So are a NIfTI whose first three axes are all longer than 1, or that holds several volumes; an
    .npy that `read_image` would want a slice of; a DICOM with several frames; and a folder where
    two DICOM files are slices of one series, whatever else lies there. What cannot be read is no
    volume.
    """
    try:
        return holds_volume(path)
    except ImageError:
        return False


def holds_volume(path: str | os.PathLike[str], *, lone: bool = False) -> bool:
    """`is_volume`, but ImageError for a file or folder that cannot be read.

    `lone`: anything but a picture counts, a single plane as a volume of one slice.
    """
    path = Path(path)
    if path.is_dir():
        images = find_images(path)
        dicoms = [image for image in images if _is_dicom(image)]
        try:
            return bool(dicoms) and (lone or _is_volume(path, "series", dicoms))
        except MissingDependencyError:
            if len(dicoms) == len(images):
                raise
            return False  # the others can be read, and each of these says what it needs
    file_format = format_of(path)
    return (lone and file_format != "raster") or _is_volume(path, file_format, [])


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Files directly in `folder` that look like images, sorted by name; ImageError if none do.

    That is: a known suffix, or DICOM's signature whatever the name (exports often have names such
    as 1.2.840.3). Hidden files are left out, and a DICOMDIR, which is DICOM without an image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ImageError(f"{folder} {what}: give a folder that holds images")
    try:
        found = sorted(path for path in folder.iterdir() if _looks_like_image(path))
    except OSError as e:
        raise ImageError(f"{e.filename or folder} cannot be opened: {e.strerror}") from e
    if not found:
        raise ImageError(
            f"{folder} holds no images: expected files ending in {', '.join(SUFFIXES)}"
        )
    return found


def is_derived(path: Path) -> bool:
    """Whether a file is a DICOM that was made from images: a segmentation, a map, a dose."""
    if not _is_dicom(path):
        return False
    try:
        from .series import is_derived_dicom

        return is_derived_dicom(path)
    except (ImageError, MissingDependencyError):  # said where it is read
        return False


def _looks_like_image(path: Path) -> bool:
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    return suffix(path) in SUFFIXES or _signature(path) == "dicom"


def _is_dicom(path: Path) -> bool:
    try:
        return suffix(path) == ".dcm" or _signature(path) == "dicom"
    except OSError as e:
        raise ImageError(f"{path} cannot be opened: {e.strerror}") from e


def format_of(path: Path) -> Format:
    """The format of a file, by its content or else its suffix."""
    if not path.exists():
        raise ImageError(f"{path} does not exist: give the path of an image")
    if path.is_dir():
        raise ImageError(f"{path} is a folder: give one image file")
    if not path.is_file():
        raise ImageError(f"{path} is not a regular file: give one image file")
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"{path} is an empty file: copy or export the image again")
        known = _signature(path) or SUFFIXES.get(suffix(path))
    except OSError as e:
        raise ImageError(f"{path} cannot be opened: {e.strerror}") from e
    if known is None:
        raise ImageError(
            f"{path} is not an image this can read, by suffix or content; "
            f"expected DICOM or one of: {', '.join(SUFFIXES)}"
        )
    return known


def _signature(path: Path) -> Format | None:
    """The format whose signature stands in a file; None for those without a usable one."""
    with path.open("rb") as f:
        head = f.read(132)
    for offset, magic, file_format in SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return file_format
    return None


def _read(path: Path, file_format: Format, axis: int | None, index: int | None) -> Image:
    """Hand over to the reader; NIfTI's and DICOM's libraries load only when such a file is met."""
    if file_format == "nifti":
        from .nifti import read_nifti

        return read_nifti(path, axis=axis, index=index)
    if file_format == "dicom":
        from .dicom import read_dicom

        return read_dicom(path)
    if file_format == "npy":
        from .npy import read_npy

        return read_npy(path, axis=axis, index=index)
    from .raster import read_raster

    return read_raster(path)


def _read_volume(
    path: Path, file_format: Format | Literal["series"], axis: int | None, volume: int | None
) -> Volume:
    """Hand over to the reader of a format."""
    if file_format == "nifti":
        from .nifti import read_nifti_volume

        return read_nifti_volume(path, axis=axis, volume=volume)
    if file_format == "npy":
        from .npy import read_npy_volume

        return read_npy_volume(path, axis=axis)
    from .series import read_dicom_volume, read_series

    if file_format == "dicom":
        return read_dicom_volume(path, axis=axis)
    found = find_images(path)
    dicoms = [image for image in found if _is_dicom(image)]
    if others := [image.name for image in found if image not in dicoms]:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        logger.info("%s: passed over, no DICOM: %s%s", path, ", ".join(others[:3]), more)
    return read_series(path, dicoms, axis=axis)


def _is_volume(path: Path, file_format: Format | Literal["series"], dicoms: list[Path]) -> bool:
    """Ask the reader of a format; `dicoms` are the files of a folder."""
    if file_format == "nifti":
        from .nifti import is_nifti_volume

        return is_nifti_volume(path)
    if file_format == "npy":
        from .npy import is_npy_volume

        return is_npy_volume(path)
    if file_format == "raster":
        return False
    from .series import is_dicom_volume, is_series

    return is_dicom_volume(path) if file_format == "dicom" else is_series(dicoms)
