"""The name of a postprocessing → its spec: how low-resolution logits become an image's pixels.

Each network's own inference code makes masks in its own way, and another way moves their edges.
Every way is three steps: a function of each logit, a resize of each axis, a decision at each pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from medsa_deploy.bundle.manifest import PostprocessingName

from .resampling import (
    Taps,
    aligned_nearest_taps,
    bicubic_taps,
    bilinear_taps,
    compose,
    crop,
    nearest_taps,
)

AxisTaps = Callable[[int, int, int, int], Taps]
"""Of n logits that cover a network's side S, of which `content` samples are the image, and the
image's size m: which logits each pixel of the axis reads."""


@dataclass(frozen=True, kw_only=True)
class PostprocessingSpec:
    """How low-resolution logits become values of the image's pixels."""

    axis_taps: AxisTaps
    """Called with (n, S, content, m)."""
    probabilities: bool = False
    """Whether logits become probabilities first; then these are resized and compared."""
    inclusive: bool = False
    """Whether a pixel on the threshold belongs to the mask."""


def _through_frame(n: int, network: int, content: int, m: int) -> Taps:
    """SAM's `postprocess_masks`: bilinear to the network's frame, cropped, bilinear to the image.

    LiteMedSAM crops its logits before the only resize. Its logits are of the frame's size, so the
    two are the same.
    """
    return compose(crop(bilinear_taps(n, network), content), bilinear_taps(content, m))


def _bilinear(n: int, network: int, content: int, m: int) -> Taps:
    return bilinear_taps(n, m, extent=n * content / network)


def _bicubic(n: int, network: int, content: int, m: int) -> Taps:
    return bicubic_taps(n, m, extent=n * content / network)


def _nearest(n: int, network: int, content: int, m: int) -> Taps:
    return nearest_taps(n, m, extent=n * content / network)


def _nearest_of_frame(n: int, network: int, content: int, m: int) -> Taps:
    """Bilinear to the network's frame, cropped, then its nearest samples, corners aligned."""
    return compose(crop(bilinear_taps(n, network), content), aligned_nearest_taps(content, m))


POSTPROCESSING: Mapping[PostprocessingName, PostprocessingSpec] = {
    "sam": PostprocessingSpec(axis_taps=_through_frame),
    "medsam": PostprocessingSpec(axis_taps=_bilinear, probabilities=True),
    "efficientsam": PostprocessingSpec(axis_taps=_bicubic, inclusive=True),
    "finetune-sam": PostprocessingSpec(axis_taps=_nearest),
    "samed": PostprocessingSpec(axis_taps=_nearest_of_frame),
}
