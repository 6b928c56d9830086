"""A seed → a phantom: a chunk of slices with structures that vary slowly over depth, and labels.

Three styles, none of them a copy of any patient: `ultrasound` (speckle, attenuation, a sector),
`ct` (a body with textured organs), `folded` (two tissues in a head-like blob, their border folded).
Contrasts are random in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from .network import SIZE

Style = Literal["ultrasound", "ct", "folded"]
Floats = NDArray[np.float32]
Rng = np.random.Generator

ANGLES = 256
"""Samples of a blob's outline."""
REACH = 1.8
"""How far, in radii, a blob is computed; no outline goes as far."""
OUTER, INNER = 1, 2
"""Labels of the two tissues of a folded head."""
OUTSIDE = -1.0
"""What `blob` says of pixels far outside."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Phantom:
    """A chunk of slices and what is in it."""

    pixels: NDArray[np.uint8]
    """(D, S, S) display values."""
    labels: NDArray[np.uint8]
    """(D, S, S) 0 background, 1… structures; of `folded` OUTER, INNER, and 3 its hollow."""


def phantom(seed: tuple[int, ...], style: Style, *, depth: int) -> Phantom:
    """The phantom of a seed: `depth` slices of SIZE×SIZE; the same seed gives the same phantom."""
    rng = np.random.default_rng(seed)
    image, labels = STYLES[style](rng, depth)
    return Phantom(pixels=np.clip(image, 0, 255).astype(np.uint8), labels=labels)


def smooth_noise(rng: Rng, cells: int, depth: int, *, turn: float = 0.06) -> Floats:
    """A field (D, S, S) of unit variance with about `cells` hills a side, turning over depth."""
    two = torch.from_numpy(rng.standard_normal((2, 1, cells + 3, cells + 3), np.float32))
    a, b = F.interpolate(two, (SIZE, SIZE), mode="bicubic", align_corners=False)[:, 0].numpy()
    angle = turn * np.arange(depth, dtype=np.float32)[:, None, None]
    field = np.cos(angle) * a + np.sin(angle) * b
    return np.asarray(field / field.std(), np.float32)


def blob(
    rng: Rng, depth: int, *, centre: tuple[float, float], radius: float, closing: bool = True
) -> Floats:
    """How far inside a blob each pixel is, (D, S, S): 1 at its centre, 0 on its outline.

    The outline is an ellipse with four harmonics; over depth the centre drifts and, if `closing`,
    the blob narrows away from its widest slice. Lengths are in half sides of the image.
    """
    theta = np.linspace(0, 2 * np.pi, ANGLES, endpoint=False)
    outline = np.ones(ANGLES)
    for k in range(2, 6):
        outline += rng.normal(0, 0.13 / k) * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
    aspect, tilt = rng.uniform(0.6, 1.0), rng.uniform(0, np.pi)
    z = np.arange(depth) - depth / 2
    length = rng.uniform(8, 40)
    narrow = 1 - ((z - rng.normal(0, 3)) / length) ** 2 if closing else np.ones(depth)
    drift = rng.normal(0, 0.006, 2)
    axis = (np.arange(SIZE) + 0.5) * 2 / SIZE - 1
    inside = np.full((depth, SIZE, SIZE), OUTSIDE, np.float32)
    for i in range(depth):
        v, u = (axis - centre[k] - drift[k] * z[i] for k in (0, 1))
        rows, columns = np.abs(v) < REACH * radius, np.abs(u) < REACH * radius
        v, u = v[rows, None], u[None, columns]
        along, across = u * np.cos(tilt) + v * np.sin(tilt), v * np.cos(tilt) - u * np.sin(tilt)
        across = across / aspect
        index = np.arctan2(across, along) * (ANGLES / (2 * np.pi))
        r = outline[np.round(index).astype(int) % ANGLES] * radius
        r = r * np.sqrt(max(narrow[i], 1e-4))
        inside[i][np.ix_(rows, columns)] = np.maximum(1 - np.hypot(along, across) / r, OUTSIDE)
    return inside


def _scatter(
    rng: Rng, depth: int, count: int, radii: tuple[float, float], reach: float
) -> NDArray[np.uint8]:
    """Labels of up to `count` blobs that do not touch, within `reach` of the middle."""
    labels = np.zeros((depth, SIZE, SIZE), np.uint8)
    for _ in range(3 * count):
        centre = rng.uniform(-reach, reach, 2)
        inside = blob(rng, depth, centre=(centre[0], centre[1]), radius=rng.uniform(*radii)) > 0
        if inside.any() and not (inside & (labels > 0)).any():
            labels[inside] = labels.max() + 1
        if labels.max() == count:
            break
    return labels


def _painted(
    rng: Rng, labels: NDArray[np.uint8], background: Floats, *, contrast: float, texture: float
) -> Floats:
    """Every structure in its own grey level, at least `contrast` away from the background's."""
    image = background.copy()
    for k in range(1, int(labels.max()) + 1):
        tissue = labels == k
        around = float(np.median(background[tissue])) if tissue.any() else 0.0
        step = rng.uniform(contrast, 3 * contrast)
        up = around + step <= 240 and (around - step < 10 or rng.random() < 0.5)
        level = around + step if up else max(around - step, 4.0)
        noise = smooth_noise(rng, int(rng.integers(8, 48)), len(labels))
        image[tissue] = level + texture * rng.random() * noise[tissue]
    return image


def _blurred(image: Floats, width: int) -> Floats:
    """A box blur in the plane, `width` odd."""
    planes = torch.from_numpy(image)[:, None]
    blurred = F.avg_pool2d(planes, width, stride=1, padding=width // 2, count_include_pad=False)
    return np.asarray(blurred[:, 0].numpy())


def _ultrasound(rng: Rng, depth: int) -> tuple[Floats, NDArray[np.uint8]]:
    labels = _scatter(rng, depth, int(rng.integers(1, 5)), (0.12, 0.42), 0.6)
    level = rng.uniform(50, 150)
    background = level + rng.uniform(5, 25) * smooth_noise(rng, int(rng.integers(3, 9)), depth)
    image = _painted(rng, labels, background, contrast=40, texture=12)
    image = _blurred(np.maximum(image, 3), 3)
    grain = rng.uniform(0.5, 1.0)
    real, imaginary = rng.standard_normal((2, depth, SIZE, SIZE), np.float32)
    width = int(rng.choice([1, 3]))
    speckle = np.hypot(_blurred(real, width), _blurred(imaginary, width))
    image = image * (1 + grain * (speckle / speckle.mean() - 1))
    rows = np.linspace(-1, 1, SIZE, dtype=np.float32)
    image = image * (1 - rng.uniform(0, 0.35) * (rows + 1) / 2)[:, None]
    if rng.random() < 0.4:
        apex, half = rng.uniform(-2.2, -1.4), rng.uniform(0.6, 0.9)
        angle = np.arctan2(rows[None, :], rows[:, None] - apex)
        outside = (np.abs(angle) > half) | (np.hypot(rows[None, :], rows[:, None] - apex) > 2.9)
        image[:, outside] = 0
        labels[:, outside] = 0
    return image, labels


def _ct(rng: Rng, depth: int) -> tuple[Floats, NDArray[np.uint8]]:
    centre = rng.normal(0, 0.04, 2)
    body = blob(
        rng, depth, centre=(centre[0], centre[1]), radius=rng.uniform(0.8, 1.05), closing=False
    )
    labels = _scatter(rng, depth, int(rng.integers(2, 7)), (0.08, 0.34), 0.62)
    labels[body < 0.08] = 0
    fat, air = rng.uniform(40, 170), rng.uniform(0, 20)
    background = np.where(
        body > 0, fat + rng.uniform(2, 10) * smooth_noise(rng, 12, depth), air
    ).astype(np.float32)
    if rng.random() < 0.5:
        background[(body > 0) & (body < rng.uniform(0.02, 0.06))] = rng.uniform(120, 255)
    image = _painted(rng, labels, background, contrast=28, texture=10)
    image = _blurred(image, int(rng.choice([1, 3])))
    noise = rng.standard_normal(image.shape, np.float32)
    return image + rng.uniform(1, 9) * noise, labels


def _folded(rng: Rng, depth: int) -> tuple[Floats, NDArray[np.uint8]]:
    centre = rng.normal(0, 0.05, 2)
    head = blob(
        rng, depth, centre=(centre[0], centre[1]), radius=rng.uniform(0.75, 1.0), closing=False
    )
    head = head - 0.1
    folds = smooth_noise(rng, int(rng.integers(8, 36)), depth)
    finer = smooth_noise(rng, int(rng.integers(30, 72)), depth)
    folds = folds + rng.uniform(0, 0.6) * finer
    rim = rng.uniform(0.12, 0.45)
    border = rim * (1 + 0.9 * np.tanh(folds))
    clefts = (folds > rng.uniform(0.6, 2.5)) & (head < border - rng.uniform(0.02, 0.2))
    inside = (head > 0.02 * np.maximum(folds, 0)) & ~clefts
    islands = smooth_noise(rng, int(rng.integers(4, 12)), depth) > rng.uniform(1.3, 3)
    inner = inside & (head > border) & ~islands
    labels = np.where(inner, INNER, np.where(inside, OUTER, 0)).astype(np.uint8)
    hollow = blob(rng, depth, centre=(centre[0], centre[1]), radius=rng.uniform(0.08, 0.2)) > 0
    labels[hollow] = 3
    low = rng.uniform(20, 140)
    levels = rng.permutation(np.linspace(low, rng.uniform(low + 70, 245), 4)) + rng.normal(0, 4, 4)
    image = levels[labels].astype(np.float32)
    shell = -0.1 if rng.random() < 0.6 else -0.03  # or none
    image[(head <= -0.03) & (head > shell)] = rng.uniform(60, 240)
    image[head <= shell] = rng.uniform(0, 12)
    image += rng.uniform(0, 8) * smooth_noise(rng, int(rng.integers(4, 30)), depth)
    image = _blurred(image, int(rng.choice([1, 3, 5])))
    return image + rng.uniform(0, 8) * rng.standard_normal(image.shape, np.float32), labels


STYLES: dict[Style, Callable[[Rng, int], tuple[Floats, NDArray[np.uint8]]]] = {
    "ultrasound": _ultrasound,
    "ct": _ct,
    "folded": _folded,
}
