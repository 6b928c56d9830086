"""A path → an `Image` or a `Volume`, through the reader of the format that the file holds."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from medsa_deploy.errors import ImageError, MissingDependencyError, about

from .files import suffix
from .image import Image, Nan, check_image, check_values
from .signatures import SUFFIXES, Format, signature
from .volume import Volume, check_volume

logger = logging.getLogger(__name__)


def read_image(
    path: str | os.PathLike[str],
    *,
    axis: int | None = None,
    index: int | None = None,
    nan: Nan = "refuse",
) -> Image:
    """The image in a file; ImageError if it cannot be read or holds nothing to segment.

    The content decides the format, and the suffix only if the content has no signature.

    `axis` and `index` choose a slice of a NIfTI or of a three-dimensional .npy. The slice keeps the
    stored order of the two axes that remain: rows are the first, columns the second. So in a volume
    (X, Y, Z) sliced along axis 2, the pixel at row r and column c is voxel (r, c, index), and the
    point x, y is voxel (y, x, index). Nothing is flipped or turned to look anatomical. `nan`:
    "background" if NaN marks pixels outside the field of view.

    >>> read_image("head.npy", axis=0, index=2).pixels.shape
    (4, 5)
    """
    with about(Path(path)):
        return _read_image(Path(path), axis, index, nan)


def read_frame(path: Path) -> Image:
    """The image in a file, a frame of a clip: as `read_image`, but it may be one flat grey.

    >>> read_frame(Path("image.png")).pixels.shape
    (280, 320, 3)
    """
    with about(path):
        return check_values(_read(path, format_of(path), None, None), str(path))


def _read_image(path: Path, axis: int | None, index: int | None, nan: Nan) -> Image:
    file_format = format_of(path)
    sliced = axis is not None or index is not None
    if sliced and file_format in ("raster", "dicom") and not _is_volume(path, file_format, []):
        raise ImageError(f"{path} is a single image without slices: leave the axis and slice out")
    return check_image(_read(path, file_format, axis, index), nan=nan)


def read_volume(
    path: str | os.PathLike[str],
    *,
    axis: int | None = None,
    volume: int | None = None,
    series: str | None = None,
    orientation: int | None = None,
    phase: int | None = None,
    nan: Nan = "refuse",
) -> Volume:
    """The volume in a NIfTI, .npy or DICOM file, or in a folder that holds one DICOM series.

    Slices are taken along `axis`. The default is the axis of largest spacing in a NIfTI (the last
    among equals) and the first axis of a .npy; in a DICOM it is always 2. `volume` chooses one of
    the volumes of a 4-D NIfTI. `series`, a Series Instance UID, chooses from a folder of several
    series, `orientation` from a series that mixes them, as with localizers of its own, and `phase`
    from images that share their places: phases of the heart, echoes. A single image is a volume of
    one slice. ImageError if the path cannot be read, does not hold a volume, or has one value
    everywhere. A slice with infinite values, or with NaN unless `nan` is "background", is refused
    when it is read.

    >>> volume = read_volume("head.npy")
    >>> volume.shape, len(volume), volume.slice_size
    ((3, 4, 5), 3, (4, 5))
    """
    with about(Path(path)):
        choices = {"series": series, "orientation": orientation, "phase": phase}
        return _read_checked_volume(Path(path), axis, volume, choices, nan)


def _read_checked_volume(
    path: Path,
    axis: int | None,
    volume: int | None,
    choices: dict[str, Any],
    nan: Nan,
) -> Volume:
    file_format = "series" if path.is_dir() else format_of(path)
    if file_format == "raster" and not _is_volume(path, file_format, []):
        raise ImageError(f"{path} is a picture; expected a volume: NIfTI, NRRD, DICOM series, .npy")
    if volume is not None and file_format != "nifti":
        raise ImageError(
            f"{path}: volume {volume} was given; only a 4-D NIfTI holds several volumes: leave the "
            "volume out"
        )
    if any(value is not None for value in choices.values()) and file_format not in (
        "series",
        "dicom",
    ):
        raise ImageError(
            f"{path} is not DICOM: a series, an orientation and a phase are chosen from DICOM "
            "images: leave them out"
        )
    if file_format in ("series", "dicom"):
        opened = _read_dicom_volume(path, axis, choices)
    else:
        opened = open_volume(path, file_format, axis, volume)
    return check_volume(replace(opened, nan=nan))


def is_volume(path: str | os.PathLike[str]) -> bool:
    """Whether a path holds a volume, judged by headers alone; False if it cannot be read.

    Volumes are: a NIfTI with more than one plane or with several volumes; a three-dimensional .npy
    without channels; a DICOM with several frames; and a folder in which two DICOM files are slices
    of one series, whatever else is in it.
    """
    try:
        return holds_volume(path)
    except ImageError:
        return False


def holds_volume(path: str | os.PathLike[str], *, lone: bool = False) -> bool:
    """Like `is_volume`, but with ImageError for a file or folder that cannot be read.

    With `lone`, a single plane counts as a volume of one slice, unless the file is a picture.
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
            return False  # other images can be read; reading a DICOM reports the missing library
    file_format = format_of(path)
    return (lone and file_format != "raster") or _is_volume(path, file_format, [])


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Files directly in `folder` that look like images, sorted by name; ImageError without any.

    An image has a known suffix or the DICOM signature: exported DICOM files often have names such
    as 1.2.840.3. Hidden files and a DICOMDIR, which holds no image, are left out.
    """
    folder = Path(folder)
    if not folder.is_dir():
        state = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ImageError(f"{folder} {state}: give a folder that holds images")
    try:
        images = sorted(path for path in folder.iterdir() if _looks_like_image(path))
    except OSError as e:
        raise ImageError(f"{e.filename or folder} cannot be opened: {e.strerror}") from e
    if not images:
        raise ImageError(
            f"{folder} holds no images: expected files ending in {', '.join(SUFFIXES)}"
        )
    return images


def is_derived(path: Path) -> bool:
    """Whether a file is a DICOM computed from images: a segmentation, a parametric map, a dose."""
    if not _is_dicom(path):
        return False
    try:
        from .series import is_derived_dicom

        return is_derived_dicom(path)
    except (ImageError, MissingDependencyError):  # reading the file will report it
        return False


def _looks_like_image(path: Path) -> bool:
    """Whether a file is an image, by its suffix or its signature."""
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    return suffix(path) in SUFFIXES or signature(path) == "dicom"


def _is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its suffix or its signature."""
    try:
        return suffix(path) == ".dcm" or signature(path) == "dicom"
    except OSError as e:
        raise ImageError(f"{path} cannot be opened: {e.strerror}") from e


def format_of(path: Path) -> Format:
    """The format of a file, by its content, or by its suffix if the content has no signature."""
    if not path.exists():
        raise ImageError(f"{path} does not exist: give the path of an image")
    if path.is_dir():
        raise ImageError(f"{path} is a folder: give one image file")
    if not path.is_file():
        raise ImageError(f"{path} is not a regular file: give one image file")
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"{path} is an empty file: copy or export the image again")
        known = signature(path) or SUFFIXES.get(suffix(path))
    except OSError as e:
        raise ImageError(f"{path} cannot be opened: {e.strerror}") from e
    if known is None:
        raise ImageError(
            f"{path} is not a known image, by suffix or content; "
            f"expected DICOM or one of: {', '.join(SUFFIXES)}"
        )
    return known


def _read(path: Path, file_format: Format, axis: int | None, index: int | None) -> Image:
    """The image, from the format's reader; NIfTI's and DICOM's libraries are imported only here."""
    if file_format == "nifti":
        from .nifti import read_nifti

        return read_nifti(path, axis=axis, index=index)
    if file_format == "nrrd":
        from .nrrd import read_nrrd

        return read_nrrd(path, axis=axis, index=index)
    if file_format == "dicom":
        from .dicom import read_dicom

        return read_dicom(path)
    if file_format == "npy":
        from .npy import read_npy

        return read_npy(path, axis=axis, index=index)
    from .raster import read_raster

    if axis not in (None, 2):
        raise ImageError(f"{path}: axis {axis} was given, expected 2: the slices are its pages")
    return read_raster(path, page=index)


def open_volume(
    path: Path, file_format: Format | Literal["series"], axis: int | None, volume: int | None
) -> Volume:
    """The volume in a file that is not DICOM, from the format's reader, unchecked."""
    if file_format == "nifti":
        from .nifti import read_nifti_volume

        return read_nifti_volume(path, axis=axis, volume=volume)
    if file_format == "nrrd":
        from .nrrd import read_nrrd_volume

        return read_nrrd_volume(path, axis=axis)
    if file_format == "npy":
        from .npy import read_npy_volume

        return read_npy_volume(path, axis=axis)
    from .raster import read_tiff_volume

    return read_tiff_volume(path, axis=axis)


def _read_dicom_volume(path: Path, axis: int | None, choices: dict[str, Any]) -> Volume:
    """The volume of a DICOM file, or of the series in a folder.

    `choices`: `series`, `orientation` and `phase`, for `read_series`.
    """
    from .series import read_dicom_volume, read_series

    if not path.is_dir():
        return read_dicom_volume(
            path, axis=axis, orientation=choices["orientation"], phase=choices["phase"]
        )
    images = find_images(path)
    dicoms = [image for image in images if _is_dicom(image)]
    if skipped := [image.name for image in images if image not in dicoms]:
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        logger.info("%s: skipped, not DICOM: %s%s", path, ", ".join(skipped[:3]), more)
    return read_series(path, dicoms, axis=axis, **choices)


def _is_volume(path: Path, file_format: Format | Literal["series"], dicoms: list[Path]) -> bool:
    """Whether a path holds a volume, by the format's reader; `dicoms` are the files of a folder."""
    if file_format == "nifti":
        from .nifti import is_nifti_volume

        return is_nifti_volume(path)
    if file_format == "nrrd":
        from .nrrd import is_nrrd_volume

        return is_nrrd_volume(path)
    if file_format == "npy":
        from .npy import is_npy_volume

        return is_npy_volume(path)
    if file_format == "raster":
        from .raster import is_raster_volume

        return is_raster_volume(path)
    from .series import is_dicom_volume, is_series

    return is_dicom_volume(path) if file_format == "dicom" else is_series(dicoms)
