"""Session: images of every type and window to what the network sees."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_backend import FOUR_BY_FOUR, HEIGHT, WIDTH, full_size

from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images import Image


# Images
@pytest.mark.parametrize("dtype", ["u1", "u2", ">u2", "i2", "i4", "u8", "f2", "f4", "f8", "bool"])
@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (HEIGHT, WIDTH, 1), (HEIGHT, WIDTH, 3)])
def test_images_of_every_type(session, image, dtype: str, shape: tuple[int, ...]) -> None:
    values = image[..., : shape[2] if len(shape) == 3 else 1].reshape(shape)
    embedding = session.encode((values > 127 if dtype == "bool" else values).astype(dtype))
    assert embedding.values.shape == (1, 256, 16, 16)
    assert (embedding.intensity_window is None) == (dtype in ("u1", "bool"))


def test_grey_bool_and_8_bit_images_are_seen_as_they_are(shown) -> None:
    grey = full_size(FOUR_BY_FOUR * 17)
    np.testing.assert_allclose(shown(grey), grey, atol=1e-4)
    np.testing.assert_allclose(shown(grey[..., None]), grey, atol=1e-4)
    np.testing.assert_allclose(shown(grey.tolist()), grey, atol=1e-4)  # ints: min–max is 0…255
    np.testing.assert_allclose(shown(grey > 99), 255 * (grey > 99), atol=1e-4)


HOUNSFIELD = full_size(FOUR_BY_FOUR.astype(np.int16) * 100 - 500)
"""−500…1000 in steps of 100."""


def clipped(low: float, high: float) -> np.ndarray:
    return (HOUNSFIELD.clip(low, high) - low) / (high - low) * 255


@pytest.mark.parametrize("dtype", ["i2", "f4", "f8"])
@pytest.mark.parametrize(
    ("window", "conventions", "expected"),
    [
        ((-175, 250), {}, (-175, 250)),
        (None, {"intensity_window": [-175, 250]}, (-175, 250)),
        ((0, 100), {"intensity_window": [-175, 250]}, (0, 100)),
        (None, {}, (-500, 1000)),
    ],
    ids=["given", "the bundle's", "given before the bundle's", "minimum to maximum"],
)
def test_intensity_windows(shown, dtype: str, window, conventions, expected) -> None:
    seen = shown(HOUNSFIELD.astype(dtype), window=window, **conventions)
    np.testing.assert_allclose(seen, clipped(*expected), atol=1e-3)


def test_8_bit_images_are_display_values_unless_a_window_is_given(shown) -> None:
    grey = full_size(FOUR_BY_FOUR * 17)
    np.testing.assert_allclose(shown(grey, intensity_window=[0, 10]), grey, atol=1e-4)
    expected = (grey.astype(float).clip(50, 100) - 50) / 50 * 255
    np.testing.assert_allclose(shown(grey, window=(50, 100)), expected, atol=1e-3)


def test_the_files_own_rendering_goes_after_the_bundles_window(shown) -> None:
    display = full_size(FOUR_BY_FOUR * 10).astype(np.float32)
    image = Image(pixels=HOUNSFIELD, path=Path("ct.dcm"), display=display)
    np.testing.assert_allclose(shown(image), display, atol=1e-3)
    np.testing.assert_allclose(shown(image, window=(0, 100)), clipped(0, 100), atol=1e-3)
    seen = shown(image, intensity_window=[-175, 250])
    np.testing.assert_allclose(seen, clipped(-175, 250), atol=1e-3)


def test_inverted_images_are_inverted_after_the_window(shown) -> None:
    """MONOCHROME1 and TIFF MinIsWhite: the lowest intensity is the brightest."""
    raw = Image(pixels=HOUNSFIELD, path=Path("x.dcm"), inverted=True)
    np.testing.assert_allclose(shown(raw, window=(-175, 250)), 255 - clipped(-175, 250), atol=1e-3)
    np.testing.assert_allclose(shown(raw), 255 - clipped(-500, 1000), atol=1e-3)
    grey = full_size(FOUR_BY_FOUR * 17)
    eight_bit = Image(pixels=grey, path=Path("x.tif"), inverted=True)
    np.testing.assert_allclose(shown(eight_bit), 255 - grey, atol=1e-4)


def test_stretching_without_a_window_is_said_aloud(session, image, caplog) -> None:
    with caplog.at_level(logging.WARNING, "medsa_deploy"):
        embedding = session.encode(image[..., 0].astype(np.uint16) * 7)
    (record,) = caplog.records
    assert "uint16 intensities without a window were stretched" in record.getMessage()
    assert "set an intensity window" in record.getMessage()
    assert embedding.intensity_window is not None
    caplog.clear()
    session.encode(image)
    session.encode(image[..., 0].astype(np.int16), intensity_window=(0, 200))
    assert caplog.records == []


def test_min_max_profiles_stretch_without_a_warning(faked, caplog) -> None:
    with faked(preprocess="litemedsam") as session:
        session.encode(HOUNSFIELD)
        seen = session.backend.images[0][0, 0]
    np.testing.assert_allclose(seen, clipped(-500, 1000) / 255, atol=1e-6)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 5, 4), "u1"), r"array has shape \(4, 5, 4\), expected \(H, W\) or"),
        (np.zeros((3, 40, 50), "u1"), r"has shape \(3, 40, 50\), expected"),
        (np.zeros(7), r"has shape \(7,\), expected"),
        (np.zeros((1, 1, 4, 5)), r"has shape \(1, 1, 4, 5\), expected"),
        (3.0, r"has shape \(\), expected"),
        (None, r"has shape \(\), expected"),
        ([[1, 2], [3]], "rows differ in length"),
        (np.ones((4, 5), complex), "holds complex128, expected integers or floats"),
        (np.array([["a", "b"]]), "holds <U1, expected integers or floats"),
        (np.zeros((0, 5)), "no pixels"),
        (np.zeros((4, 0, 3), "u1"), "no pixels"),
        (np.full((4, 5), 7, "u2"), "every pixel is 7"),
        (np.full((4, 5, 3), 7, "u1"), "every pixel is"),
        (np.full((4, 5), True), "every pixel is 255"),
        (np.array([[0, np.nan], [1, 2]]), "1 NaN or infinite values out of 4"),
        (np.array([[0, -np.inf], [1, 2]], "f4"), "1 NaN or infinite values out of 4"),
        (np.array([[0, 1e300], [1, 2]]), "1 NaN or infinite values out of 4"),
    ],
)
def test_images_that_cannot_be_segmented(session, pixels: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        session.encode(pixels)


@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        ((5000, 6000), ImageError, "lie outside the intensity window 5000…6000.*choose another"),
        ((5, 5), UsageError, "the intensity window 5,5 cannot be used"),
        ((9, 5), UsageError, "cannot be used"),
        ((float("nan"), 5), UsageError, "cannot be used"),
        ((-np.inf, 5), UsageError, "cannot be used"),
        ((1, 2, 3), UsageError, r"cannot be used: give \(low, high\)"),
    ],
)
def test_windows_that_cannot_be_used(session, window: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        session.encode(HOUNSFIELD, intensity_window=window)
