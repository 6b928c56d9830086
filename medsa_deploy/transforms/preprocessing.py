"""The name of a preprocessing → its spec: how an image becomes the network's input.

A spec also names the postprocessing of the code that prepares images so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from medsa_deploy.bundle.manifest import PostprocessingName, PreprocessingName

from .resampling import Filter


@dataclass(frozen=True, kw_only=True)
class PreprocessingSpec:
    """How an image becomes the network's input."""

    fit: Literal["stretch", "longest_side"]
    """`stretch`: to the whole frame. `longest_side`: scaled until its longest side is the frame's,
    and padded right and bottom with zeros, after the intensities are scaled."""
    filter: Filter
    """See `resampling.resize`."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from display values 0…255; None: the image's own minimum becomes 0, maximum 1."""
    std: tuple[float, float, float] | None = None
    """Divisor of the differences from `mean`."""
    postprocess: PostprocessingName = "sam"
    """How masks are made of the network's logits, unless the bundle says otherwise."""

    @property
    def min_max(self) -> bool:
        """Whether it takes intensities of any range; otherwise it takes display values 0…255."""
        return self.mean is None


IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

PREPROCESSING: Mapping[PreprocessingName, PreprocessingSpec] = {
    "medsa": PreprocessingSpec(
        fit="stretch", filter="bilinear", mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0)
    ),
    "sam": PreprocessingSpec(
        fit="longest_side", filter="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD
    ),
    "medsam": PreprocessingSpec(fit="stretch", filter="cubic", postprocess="medsam"),
    "litemedsam": PreprocessingSpec(fit="longest_side", filter="area"),
    "efficientsam": PreprocessingSpec(
        fit="stretch",
        filter="linear",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        postprocess="efficientsam",
    ),
    "sam-med2d": PreprocessingSpec(
        fit="stretch", filter="nearest", mean=IMAGENET_MEAN, std=IMAGENET_STD
    ),
    "finetune-sam": PreprocessingSpec(
        fit="stretch",
        filter="bilinear",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        postprocess="finetune-sam",
    ),
    "samed": PreprocessingSpec(
        fit="stretch",
        filter="spline",
        mean=(0.0, 0.0, 0.0),
        std=(255.0, 255.0, 255.0),
        postprocess="samed",
    ),
}
