"""Low-resolution logits → masks and label maps at the image's size."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.errors import UsageError

from . import resampling
from .image import Frame
from .intensities import Floats


def upsample(logits: Floats, frame: Frame) -> Floats:
    """Low-resolution logits (…, 4g, 4g) float32 → logits of the image's pixels (…, H, W) float32.

    Bilinear to the network's frame, cropped of padding, then bilinear to the image, as SAM's
    `postprocess_masks`. Both steps are linear, so they are applied as one.
    """
    logits = np.asarray(logits, dtype=np.float32)
    rows, columns = _upsample_operators(logits.shape[-2], frame)
    return resampling.resample(logits, rows, columns)


def prepare_upsampling(side: int, frame: Frame) -> None:
    """Build what `upsample` needs for logits (4g, 4g) of a frame, so that the first click has it.

    `side`: 4g. Operators stay in memory for the frames that were used last.
    """
    _upsample_operators(side, frame)


def _upsample_operators(side: int, frame: Frame) -> tuple[resampling.Operator, resampling.Operator]:
    """Along rows, and along columns."""
    rows, columns = (
        resampling.upsample_operator(side, frame.network_size, content, size)
        for content, size in zip(frame.content_size, frame.image_size, strict=True)
    )
    return rows, columns


def probability_to_logit(threshold: float) -> float:
    """The logit of a probability; UsageError unless 0 < threshold < 1.

    >>> probability_to_logit(0.5)
    0.0
    """
    if not 0 < threshold < 1:
        raise UsageError(f"the threshold {threshold:g} is not a probability between 0 and 1")
    return math.log(threshold) - math.log1p(-threshold)


def label_map(logits: Floats, threshold_logit: float) -> NDArray[np.uint8]:
    """Logits of K classes (K, H, W) → (H, W) uint8: 0 background, k + 1 for class k.

    A pixel belongs to its class with the highest logit if that is above `threshold_logit`.
    """
    if not 1 <= len(logits) <= 255:
        raise UsageError(f"a label map holds 1 to 255 classes, not {len(logits)}")
    best = (logits.argmax(axis=0) + 1).astype(np.uint8)
    return np.where(logits.max(axis=0) > threshold_logit, best, np.uint8(0))
