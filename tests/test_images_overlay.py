"""Overlays show the image, the mask and the prompts, each where it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsa_deploy.errors import ImageError, PromptError, UsageError
from medsa_deploy.images import check_overlay_suffix, draw_overlay, write_overlay
from medsa_deploy.images.overlay import BOX, NEGATIVE, PALETTE, POSITIVE, WHITE

GREY = np.tile(np.linspace(0, 255, 600), (520, 1))
NO_MASK = np.zeros((520, 600), bool)


def disc(shape: tuple[int, int], y: int, x: int, radius: int) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_without_a_mask_the_image_is_shown_as_it_is(dtype: type, channels: int) -> None:
    background = GREY.astype(dtype)
    if channels == 3:
        background = np.stack([background, background[::-1], background[:, ::-1]], axis=-1)
    picture = draw_overlay(background, NO_MASK)
    assert picture.dtype == np.uint8
    assert picture.shape == (520, 600, 3)
    expected = np.rint(background).astype(np.uint8).reshape(520, 600, channels)
    np.testing.assert_array_equal(picture, np.broadcast_to(expected, picture.shape))


def test_the_background_is_not_changed() -> None:
    background = np.stack([GREY.astype(np.uint8)] * 3, axis=-1)
    before = background.copy()
    draw_overlay(background, ~NO_MASK, points=[(5, 5)], labels=[1], boxes=[(1, 1, 9, 9)])
    np.testing.assert_array_equal(background, before)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 600), width=st.integers(1, 600))
def test_small_images_are_enlarged_by_a_whole_factor(height: int, width: int) -> None:
    background = np.zeros((height, width))
    background[height // 2, width // 2] = 200
    picture = draw_overlay(background, np.zeros((height, width), bool))
    scale, remainder = divmod(picture.shape[0], height)
    assert remainder == 0
    assert picture.shape == (height * scale, width * scale, 3)
    assert max(picture.shape) >= 512
    assert scale == 1 or max(height, width) * (scale - 1) < 512
    bright = np.argwhere(picture[..., 0] == 200)
    assert bright.min(axis=0).tolist() == [height // 2 * scale, width // 2 * scale]
    assert len(bright) == scale**2


def test_a_mask_is_tinted_outlined_and_set_off() -> None:
    background = np.full((520, 600), 100.0)
    mask = disc((520, 600), 260, 300, 100)
    picture = draw_overlay(background, mask).astype(int)
    colour = PALETTE[0].astype(int)
    np.testing.assert_array_equal(picture[260, 201], colour)  # outline: the mask's leftmost pixel
    inner = picture[260, 300]
    assert (np.sign(inner - 100) == np.sign(colour - 100)).all()
    assert np.abs(inner - 100).sum() < np.abs(colour - 100).sum()
    assert (picture[260, 200] < 60).all()  # the dark edge around it
    untouched = ~disc((520, 600), 260, 300, 103)
    assert (picture[untouched] == 100).all()


def test_a_mask_of_one_pixel_is_seen() -> None:
    mask = NO_MASK.copy()
    mask[7, 9] = True
    picture = draw_overlay(np.full((520, 600), 100.0), mask)
    np.testing.assert_array_equal(picture[7, 9], PALETTE[0].astype(np.uint8))


def test_labels_differ_in_colour() -> None:
    mask = np.zeros((520, 600), np.uint8)
    for label in range(1, 8):
        mask[20:60, label * 60 : label * 60 + 40] = label
    picture = draw_overlay(np.full((520, 600), 100.0), mask)
    outlines = [tuple(picture[20, label * 60 + 20].tolist()) for label in range(1, 8)]
    assert outlines == [tuple(colour.astype(int).tolist()) for colour in PALETTE]
    assert len(set(outlines)) == 7
    assert draw_overlay(GREY, np.full((520, 600), 255, np.uint8)).shape == (520, 600, 3)


def test_points_are_drawn_where_they_are() -> None:
    points, labels = [(100, 50), (400, 300)], [1, 0]
    picture = draw_overlay(np.zeros((520, 600)), NO_MASK, points=points, labels=labels)
    for (x, y), label in zip(points, labels, strict=True):
        np.testing.assert_array_equal(picture[y, x], WHITE)  # plus and minus cross here
        colour = POSITIVE if label else NEGATIVE
        np.testing.assert_array_equal(picture[y + 4, x + 4], colour)
        upright = picture[y - 4, x]
        np.testing.assert_array_equal(upright, WHITE if label else colour)
    drawn = np.argwhere(picture.any(axis=-1))
    for y, x in drawn:
        assert min(np.hypot(x - px, y - py) for px, py in points) < 15


@pytest.mark.parametrize("point", [(0, 0), (599, 519), (-40, 3), (10_000, 10_000), (0.4, 518.7)])
def test_points_at_and_beyond_the_border(point: tuple[float, float]) -> None:
    picture = draw_overlay(np.zeros((520, 600)), NO_MASK, points=[point], labels=[1])
    inside = 0 <= point[0] < 600 and 0 <= point[1] < 520
    assert picture.any() == inside


def test_prompts_follow_the_enlargement() -> None:
    background = np.zeros((64, 64))
    picture = draw_overlay(
        background, background > 0, points=[(10, 20)], labels=[1], boxes=[(30, 8, 50, 40)]
    )
    assert picture.shape == (512, 512, 3)
    white = np.argwhere((picture == WHITE).all(axis=-1))
    assert np.abs(white.mean(axis=0) - [20 * 8 + 3.5, 10 * 8 + 3.5]).max() < 1
    yellow = np.argwhere((picture == BOX).all(axis=-1))
    assert np.abs(yellow.min(axis=0) - [8 * 8 + 3.5, 30 * 8 + 3.5]).max() <= 2
    assert np.abs(yellow.max(axis=0) - [40 * 8 + 3.5, 50 * 8 + 3.5]).max() <= 2


def test_boxes_are_outlined_in_any_order_and_clipped() -> None:
    blank = np.full((520, 600), 90.0)
    picture = draw_overlay(blank, NO_MASK, boxes=[(50, 60, 200, 160)])
    np.testing.assert_array_equal(picture[60, 120], BOX)
    np.testing.assert_array_equal(picture[110, 200], BOX)
    np.testing.assert_array_equal(picture[110, 120], (90, 90, 90))
    turned = draw_overlay(blank, NO_MASK, boxes=[(200, 160, 50, 60)])
    np.testing.assert_array_equal(turned, picture)
    draw_overlay(blank, NO_MASK, boxes=np.array([(-50, -50, 9000, 20), (-9, -9, -5, -5)]))


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ImageError, match=r"\(600, 520\) over \(520, 600\)"):
        draw_overlay(GREY, NO_MASK.T)
    with pytest.raises(PromptError, match="1 for 2"):
        draw_overlay(GREY, NO_MASK, points=[(1, 1), (2, 2)], labels=[1])


def test_overlays_are_written_as_png_or_jpeg(tmp_path: Path) -> None:
    mask = disc((520, 600), 260, 300, 100)
    expected = draw_overlay(GREY, mask, points=[(300, 260)], labels=[1])
    for name in ("o.png", "o.jpg", "o.JPEG"):
        write_overlay(tmp_path / name, GREY, mask, points=[(300, 260)], labels=[1])
        with PIL.Image.open(tmp_path / name) as picture:
            difference = np.abs(np.asarray(picture).astype(int) - expected)
        assert difference.mean() < (1e-9 if name == "o.png" else 3)
    assert len(list(tmp_path.iterdir())) == 3


def test_other_formats_are_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'\.gif'; use one of: \.png, \.jpg, \.jpeg"):
        check_overlay_suffix(tmp_path / "o.gif")
    with pytest.raises(UsageError):
        write_overlay(tmp_path / "o.nii.gz", GREY, NO_MASK)
    with pytest.raises(ImageError, match="does not exist"):
        write_overlay(tmp_path / "missing" / "o.png", GREY, NO_MASK)
    check_overlay_suffix("o.JPG")
