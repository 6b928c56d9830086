"""A .npy array (H, W), (H, W, 1|3|4) or a slice of (X, Y, Z) → `Image`; (X, Y, Z) → `Volume`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsa_deploy.errors import ImageError

from .files import reading
from .image import Image, choose_slice
from .limits import check_plane, check_volume_size
from .volume import Volume

CHANNELS = (1, 3, 4)


def read_npy(path: Path, *, axis: int | None, index: int | None) -> Image:
    """An array of numbers; bool becomes 0 and 255, a fourth channel (alpha) is dropped.

    If `axis` or `index` is given, a three-dimensional array is a volume. Otherwise it is a picture
    if its last axis has length 1, 3 or 4. A volume needs `index`, along axis 0 by default.
    """
    array = map_array(path)
    picture = _picture(path, array, axis, index)
    check_plane(path, picture.shape[:2], picture.nbytes)
    pixels = np.array(picture)
    if pixels.ndim == 3:
        pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3]
    return Image(pixels=_numbers(pixels), path=path)


@dataclass(frozen=True, kw_only=True, eq=False)
class ArraySlices:
    """The slices of an array: mapped from a .npy, or held in memory for another format."""

    path: Path
    array: np.ndarray
    """(X, Y, Z), or (X, Y, Z, 3) of colours."""
    axis: int

    def read(self, index: int) -> Image:
        """The slice; bool becomes 0 and 255."""
        pixels = np.array(np.moveaxis(self.array, self.axis, 0)[index])
        return Image(pixels=_numbers(pixels), path=self.path)


def is_npy_volume(path: Path) -> bool:
    """Whether the header announces a volume: an array that is neither a plane nor a picture."""
    array = map_array(path)
    return array.ndim > 3 or (array.ndim == 3 and array.shape[2] not in CHANNELS)


def read_npy_volume(path: Path, *, axis: int | None) -> Volume:
    """An array (X, Y, Z) of any real type, sliced along axis 0 by default, with spacing 1."""
    array = map_array(path)
    if array.ndim != 3 or 0 in array.shape:
        raise ImageError(
            f"{path} has shape {array.shape}; expected a volume (X, Y, Z) of one number a voxel"
        )
    shape = (array.shape[0], array.shape[1], array.shape[2])
    axis = 0 if axis is None else axis
    choose_slice(path, shape, axis, 0)
    rows, columns = (k for k in range(3) if k != axis)
    plane = shape[rows] * shape[columns]
    check_plane(path, (shape[rows], shape[columns]), plane * array.dtype.itemsize)
    check_volume_size(path, shape, array.dtype, 0, plane)
    stored = np.dtype(np.uint8) if array.dtype == np.bool_ else array.dtype.newbyteorder("=")
    return Volume(
        path=path,
        kind="npy",
        files=(path,),
        shape=shape,
        axis=axis,
        plane_axes=(rows, columns),
        spacing_mm=(1.0, 1.0, 1.0),
        affine=None,
        dtype=np.dtype(np.float32) if stored.kind == "f" else stored,
        slices=ArraySlices(path=path, array=array, axis=axis),
    )


def map_array(path: Path) -> np.ndarray:
    """The array in a file, mapped: reading a slice costs one slice. Pickles are never loaded."""
    with reading(path, "a .npy array"):
        array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype.kind not in "biuf":
        raise ImageError(f"{path} holds {array.dtype} values; expected real numbers or booleans")
    return array


def _numbers(pixels: np.ndarray) -> np.ndarray:
    """The pixels, bool as 0 and 255."""
    return pixels.astype(np.uint8) * 255 if pixels.dtype == np.bool_ else pixels


def _picture(path: Path, array: np.ndarray, axis: int | None, index: int | None) -> np.ndarray:
    """`array` itself, or the chosen slice of it."""
    sliced = axis is not None or index is not None
    if array.ndim == 3 and (sliced or array.shape[2] not in CHANNELS):
        x, y, z = array.shape
        plane = choose_slice(path, (x, y, z), 0 if axis is None else axis, index)
        pixels: np.ndarray = np.moveaxis(array, plane.axis, 0)[plane.index]
        return pixels
    if array.ndim not in (2, 3) or sliced:
        raise ImageError(
            f"{path} has shape {array.shape}; expected (H, W), (H, W, 3), "
            "or (X, Y, Z) with a chosen slice"
        )
    return array
