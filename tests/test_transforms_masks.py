"""Logits out of the network's frame, against SAM's own postprocessing; masks and labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medsa_deploy import transforms
from medsa_deploy.errors import UsageError
from medsa_deploy.transforms import Frame


def sam_postprocess(logits: np.ndarray, frame: Frame) -> np.ndarray:
    """SAM's postprocess_masks, in the precision of `logits`."""
    size = (frame.network_size, frame.network_size)
    masks = F.interpolate(torch.from_numpy(logits), size, mode="bilinear", align_corners=False)
    masks = masks[..., : frame.content_size[0], : frame.content_size[1]]
    return F.interpolate(masks, frame.image_size, mode="bilinear", align_corners=False).numpy()


def frame_of(size: tuple[int, int], network_size: int, profile: str) -> Frame:
    return transforms.preprocess(np.zeros(size, np.uint8), profile, network_size)[1]


@pytest.mark.parametrize("profile", ["medsa", "sam"])
@pytest.mark.parametrize("network_size", [256, 1024])
@pytest.mark.parametrize(
    "size",
    [(1024, 1024), (512, 512), (240, 320), (197, 233), (1411, 999), (1, 1), (1, 900), (1999, 3)],
)
def test_pixel_values_is_sams_postprocessing(size, network_size, profile):
    frame = frame_of(size, network_size, profile)
    rng = np.random.default_rng(7)
    logits = rng.uniform(-10, 10, (2, 3, network_size // 4, network_size // 4)).astype(np.float32)
    out = transforms.pixel_values(logits, frame, "sam")
    assert out.dtype == np.float32
    assert out.shape == (2, 3, *size)
    exact = sam_postprocess(logits.astype(np.float64), frame)
    np.testing.assert_allclose(out, exact, atol=1e-5, rtol=0)
    # torch's float32 positions have errors of their own: 1e-4 of a sample, on this white noise
    np.testing.assert_allclose(out, sam_postprocess(logits, frame), atol=2e-3, rtol=0)


def test_pixel_values_takes_a_single_mask_and_none():
    frame = frame_of((30, 50), 64, "sam")
    assert transforms.pixel_values(np.ones((16, 16), np.float32), frame, "sam").shape == (30, 50)
    assert transforms.pixel_values(np.ones((0, 3, 16, 16), np.float32), frame, "sam").shape == (
        0,
        3,
        30,
        50,
    )


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    profile=st.sampled_from(["medsa", "sam"]),
    value=st.floats(-20, 20, width=32),
)
def test_upsampled_constant_logits_are_constant(height, width, profile, value):
    frame = frame_of((height, width), 128, profile)
    out = transforms.pixel_values(np.full((1, 32, 32), value, np.float32), frame, "sam")
    np.testing.assert_allclose(out, value, rtol=5e-7, atol=1e-30)


@pytest.mark.parametrize("probability", [1e-6, 0.3, 0.5, 0.9, 1 - 1e-6])
def test_threshold_logit(probability):
    logit = transforms.probability_to_logit(probability)
    assert 1 / (1 + math.exp(-logit)) == pytest.approx(probability, rel=1e-12)
    assert transforms.probability_to_logit(0.5) == 0


@pytest.mark.parametrize("probability", [0, 1, -0.1, 1.5, math.nan, math.inf])
def test_impossible_thresholds_are_refused(probability):
    with pytest.raises(UsageError, match="not a probability"):
        transforms.probability_to_logit(probability)


def test_label_map_takes_the_best_class_above_the_threshold():
    logits = np.array([[[1, -1, 0.5, 2]], [[0.2, -2, 3, 2]]], np.float32)
    np.testing.assert_array_equal(transforms.label_map(logits, 0.0), [[1, 0, 2, 1]])
    np.testing.assert_array_equal(transforms.label_map(logits, 1.0), [[0, 0, 2, 1]])
    assert transforms.label_map(logits, 0.0).dtype == np.uint8


def test_label_map_holds_255_classes():
    logits = np.eye(255, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(transforms.label_map(logits, 0.5), [np.arange(1, 256)])
    for count in (0, 256):
        with pytest.raises(UsageError, match=f"1 to 255 classes, not {count}"):
            transforms.label_map(np.zeros((count, 2, 2), np.float32), 0.0)
