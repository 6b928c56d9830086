"""Intensities of an image → the display values that its preprocessing spec takes."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medsa_deploy.bundle.manifest import Conventions
from medsa_deploy.errors import ImageError, UsageError

from .preprocessing import PREPROCESSING

if TYPE_CHECKING:
    from medsa_deploy.images.image import Image
    from medsa_deploy.images.tissue import TissueRange

IntensityWindow: TypeAlias = tuple[float, float] | Literal["auto"] | None
"""Intensities of black and white; "auto" for percentiles without padding; None for the bundle's,
else the file's own."""
Floats: TypeAlias = NDArray[np.float32]

logger = logging.getLogger(__name__)


def display_values(
    pixels: ArrayLike, window: tuple[float, float], *, inverted: bool = False
) -> Floats:
    """Intensities → display values: `window` (low, high) becomes 0…255, clipped, float32.

    `pixels` (H, W) or (H, W, 3) of any real type; `inverted` makes low intensities bright
    (MONOCHROME1). UsageError unless the window is finite and low < high, ImageError for NaN or
    infinity.

    >>> display_values([[-1000, 0, 400]], (-160, 240))
    array([[  0., 102., 255.]], dtype=float32)
    """
    low, high = window
    if not 0 < high - low < math.inf:
        raise UsageError(
            f"the intensity window {low:g},{high:g} cannot be used: give two finite numbers, "
            "the lower first"
        )
    values = np.clip(finite(pixels, np.float64), low, high)
    values = (values - low) / (high - low) * 255
    return np.asarray(255 - values if inverted else values, np.float32)


def intensities(
    image: Image, conventions: Conventions, window: IntensityWindow
) -> tuple[NDArray[np.generic], tuple[float, float] | None]:
    """The values that preprocessing takes, and the window they were mapped with (None: no window).

    The caller's window comes first, then the bundle's, then the file's own rendering. Background
    that the image marks is black.
    """
    values, used = _unmasked(image, conventions, window)
    if image.background is not None:
        values = values.copy()
        values[image.background] = 0
    return values, used


def _unmasked(
    image: Image, conventions: Conventions, window: IntensityWindow
) -> tuple[NDArray[np.generic], tuple[float, float] | None]:
    """As `intensities`, without regard to the background."""
    from medsa_deploy.images.tissue import robust_window, tissue_range  # imports Pillow

    if window == "auto":
        window = robust_window([image], tissue_range([image]))
        return (
            (_windowed(image, window), window) if window[0] < window[1] else (_black(image), None)
        )
    if window is None and image.pixels.dtype != np.uint8:
        window = conventions.intensity_window
    if window is not None:
        return _windowed(image, window), window
    if image.display is not None:
        return image.display, None
    if image.pixels.dtype == np.uint8:
        return (255 - image.pixels if image.inverted else image.pixels), None
    tissue = tissue_range([image])
    low, high = tissue.low, tissue.high
    if low == high:
        return _black(image), None
    if not PREPROCESSING[conventions.preprocess].min_max:
        warn_of_stretching(image.path, image.pixels.dtype, tissue, robust_window([image], tissue))
    return _windowed(image, (low, high)), (low, high)


def warn_of_stretching(
    path: Path, dtype: np.dtype, tissue: TissueRange, robust: tuple[float, float]
) -> None:
    """Log that the whole range was stretched, what was left out, and windows to try."""
    advice = (
        "for a CT, --intensity-window -160,240 shows the abdomen and -1350,150 the lungs"
        if tissue.looks_like_ct
        else f"--intensity-window auto takes {robust[0]:.6g}…{robust[1]:.6g}, without outliers"
    )
    logger.warning(
        "%s: %s intensities without a window were stretched from %g…%g to 0…255%s; "
        "set an intensity window to fix the scale: %s",
        path,
        dtype,
        tissue.low,
        tissue.high,
        tissue.remark,
        advice,
    )


def _black(image: Image) -> NDArray[np.uint8]:
    return np.zeros_like(image.pixels, np.uint8)


def check_not_flat(
    image: Image, values: NDArray[np.generic], window: tuple[float, float] | None
) -> None:
    """ImageError if the window shows the image as one flat grey."""
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
    return display_values(image.pixels, window, inverted=image.inverted)


def finite(pixels: ArrayLike, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """`pixels` as finite floats of `dtype`, or ImageError."""
    array = np.asarray(pixels)
    if array.dtype.kind not in "uif":
        raise ImageError(f"an image has integers or floats, not {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise ImageError("the image has NaN or infinite values: replace them first")
    return array
