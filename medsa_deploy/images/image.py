"""An array or a decoded file → `Image`: one two-dimensional image, checked alike for any format."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from medsa_deploy.errors import ImageError, one_line

logger = logging.getLogger(__name__)

Nan: TypeAlias = Literal["refuse", "background"]
"""What NaN is: a fault of the file, or pixels outside the field of view."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """The place of a slice in its volume, so that its mask can be written back there."""

    axis: int
    index: int
    shape: tuple[int, int, int]
    """(X, Y, Z) of the volume, in stored voxel order."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Image:
    """One two-dimensional image, with the values its file holds."""

    pixels: np.ndarray
    """(H, W) or (H, W, 3). uint8: display values 0…255. Any other dtype: raw intensities that need
    a window before they can be shown (DICOM: after the rescale)."""
    path: Path
    display: np.ndarray | None = None
    """(H, W) or (H, W, 3) float32 0…255: the rendering that the file defines (DICOM: its VOI LUT or
    window, MONOCHROME1 inverted); None if it defines none."""
    inverted: bool = False
    """Low intensities are bright (DICOM MONOCHROME1, TIFF MinIsWhite). `pixels` are as stored:
    invert them after windowing. `display` is inverted already."""
    plane: Plane | None = None
    """The place of a NIfTI's slice in its volume; None for any other image."""
    background: np.ndarray | None = None
    """(H, W) bool: pixels that hold padding and no tissue; None if the file marks none."""


def choose_slice(path: Path, shape: tuple[int, int, int], axis: int, index: int | None) -> Plane:
    """Slice `index` along `axis`; ImageError names the valid range. A lone slice needs no index."""
    if axis not in (0, 1, 2):
        raise ImageError(f"{path} has axes 0, 1 and 2; there is no axis {axis}")
    if index is None and shape[axis] == 1:
        index = 0
    if index is None or not 0 <= index < shape[axis]:
        choice = "none was given" if index is None else f"{index} was given"
        raise ImageError(
            f"{path} is a volume of shape {shape}: choose a slice (--slice) "
            f"0…{shape[axis] - 1} along axis {axis}; {choice}"
        )
    return Plane(axis=axis, index=index, shape=shape)


def check_image(image: Image, *, nan: Nan = "refuse") -> Image:
    """`image` in native byte order, floats as float32; ImageError if it cannot be segmented.

    It cannot be segmented without pixels, with NaN or infinite values (unless `nan` says that NaN
    is background), or if all values are equal.
    """
    image = check_values(image, str(image.path), nan=nan)
    pixels = image.pixels
    if (pixels == pixels[0, 0]).all():
        value = pixels[0, 0].tolist()
        raise ImageError(f"{image.path}: every pixel is {value}: nothing to segment")
    if image.display is not None and np.ptp(image.display) == 0:
        logger.warning(
            "%s: the file's window shows one flat grey; its values span %g to %g",
            image.path, pixels.min(), pixels.max(),
        )  # fmt: skip
    return image


def check_values(image: Image, name: str, *, nan: Nan = "refuse") -> Image:
    """`image` in native byte order, floats as float32; for an image or a volume's slice.

    NaN becomes background if `nan` says so. ImageError, in which the image is called `name`, if
    there are no pixels or some are NaN or infinite.
    """
    pixels = image.pixels
    if pixels.size == 0:
        raise ImageError(f"{name} has no pixels: its shape is {pixels.shape}")
    if pixels.dtype.kind == "f":
        # Values beyond float32 become infinite and are refused below.
        with np.errstate(over="ignore"):
            pixels = pixels.astype(np.float32)
        if nan == "background":
            image, pixels = _without_nan(image, pixels)
        if bad := int(np.count_nonzero(~np.isfinite(pixels))):
            raise ImageError(
                f"{name} has {bad} NaN or infinite values out of {pixels.size}: "
                "replace them before segmenting, or call NaN background (--nan background)"
            )
    native = pixels.astype(pixels.dtype.newbyteorder("="), order="C", copy=False)
    return dataclasses.replace(image, pixels=native)


def _without_nan(image: Image, pixels: np.ndarray) -> tuple[Image, np.ndarray]:
    """The image with NaN as background, and its pixels with the lowest number in their place."""
    missing = np.isnan(pixels)
    if not missing.any():
        return image, pixels
    lowest = np.fmin.reduce(pixels, axis=None)
    pixels = np.where(missing, np.float32(0) if np.isnan(lowest) else lowest, pixels)
    marked = missing if missing.ndim == 2 else missing.any(axis=2)
    background = marked if image.background is None else image.background | marked
    return dataclasses.replace(image, background=background), pixels


def as_image(image: Image | ArrayLike) -> Image:
    """`image` itself, or an array as an image with the path `array`.

    ImageError unless the pixels are real numbers of shape (H, W) or (H, W, 3).
    """
    source = image if isinstance(image, Image) else _from_array(image)
    _check_pixels(source)
    return source


def _from_array(array: ArrayLike) -> Image:
    """An array as an image: bool as 0 and 255, (H, W, 1) as (H, W)."""
    try:
        pixels = np.asarray(array)
    except ValueError as e:
        raise ImageError(
            "the image's rows differ in length, expected the shape (H, W) or (H, W, 3): give a "
            "rectangular array"
        ) from e
    except TypeError as e:  # an array on a GPU
        raise ImageError(
            f"the image is not in host memory ({one_line(e)}): copy it to the host first"
        ) from e
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    return Image(pixels=pixels, path=Path("array"))


def _check_pixels(image: Image) -> None:
    shape = image.pixels.shape
    if len(shape) not in (2, 3) or shape[2:] not in ((), (3,)):
        raise ImageError(f"{image.path} has shape {shape}, expected (H, W) or (H, W, 3)")
    if image.pixels.dtype.kind not in "uif":
        raise ImageError(f"{image.path} holds {image.pixels.dtype}, expected integers or floats")
