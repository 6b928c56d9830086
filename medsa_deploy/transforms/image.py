"""An image → the input of the network's image encoder, and the place of the image in that frame."""

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
    pixels: ArrayLike, preprocessing: PreprocessingName, network_size: int
) -> tuple[Floats, Frame]:
    """An image → the image encoder's input, (3, S, S) float32, and how the image lies in it.

    `pixels` (H, W) or (H, W, 3): uint8, or any other real type as float32. `medsa` and `sam` take
    display values 0…255 (see `display_values`); `medsam` and `litemedsam` take any range. One
    channel is repeated to three. ImageError for other shapes, an empty image, NaN or infinity, or
    values outside 0…255 for a preprocessing that takes display values.

    >>> image, frame = preprocess(np.zeros((240, 320), np.uint8), "sam", 256)
    >>> image.shape, frame.content_size
    ((3, 256, 256), (192, 256))
    """
    if preprocessing not in PREPROCESSING:
        raise UsageError(
            f"unknown preprocessing {preprocessing!r}; there are: {', '.join(PREPROCESSING)}"
        )
    spec = PREPROCESSING[preprocessing]
    planes = _planes(pixels)
    if not (spec.min_max or planes.dtype == np.uint8 or 0 <= planes.min() <= planes.max() <= 255):
        raise ImageError(
            f"the image has values {planes.min():g}…{planes.max():g}, but preprocessing "
            f"{preprocessing} takes display values 0…255: give an intensity window"
        )
    frame = frame_of((planes.shape[1], planes.shape[2]), preprocessing, network_size)
    content = resampling.resize(planes, frame.content_size, spec.filter)
    h, w = frame.content_size
    image = np.zeros((3, network_size, network_size), np.float32)
    image[:, :h, :w] = _scaled_intensities(content, spec)
    return image, frame


def frame_of(
    image_size: tuple[int, int], preprocessing: PreprocessingName, network_size: int
) -> Frame:
    """The place of an image of (H, W) in the network's frame."""
    content = network_size, network_size
    if PREPROCESSING[preprocessing].fit == "longest_side":
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


def _scaled_intensities(content: NDArray[Any], spec: PreprocessingSpec) -> NDArray[Any]:
    """(C, h, w) → (C or 3, h, w) with the spec's mean and std, or min–max over all channels."""
    if spec.mean is None or spec.std is None:
        low, high = float(content.min()), float(content.max())
        return np.asarray((content - low) / max(high - low, 1e-8))
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (spec.mean, spec.std))
    return np.asarray((content.astype(np.float32) - mean) / std)
