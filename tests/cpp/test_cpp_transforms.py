"""The C++ runtime's transforms beside Python's: SHA-256, preprocessing, masks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from cpp_driver import Driver
from random_images import RandomImage, random_image

from medsa_deploy.bundle.manifest import Conventions
from medsa_deploy.images.image import Image
from medsa_deploy.transforms import (
    POSTPROCESSING,
    PREPROCESSING,
    MaskRule,
    frame_of,
    image_masks,
    intensities,
    pixel_values,
    preprocess,
)

SIZES = (64, 100, 256)
INTEGER_FILTERS = ("bilinear", "nearest")
"""Filters whose arithmetic is in whole numbers: 8-bit images are equal bit by bit."""


@pytest.mark.parametrize("kind", ["portable", "fast"])
def test_sha256(driver: Driver, kind: str) -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 1000, 100_003):
        data = rng.bytes(size)
        for piece in (1 + size, 64, 77):
            (digest,) = driver.ask(f"sha256 {kind} {piece} {size}", data)
            assert digest.decode() == hashlib.sha256(data).hexdigest()


def expected_input(image: RandomImage, spec: str, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """What Python's session gives to the encoder."""
    source = Image(pixels=image.pixels, path=Path("array"), inverted=image.inverted)
    values, _ = intensities(source, Conventions(preprocess=spec), image.window)
    network_image, frame = preprocess(values, spec, size)
    return network_image, frame.content_size


def grey_level(spec: str, expected: np.ndarray, *, whole_levels: bool) -> np.ndarray:
    """(3, 1, 1): how much one grey level is in a network's input.

    An 8-bit image that is stretched from its minimum to its maximum has fewer levels than 255.
    """
    std = PREPROCESSING[spec].std
    if std is None and whole_levels:
        return np.full((3, 1, 1), np.diff(np.unique(expected)).min())
    return np.array([255.0] * 3 if std is None else std, np.float32)[:, None, None] ** -1


def assert_inputs_equal(driver: Driver, spec: str, seed: int, size: int) -> bool:
    """Compare one image; whether the inputs are equal bit by bit."""
    image = random_image(seed)
    expected, content = expected_input(image, spec, size)
    driver.image(image.pixels, **image.layout)
    actual, actual_content = driver.preprocess(spec, size, image.window)
    assert actual_content == content
    whole_levels = image.pixels.dtype == np.uint8 and image.window is None
    level = grey_level(spec, expected, whole_levels=whole_levels)
    difference = np.abs(actual - expected) / level
    if whole_levels and PREPROCESSING[spec].filter in INTEGER_FILTERS:
        assert difference.max() == 0, (spec, seed)
    # where a level is a tie, another order of summation may round it to the other side
    assert difference.max() <= 1.01, (spec, seed)
    assert (difference > 0.01).mean() <= 1e-3, (spec, seed)
    return bool(difference.max() == 0)


@pytest.mark.parametrize("spec", PREPROCESSING)
def test_network_inputs(driver: Driver, spec: str) -> None:
    for seed in range(8):
        assert_inputs_equal(driver, spec, seed, SIZES[seed % 3])


@pytest.mark.slow
@pytest.mark.parametrize("spec", PREPROCESSING)
def test_network_inputs_of_many_images(fast_program: Path, spec: str) -> None:
    with Driver(fast_program) as driver:
        equal = [assert_inputs_equal(driver, spec, seed, SIZES[seed % 3]) for seed in range(200)]
    print(f"{spec}: {sum(equal)} of {len(equal)} inputs are equal bit by bit")


def assert_masks_equal(driver: Driver, postprocess: str, seed: int) -> None:
    """Compare masks of random logits; pixels on the threshold may differ."""
    rng = np.random.default_rng(seed)
    side, network = ((16, 64), (48, 48), (64, 256), (20, 100))[seed % 4]
    size = tuple(int(s) for s in rng.integers(1, 200, 2))
    frame = frame_of(size, ("sam", "medsa")[seed % 2], network)
    count, exclusive = int(rng.integers(2, 5)), bool(rng.random() < 0.4)
    coarse = rng.normal(0, 3, (count, side // 4, side // 4)).repeat(4, 1).repeat(4, 2)
    logits = (coarse + rng.normal(0, 1, (count, side, side))).astype(np.float32)
    rule = MaskRule(
        postprocess=postprocess,
        exclusive=exclusive,
        probability=0.5 if exclusive else float(rng.choice([0.5, 0.3, 0.9])),
    )
    differing = driver.masks(logits, frame, rule) != image_masks(logits, frame, rule)
    values = pixel_values(logits, frame, postprocess)
    if exclusive:
        two_highest = np.sort(values, axis=0)[-2:]
        margin = np.broadcast_to(two_highest[1] - two_highest[0], differing.shape)
    else:
        margin = np.abs(values - rule.threshold)
    assert np.all(margin[differing] <= 1e-5), (postprocess, seed)
    assert differing.sum() <= max(1, 1e-5 * differing.size), (postprocess, seed)


@pytest.mark.parametrize("postprocess", POSTPROCESSING)
def test_masks(driver: Driver, postprocess: str) -> None:
    for seed in range(12):
        assert_masks_equal(driver, postprocess, seed)


@pytest.mark.slow
@pytest.mark.parametrize("postprocess", POSTPROCESSING)
def test_masks_of_many_logits(fast_program: Path, postprocess: str) -> None:
    with Driver(fast_program) as driver:
        for seed in range(200):
            assert_masks_equal(driver, postprocess, seed)
