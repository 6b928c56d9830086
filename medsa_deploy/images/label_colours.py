"""Number of a label → its colour, the same in every file and far from the other labels' colours.

The first seven are those of overlays. Each further one is the colour of a grid in sRGB that is
farthest, in CIELab, from all before it. Greys are left out: images are grey.
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import numpy as np

from .overlay import PALETTE

Rgb: TypeAlias = tuple[int, int, int]
"""sRGB, 0…255."""

MOST_LABELS = 255
LEVELS = np.array([0, 28, 57, 85, 113, 142, 170, 198, 227, 255], np.float64)
LEAST_CHROMA = 20.0
LIGHTNESS = (30.0, 92.0)
"""Darker colours vanish on an image, lighter ones look white."""
WHITE = np.array([0.95047, 1.0, 1.08883])
"""XYZ of the white point D65."""
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
     [0.0193339, 0.1191920, 0.9503041]]
)  # fmt: skip


def label_colour(label: int) -> Rgb:
    """The colour of label 1…255; beyond, colours repeat.

    >>> label_colour(1), label_colour(256) == label_colour(1)
    ((86, 180, 233), True)
    """
    return _colours()[(label - 1) % MOST_LABELS]


def cielab(colours: np.ndarray) -> np.ndarray:
    """(N, 3) sRGB 0…255 → (N, 3) float64 L*, a*, b* (CIE 1976, D65).

    >>> cielab(np.array([[255, 255, 255]])).round(1).tolist()[0][0]
    100.0
    """
    unit = np.asarray(colours, np.float64) / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    ratio = linear @ TO_XYZ.T / WHITE
    root = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    x, y, z = root.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@cache
def _colours() -> tuple[Rgb, ...]:
    """The colours of all labels, in order."""
    grid = np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = cielab(grid)
    shown = (np.hypot(lab[:, 1], lab[:, 2]) >= LEAST_CHROMA) & (
        (lab[:, 0] >= LIGHTNESS[0]) & (lab[:, 0] <= LIGHTNESS[1])
    )
    grid, lab = grid[shown], lab[shown]
    colours = [tuple(map(int, colour)) for colour in PALETTE]
    distance = np.min(
        np.linalg.norm(lab[:, None] - cielab(PALETTE)[None], axis=2), axis=1, initial=np.inf
    )
    while len(colours) < MOST_LABELS:
        farthest = int(distance.argmax())
        colours.append(tuple(map(int, grid[farthest])))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[farthest], axis=1))
    return tuple((red, green, blue) for red, green, blue in colours)
