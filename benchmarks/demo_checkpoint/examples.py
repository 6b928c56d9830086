"""Pools of phantoms and of the template's slices → the examples of a step, augmented.

Pools are made once from their seeds and kept beside the training's state.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .chunks import LABEL_THRESHOLD, TRAIN, Template, phantom_chunk, structures_of, train_windows
from .network import CHUNK, CLASSES, SIZE
from .phantoms import Style, phantom
from .prompts import FRAME, decoder_inputs, sample
from .training import Example

Rng = np.random.Generator
Progress = Callable[[int], None]

BASE_STYLES: tuple[Style, ...] = ("ultrasound", "ct", "folded", "folded")
PROMPTS = 3
"""Prompts decoded on every image of the base's batches."""
SMALLEST = 150
"""Pixels of the smallest structure that is prompted."""
CLICKS = (0, 0, 1, 2, 3)
"""Clicks of a prompt, drawn evenly; 0 is a box."""
DEEP = 0.75
"""Part of the steps in which SD-Trans is on; in the others every slice is by itself, so that the
network also serves single images."""
BRAINS = 0.6
"""Part of the steps on the template; the others are on phantoms."""


class PhantomImages:
    """Single phantom slices, each with its structures: what the base learns from."""

    def __init__(self, count: int, folder: Path, on_made: Progress) -> None:
        def make(i: int) -> NDArray[np.uint8]:
            style = BASE_STYLES[i % len(BASE_STYLES)]
            for attempt in range(100):
                made = phantom((TRAIN, 1, i, attempt), style, depth=1)
                if structures_of(made, pixels=SMALLEST):
                    break
            return np.concatenate([made.pixels, made.labels])

        self._pool = _pool(folder / f"images-{count}.npy", (count, 2, SIZE, SIZE), make, on_made)

    def example(self, rng: Rng, batch: int) -> Example:
        """A batch of images, each with PROMPTS prompts; the target of each is the one mask."""
        clicks = int(rng.choice(CLICKS))
        images, targets, prompts = [], [], []
        for i in rng.integers(0, len(self._pool), batch):
            pixels, labels = _turned(rng, self._pool[i])
            image = pixels.astype(np.float32) / 255
            images.append(1 - image if rng.random() < 0.3 else image)
            found = 1 + np.flatnonzero(np.bincount(labels.ravel())[1:] >= SMALLEST)
            for k in rng.choice(found, PROMPTS):
                targets.append(labels == k)
                prompt = sample(rng, targets[-1][None], clicks=clicks)
                prompts.append(decoder_inputs(prompt, FRAME))
        image = _shaded(rng, torch.from_numpy(np.stack(images)))
        return Example(
            image=image[:, None].expand(-1, 3, -1, -1),
            coords=torch.cat([coords for coords, _ in prompts]),
            labels=torch.cat([labels for _, labels in prompts]),
            target=torch.from_numpy(np.stack(targets))[:, None].float(),
        )


class Chunks:
    """Chunks of the template and of phantoms: what the adapters learn from."""

    def __init__(self, phantoms: int, folder: Path, on_made: Progress) -> None:
        template = Template()
        windows = train_windows()
        slices = sorted({z for window in windows for z in window})
        frame = torch.from_numpy(template.network_frame_of(slices))
        where = {z: i for i, z in enumerate(slices)}
        self._slices = frame
        self._windows = [where[window.start] for window in windows]

        def make(i: int) -> NDArray[np.uint8]:
            chunk = phantom_chunk((TRAIN, 2, i))
            pixels = np.round(chunk.image * 255).astype(np.uint8)
            return np.stack([pixels, chunk.structures[CLASSES[-1]].astype(np.uint8)])

        shape = (phantoms, 2, CHUNK, SIZE, SIZE)
        self._phantoms = _pool(folder / f"chunks-{phantoms}.npy", shape, make, on_made)

    def example(self, rng: Rng) -> Example:
        """A chunk and one prompt set for its slices; the targets are all classes' masks."""
        target = torch.zeros(len(CLASSES), CHUNK, SIZE, SIZE)
        if rng.random() < BRAINS:
            start = int(rng.choice(self._windows))
            planes = _warped(rng, self._slices[:, start : start + CHUNK])
            white, grey = planes[1:] >= LABEL_THRESHOLD / 255
            target[:3] = torch.stack([white, grey, white | grey])
            prompted = int(rng.integers(0, 3))
        else:
            i = int(rng.integers(0, len(self._phantoms)))
            pixels, labels = self._phantoms[i].astype(np.float32)
            planes = _warped(rng, torch.from_numpy(np.stack([pixels / 255, labels])))
            target[3] = planes[1] >= 0.5
            prompted = 3
        image = _shaded(rng, planes[0])
        structure = target[prompted].numpy() > 0
        if not structure.any():  # warped out of the image
            return self.example(rng)
        prompt = sample(rng, structure, clicks=int(rng.choice(CLICKS)))
        coords, labels = decoder_inputs(prompt, FRAME)
        return Example(
            image=image[:, None].expand(-1, 3, -1, -1),
            coords=coords,
            labels=labels,
            target=target.transpose(0, 1),
            deep=bool(rng.random() < DEEP),
        )


def _pool(
    path: Path,
    shape: tuple[int, ...],
    make: Callable[[int], NDArray[np.uint8]],
    on_made: Progress,
) -> NDArray[np.uint8]:
    """The array at `path`, made entry by entry if it is not there yet; it is memory-mapped."""
    if not path.exists():
        temporary = path.with_suffix(".partial")
        pool = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        for i in range(len(pool)):
            pool[i] = make(i)
            on_made(i + 1)
        pool.flush()
        temporary.replace(path)
    loaded: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return loaded


def _turned(rng: Rng, planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Planes (…, S, S) turned by a multiple of 90° and mirrored."""
    turned = np.rot90(planes, int(rng.integers(0, 4)), axes=(-2, -1))
    return np.ascontiguousarray(turned[..., ::-1] if rng.random() < 0.5 else turned)


def _shaded(rng: Rng, image: Tensor) -> Tensor:
    """Gamma, gain, offset and noise, the same for all of the image (B, S, S) but the noise."""
    gamma, gain, offset = rng.uniform(0.75, 1.35), rng.uniform(0.85, 1.1), rng.normal(0, 0.03)
    noise = torch.from_numpy(rng.standard_normal(image.shape, np.float32))
    shaded = image.clamp(0, 1) ** gamma * gain + offset + rng.uniform(0, 0.03) * noise
    return shaded.clamp(0, 1)


def _warped(rng: Rng, planes: Tensor) -> Tensor:
    """Planes (K, D, S, S) mirrored, turned, scaled, shifted and bent, alike in all; D may turn."""
    angle, scale, stretch = rng.normal(0, 0.12), rng.uniform(0.85, 1.15), rng.uniform(0.94, 1.06)
    mirror = (1.0, -1.0 if rng.random() < 0.5 else 1.0)  # the template's left and right are rows
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = scale * turn * mirror * (stretch, 1 / stretch)
    theta = np.concatenate([matrix, rng.uniform(-0.06, 0.06, (2, 1))], axis=1)
    count, depth = planes.shape[:2]
    grid = F.affine_grid(
        torch.from_numpy(theta[None].astype(np.float32)), [1, 1, SIZE, SIZE], align_corners=False
    )
    bend = torch.from_numpy(rng.normal(0, 0.018, (1, 2, 7, 7)).astype(np.float32))
    bent = F.interpolate(bend, (SIZE, SIZE), mode="bicubic", align_corners=False)
    warped = F.grid_sample(
        planes.flatten(0, 1)[None], grid + bent.permute(0, 2, 3, 1), align_corners=False
    )
    warped = warped[0].unflatten(0, (count, depth))
    return warped.flip(1) if rng.random() < 0.5 else warped
