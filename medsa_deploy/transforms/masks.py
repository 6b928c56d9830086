"""Low-resolution logits → masks and label maps at the image's size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.bundle.manifest import Manifest, PostprocessingName
from medsa_deploy.errors import UsageError

from . import resampling
from .image import Frame
from .intensities import Floats
from .postprocessing import POSTPROCESSING

MOST_CLASSES = 255
"""Classes that a label map of uint8 holds beside the background."""


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """How a network's low-resolution logits become masks."""

    postprocess: PostprocessingName
    """How logits become values of the image's pixels."""
    probability: float = 0.5
    """The threshold: probability above which a pixel belongs to a mask."""
    exclusive: bool = False
    """Whether the masks of a prompt set compete: a pixel belongs to the highest, and mask 0 is the
    background. There is no threshold then."""

    @property
    def threshold(self) -> float:
        """The value that a mask's pixels exceed: see `threshold_value`."""
        return threshold_value(self.probability, self.postprocess)


def mask_rule(manifest: Manifest, probability: float | None = None) -> MaskRule:
    """The rule of a bundle's network, with its own threshold or another probability.

    UsageError unless 0 < probability < 1, and for a threshold on masks that exclude each other.
    """
    conventions, exclusive = manifest.conventions, manifest.network.outputs == "labels"
    if exclusive and probability is not None:
        raise UsageError(
            "a threshold was given, but this network's classes exclude each other: a pixel belongs "
            "to the highest; leave the threshold out"
        )
    if probability is None:
        probability = conventions.threshold
    probability_to_logit(probability)
    return MaskRule(
        postprocess=conventions.postprocess, probability=probability, exclusive=exclusive
    )


def image_masks(logits: Floats, frame: Frame, rule: MaskRule) -> NDArray[np.bool_]:
    """Logits of one prompt set's masks (K, 4g, 4g) → masks of the image's size (n, H, W).

    n is K, or K − 1 of masks that exclude each other: those of the classes, without background.
    """
    values = pixel_values(logits, frame, rule.postprocess)
    if rule.exclusive:
        classes = np.arange(1, len(values), dtype=np.uint8)
        return np.equal(exclusive_labels(values), classes[:, None, None])
    return values > rule.threshold


def pixel_values(logits: Floats, frame: Frame, postprocess: PostprocessingName) -> Floats:
    """Low-resolution logits (…, 4g, 4g) float32 → values of the image's pixels (…, H, W) float32.

    The values are logits or, for a postprocessing that resizes probabilities, probabilities;
    `threshold_value` is comparable with them.

    >>> frame = Frame(image_size=(2, 4), network_size=4, content_size=(4, 4))
    >>> pixel_values(np.eye(4, dtype=np.float32), frame, "finetune-sam").tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    """
    values = np.asarray(logits, dtype=np.float32)
    if POSTPROCESSING[postprocess].probabilities:
        values = sigmoid(values)
    rows, columns = _operators(values.shape[-2], frame, postprocess)
    return resampling.resample(values, rows, columns)


def prepare_postprocessing(side: int, frame: Frame, postprocess: PostprocessingName) -> None:
    """Build what `pixel_values` needs for logits (4g, 4g) of a frame, before the first click.

    `side`: 4g. Operators stay in memory for the frames that were used last.
    """
    _operators(side, frame, postprocess)


def _operators(
    side: int, frame: Frame, postprocess: PostprocessingName
) -> tuple[resampling.Operator, resampling.Operator]:
    """Along rows, and along columns."""
    rows, columns = (
        axis_operator(postprocess, side, frame.network_size, content, size)
        for content, size in zip(frame.content_size, frame.image_size, strict=True)
    )
    return rows, columns


@lru_cache(maxsize=16)
def axis_operator(
    postprocess: PostprocessingName, n: int, network: int, content: int, m: int
) -> resampling.Operator:
    """The float32 operator from n logits to m pixels; a few MB at most."""
    taps = POSTPROCESSING[postprocess].axis_taps(n, network, content, m)
    return resampling.banded(taps, np.float32)


def sigmoid(logits: Floats) -> Floats:
    """Logits → probabilities, float32; no logit overflows."""
    with np.errstate(under="ignore"):
        decay = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits < 0, decay, np.float32(1)) / (1 + decay), np.float32)


def threshold_value(probability: float, postprocess: PostprocessingName) -> float:
    """The value that a pixel of a mask exceeds, among those of `pixel_values`.

    Where a pixel on the threshold belongs to the mask, it is the next smaller float32. UsageError
    unless 0 < probability < 1.

    >>> threshold_value(0.5, "sam"), threshold_value(0.5, "medsam")
    (0.0, 0.5)
    """
    spec = POSTPROCESSING[postprocess]
    logit = probability_to_logit(probability)
    value = probability if spec.probabilities else logit
    return float(np.nextafter(np.float32(value), np.float32(-np.inf))) if spec.inclusive else value


def probability_to_logit(threshold: float) -> float:
    """The logit of a probability; UsageError unless 0 < threshold < 1.

    >>> probability_to_logit(0.5)
    0.0
    """
    if not 0 < threshold < 1:
        raise UsageError(f"the threshold {threshold:g} is not a probability between 0 and 1")
    return math.log(threshold) - math.log1p(-threshold)


def label_map(values: Floats, threshold: float) -> NDArray[np.uint8]:
    """Pixel values of K classes (K, H, W) → (H, W) uint8: 0 background, k + 1 for class k.

    A pixel belongs to its class with the highest value if that is above `threshold`.
    """
    _check_classes(len(values))
    best = (values.argmax(axis=0) + 1).astype(np.uint8)
    labels: NDArray[np.uint8] = np.where(values.max(axis=0) > threshold, best, np.uint8(0))
    return labels


def exclusive_labels(values: Floats) -> NDArray[np.uint8]:
    """Pixel values of a background and K classes (K + 1, H, W) → (H, W) uint8: the highest's index.

    Of equal values the first wins; no value is compared with a threshold.

    >>> exclusive_labels(np.array([[[0.5, 0.0]], [[-1.0, 2.0]]], np.float32)).tolist()
    [[0, 1]]
    """
    _check_classes(len(values) - 1)
    return np.asarray(values.argmax(axis=0), np.uint8)


def class_margins(values: Floats) -> Floats:
    """Pixel values of a background and K classes (K + 1, H, W) → (K, H, W) float32.

    By how much each class exceeds all others: above 0 for the pixels that `exclusive_labels` gives
    to the class, and nowhere else.
    """
    labels, smallest = exclusive_labels(values), np.finfo(np.float32).tiny
    two_highest = np.partition(values, -2, axis=0)[-2:]
    margins = np.empty_like(values[1:])
    for k, value in enumerate(values[1:], 1):
        rival = np.where(labels == k, two_highest[0], two_highest[1])
        margins[k - 1] = value - rival
        # the first of equal classes wins
        np.maximum(margins[k - 1], smallest, out=margins[k - 1], where=labels == k)
        np.minimum(margins[k - 1], 0, out=margins[k - 1], where=labels != k)
    return margins


def class_probabilities(values: Floats, rule: MaskRule) -> Floats:
    """Pixel values of a prompt set's masks (K, H, W) → probabilities of the classes (n, H, W).

    Of masks that exclude each other the softmax, without the background; else each mask's own.
    """
    if rule.exclusive:
        exponentials = np.exp(values - values.max(axis=0))
        return np.asarray(exponentials[1:] / exponentials.sum(axis=0), np.float32)
    return values if POSTPROCESSING[rule.postprocess].probabilities else sigmoid(values)


def _check_classes(count: int) -> None:
    if not 1 <= count <= MOST_CLASSES:
        raise UsageError(f"a label map holds 1 to {MOST_CLASSES} classes, not {count}")
