"""Images into the network's frame, against the libraries the networks were trained with."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import cache
from importlib.resources import files

import cv2
import nibabel
import numpy as np
import pydicom
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file
from skimage.transform import resize as skimage_resize

from medsa_deploy import transforms
from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.transforms import PREPROCESSING, Frame, preprocess, resampling

SAM_MEAN = np.array([123.675, 116.28, 103.53])
SAM_STD = np.array([58.395, 57.12, 57.375])

UINT8_IMAGES = ("retina", "microaneurysms", "ultrasound", "brain", "strip", "windowed_ct")
FLOAT_IMAGES = ("mr", "ct", "float_ultrasound")
SIZES = (256, 512, 1024)


@cache
def image(name: str) -> np.ndarray:
    """A real image from an installed package, read-only."""
    skimage_data = files("skimage") / "data"
    match name:
        case "retina":  # eye fundus, RGB, cut to an odd size
            pixels = np.asarray(Image.open(str(skimage_data / "retina.jpg")))[201:1200, 100:1013]
        case "microaneurysms":
            pixels = np.asarray(Image.open(str(skimage_data / "microaneurysms.png")))
        case "ultrasound":
            pixels = dicom("examples_rgb_color.dcm")
        case "brain":
            path = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
            volume = nibabel.load(str(files("nilearn") / path))
            pixels = np.asarray(volume.dataobj[:, :, 90])
        case "strip":
            pixels = image("brain")[90:113]
        case "mr":
            pixels = dicom("MR_small.dcm").astype(np.float32)
        case "ct":
            pixels = dicom("CT_small.dcm").astype(np.float32) - 1024
        case "windowed_ct":  # with wide regions at exactly 0 and 255
            pixels = transforms.display_values(image("ct"), (-175, 250)).astype(np.uint8)
        case "float_ultrasound":
            pixels = image("ultrasound").astype(np.float32) * 0.73
    pixels.flags.writeable = False
    return pixels


def dicom(name: str) -> np.ndarray:
    path = get_testdata_file(name, download=False)
    assert path is not None
    return pydicom.dcmread(path).pixel_array


def display(name: str) -> np.ndarray:
    """The image in 0…255: as it is, or windowed to its own range."""
    pixels = image(name)
    if pixels.dtype == np.uint8:
        return pixels
    return transforms.display_values(pixels, (float(pixels.min()), float(pixels.max())))


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """(H, W[, 3]) → (3, H, W)."""
    return np.moveaxis(pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1), -1, 0)


def longest_side(size: tuple[int, int], target: int) -> tuple[int, int]:
    """(h, w) as segment-anything's ResizeLongestSide.get_preprocess_shape computes it."""
    scale = target * 1.0 / max(size)
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(3, h, w): torchvision's Resize of a PIL image; floats per channel in mode F."""
    if pixels.dtype == np.uint8:
        rgb = Image.fromarray(pixels).convert("RGB")
        return channels_first(np.asarray(rgb.resize(size[::-1], Image.Resampling.BILINEAR)))
    planes = channels_first(pixels)
    return np.stack([Image.fromarray(p).resize(size[::-1], Image.BILINEAR) for p in planes])


def antialiased(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(3, h, w) float: torch's own antialiased bilinear resize."""
    tensor = torch.from_numpy(channels_first(pixels).astype(np.float32))[None]
    return F.interpolate(tensor, size, mode="bilinear", antialias=True)[0].numpy()


def min_max(content: np.ndarray) -> np.ndarray:
    low, high = content.min(), content.max()
    return (content - low) / np.clip(high - low, 1e-8, None)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", UINT8_IMAGES + FLOAT_IMAGES)
def test_medsa_profile(name, size):
    pixels = display(name)
    out, frame = preprocess(pixels, "medsa", size)
    oracle = torch.from_numpy(pillow(pixels, (size, size)).astype(np.float32)).div(255).numpy()
    np.testing.assert_array_equal(out, oracle)
    second = antialiased(pixels, (size, size)) / 255
    # uint8 is rounded after each axis
    limit = 1.02 / 255 if pixels.dtype == np.uint8 else 2e-6
    np.testing.assert_allclose(out, second, atol=limit, rtol=0)
    assert frame == Frame(image_size=pixels.shape[:2], network_size=size, content_size=(size, size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", UINT8_IMAGES + FLOAT_IMAGES)
def test_sam_profile(name, size):
    pixels = display(name)
    out, frame = preprocess(pixels, "sam", size)
    h, w = longest_side(pixels.shape[:2], size)
    assert frame.content_size == (h, w)
    assert max(h, w) == size
    tensor = torch.from_numpy(pillow(pixels, (h, w)).astype(np.float32))
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (SAM_MEAN, SAM_STD))
    oracle = F.pad((tensor - mean) / std, (0, size - w, 0, size - h)).numpy()
    np.testing.assert_allclose(out, oracle, atol=3e-7, rtol=0)
    second = antialiased(pixels, (h, w)) - SAM_MEAN[:, None, None]
    limit = 1.02 / 57 if pixels.dtype == np.uint8 else 1e-5
    np.testing.assert_allclose(out[:, :h, :w], second / SAM_STD[:, None, None], atol=limit, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", UINT8_IMAGES)
def test_medsam_profile_of_8_bit_images(name, size):
    pixels = image(name)
    resized = skimage_resize(
        pixels, (size, size), order=3, preserve_range=True, anti_aliasing=True
    ).astype(np.uint8)
    out, _ = preprocess(pixels, "medsam", size)
    levels = int(resized.max()) - int(resized.min())
    difference = np.abs(out - min_max(channels_first(resized).astype(float))) * levels
    assert difference.max() <= 1 + 1e-4
    # scikit-image loses a level of flat regions to round-off here and there; we do not
    assert (difference > 0.5).mean() < 0.03


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FLOAT_IMAGES)
def test_medsam_profile_of_float_images(name, size):
    pixels = image(name)
    resized = skimage_resize(
        pixels.astype(np.float64), (size, size), order=3, preserve_range=True, anti_aliasing=True
    )
    out, frame = preprocess(pixels, "medsam", size)
    np.testing.assert_allclose(out, min_max(channels_first(resized)), atol=1e-7, rtol=0)
    assert frame.content_size == (size, size)


@pytest.mark.parametrize("shape", [(1, 700), (700, 1), (2, 3), (1, 1), (300, 31), (64, 64)])
def test_cubic_before_truncation_at_extreme_sizes(shape):
    pixels = image("retina")[: shape[0], 300 : 300 + shape[1], 1].astype(np.float32)
    for size in (64, 100, 256):
        resized = skimage_resize(
            pixels.astype(float), (size, size), order=3, preserve_range=True, anti_aliasing=True
        )
        ours = resampling.resize(pixels[None], (size, size), "cubic")[0]
        np.testing.assert_allclose(ours, resized, atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [100, 256, 512])
@pytest.mark.parametrize("name", UINT8_IMAGES + FLOAT_IMAGES)
def test_litemedsam_profile(name, size):
    pixels = image(name)
    h, w = longest_side(pixels.shape[:2], size)
    resized = channels_first(cv2.resize(pixels, (w, h), interpolation=cv2.INTER_AREA))
    out, frame = preprocess(pixels, "litemedsam", size)
    assert frame.content_size == (h, w)
    span = float(resized.max()) - float(resized.min())
    difference = np.abs(out[:, :h, :w] - min_max(resized.astype(float))) * span
    if pixels.dtype == np.uint8:
        # OpenCV enlarges 8-bit images in 11-bit fixed point
        assert difference.max() <= 1 + 1e-4
        assert (difference > 0.5).mean() < 0.1
    else:
        assert difference.max() < 1e-6 * span
    assert not out[:, h:].any()
    assert not out[:, :, w:].any()


def test_area_halves_8_bit_images_as_opencv_does():
    pixels = image("retina")[:512, :512]
    resized = channels_first(cv2.resize(pixels, (256, 256), interpolation=cv2.INTER_AREA))
    planes = np.moveaxis(pixels, -1, 0)
    np.testing.assert_array_equal(resampling.resize(planes, (256, 256), "area"), resized)


@pytest.mark.parametrize("profile", PREPROCESSING)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, ">u2", np.float16, np.float64])
def test_output_for_every_type(profile, dtype):
    grey = image("brain")[::2, ::3].astype(dtype)
    out, _ = preprocess(grey, profile, 128)
    assert out.shape == (3, 128, 128)
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    assert out.flags.writeable
    rgb = preprocess(np.stack([grey] * 3, axis=-1), profile, 128)[0]
    np.testing.assert_array_equal(out, rgb)
    if PREPROCESSING[profile].min_max:
        assert out.min() == 0
        assert out.max() == 1


@pytest.mark.parametrize("profile", PREPROCESSING)
@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (1, 1), (3, 2000, 3)])
def test_extreme_shapes_keep_content(profile, shape):
    pixels = np.linspace(0, 255, math.prod(shape), dtype=np.float32).reshape(shape)
    out, frame = preprocess(pixels, profile, 256)
    assert min(frame.content_size) >= 1
    assert max(frame.content_size) == 256
    assert np.isfinite(out).all()
    logits = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    assert transforms.pixel_values(logits, frame, "sam").shape == shape[:2]


@pytest.mark.parametrize("profile", PREPROCESSING)
@pytest.mark.parametrize("value", [np.uint8(0), np.uint8(37), np.uint8(255), np.float32(99.5)])
def test_constant_images_give_no_nan(profile, value):
    out, _ = preprocess(np.full((50, 61), value), profile, 128)
    assert np.isfinite(out).all()
    if PREPROCESSING[profile].min_max:
        assert not out.any()


@pytest.mark.parametrize("profile", PREPROCESSING)
@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros(5), "not \\(5,\\)"),
        (np.zeros((4, 5, 1)), "not \\(4, 5, 1\\)"),
        (np.zeros((4, 5, 4), np.uint8), "not \\(4, 5, 4\\)"),
        (np.zeros((2, 4, 5, 3)), "not \\(2, 4, 5, 3\\)"),
        (np.zeros((0, 5)), "empty"),
        (np.zeros((5, 0, 3), np.uint8), "empty"),
        (np.full((4, 5), np.nan), "NaN or infinite"),
        (np.full((4, 5), np.inf, np.float32), "NaN or infinite"),
        (np.full((4, 5), 1e300), "NaN or infinite"),
        (np.zeros((4, 5), bool), "not bool"),
        (np.zeros((4, 5), complex), "not complex128"),
        (np.array([["a", "b"]]), "not <U1"),
    ],
)
def test_unusable_images_are_refused(profile, pixels, message):
    with pytest.raises(ImageError, match=message):
        preprocess(pixels, profile, 64)


@pytest.mark.parametrize("profile", ["medsa", "sam"])
def test_raw_intensities_are_refused_where_display_values_are_wanted(profile):
    with pytest.raises(ImageError, match="takes display values 0…255: give an intensity window"):
        preprocess(image("ct"), profile, 64)


def test_unknown_profile_is_refused():
    with pytest.raises(UsageError, match=r"'sam2'; there are: medsa, sam, medsam, litemedsam"):
        preprocess(np.zeros((4, 4), np.uint8), "sam2", 64)


def test_display_values_map_the_window():
    pixels = np.array([[-2000, -175], [37, 250], [251, 3000]], np.int16)
    shown = transforms.display_values(pixels, (-175, 250))
    assert shown.dtype == np.float32
    np.testing.assert_allclose(shown, [[0, 0], [212 / 425 * 255, 255], [255, 255]], rtol=1e-7)
    inverted = transforms.display_values(pixels, (-175, 250), inverted=True)
    np.testing.assert_allclose(inverted, 255 - shown, atol=1e-4)


@pytest.mark.parametrize(
    "window",
    [(1, 1), (2, 1), (math.nan, 1), (0, math.nan), (-math.inf, 0), (0, math.inf), (-1e308, 1e308)],
)
def test_unusable_windows_are_refused(window):
    with pytest.raises(UsageError, match="intensity window"):
        transforms.display_values(np.zeros((2, 2)), window)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_window_does_not_hide_unusable_values(value):
    with pytest.raises(ImageError, match="NaN or infinite"):
        transforms.display_values(np.array([[0, value]]), (0, 1))


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 300),
    m=st.integers(1, 300),
    taps=st.sampled_from([resampling.bilinear_taps, resampling.cubic_taps, resampling.area_taps]),
)
def test_resampling_weights_sum_to_one_and_are_symmetric(n, m, taps):
    operator = resampling.banded(taps(n, m), np.float64)
    matrix = np.zeros((m, n))
    for rows, columns, weights in operator.blocks:
        matrix[rows, columns] = weights
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-9)


def test_import_costs_numpy_only():
    code = (
        "import sys, medsa_deploy.transforms\n"
        "print(*sorted({'torch', 'PIL', 'scipy', 'skimage', 'cv2'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
