"""Prompts: what a caller gives → the decoder's coordinates and labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsa_deploy.bundle.manifest import Conventions
from medsa_deploy.errors import PromptError
from medsa_deploy.transforms import Frame, network_prompt, preprocess, prompts

XY = Conventions(preprocess="sam")
YX = Conventions(preprocess="medsa", point_order="yx")
FRAME = Frame(image_size=(200, 256), network_size=1024, content_size=(800, 1024))
MASK_SIZE = 16


def converted(
    frame: Frame = FRAME, conventions: Conventions = XY, **parts: object
) -> tuple[np.ndarray, np.ndarray]:
    (prompt,) = prompts(**parts)
    return network_prompt(prompt, frame, conventions, mask_size=MASK_SIZE)


@st.composite
def scenes(draw):
    """A frame as preprocessing makes it, points within its image and perhaps a box."""
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    profile = draw(st.sampled_from(["medsa", "sam", "medsam", "litemedsam"]))
    frame = preprocess(np.zeros((height, width), np.uint8), profile, 64)[1]
    # 1/8 is exact in float32, so no point is rounded out of the image
    eighths = st.tuples(st.integers(0, 8 * width - 1), st.integers(0, 8 * height - 1))
    points = np.array(draw(st.lists(eighths, max_size=4)), float).reshape(-1, 2) / 8
    labels = draw(st.lists(st.integers(0, 1), min_size=len(points), max_size=len(points)))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    box = [x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))]
    return frame, points, labels, box if len(points) == 0 or draw(st.booleans()) else None


@settings(deadline=None, max_examples=150)
@given(scene=scenes(), order=st.sampled_from(["xy", "yx"]))
def test_coordinates_return_to_the_image(scene, order):
    frame, points, labels, box = scene
    coords, out_labels = converted(
        frame, replace(XY, point_order=order), points=points, labels=labels, box=box
    )
    assert coords.dtype == out_labels.dtype == np.float32
    assert coords.flags.c_contiguous
    assert len(coords) == len(out_labels) == len(points) + (1 if box is None else 2)
    (height, width), (h, w) = frame.image_size, frame.content_size
    back = (coords if order == "xy" else coords[:, ::-1]) * (width / w, height / h)
    n = len(points)
    np.testing.assert_allclose(back[:n], points, atol=1e-4)
    np.testing.assert_array_equal(out_labels[:n], labels)
    if box is None:
        np.testing.assert_array_equal(coords[n:], [[0, 0]])
        np.testing.assert_array_equal(out_labels[n:], [-1])
    else:
        np.testing.assert_allclose(back[n:].ravel(), box, atol=1e-4)
        np.testing.assert_array_equal(out_labels[n:], [2, 3])
    assert (out_labels == -1).sum() == (box is None)
    assert (coords >= 0).all()
    limits = (w, h) if order == "xy" else (h, w)
    assert (coords <= limits).all()


@settings(deadline=None, max_examples=50)
@given(scene=scenes())
def test_yx_swaps_every_coordinate(scene):
    frame, points, labels, box = scene
    xy = converted(frame, XY, points=points, labels=labels, box=box)
    yx = converted(frame, YX, points=points, labels=labels, box=box)
    np.testing.assert_array_equal(yx[0], xy[0][:, ::-1])
    np.testing.assert_array_equal(yx[1], xy[1])


def test_points_come_before_the_box():
    coords, labels = converted(points=[[10, 20], [30, 40]], labels=[1, 0], box=[8, 16, 128, 100])
    np.testing.assert_array_equal(coords, [[40, 80], [120, 160], [32, 64], [512, 400]])
    np.testing.assert_array_equal(labels, [1, 0, 2, 3])


def test_axes_are_scaled_apart_when_the_image_is_stretched():
    frame = Frame(image_size=(200, 256), network_size=1024, content_size=(1024, 1024))
    coords, labels = converted(frame, points=[[100, 100]])
    np.testing.assert_array_equal(coords, np.float32([[400, 512], [0, 0]]))
    np.testing.assert_array_equal(labels, [1, -1])


def test_image_frame_is_unscaled():
    coords, labels = converted(
        conventions=replace(YX, point_frame="image"), points=[[100, 30.5]], box=[1, 2, 30, 40]
    )
    np.testing.assert_array_equal(coords, [[30.5, 100], [2, 1], [40, 30]])
    np.testing.assert_array_equal(labels, [1, 2, 3])


@settings(deadline=None, max_examples=50)
@given(scene=scenes(), scale=st.sampled_from([0.25, 1.0, 4.0]), order=st.sampled_from(["xy", "yx"]))
def test_padding_is_neither_scaled_nor_swapped(scene, scale, order):
    """EfficientSAM's: the points SAM would get, scaled, its padding point aside, then (−1, −1)."""
    frame, points, labels, box = scene
    conventions = replace(XY, point_order=order)
    parts = {"points": points, "labels": labels, "box": box}
    plain, plain_labels = converted(frame, conventions, **parts)
    placed = plain_labels != -1
    padded = replace(conventions, point_scale=scale, pad_points=6)
    coords, labels = converted(frame, padded, **parts)
    assert coords.dtype == labels.dtype == np.float32
    assert coords.shape == (6, 2)
    count = placed.sum()
    np.testing.assert_allclose(coords[:count], plain[placed] * scale, rtol=1e-6)
    np.testing.assert_array_equal(labels[:count], plain_labels[placed])
    np.testing.assert_array_equal(coords[count:], np.full((6 - count, 2), -1))
    np.testing.assert_array_equal(labels[count:], np.full(6 - count, -1))


@pytest.mark.parametrize(("pad", "tokens"), [(None, 2), (0, 1), (3, 3), (6, 6)])
def test_points_a_set_is_padded_to(pad, tokens):
    conventions = replace(XY, pad_points=pad)
    assert len(converted(conventions=conventions, points=[[1, 2]])[1]) == tokens


@pytest.mark.parametrize(("points", "box"), [(7, None), (5, [1, 2, 3, 4])])
def test_more_points_than_a_set_is_padded_to_are_refused(points, box):
    parts = {"points": np.ones((points, 2)), "box": box}
    with pytest.raises(PromptError, match=r"has 7 points \(a box counts as two\).* at most 6"):
        converted(conventions=replace(XY, pad_points=6), **parts)
    unpadded = converted(conventions=replace(XY, pad_points=0), **parts)
    assert len(unpadded[1]) == 7


def test_a_network_without_mask_prompts_refuses_them():
    (prompt,) = prompts(points=[[1, 2]], mask=np.zeros((16, 16)))
    with pytest.raises(PromptError, match="takes no mask prompt: give points or a box"):
        network_prompt(prompt, FRAME, XY, mask_size=None)


@pytest.mark.parametrize("point", [(0, 0), (255, 0), (0, 199), (255, 199), (255.9, 199.9)])
def test_corners_of_the_image_are_inside(point):
    coords, _ = converted(points=[point])
    np.testing.assert_allclose(coords[0], np.multiply(point, 4), rtol=1e-6)


def test_a_mask_alone_is_a_prompt():
    """As in SAM's predictor, which pads points only."""
    coords, labels = converted(mask=np.zeros((MASK_SIZE, MASK_SIZE)))
    assert (coords.shape, labels.shape) == ((0, 2), (0,))


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("number", [1, 4])
def test_sets_of_points_boxes_and_masks(sets, number):
    rng = np.random.default_rng(1)
    points = rng.uniform(0, 100, (sets, number, 2))
    labels = rng.integers(0, 2, (sets, number))
    box = np.tile([1, 2, 30, 40], (sets, 1)) + np.arange(sets)[:, None]
    mask = rng.standard_normal((sets, 1, MASK_SIZE, MASK_SIZE))
    prompt_sets = prompts(points=points, labels=labels, box=box, mask=mask)
    assert len(prompt_sets) == sets
    for i, prompt in enumerate(prompt_sets):
        np.testing.assert_allclose(prompt.points, points[i], rtol=1e-6)
        np.testing.assert_array_equal(prompt.labels, labels[i])
        np.testing.assert_array_equal(prompt.box, box[i])
        np.testing.assert_allclose(prompt.mask, mask[i, 0], rtol=1e-6)
        assert prompt.points.dtype == prompt.mask.dtype == np.float32
    assert len(prompts(mask=mask[:, 0])) == sets
    assert len(prompts(box=box)) == sets


def test_one_set_with_and_without_the_set_axis():
    (prompt,) = prompts(points=[[1, 2], [3, 4]], box=[[5, 6, 7, 8]], mask=np.zeros((1, 1, 8, 8)))
    assert prompt.points.shape == (2, 2)
    np.testing.assert_array_equal(prompt.labels, [1, 1])
    assert prompt.box is not None
    assert prompt.mask is not None
    (prompt,) = prompts(box=[5, 6, 7, 8])
    assert prompt.points.shape == (0, 2)
    assert prompt.labels.shape == (0,)
    assert prompt.mask is None
    assert prompts(points=[[1, 2]])[0].box is None


def test_a_prompt_does_not_share_memory_with_the_callers_arrays():
    points = np.array([[1, 2]], np.float32)
    (prompt,) = prompts(points=points)
    points[:] = 9
    np.testing.assert_array_equal(prompt.points, [[1, 2]])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "the prompt is empty: give points, a box or a mask"),
        ({"points": np.zeros((0, 2))}, "the prompt is empty"),
        ({"points": np.zeros((0, 3, 2))}, "the prompt is empty"),
        ({"points": np.zeros((3, 0, 2))}, "the prompt is empty"),
        ({"labels": [1]}, "0 points have 1 labels"),
        ({"points": [[1, 2], [3, 4]], "labels": [1]}, "2 points have 1 labels"),
        ({"box": [1, 2, 3, 4], "labels": [1]}, "0 points have 1 labels"),
        ({"points": [1, 2]}, r"points should have the shape \(N, 2\) .* found \(2,\)"),
        ({"points": [[1, 2, 3]]}, r"found \(1, 3\)"),
        ({"points": [[1, 2], [3]]}, "points should be numbers"),
        ({"points": [["a", "b"]]}, "points should be numbers"),
        ({"points": {"x": 1}}, "points should be numbers"),
        ({"points": [[1, 2]], "labels": 1}, r"labels should have the shape .* found \(\)"),
        ({"box": [1, 2, 3]}, r"box should have the shape \(4,\) or \(P, 4\), found \(3,\)"),
        ({"mask": np.zeros((2, 3, 8, 8))}, r"mask should .* found \(2, 3, 8, 8\)"),
        ({"mask": np.zeros(8)}, r"mask should .* found \(8,\)"),
        (
            {"points": [[1, 2]], "box": np.ones((3, 4))},
            r"points for 1, box for 3\).*give points as \(P, N, 2\), box as \(P, 4\)",
        ),
        ({"points": np.ones((2, 5, 2)), "labels": [1] * 5}, "points for 2, labels for 1"),
        ({"points": np.ones((2, 5, 2)), "mask": np.ones((3, 8, 8))}, "points for 2.* mask for 3"),
    ],
)
def test_unusable_parts_are_refused(parts, message):
    with pytest.raises(PromptError, match=message):
        prompts(**parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"points": [[1, 2], [3, 4], [300, 20]]},
            r"^point 3 \(300, 20\) lies outside the 256×200 image \(x 0…255, y 0…199\)$",
        ),
        ({"points": [[256, 0]]}, r"point 1 \(256, 0\) lies outside"),
        ({"points": [[0, 200]]}, r"point 1 \(0, 200\) lies outside"),
        ({"points": [[-0.5, 3]]}, r"point 1 \(-0.5, 3\) lies outside"),
        ({"points": [[np.nan, 3]]}, r"point 1 \(nan, 3\) lies outside"),
        ({"points": [[1e300, 3]]}, r"point 1 \(inf, 3\) lies outside"),
        ({"points": [[1, 2]], "labels": [2]}, r"point 1 \(1, 2\) has the label 2"),
        ({"points": [[1, 2]], "labels": [-1]}, "has the label -1"),
        ({"points": [[1, 2]], "labels": [0.5]}, "has the label 0.5"),
        ({"box": [30, 2, 10, 40]}, r"the box \(30, 2, 10, 40\) is empty or inverted"),
        ({"box": [10, 40, 30, 40]}, "is empty or inverted"),
        ({"box": [np.nan, 2, 10, 40]}, "is empty or inverted"),
        (
            {"box": [0, 0, 257, 200]},
            r"lies outside the 256×200 image \(x 0…256, y 0…200\)",
        ),
        ({"box": [-1, 0, 25, 20]}, "lies outside"),
        ({"box": [0, 0, np.inf, 20]}, "lies outside"),
        ({"mask": np.zeros((8, 8))}, r"shape \(8, 8\), expected \(16, 16\)"),
        ({"mask": np.zeros((200, 256))}, r"shape \(200, 256\), expected \(16, 16\)"),
        ({"mask": np.full((16, 16), np.nan)}, "NaN or infinite"),
    ],
)
def test_values_are_checked_against_the_image(parts, message):
    with pytest.raises(PromptError, match=message):
        converted(**parts)


def test_the_whole_image_is_a_box():
    coords, labels = converted(box=[0, 0, 256, 200])
    np.testing.assert_array_equal(coords, [[0, 0], [1024, 800]])
    np.testing.assert_array_equal(labels, [2, 3])
