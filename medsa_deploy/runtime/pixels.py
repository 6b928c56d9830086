"""What a caller gives as an image, and its intensities → the display values a profile takes."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medsa_deploy import transforms
from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images.files import one_line
from medsa_deploy.images.image import Image
from medsa_deploy.manifest import Conventions

logger = logging.getLogger(__name__)


def intensities(
    image: Image, conventions: Conventions, window: tuple[float, float] | None
) -> tuple[NDArray[np.generic], tuple[float, float] | None]:
    """The values a profile takes, and the window they were mapped with (None: no window).

    A window the caller gives goes before the bundle's, that before the file's own rendering.
    """
    if window is None and image.pixels.dtype != np.uint8:
        window = conventions.intensity_window
    if window is not None:
        return _windowed(image, window), window
    if image.display is not None:
        return image.display, None
    if image.pixels.dtype == np.uint8:
        return (255 - image.pixels if image.inverted else image.pixels), None
    low, high = float(image.pixels.min()), float(image.pixels.max())
    if low == high:
        return np.zeros_like(image.pixels, np.uint8), None
    if not transforms.PROFILES[conventions.preprocess].min_max:
        logger.warning(
            "%s: %s intensities without a window were stretched from %g…%g to 0…255; "
            "set an intensity window to fix the scale",
            image.path,
            image.pixels.dtype,
            low,
            high,
        )
    return _windowed(image, (low, high)), (low, high)


def check_shown(
    image: Image, values: NDArray[np.generic], window: tuple[float, float] | None
) -> None:
    """ImageError for an image that its window shows as one flat grey."""
    if window is not None and np.ptp(values) == 0:
        raise ImageError(
            f"{image.path}: its values {image.pixels.min():g}…{image.pixels.max():g} lie outside "
            f"the intensity window {window[0]:g}…{window[1]:g}, which shows one flat grey: "
            "choose another window"
        )


def _windowed(image: Image, window: tuple[float, float]) -> NDArray[np.float32]:
    """Display values of an image under a window."""
    if len(window) != 2:
        raise UsageError(f"the intensity window {window} cannot be used: give (low, high)")
    return transforms.display_values(image.pixels, window, inverted=image.inverted)


def as_image(image: Image | ArrayLike) -> Image:
    """What a caller gives, as an image; arrays become one without a file."""
    return image if isinstance(image, Image) else _from_array(image)


def _from_array(array: ArrayLike) -> Image:
    """An array as an image without a file."""
    try:
        pixels = np.asarray(array)
    except ValueError as e:
        raise ImageError(
            "the image's rows differ in length, expected the shape (H, W) or (H, W, 3)"
        ) from e
    except TypeError as e:  # an array on a GPU
        raise ImageError(f"the image cannot be had on the host: {one_line(e)}") from e
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    return Image(pixels=pixels, path=Path("array"))


def check_pixels(image: Image) -> None:
    """ImageError unless pixels are real numbers of shape (H, W) or (H, W, 3)."""
    shape = image.pixels.shape
    if len(shape) not in (2, 3) or shape[2:] not in ((), (3,)):
        raise ImageError(f"{image.path} has shape {shape}, expected (H, W) or (H, W, 3)")
    if image.pixels.dtype.kind not in "uif":
        raise ImageError(f"{image.path} holds {image.pixels.dtype}, expected integers or floats")
