"""A seed → an image of random size, type and content, a window, and prompts on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from medsa_deploy.transforms import Prompt

KINDS = ("uint8", "uint16", "int16", "float32")


@dataclass(frozen=True, kw_only=True)
class RandomImage:
    """An image, how it lies in memory, and the window that it is shown with."""

    pixels: np.ndarray
    window: tuple[float, float] | None
    inverted: bool
    gap: int
    """Bytes between two rows."""
    upwards: bool
    """Whether rows are stored from the bottom to the top."""

    @property
    def layout(self) -> dict[str, Any]:
        """The options of `Driver.image`."""
        return {"gap": self.gap, "upwards": self.upwards, "inverted": self.inverted}


def random_image(seed: int, *, largest: int = 300, kind: str | None = None) -> RandomImage:
    """Smooth and noisy content over a part of its type's range; a CT has padding of −2000."""
    rng = np.random.default_rng(seed)
    height, width = (int(rng.integers(3, largest)) for _ in range(2))
    channels = int(rng.choice([1, 1, 3]))
    kind = kind or KINDS[seed % len(KINDS)]
    y, x = np.mgrid[:height, :width]
    phases = rng.uniform(0, 6, (channels, 1, 1))
    waves = np.sin(x / rng.uniform(3, 60) + phases) + np.cos(y / rng.uniform(3, 60) - phases)
    content = waves / 4 + 0.5 + rng.normal(0, rng.choice([0.0, 0.05, 0.3]), waves.shape)
    ranges = {
        "uint8": (0, 255),
        "uint16": (0, int(rng.choice([255, 4095, 65535]))),
        "int16": (-1024, int(rng.choice([400, 3000]))),
        "float32": (float(rng.uniform(-5, 0)), float(rng.uniform(1, 2000))),
    }
    low, high = ranges[kind]
    values = low + np.clip(content, 0, 1) * (high - low)
    if kind == "int16" and rng.random() < 0.5:
        values[:, : height // 4] = -2000
    pixels = np.round(values) if kind != "float32" else values
    pixels = np.moveaxis(pixels.astype(kind), 0, -1)
    window = None
    if rng.random() < 0.4:
        window = tuple(sorted(low + rng.uniform(0, 1, 2) * (high - low)))
    return RandomImage(
        pixels=pixels[..., 0] if channels == 1 else pixels,
        window=window,
        inverted=bool(rng.random() < 0.2),
        gap=int(rng.choice([0, 1, 13])),
        upwards=bool(rng.random() < 0.3),
    )


def random_prompt(rng: np.random.Generator, size: tuple[int, int], kinds: str = "pb") -> Prompt:
    """Up to four points and perhaps a box on an image of (H, W). `kinds`: p, b or both."""
    height, width = size
    number = int(rng.integers(1, 5)) if "p" in kinds else 0
    points = np.column_stack([rng.uniform(0, width, number), rng.uniform(0, height, number)])
    points = np.minimum(points.astype(np.float32), np.float32([width - 0.5, height - 0.5]))
    labels = (rng.random(number) < 0.7).astype(np.float32)
    box = None
    if "b" in kinds and (number == 0 or rng.random() < 0.5):
        x = np.sort(rng.uniform(0, width, 2)) + np.array([0, 0.01])
        y = np.sort(rng.uniform(0, height, 2)) + np.array([0, 0.01])
        box = np.float32([x[0], y[0], min(x[1], width), min(y[1], height)])
    return Prompt(points=points, labels=labels, box=box, mask=None)
