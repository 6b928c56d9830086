"""A made ultrasound clip: speckle, and a dark structure that moves and deforms, with its masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

KEPT_SPECKLE = 0.8
"""Correlation of the speckle of neighbouring frames."""
BEAT = 30
"""Frames in which the structure shrinks and grows once."""


@dataclass(frozen=True)
class SpeckleClip:
    """Frames (H, W) uint8 with the mask of the structure, the same for every reading."""

    count: int = 100
    size: tuple[int, int] = (240, 320)
    seed: int = 0

    def mask(self, index: int) -> NDArray[np.bool_]:
        """The structure in a frame: an oval that beats, turns, bulges and drifts."""
        height, width = self.size
        y, x = np.mgrid[:height, :width].astype(np.float64)
        turn = 2 * np.pi * index
        center_x = width * (0.5 + 0.12 * np.sin(turn / 80))
        center_y = height * (0.5 + 0.10 * np.sin(turn / 60))
        angle = np.arctan2(y - center_y, x - center_x)
        radius = 0.2 * height * (1 + 0.15 * np.cos(turn / BEAT))
        bulges = 0.2 * np.cos(2 * angle + turn / 100) + 0.08 * np.cos(3 * angle - turn / 45)
        return np.hypot(x - center_x, y - center_y) < radius * (1 + bulges)

    def frame(self, mask: NDArray[np.bool_], field: NDArray[np.complex128]) -> NDArray[np.uint8]:
        """The echo of tissue, of a bright wall and of the dark structure inside."""
        height = self.size[0]
        inside = gaussian_filter(mask.astype(np.float64), 0.008 * height)
        wall = np.clip(gaussian_filter(mask.astype(np.float64), 0.02 * height) - inside, 0, 1)
        echo = (0.45 + wall) * (1 - inside) + 0.04 * inside
        level = 255 * np.sqrt(np.clip(echo * np.abs(field) / 2, 0, 1))
        return np.rint(np.clip(level, 0, 255)).astype(np.uint8)

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
        rng = np.random.default_rng(self.seed)
        field = _speckle(rng, self.size)
        for index in range(self.count):
            mask = self.mask(index)
            yield self.frame(mask, field), mask
            fresh = _speckle(rng, self.size)
            field = KEPT_SPECKLE * field + np.sqrt(1 - KEPT_SPECKLE**2) * fresh


def _speckle(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.complex128]:
    """Echoes of many scatterers, of mean power 1: their magnitude is Rayleigh distributed."""
    real, imaginary = (gaussian_filter(rng.standard_normal(size), (1.0, 1.6)) for _ in range(2))
    field = real + 1j * imaginary
    return np.asarray(field / np.sqrt((np.abs(field) ** 2).mean()))


def box_of(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 around a mask, the last two exclusive."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
