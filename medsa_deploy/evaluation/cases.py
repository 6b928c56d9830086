"""Seeds and a user's images → cases: images with prompt sets on which two networks are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from medsa_deploy.bundle.manifest import Manifest, PromptNeed
from medsa_deploy.errors import ImageError
from medsa_deploy.images import Image, find_images, is_volume, read_image, read_volume
from medsa_deploy.transforms import UNPROMPTED, Prompt

Array = NDArray[np.float32]

SEEDS = (1, 2)
"""Seeds of the images in every comparison, besides the user's own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """An image, or neighbouring slices of a volume, and prompt sets.

    Prompt set i is decoded on slice i. The shorter of the two starts again from its first.
    """

    name: str
    images: Sequence[Image]
    """One image; for a network that sees depth, the slices of a chunk."""
    prompts: Sequence[Prompt]
    seeded: bool

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The (slice, prompt set) pairs that are decoded."""
        slices, sets = len(self.images), len(self.prompts)
        return [(i % slices, i % sets) for i in range(max(slices, sets))]


def parity_cases(manifest: Manifest, images: Path | None) -> list[Case]:
    """Seeded cases, then a case for each of the user's images.

    `images`: a file or a folder. A network that sees depth takes volumes, and a chunk from the
    middle of each.
    """
    network = manifest.network
    side, chunk = manifest.mask_prompt_size, network.chunk
    seeded = [seeded_case(network.image_size, side, seed, chunk) for seed in SEEDS]
    users = [image_case(name, slices, side) for name, slices in _users(images, chunk)]
    need = manifest.conventions.prompts
    return [replace(case, prompts=needed_prompts(case.prompts, need)) for case in seeded + users]


def needed_prompts(prompts: Sequence[Prompt], need: PromptNeed) -> list[Prompt]:
    """The prompt sets that a network takes, with the empty one if it takes that."""
    unprompted = [] if need == "required" else [UNPROMPTED]
    return unprompted + ([] if need == "none" else list(prompts))


def seeded_case(image_size: int, mask_size: int | None, seed: int, slices: int = 1) -> Case:
    """A case whose images and prompts depend on a seed alone."""
    slice_pixels = [seeded_image(image_size, [seed, i] if i else seed) for i in range(slices)]
    return Case(
        name=f"seed {seed}",
        images=[Image(pixels=pixels, path=Path(f"seed-{seed}")) for pixels in slice_pixels],
        prompts=seeded_prompts(image_size, image_size, mask_size, seed),
        seeded=True,
    )


def image_case(name: str, images: Sequence[Image], mask_size: int | None) -> Case:
    """A case on a user's image or neighbouring slices, with prompts of every kind."""
    height, width = images[0].pixels.shape[:2]
    return Case(
        name=name,
        images=images,
        prompts=seeded_prompts(height, width, mask_size, 0),
        seeded=False,
    )


def middle_slices(path: Path, chunk: int) -> list[Image]:
    """`chunk` slices from the middle of a volume."""
    volume = read_volume(path)
    if len(volume) < chunk:
        raise ImageError(
            f"{path} has {len(volume)} slices; this network sees {chunk} at a time: give a volume "
            f"of at least {chunk} slices"
        )
    start = (len(volume) - chunk) // 2
    return [volume.slice(start + i) for i in range(chunk)]


def seeded_image(size: int, seed: int | list[int]) -> NDArray[np.uint8]:
    """A colour image (size, size, 3) uint8, smooth and detailed: noise of several scales."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size, size, 3), np.float32)
    for octave, weight in ((4, 1.0), (12, 0.6), (48, 0.3)):
        noise = rng.integers(0, 256, (octave, octave, 3), dtype=np.uint8)
        enlarged = PillowImage.fromarray(noise).resize((size, size), PillowImage.Resampling.BICUBIC)
        total += weight * np.asarray(enlarged, np.float32)
    low, high = float(total.min()), float(total.max())
    return np.asarray(np.rint((total - low) / (high - low) * 255), np.uint8)


def seeded_prompts(height: int, width: int, mask_size: int | None, seed: int) -> list[Prompt]:
    """Prompt sets of every kind on an image: clicks, a box, a box with a click, a mask.

    `mask_size`: side of the mask; None for a network without mask prompts.
    """
    rng = np.random.default_rng([seed, height, width])

    def clicks(count: int) -> Array:
        return (rng.random((count, 2)) * (width - 1, height - 1)).astype(np.float32)

    def box() -> Array:
        low, high = rng.random(2) * 0.4, 0.6 + rng.random(2) * 0.4
        corners = np.concatenate([low, high]) * (width, height, width, height)
        return corners.astype(np.float32)

    coarse = PillowImage.fromarray(rng.normal(0, 4, (6, 6)).astype(np.float32))
    no_points: Array = np.zeros((0, 2), np.float32)
    foreground = np.ones(1, np.float32)
    mixed = np.array([1, 0, 1], np.float32)
    sets = [
        Prompt(points=clicks(1), labels=foreground, box=None, mask=None),
        Prompt(points=clicks(3), labels=mixed, box=None, mask=None),
        Prompt(points=no_points, labels=no_points[:, 0], box=box(), mask=None),
        Prompt(points=clicks(1), labels=foreground, box=box(), mask=None),
    ]
    if mask_size is not None:
        mask = coarse.resize((mask_size, mask_size), PillowImage.Resampling.BILINEAR)
        masked = Prompt(
            points=clicks(1), labels=foreground, box=None, mask=np.asarray(mask, np.float32)
        )
        sets.append(masked)
    return sets


def _users(path: Path | None, chunk: int) -> Iterator[tuple[str, list[Image]]]:
    """Each of the user's images or chunks of slices, with its file's name."""
    if path is None:
        return
    is_single = not path.is_dir() or (chunk > 1 and is_volume(path))
    for file in [path] if is_single else find_images(path):
        yield file.name, [read_image(file)] if chunk == 1 else middle_slices(file, chunk)
