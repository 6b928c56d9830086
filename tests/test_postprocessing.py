"""Masks as each network's own inference code makes them, against that code's steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import zoom

from medsa_deploy import transforms
from medsa_deploy.bundle.manifest import PostprocessingName, PreprocessingName
from medsa_deploy.errors import UsageError
from medsa_deploy.transforms import PREPROCESSING, Frame, MaskRule
from medsa_deploy.transforms.masks import sigmoid

SIZES = [(256, 256), (240, 320), (512, 512), (333, 900), (1411, 999), (97, 64), (1, 700), (31, 1)]
ALLOWED = 1e-5
"""Share of a mask's pixels that may differ: torch's positions are float32."""


def logits_like_masks(count: int, side: int, seed: int = 0) -> np.ndarray:
    """(count, side, side) float32: smooth fields that cross zero, as decoders give them."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(0, 6, (1, count, 9, 9)).astype(np.float32))
    fields = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)[0].numpy()
    return (fields + rng.normal(0, 0.3, fields.shape)).astype(np.float32)


def medsam(logits: np.ndarray, frame: Frame) -> np.ndarray:
    probabilities = torch.sigmoid(torch.from_numpy(logits))[None]
    full = F.interpolate(probabilities, frame.image_size, mode="bilinear", align_corners=False)
    return (full[0] > 0.5).numpy()


def efficientsam(logits: np.ndarray, frame: Frame) -> np.ndarray:
    tensor = torch.from_numpy(logits)[None]
    return (F.interpolate(tensor, frame.image_size, mode="bicubic")[0] >= 0).numpy()


def sam(logits: np.ndarray, frame: Frame) -> np.ndarray:
    size, (h, w) = (frame.network_size,) * 2, frame.content_size
    tensor = F.interpolate(torch.from_numpy(logits)[None], size, mode="bilinear")[..., :h, :w]
    return (F.interpolate(tensor, frame.image_size, mode="bilinear")[0] > 0).numpy()


def litemedsam(logits: np.ndarray, frame: Frame) -> np.ndarray:
    """Its logits are of the frame's size, and are cropped there."""
    h, w = frame.content_size
    cropped = torch.from_numpy(logits)[None, :, :h, :w]
    return (F.interpolate(cropped, frame.image_size, mode="bilinear")[0] > 0).numpy()


def samed(logits: np.ndarray, frame: Frame) -> np.ndarray:
    side = frame.network_size
    tensor = F.interpolate(torch.from_numpy(logits)[None], (side, side), mode="bilinear")
    labels = torch.argmax(torch.softmax(tensor, dim=1), dim=1)[0].numpy()
    return zoom(labels, [size / side for size in frame.image_size], order=0)


def finetune_sam(logits: np.ndarray, frame: Frame) -> np.ndarray:
    labels = torch.from_numpy(logits).argmax(dim=0)[None, None].float()
    return F.interpolate(labels, frame.image_size, mode="nearest")[0, 0].numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("preprocess", "original", "network_size", "side"),
    [
        ("medsam", medsam, 1024, 256),
        ("medsam", medsam, 256, 64),
        ("efficientsam", efficientsam, 1024, 256),
        ("efficientsam", efficientsam, 512, 128),
        ("litemedsam", litemedsam, 256, 256),
        ("sam", sam, 1024, 256),
        ("medsa", sam, 256, 64),
        ("sam-med2d", sam, 256, 64),
    ],
)
def test_masks_are_the_original_codes(
    preprocess: PreprocessingName,
    original,
    network_size: int,
    side: int,
    size: tuple[int, int],
) -> None:
    frame = transforms.frame_of(size, preprocess, network_size)
    logits = logits_like_masks(6, side)
    rule = MaskRule(postprocess=PREPROCESSING[preprocess].postprocess)
    masks, expected = transforms.image_masks(logits, frame, rule), original(logits, frame)
    assert 0.1 < expected.mean() < 0.9
    assert (masks != expected).sum() <= max(1, ALLOWED * expected.size)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("preprocess", "original", "network_size"),
    [("samed", samed, 512), ("samed", samed, 224), ("finetune-sam", finetune_sam, 1024)],
)
def test_labels_are_the_original_codes(
    preprocess: PreprocessingName, original, network_size: int, size: tuple[int, int]
) -> None:
    frame = transforms.frame_of(size, preprocess, network_size)
    logits = logits_like_masks(5, network_size // 4)
    rule = MaskRule(postprocess=PREPROCESSING[preprocess].postprocess, exclusive=True)
    values = transforms.pixel_values(logits, frame, rule.postprocess)
    labels, expected = transforms.exclusive_labels(values), original(logits, frame)
    assert labels.dtype == np.uint8
    assert len(np.unique(expected)) == 5 or min(size) == 1
    assert (labels != expected).sum() <= max(1, ALLOWED * expected.size)
    masks = transforms.image_masks(logits, frame, rule)
    assert masks.shape == (4, *size)
    np.testing.assert_array_equal(sum(k * mask for k, mask in enumerate(masks, 1)), labels)


def test_nearest_samples_are_exactly_those_of_the_libraries() -> None:
    """At the borders between samples, where round-off decides."""
    for n in (14, 56, 64, 128, 256):
        samples = np.arange(n, dtype=np.float32)
        for m in range(1, 700, 3):
            frame = Frame(image_size=(m, m), network_size=4 * n, content_size=(4 * n, 4 * n))
            logits = np.broadcast_to(samples, (n, n))
            values = transforms.pixel_values(logits, frame, "finetune-sam")[0]
            expected = F.interpolate(torch.from_numpy(samples)[None, None], m, mode="nearest")
            np.testing.assert_array_equal(values, expected[0, 0].numpy(), f"{n} → {m}")


@pytest.mark.parametrize("postprocess", transforms.POSTPROCESSING)
def test_padding_never_reaches_the_image(postprocess: PostprocessingName) -> None:
    """An image that covers a quarter of the frame reads that quarter, and at most its border."""
    frame = Frame(image_size=(300, 300), network_size=256, content_size=(128, 128))
    logits = np.full((64, 64), 9, np.float32)
    logits[:32, :32] = -9
    masks = transforms.image_masks(logits[None], frame, MaskRule(postprocess=postprocess))
    assert not masks[0, :285, :285].any()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.93])
def test_a_pixel_on_the_threshold(probability: float) -> None:
    frame = Frame(image_size=(8, 8), network_size=32, content_size=(32, 32))
    logit = np.float32(transforms.probability_to_logit(probability))
    logits = np.full((1, 8, 8), logit, np.float32)
    assert (transforms.pixel_values(logits, frame, "efficientsam") == logit).all()
    inclusive, exclusive = (
        transforms.image_masks(
            logits, frame, MaskRule(postprocess=postprocess, probability=probability)
        )
        for postprocess in ("efficientsam", "sam")
    )
    assert inclusive.all()
    assert not exclusive.any()


def test_sigmoid_is_torchs_and_never_overflows() -> None:
    logits = np.array([-1e30, -100, -20, -1, -0.0, 0, 1e-7, 3, 20, 100, 1e30], np.float32)
    with np.errstate(all="raise"):
        probabilities = sigmoid(logits)
    expected = torch.sigmoid(torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(probabilities, expected, rtol=3e-7, atol=1e-38)


def test_classes_that_exclude_each_other_are_255_at_most() -> None:
    with pytest.raises(UsageError, match="1 to 255 classes, not 256"):
        transforms.exclusive_labels(np.zeros((257, 2, 2), np.float32))
