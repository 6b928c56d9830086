"""Intensities of an image or a volume → the range that tissue has, without padding.

Padding is what scanners and tools put where nothing was measured: values marked in the file, NaN
that the caller calls background, and fillers such as −2000 or −3024 around a CT. In a range it
would leave all tissue one grey.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .image import Image

HIGHEST_FILLER = -1500.0
"""A filler is below air, which is −1000 in a CT, and as low as −1100 with noise."""
LEAST_GAP = 400.0
"""Intensities between a filler and the lowest value that was measured."""
CT_AIR = (-1100.0, -800.0)
PERCENTILES = (0.5, 99.5)
MOST_SAMPLES = 4_000_000
"""Pixels that percentiles are computed from."""


@dataclass(frozen=True, kw_only=True)
class TissueRange:
    """The lowest and highest intensity that was measured."""

    low: float
    high: float
    filler: float | None = None
    """The value of padding that was left out and is not marked in the file."""
    marked: bool = False
    """Whether pixels that the file or the caller marks as background were left out."""

    @property
    def looks_like_ct(self) -> bool:
        """Whether the range starts at the Hounsfield units of air."""
        return CT_AIR[0] <= self.low <= CT_AIR[1] < 0 < self.high

    @property
    def remark(self) -> str:
        """What was left out, in words to put behind a sentence; empty if nothing was."""
        values = [f"padding of {self.filler:g}"] if self.filler is not None else []
        values += ["marked background"] if self.marked else []
        return f"; {' and '.join(values)} is left out and shown black" if values else ""


def tissue_range(images: Iterable[Image]) -> TissueRange:
    """The range of all pixels of the images, slices of one volume; (0, 0) if all are background."""
    lowest, second, high, marked = math.inf, math.inf, -math.inf, False
    for image in images:
        pixels = image.pixels
        if image.background is not None:
            marked = marked or bool(image.background.any())
            pixels = pixels[~image.background]
        if not pixels.size:
            continue
        low = float(pixels.min())
        high = max(high, float(pixels.max()))
        values = [low, *([_next(pixels, low)] if low <= HIGHEST_FILLER else []), lowest, second]
        lowest = min(values)
        second = min((value for value in values if value > lowest), default=math.inf)
    if lowest > high:
        return TissueRange(low=0.0, high=0.0, marked=marked)
    if lowest <= HIGHEST_FILLER and LEAST_GAP <= second - lowest < math.inf:
        return TissueRange(low=second, high=high, filler=lowest, marked=marked)
    return TissueRange(low=lowest, high=high, marked=marked)


def robust_window(images: Iterable[Image], tissue: TissueRange) -> tuple[float, float]:
    """The 0.5th and 99.5th percentile of what is not padding; `tissue`'s range if these are equal.

    `images` are slices of one volume; of large ones a regular sample of pixels counts.
    """
    samples = []
    for image in images:
        pixels = image.pixels if image.background is None else image.pixels[~image.background]
        samples.append(pixels[pixels != tissue.filler].ravel())
    values = np.concatenate(samples) if samples else np.zeros(0)
    if not values.size:
        return tissue.low, tissue.high
    low, high = np.percentile(values[:: 1 + values.size // MOST_SAMPLES], PERCENTILES)
    return (float(low), float(high)) if low < high else (tissue.low, tissue.high)


def _next(pixels: np.ndarray, low: float) -> float:
    """The lowest value above `low`; infinite if there is none."""
    higher = pixels[pixels > low]
    return float(higher.min()) if higher.size else math.inf
