"""An image → what the network's image encoder receives, and where the image lies in that frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medsa_deploy.bundle.manifest import PreprocessingName
from medsa_deploy.errors import ImageError, UsageError

from . import resampling
from .intensities import Floats, finite
from .preprocessing import PREPROCESSING, PreprocessingSpec


@dataclass(frozen=True, kw_only=True)
class Frame:
    """How an image lies in the network's square frame."""

    image_size: tuple[int, int]
    """(H, W) of the caller's image."""
    network_size: int
    """S"""
    content_size: tuple[int, int]
    """(h, w) of the frame that the image covers, from the top left; the rest is padding."""


def preprocess(
    pixels: ArrayLike, profile: PreprocessingName, network_size: int
) -> tuple[Floats, Frame]:
    """An image → what the image encoder receives, (3, S, S) float32, and how it lies in it.

    `pixels` (H, W) or (H, W, 3): uint8, or any other real type as float32. The profiles `medsa` and
    `sam` take display values 0…255 (see `display_values`), the min–max profiles any range. One
    channel is repeated to three. ImageError for other shapes, an empty image, NaN or infinity, or
    values outside 0…255 where display values are wanted.
    """
    if profile not in PREPROCESSING:
        raise UsageError(
            f"unknown preprocessing {profile!r}; there are: {', '.join(PREPROCESSING)}"
        )
    row = PREPROCESSING[profile]
    planes = _planes(pixels)
    if not (row.min_max or planes.dtype == np.uint8 or 0 <= planes.min() <= planes.max() <= 255):
        raise ImageError(
            f"the image has values {planes.min():g}…{planes.max():g}, but preprocessing {profile} "
            "takes display values 0…255: give an intensity window"
        )
    frame = frame_of((planes.shape[1], planes.shape[2]), profile, network_size)
    content = resampling.resize(planes, frame.content_size, row.filter)
    h, w = frame.content_size
    image = np.zeros((3, network_size, network_size), np.float32)
    image[:, :h, :w] = _scaled_intensities(content, row)
    return image, frame


def frame_of(image_size: tuple[int, int], profile: PreprocessingName, network_size: int) -> Frame:
    """Where an image of (H, W) lies in the frame under `profile`."""
    content = network_size, network_size
    if PREPROCESSING[profile].fit == "longest_side":
        # the order of operations is SAM's ResizeLongestSide's, so that ties round alike
        scale = network_size / max(image_size)
        h, w = (max(1, int(side * scale + 0.5)) for side in image_size)
        content = h, w
    return Frame(image_size=image_size, network_size=network_size, content_size=content)


def _planes(pixels: ArrayLike) -> NDArray[Any]:
    """(H, W) or (H, W, 3) → (C, H, W), C = 1 or 3, uint8 or finite float32."""
    array = np.asarray(pixels)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ImageError(
            f"an image has the shape (height, width) or (height, width, 3), not {array.shape}"
        )
    if array.size == 0:
        raise ImageError(f"the image is empty: its shape is {array.shape}")
    if array.dtype != np.uint8:
        array = finite(array, np.float32)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _scaled_intensities(content: NDArray[Any], profile: PreprocessingSpec) -> NDArray[Any]:
    """(C, h, w) → (C or 3, h, w) with the profile's mean and std, or min–max over all channels."""
    if profile.mean is None or profile.std is None:
        low, high = float(content.min()), float(content.max())
        return np.asarray((content - low) / max(high - low, 1e-8))
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (profile.mean, profile.std))
    return np.asarray((content.astype(np.float32) - mean) / std)
