""".npy → `Image`: (H, W), (H, W, 1|3|4), or one slice of a volume."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medsa_deploy.errors import ImageError

from .files import reading
from .image import Image, choose_slice

CHANNELS = (1, 3, 4)


def read_npy(path: Path, *, axis: int | None, index: int | None) -> Image:
    """An array of numbers; bool becomes 0 and 255, a fourth channel (alpha) is dropped.

    A three-dimensional array whose last axis is 1, 3 or 4 long is a picture with channels, unless a
    slice is asked for; any other is a volume and needs `index`, along axis 0 by default.
    """
    with reading(path, "a .npy array"):
        # Mapped, so that one slice of a large volume costs one slice; it never unpickles anything.
        array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype.kind not in "biuf":
        raise ImageError(f"{path} holds {array.dtype} values; expected real numbers or booleans")
    pixels = np.array(_picture(path, array, axis, index))
    if pixels.ndim == 3:
        pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3]
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    return Image(pixels=pixels, path=path)


def _picture(path: Path, array: np.ndarray, axis: int | None, index: int | None) -> np.ndarray:
    """`array` itself, or the slice of it that was asked for."""
    sliced = axis is not None or index is not None
    if array.ndim == 3 and (sliced or array.shape[2] not in CHANNELS):
        x, y, z = array.shape
        plane = choose_slice(path, (x, y, z), 0 if axis is None else axis, index)
        array = np.moveaxis(array, plane.axis, 0)[plane.index]
        return array
    if array.ndim not in (2, 3) or sliced:
        raise ImageError(
            f"{path} has shape {array.shape}; expected (H, W), (H, W, 3), "
            "or a three-dimensional volume to take a slice of"
        )
    return array
