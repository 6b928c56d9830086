"""Decoder outputs of prompt sets → `Prediction`: masks, scores, regions and a label map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy import transforms
from medsa_deploy.errors import UsageError
from medsa_deploy.kernels.postprocess import Region, region, unpack
from medsa_deploy.nvidia.device_array import DeviceArray
from medsa_deploy.transforms import Frame, MaskRule

from .backends.interface import Array, DeviceMasks, MaskRequest


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """Masks of P prompt sets, K each: one per class, or SAM's candidates.

    >>> from medsa_deploy import load, read_image
    >>> with load("liver.medsa") as session:
    ...     embedding = session.encode(read_image("slice.png"))
    ...     prediction = session.segment(embedding, boxes=[(40, 60, 200, 210), (10, 10, 90, 80)])
    >>> prediction.masks.shape, prediction.scores.shape
    ((2, 1, 240, 320), (2, 1))
    >>> prediction.label_map().shape
    (240, 320)
    """

    masks: NDArray[np.bool_] | DeviceArray
    """(P, K, H, W) bool at the image's size; with `on_device` a `DeviceArray`, which belongs to its
    session. If classes exclude each other, there is none for the background."""
    scores: Array
    """(P, K) predicted IoU of each mask."""
    low_res_logits: Array
    """(P, K, 4g, 4g) float32; one of them can be the mask prompt of a further call. If classes
    exclude each other, the background's come first: (P, K + 1, 4g, 4g)."""
    rule: MaskRule
    """How the logits became masks, with the threshold."""
    classes: bool
    """Whether K counts classes; otherwise the K masks of a set are candidates for one object."""
    frame: Frame
    """How the image lies in the network's frame."""
    timings_ms: dict[str, float]
    """`decode` and `postprocess`. Masks that a GPU makes count as `decode`; unpacking them counts
    as `postprocess`."""
    counted: list[list[Region]] | None = None
    """The regions, if a GPU made the masks and counted them."""
    degraded: str | None = None
    """Why a fallback backend made this; None if the backend that was asked for did."""

    @property
    def threshold(self) -> float:
        """Probability above which a pixel belongs to a mask."""
        return self.rule.probability

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(H, W) bool: the mask of a prediction that has one, on the host.

        UsageError for several prompt sets, or several masks of one.
        """
        sets, count = self.masks.shape[:2]
        if (sets, count) != (1, 1):
            raise UsageError(
                f"the prediction has {count} mask(s) for each of {sets} prompt set(s), expected "
                "one mask in all: use .masks"
            )
        mask: NDArray[np.bool_] = np.asarray(self.masks)[0, 0]
        return mask

    @property
    def best(self) -> NDArray[np.intp]:
        """(P,) the candidate with the highest score."""
        return np.asarray(self.scores.argmax(axis=1))

    @property
    def regions(self) -> list[list[Region]]:
        """Area and bounding box of each mask, K for each of P sets."""
        return self.counted or [
            [region(mask) for mask in of_set] for of_set in np.asarray(self.masks)
        ]

    @property
    def labels(self) -> NDArray[np.uint8]:
        """(H, W): see `label_map`."""
        return self.label_map()

    @property
    def probabilities(self) -> Array:
        """(P, K, H, W) float32: probability of each mask at each pixel of the image.

        If classes exclude each other, the background has the rest to 1.
        """
        return np.stack(
            [
                transforms.class_probabilities(self._values(of_set), self.rule)
                for of_set in self.low_res_logits
            ]
        )

    def label_map(self) -> NDArray[np.uint8]:
        """(H, W): 0 for background, else a number from 1; the highest value wins an overlap.

        If K counts several classes, numbers are classes, over all prompt sets. Otherwise numbers
        are prompt sets, each with its best candidate.
        """
        if self.rule.exclusive:
            return transforms.exclusive_labels(self._highest_values())
        if self.classes and self.masks.shape[1] > 1:
            return transforms.label_map(self._highest_values(), self.rule.threshold)
        best_logits = self.low_res_logits[np.arange(len(self.best)), self.best]
        return transforms.label_map(self._values(best_logits), self.rule.threshold)

    def _values(self, logits: Array) -> Array:
        """Logits (n, 4g, 4g) → values of the image's pixels (n, H, W)."""
        return transforms.pixel_values(logits, self.frame, self.rule.postprocess)

    def _highest_values(self) -> Array:
        """(n, H, W): each class's highest values over all prompt sets."""
        return reduce(np.maximum, map(self._values, self.low_res_logits))


def best_candidates(
    logits: Array, scores: Array, device_masks: DeviceMasks | None
) -> tuple[Array, Array, DeviceMasks | None]:
    """The candidate with the highest score of every set, as sets of one mask."""
    sets, best = np.arange(len(scores)), scores.argmax(axis=1)

    def chosen(candidates: Any) -> Any:
        return candidates[sets, best][:, None]

    if device_masks is not None:
        masks, tally = chosen(device_masks.masks), chosen(device_masks.tally)
        device_masks = DeviceMasks(masks=masks, tally=tally)
    return chosen(logits), chosen(scores), device_masks


def full_size_masks(
    logits: Array, device_masks: DeviceMasks | None, request: MaskRequest
) -> NDArray[np.bool_] | DeviceArray:
    """(P, n, H, W) bool: the masks that a GPU made, or else those of the logits (P, n, 4g, 4g)."""
    if device_masks is None:
        # set by set: the logits of an image's size take four times as much as their masks
        return np.stack(
            [transforms.image_masks(of_set, request.frame, request.rule) for of_set in logits]
        )
    if isinstance(device_masks.masks, DeviceArray):
        return device_masks.masks
    return unpack(device_masks.masks, request.frame.image_size[1])
