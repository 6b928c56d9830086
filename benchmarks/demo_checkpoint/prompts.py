"""A structure's labels → prompts: clicks inside it, or a box around it, one set for all slices.

Prompts are x, y in pixels of the labels' frame; `decoder_inputs` makes of them what the decoder
takes, with the conventions a Med-SA checkpoint is exported with by default.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medsa_deploy.bundle.manifest import Conventions
from medsa_deploy.transforms import Frame, Prompt, network_prompt

from .network import CLASSES, GRID, SIZE

Kind = Literal["1 click", "3 clicks", "box"]
KINDS: tuple[Kind, ...] = ("1 click", "3 clicks", "box")
Mask = NDArray[np.bool_]
Rng = np.random.Generator

JITTER = 0.06
"""How far a box's edge may lie from the structure's, as a part of its side."""
FRAME = Frame(image_size=(SIZE, SIZE), network_size=SIZE, content_size=(SIZE, SIZE))
"""Of an image that is as large as the network's frame."""
CONVENTIONS = Conventions(
    preprocess="medsa",
    point_order="yx",
    point_frame="network",
    intensity_window=None,
    threshold=0.5,
    class_names=CLASSES,
)


def sample(rng: Rng, mask: Mask, *, clicks: int) -> Prompt:
    """A prompt for the structure `mask` (D, H, W): `clicks` clicks, or for 0 a box.

    Clicks lie in the structure on the chunk's middle slice, or on the one that shows most of it if
    that shows none. The box is around the structure on all slices, its edges jittered.
    """
    no_points = np.zeros(0, np.float32)
    if not clicks:
        box = _box(rng, mask.any(axis=0))
        return Prompt(points=no_points.reshape(0, 2), labels=no_points, box=box, mask=None)
    middle = mask[len(mask) // 2]
    plane = middle if middle.any() else mask[mask.sum(axis=(1, 2)).argmax()]
    rows, columns = np.nonzero(plane)
    chosen = rng.integers(0, len(rows), clicks)
    points = np.stack([columns[chosen], rows[chosen]], axis=1).astype(np.float32)
    return Prompt(points=points, labels=np.ones(clicks, np.float32), box=None, mask=None)


def decoder_inputs(prompt: Prompt, frame: Frame) -> tuple[Tensor, Tensor]:
    """A prompt → the decoder's coords (1, N, 2) and labels (1, N), clicks swapped to (y, x)."""
    coords, labels = network_prompt(prompt, frame, CONVENTIONS, mask_size=4 * GRID)
    return torch.from_numpy(coords)[None], torch.from_numpy(labels)[None]


def _box(rng: Rng, mask: Mask) -> NDArray[np.float32]:
    """x0, y0, x1, y1 around the mask (H, W), each edge moved by up to JITTER of the side."""
    rows, columns = np.nonzero(mask)
    low = np.array([columns.min(), rows.min()], np.float32)
    high = np.array([columns.max() + 1, rows.max() + 1], np.float32)
    reach = JITTER * (high - low) + 1
    end = np.array(mask.shape[::-1], np.float32)
    corners = (
        np.clip(low + rng.uniform(-1, 1, 2) * reach, 0, end - 2),
        np.clip(high + rng.uniform(-1, 1, 2) * reach, 2, end),
    )
    return np.concatenate(corners).astype(np.float32)
