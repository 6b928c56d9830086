"""Preprocessing of the other adapted SAMs, against the libraries that their code resizes with."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import zoom

from medsa_deploy.errors import ImageError
from medsa_deploy.transforms import preprocess

MEAN = np.array([0.485, 0.456, 0.406])[:, None, None]
STD = np.array([0.229, 0.224, 0.225])[:, None, None]
PIXEL_MEAN = np.array([123.675, 116.28, 103.53])
PIXEL_STD = np.array([58.395, 57.12, 57.375])
CLOSE = {"atol": 1e-5, "rtol": 0}


def efficientsam(pixels: np.ndarray, side: int) -> np.ndarray:
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255
    resized = F.interpolate(planes, (side, side), mode="bilinear", align_corners=False)
    return (resized[0].numpy() - MEAN) / STD


def sam_med2d(pixels: np.ndarray, side: int) -> np.ndarray:
    normalised = (pixels - PIXEL_MEAN) / PIXEL_STD
    return cv2.resize(normalised, (side, side), interpolation=cv2.INTER_NEAREST).transpose(2, 0, 1)


def finetune_sam(pixels: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)
    return (np.asarray(image).transpose(2, 0, 1) / 255 - MEAN) / STD


def samed(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width, _ = pixels.shape
    planes = (pixels[..., c] / 255 for c in range(3))
    return np.stack([zoom(plane, (side / height, side / width), order=3) for plane in planes])


ORIGINALS = {
    "efficientsam": efficientsam,
    "sam-med2d": sam_med2d,
    "finetune-sam": finetune_sam,
    "samed": samed,
}


@pytest.mark.parametrize("name", ORIGINALS)
@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    side=st.sampled_from([64, 224, 256]),
    seed=st.integers(0, 1000),
)
def test_random_sizes(name: str, height: int, width: int, side: int, seed: int) -> None:
    # Pillow's single step and two steps differ by a level on some tall images; see resampling
    if name == "finetune-sam" and height > width:
        height, width = width, height
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, frame = preprocess(pixels, name, side)
    assert image.dtype == np.float32
    assert frame.content_size == (side, side)
    np.testing.assert_allclose(image, ORIGINALS[name](pixels, side), **CLOSE)


@pytest.mark.parametrize("size", [(512, 512), (1411, 999), (999, 1411), (213, 1200), (512, 230)])
def test_sizes_at_which_scipy_drops_its_last_samples(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(3).integers(50, 256, (*size, 3), dtype=np.uint8)
    image, _ = preprocess(pixels, "samed", 512)
    np.testing.assert_allclose(image, samed(pixels, 512), **CLOSE)


def test_some_size_has_no_last_sample() -> None:
    """What the test above is for does happen."""
    pixels = np.full((1411, 999, 3), 255, np.uint8)
    images = ((side, preprocess(pixels, "samed", side)[0]) for side in range(200, 600))
    side, image = next((side, image) for side, image in images if image[0, -1].max() == 0)
    np.testing.assert_allclose(image, samed(pixels, side), **CLOSE)


@pytest.mark.parametrize("name", ORIGINALS)
def test_one_channel_is_repeated_and_floats_are_display_values(name: str) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)
    image, _ = preprocess(grey, name, 64)
    repeated, _ = preprocess(np.stack([grey] * 3, axis=-1), name, 64)
    np.testing.assert_allclose(image, repeated, atol=2e-7)
    as_float, _ = preprocess(grey.astype(np.float32), name, 64)
    np.testing.assert_allclose(as_float, image, atol=1.01 / 57 if name == "finetune-sam" else 2e-6)
    with pytest.raises(ImageError, match="takes display values 0…255: give an intensity window"):
        preprocess(grey.astype(np.float32) * 10, name, 64)
