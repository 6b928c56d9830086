"""An image, its mask and its prompts → one picture, (s·H, s·W, 3) uint8."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image

from medsa_deploy.errors import ImageError, PromptError

from .files import check_suffix, output_file

SUFFIXES = (".png", ".jpg", ".jpeg")
MIN_SIDE = 512
"""Smaller images are enlarged by a whole factor until their longer side has this many pixels."""
FILL = 0.35
"""Opacity of a mask's interior; its outline is opaque."""
PALETTE = np.array(
    [
        (86, 180, 233), (230, 159, 0), (204, 121, 167), (240, 228, 66),
        (0, 114, 178), (0, 158, 115), (213, 94, 0),
    ],
    np.float32,
)  # fmt: skip
"""Okabe and Ito's colours, distinguishable with any colour vision. Green and vermilion come last:
they are the colours of positive and negative points."""
POSITIVE, NEGATIVE, BOX = (0, 158, 115), (213, 94, 0), (240, 228, 66)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
Colour = tuple[int, int, int]


def check_overlay_suffix(path: str | os.PathLike[str]) -> None:
    """UsageError unless `write_overlay` knows the suffix of `path`; call it before any work."""
    check_suffix(Path(path), SUFFIXES, "overlay")


def write_overlay(
    path: str | os.PathLike[str],
    background: np.ndarray,
    mask: np.ndarray,
    *,
    points: npt.ArrayLike = (),
    labels: npt.ArrayLike = (),
    boxes: npt.ArrayLike = (),
) -> None:
    """Write the picture of `draw_overlay` as PNG or JPEG, by the suffix of `path`."""
    path = Path(path)
    check_overlay_suffix(path)
    picture = draw_overlay(background, mask, points=points, labels=labels, boxes=boxes)
    with output_file(path) as temporary:
        PIL.Image.fromarray(picture).save(temporary, quality=92)


def draw_overlay(
    background: np.ndarray,
    mask: np.ndarray,
    *,
    points: npt.ArrayLike = (),
    labels: npt.ArrayLike = (),
    boxes: npt.ArrayLike = (),
) -> np.ndarray:
    """The mask over the image, with its prompts: (s·H, s·W, 3) uint8.

    `background`: (H, W) or (H, W, 3), 0…255. `mask`: (H, W) bool, or integer labels with 0 as
    background. `points`: (N, 2) x, y in pixels of the image; `labels`: (N,) 1 is positive (green,
    plus), 0 negative (vermilion, minus). `boxes`: (M, 4) x0, y0, x1, y1. s is the whole factor that
    brings the longer side to at least 512 pixels. ImageError if the shapes differ; PromptError
    unless there is one label a point.
    """
    if background.ndim not in (2, 3) or background.shape[:2] != mask.shape:
        raise ImageError(
            f"an overlay needs a mask of its image's shape: found {mask.shape} "
            f"over {background.shape}"
        )
    scale = -(-MIN_SIDE // max(mask.shape))
    canvas = _enlarge(_rgb(background), scale)
    side = max(canvas.shape)
    width = max(2, round(side / 400))
    _draw_mask(canvas, _enlarge(mask, scale), width)
    # A coordinate is the centre of a pixel, which is now `scale` pixels wide.
    for box in (np.asarray(boxes, float).reshape(-1, 4) + 0.5) * scale - 0.5:
        _draw_box(canvas, box, width)
    centres = (np.asarray(points, float).reshape(-1, 2) + 0.5) * scale - 0.5
    signs = np.asarray(labels).reshape(-1)
    if len(signs) != len(centres):
        raise PromptError(f"an overlay needs one label a point: {len(signs)} for {len(centres)}")
    for (x, y), sign in zip(centres, signs, strict=True):
        _draw_point(canvas, x, y, radius=max(9.0, side / 70), positive=bool(sign == 1))
    return canvas


def _rgb(background: np.ndarray) -> np.ndarray:
    """An image in 0…255 as (H, W, 3) uint8."""
    levels = np.rint(np.clip(np.nan_to_num(background), 0, 255)).astype(np.uint8)
    return np.stack([levels] * 3, axis=-1) if levels.ndim == 2 else levels


def _enlarge(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Every pixel as a square of `scale` × `scale`, without smoothing: masks stay exact."""
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def _draw_mask(canvas: np.ndarray, mask: np.ndarray, width: int) -> None:
    """Tint each label's pixels and outline them with `width` opaque pixels, inside the mask."""
    # One dark pixel around all labels keeps the outline visible on a bright background.
    canvas[~_erode(mask == 0, 1, beyond=True) & (mask == 0)] //= 3
    for label in np.unique(mask[mask != 0]).tolist():
        inside = mask == label
        colour = PALETTE[(int(label) - 1) % len(PALETTE)]
        tinted = canvas[inside] * (1 - FILL) + colour * FILL
        canvas[inside] = np.rint(tinted).astype(np.uint8)
        canvas[inside & ~_erode(inside, width, beyond=False)] = colour.astype(np.uint8)


def _erode(mask: np.ndarray, steps: int, *, beyond: bool) -> np.ndarray:
    """`mask` without its outer `steps` pixels; outside the image, the mask is `beyond`."""
    for _ in range(steps):
        m = np.pad(mask, 1, constant_values=beyond)
        mask = mask & m[:-2, 1:-1] & m[2:, 1:-1] & m[1:-1, :-2] & m[1:-1, 2:]
    return mask


def _draw_box(canvas: np.ndarray, box: np.ndarray, width: int) -> None:
    """Draw the outline of a box, with a dark edge that shows on a bright background."""
    left, right = sorted(np.rint(box[[0, 2]]).astype(int).tolist())
    top, bottom = sorted(np.rint(box[[1, 3]]).astype(int).tolist())
    for reach, colour in ((width // 2 + 1, BLACK), (width // 2, BOX)):
        for y in (top, bottom):
            canvas[_around(y, y, reach), _around(left, right, reach)] = colour
        for x in (left, right):
            canvas[_around(top, bottom, reach), _around(x, x, reach)] = colour


def _around(first: int, last: int, reach: int) -> slice:
    """Pixels `first` to `last` and `reach` more on both sides, without negative ones."""
    return slice(max(0, first - reach), max(0, last + reach + 1))


def _draw_point(canvas: np.ndarray, x: float, y: float, *, radius: float, positive: bool) -> None:
    """Draw a disc with a white rim and a white plus or minus, with smoothed edges."""
    reach = int(np.ceil(radius * 1.3)) + 1
    rows, columns = _around(int(y), int(y), reach), _around(int(x), int(x), reach)
    patch = canvas[rows, columns]
    dy = np.arange(rows.start, rows.start + patch.shape[0])[:, np.newaxis] - y
    dx = np.arange(columns.start, columns.start + patch.shape[1]) - x
    distance = np.hypot(dx, dy)
    _blend(patch, BLACK, radius * 1.3 - distance)
    _blend(patch, WHITE, radius * 1.2 - distance)
    _blend(patch, POSITIVE if positive else NEGATIVE, radius - distance)
    long, thick = 0.58 * radius, 0.17 * radius
    bar = np.maximum(np.abs(dx) - long, np.abs(dy) - thick)
    if positive:
        bar = np.minimum(bar, np.maximum(np.abs(dy) - long, np.abs(dx) - thick))
    _blend(patch, WHITE, -bar)


def _blend(patch: np.ndarray, colour: Colour, depth: np.ndarray) -> None:
    """Paint `colour` over the pixels inside a shape; `depth` is their distance from its edge.

    A pixel on the edge, at depth 0, is painted by half.
    """
    opacity = np.clip(depth + 0.5, 0, 1)[..., np.newaxis]
    patch[...] = np.rint(patch * (1 - opacity) + np.array(colour) * opacity).astype(np.uint8)
