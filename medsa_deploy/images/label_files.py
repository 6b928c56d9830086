"""A label file (PNG, TIFF, BMP, .npy, NIfTI, NRRD, DICOM segmentation) → `Labels`."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from medsa_deploy.errors import ImageError

from .files import reading
from .labels import Labels
from .limits import check_memory
from .raster import FORMATS, is_raster_volume, read_raster
from .raster_limits import check_picture
from .read import format_of, open_volume
from .volume import Volume

MOST_LABELS = 200
"""Most different values in a label file: a file with more is an image."""
MASK_VALUES = (255, 65535)
"""Values that mark a mask in a file whose only other value is 0."""


def read_labels(path: str | os.PathLike[str]) -> Labels:
    """The labels in a file: whole numbers from 0, at most 200 different ones.

    A picture is grey, or has a palette whose indices are the labels. A file with only 0 and 255
    (or 65535) is a mask and becomes label 1, and so does a .npy of bool. A NIfTI or .npy volume
    keeps its stored order. A DICOM segmentation is BINARY or LABELMAP, and its segment numbers are
    the labels. ImageError for any other file.
    """
    path = Path(path)
    file_format = format_of(path)
    if file_format == "dicom":
        from .dicom_seg import read_segmentation

        return read_segmentation(path)
    if file_format == "npy":
        return Labels(path=path, values=_whole_numbers(path, _array(path)))
    if file_format != "raster" or is_raster_volume(path):
        volume = open_volume(path, file_format, None, None)
        return Labels(path=path, values=_whole_numbers(path, _voxels(volume)), affine=volume.affine)
    return Labels(path=path, values=_whole_numbers(path, _picture(path)))


def _voxels(volume: Volume) -> np.ndarray:
    """All voxels of a volume, (X, Y, Z) in stored order."""
    if volume.colour:
        raise ImageError(
            f"{volume.path} holds colours; expected a label, one number, in each voxel"
        )
    in_memory = 2 * math.prod(volume.shape) * volume.dtype.itemsize
    check_memory(volume.path, in_memory, f"{'×'.join(map(str, volume.shape))} voxels")
    stacked = np.stack([volume.slice(k).pixels for k in range(len(volume))])
    voxels: np.ndarray = stacked.transpose(np.argsort((volume.axis, *volume.plane_axes)))
    return voxels


def _array(path: Path) -> np.ndarray:
    """The array in a .npy, (H, W) or (X, Y, Z)."""
    from .npy import map_array

    mapped = map_array(path)
    check_memory(path, 2 * mapped.nbytes, f"an array of shape {mapped.shape}")
    array = np.array(mapped)
    if array.ndim not in (2, 3) or array.size == 0:
        raise ImageError(f"{path} has shape {array.shape}; expected labels (H, W) or (X, Y, Z)")
    return array


def _picture(path: Path) -> np.ndarray:
    """The grey values or palette indices of a picture, (H, W)."""
    with reading(path, "a label picture"), path.open("rb") as f:
        picture = PIL.Image.open(f, formats=FORMATS)
        if picture.format in ("JPEG", "MPO"):
            raise ImageError(f"{path} is a JPEG, which blurs labels; give the labels as PNG")
        if picture.mode == "P":
            check_picture(path, picture)
            return np.asarray(PIL.ImageOps.exif_transpose(picture))
    pixels = read_raster(path).pixels
    if pixels.ndim == 3 and not (pixels == pixels[..., :1]).all():
        raise ImageError(
            f"{path} is a colour picture; expected one number a pixel: a grey PNG, or one with a "
            "palette"
        )
    return pixels if pixels.ndim == 2 else pixels[..., 0]


def _whole_numbers(path: Path, values: np.ndarray) -> np.ndarray:
    """The values as the smallest unsigned type that holds them; ImageError if not labels."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if values.dtype.kind == "f":
        odd = values != np.rint(values)  # NaN and infinite values are not whole either
        odd |= ~np.isfinite(values)
        if odd.any():
            raise ImageError(
                f"{path} holds {values[odd][0]:g}; labels are whole numbers: is this a label file, "
                "or a map of probabilities or intensities?"
            )
    distinct = np.unique(values)
    if distinct[0] < 0 or distinct[-1] > np.iinfo(np.uint32).max:
        raise ImageError(
            f"{path} holds values from {distinct[0]:g} to {distinct[-1]:g}; labels are whole "
            "numbers from 0: is this a label file?"
        )
    if len(distinct) > MOST_LABELS:
        raise ImageError(
            f"{path} holds {len(distinct)} different values, more than labels have (at most "
            f"{MOST_LABELS}): is this an image?"
        )
    if distinct[-1] in MASK_VALUES and not distinct[:-1].any():
        return np.asarray(values != 0, np.uint8)
    return values.astype(np.min_scalar_type(int(distinct[-1])))
