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

from .chunks import (
    LABEL_THRESHOLD,
    SMALLEST,
    TRAIN,
    Template,
    phantom_of,
    structures_of,
    tissue_labels,
    train_windows,
)
from .network import CHUNK, CLASSES, SIZE
from .phantoms import INNER, OUTER, Style, phantom
from .prompts import FRAME, decoder_inputs, sample
from .training import Example

Rng = np.random.Generator
Progress = Callable[[int], None]

BASE_STYLES: tuple[Style, ...] = ("ultrasound", "ct", "folded", "folded", "folded")
PROMPTS = 3
"""Prompts decoded on every image of the base's batches."""
CLICKS = (0, 0, 1, 2, 3)
"""Clicks of a prompt, drawn evenly; 0 is a box."""
TISSUE, PROMPTED_MASK = 0.5, 2.0
"""What each of the base's masks counts: to answer to prompts is what it is slow to learn."""
ABSENT = 0.1
"""What an empty mask counts; those of the classes present count 1 together."""


class PhantomImages:
    """Single phantom slices, each with its structures: what the base learns from.

    As SAM's masks are a whole, a part and a subpart, the base's are, in the classes' order, a
    folded head's inner tissue, its outer tissue and both, whatever was prompted, and the structure
    that was prompted. Of other styles the first three do not count.
    """

    def __init__(self, count: int, folder: Path, on_made: Progress) -> None:
        def make(i: int) -> NDArray[np.uint8]:
            style = BASE_STYLES[i % len(BASE_STYLES)]
            for attempt in range(100):
                drawn = phantom((TRAIN, 1, i, attempt), style, depth=1)
                if structures_of(drawn.labels, pixels=SMALLEST):
                    break
            return np.concatenate([drawn.pixels, drawn.labels])

        self._pool = _pool(folder / f"images-{count}.npy", (count, 2, SIZE, SIZE), make, on_made)

    def example(self, rng: Rng, batch: int, *, shrunk: int = 1) -> Example:
        """A batch of images, each with PROMPTS prompts for structures drawn apart.

        Images are `shrunk` times smaller than the network's frame; prompts stay in that frame.
        """
        clicks = int(rng.choice(CLICKS))
        images, targets, weights, prompts = [], [], [], []
        for i in rng.integers(0, len(self._pool), batch):
            folded = BASE_STYLES[i % len(BASE_STYLES)] == "folded"
            pixels, labels = _turned(rng, self._pool[i])
            image = pixels.astype(np.float32) / 255
            images.append(1 - image if rng.random() < 0.3 else image)
            tissues = [labels == INNER, labels == OUTER, (labels == INNER) | (labels == OUTER)]
            masks = [labels == k for k in structures_of(labels, pixels=SMALLEST)]
            masks += tissues[2:] if folded else []
            for k in rng.integers(0, len(masks), PROMPTS):
                targets.append(np.stack([*tissues, masks[k]]))
                weights.append([TISSUE * folded] * 3 + [PROMPTED_MASK])
                prompt = sample(rng, masks[k][None], clicks=clicks)
                prompts.append(decoder_inputs(prompt, FRAME))
        image = _shaded(rng, torch.from_numpy(np.stack(images)))[:, None]
        return Example(
            image=F.avg_pool2d(image, shrunk).expand(-1, 3, -1, -1),
            coords=torch.cat([coords for coords, _ in prompts]),
            labels=torch.cat([labels for _, labels in prompts]),
            target=torch.from_numpy(np.stack(targets)).float(),
            weight=torch.tensor(weights),
        )


class Chunks:
    """Chunks of the template and of phantoms: what the adapters learn from."""

    def __init__(self, phantoms: int, folder: Path, on_made: Progress) -> None:
        template = Template()
        windows = train_windows()
        slices = sorted({z for window in windows for z in window})
        frame = torch.from_numpy(template.network_frame_of(slices))
        index_of = {z: i for i, z in enumerate(slices)}
        self._slices = frame
        self._windows = [index_of[window.start] for window in windows]

        def make(i: int) -> NDArray[np.uint8]:
            drawn = phantom_of((TRAIN, 2, i))
            return np.stack([drawn.pixels, drawn.labels])

        shape = (phantoms, 2, CHUNK, SIZE, SIZE)
        self._phantoms = _pool(folder / f"chunks-{phantoms}.npy", shape, make, on_made)

    def example(self, rng: Rng, *, shrunk: int = 1, brains: float = 0.5) -> Example:
        """A chunk and its prompt sets, each for all slices; targets are all classes' masks.

        It is a brain's in `brains` of the steps, a phantom's in the others; slices are `shrunk`
        times smaller than the network's frame, prompts stay in that frame. A brain has one set,
        whose answer is the same whatever was prompted; a phantom has two, for structures drawn
        apart, so that the answer is a matter of the prompt.
        """
        if rng.random() < brains:
            start = int(rng.choice(self._windows))
            planes = _warped(rng, self._slices[:, start : start + CHUNK])
            white, grey = planes[1:] >= LABEL_THRESHOLD / 255
            target = torch.zeros(1, len(CLASSES), CHUNK, SIZE, SIZE)
            target[0, :3] = torch.stack([white, grey, white | grey])
            prompted = target[0, [int(rng.integers(0, 3))]]
        else:
            pixels, labels = self._phantoms[int(rng.integers(0, len(self._phantoms)))]
            structures = structures_of(labels, pixels=SMALLEST * CHUNK)
            chosen = rng.choice(structures, 2, replace=len(structures) < 2)
            stacked = [pixels / np.float32(255), *(labels == k for k in chosen)]
            planes = _warped(rng, torch.from_numpy(np.stack(stacked).astype(np.float32)))
            target = torch.zeros(len(chosen), len(CLASSES), CHUNK, SIZE, SIZE)
            target[:, 3] = planes[1:] >= 0.5
            prompted = target[:, 3]
        if not prompted.flatten(1).any(dim=1).all():  # warped out of the image
            return self.example(rng, shrunk=shrunk, brains=brains)
        clicks = int(rng.choice(CLICKS))
        drawn = [sample(rng, mask.numpy() > 0, clicks=clicks) for mask in prompted]
        inputs = [decoder_inputs(prompt, FRAME) for prompt in drawn]
        present = target.flatten(2).any(dim=2)
        image = _shaded(rng, planes[0])[:, None]
        return Example(
            image=F.avg_pool2d(image, shrunk).expand(-1, 3, -1, -1),
            coords=torch.cat([coords for coords, _ in inputs] * CHUNK),
            labels=torch.cat([labels for _, labels in inputs] * CHUNK),
            target=target.permute(2, 0, 1, 3, 4).flatten(0, 1),
            weight=torch.where(present, 1 / present.sum(1, keepdim=True), ABSENT),
            depth=CHUNK,
        )


class Tissues:
    """Single slices of the template with their tissues: what is segmented without a prompt."""

    def __init__(self) -> None:
        template = Template()
        slices = sorted({z for window in train_windows() for z in window})
        self._slices = torch.from_numpy(np.stack([template.tissues_of(z) for z in slices], axis=1))

    def example(self, rng: Rng, batch: int, *, shrunk: int = 1) -> tuple[Tensor, Tensor]:
        """Images (B, 3, s, s), `shrunk` times smaller than the frame, and labels (B, S, S)."""
        images, labels = [], []
        for i in rng.integers(0, self._slices.shape[1], batch):
            grey_values, *maps = _warped(rng, self._slices[:, i : i + 1])
            white, grey, drawn = (plane[0].numpy() >= LABEL_THRESHOLD / 255 for plane in maps)
            images.append(_shaded(rng, grey_values))
            labels.append(tissue_labels(white, grey, drawn))
        image = F.avg_pool2d(torch.stack(images), shrunk).expand(-1, 3, -1, -1)
        return image, torch.from_numpy(np.stack(labels)).long()


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
