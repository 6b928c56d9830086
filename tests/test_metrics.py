"""Dice, IoU and the Hausdorff distance against their definitions, and against SimpleITK."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import SimpleITK
from command_line import WITHOUT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from medsa_deploy.errors import UsageError
from medsa_deploy.evaluation import metrics

STEPS = st.floats(0.1, 5)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Two masks of one shape, of two or three dimensions, and a spacing."""
    shape = draw(array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6))
    masks = arrays(np.bool_, shape)
    return draw(masks), draw(masks), [draw(STEPS) for _ in shape]


def surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    """The mask's pixels with a neighbour across a face that is not in it, by definition."""
    inside = {tuple(map(int, at)) for at in np.argwhere(mask)}
    steps = [tuple(s * (k == axis) for k in range(mask.ndim)) for axis in range(mask.ndim)
             for s in (-1, 1)]  # fmt: skip
    return [p for p in inside if any(tuple(map(sum, zip(p, s, strict=True))) not in inside
                                     for s in steps)]  # fmt: skip


def brute_force(
    first: np.ndarray, other: np.ndarray, spacing: Sequence[float], percentile: float
) -> float:
    """The definition, every surface pixel against every other."""
    surfaces = [
        np.array(surface(mask)).reshape(-1, first.ndim) * spacing for mask in (first, other)
    ]
    between = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=2)
    there, back = between.min(axis=1), between.min(axis=0)
    return float(max(np.percentile(there, percentile), np.percentile(back, percentile)))


def test_dice_of_masks_that_are_empty_apart_and_half_alike() -> None:
    a = np.zeros((4, 2, 2), bool)
    b = np.zeros((4, 2, 2), bool)
    a[1, 0, 0] = b[2, 0, 0] = a[3, 0, 0] = b[3, 0, 0] = b[3, 0, 1] = True
    values = [metrics.dice(mask, other) for mask, other in zip(a, b, strict=True)]
    assert values == [1.0, 0.0, 0.0, pytest.approx(2 / 3)]


@given(pairs())
def test_overlap_is_counted(pair: tuple[np.ndarray, np.ndarray, list[float]]) -> None:
    first, other, _ = pair
    a, b = ({tuple(map(int, at)) for at in np.argwhere(mask)} for mask in (first, other))
    if a or b:
        assert metrics.dice(first, other) == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
        assert metrics.iou(first, other) == pytest.approx(len(a & b) / len(a | b))
    d, i = metrics.dice(first, other), metrics.iou(first, other)
    assert d == pytest.approx(2 * i / (1 + i))
    assert (metrics.dice(other, first), metrics.iou(other, first)) == (d, i)


@given(pairs(), st.sampled_from([50, 95, 100]))
@settings(max_examples=200)
def test_distance_is_the_definition(
    pair: tuple[np.ndarray, np.ndarray, list[float]], percentile: float
) -> None:
    mask, other, spacing = pair
    distance = metrics.hausdorff(mask, other, spacing, percentile=percentile)
    assert metrics.hausdorff(other, mask, spacing, percentile=percentile) == distance
    if mask.any() and other.any():
        assert distance == pytest.approx(brute_force(mask, other, spacing, percentile), abs=1e-9)
    else:
        assert distance == (0 if mask.any() == other.any() else math.inf)


@given(pairs())
def test_depth_is_the_distance_to_the_outside(
    pair: tuple[np.ndarray, np.ndarray, list[float]],
) -> None:
    mask = pair[0]
    outside = np.argwhere(~np.pad(mask, 1)) - 1
    for at, distance in np.ndenumerate(metrics.depth(mask)):
        nearest = np.linalg.norm(outside - np.array(at), axis=1).min()
        assert distance == pytest.approx(nearest if mask[at] else 0)


def blobs(shape: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Two irregular masks away from the border, as organs are."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    masks = []
    for _ in range(2):
        centres = rng.uniform(0.35, 0.65, (4, len(shape))) * shape
        radii = rng.uniform(0.12, 0.25, 4) * min(shape)
        near = [np.linalg.norm(grid - c, axis=-1) < r for c, r in zip(centres, radii, strict=True)]
        masks.append(np.any(near, axis=0))
    return masks


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("shape", "spacing"), [((60, 45), (0.4, 1.7)), ((40, 30, 20), (0.7, 0.7, 3.0))]
)
def test_simpleitk_agrees(shape: tuple[int, ...], spacing: tuple[float, ...], seed: int) -> None:
    """Overlap, the full distance of the surfaces, and percentiles over its distance maps."""
    masks = blobs(shape, seed)
    images, contours = [], []
    for mask in masks:
        image = SimpleITK.GetImageFromArray(mask.astype(np.uint8))
        image.SetSpacing(spacing[::-1])
        images.append(image)
        # Fully connected background: neighbours across faces only.
        contours.append(SimpleITK.BinaryContour(image, fullyConnected=False, foregroundValue=1))
    overlap = SimpleITK.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    assert metrics.dice(*masks) == pytest.approx(overlap.GetDiceCoefficient())
    assert metrics.iou(*masks) == pytest.approx(overlap.GetJaccardCoefficient())
    overall = SimpleITK.HausdorffDistanceImageFilter()
    overall.Execute(*contours)
    full = metrics.hausdorff(*masks, spacing, percentile=100)
    assert full == pytest.approx(overall.GetHausdorffDistance(), rel=1e-5)
    arrays = [SimpleITK.GetArrayFromImage(contour) == 1 for contour in contours]
    maps = [
        np.abs(SimpleITK.GetArrayFromImage(SimpleITK.SignedMaurerDistanceMap(
            contour, squaredDistance=False, useImageSpacing=True)))
        for contour in contours
    ]  # fmt: skip
    directed = [np.percentile(maps[1][arrays[0]], 95), np.percentile(maps[0][arrays[1]], 95)]
    assert metrics.hausdorff(*masks, spacing) == pytest.approx(max(directed), rel=1e-5)
    assert max(directed) < full


def test_a_known_distance() -> None:
    """Two columns of pixels, 3 apart: 3 columns × 0.5 mm; one pixel more is beyond 95 %."""
    mask, other = np.zeros((2, 30, 40), bool)
    mask[5:25, 10], other[5:25, 13] = True, True
    assert metrics.hausdorff(mask, other, (2.0, 0.5)) == 1.5
    other[24, 35] = True
    assert metrics.hausdorff(mask, other, (2.0, 0.5)) == 1.5
    assert metrics.hausdorff(mask, other, (2.0, 0.5), percentile=100) == 12.5


@pytest.mark.parametrize(
    ("other", "spacing", "message"),
    [
        (np.zeros((4, 6), bool), (1, 1), "cannot be compared"),
        (np.zeros((4, 5), np.uint8), (1, 1), "uint8"),
        (np.zeros((4, 5), bool), (1, 1, 1), "2 positive numbers"),
        (np.zeros((4, 5), bool), (1, 0), "2 positive numbers"),
    ],
)
def test_what_cannot_be_compared(other: np.ndarray, spacing: Sequence[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        metrics.hausdorff(np.zeros((4, 5), bool), other, spacing)


def test_without_scipy_the_extra_is_named() -> None:
    import subprocess
    import sys

    code = """
import numpy as np
from medsa_deploy.errors import MissingDependencyError
from medsa_deploy.evaluation import metrics
mask = np.ones((3, 3), bool)
assert metrics.dice(mask, mask) == metrics.iou(mask, mask) == 1
try:
    metrics.hausdorff(mask, mask, (1, 1))
except MissingDependencyError as e:
    print(e)
"""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=("scipy",)) + code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "medsa-deploy[metrics]" in done.stdout
