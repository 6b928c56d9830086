"""Slices of a volume with their labels and prompts → one picture of tiles."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from .files import output_file
from .overlay import check_overlay_suffix, draw_overlay

COLUMNS = 4
CAPTION = 28
"""Height in pixels of the strip under a tile that names its slice."""
GAP = 8
"""Width in pixels of the strip between two tiles."""
TILE = 512
"""Longest side of a tile in pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """One slice of a montage."""

    caption: str
    background: np.ndarray
    """(H, W) or (H, W, 3), 0…255."""
    labels: np.ndarray
    """(H, W) integers, 0 is background."""
    points: Sequence[tuple[float, float]] = ()
    signs: Sequence[int] = ()
    """1 foreground, 0 background, for each point."""
    boxes: Sequence[Sequence[float]] = ()


def spread(slices: Sequence[int], count: int) -> list[int]:
    """`count` of `slices`, evenly spread from the first to the last; all if there are fewer.

    >>> spread(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(slices) <= count:
        return list(slices)
    return [slices[round(i * (len(slices) - 1) / (count - 1))] for i in range(count)]


def write_montage(path: str | os.PathLike[str], tiles: Sequence[Tile]) -> None:
    """Write the picture of `draw_montage` as PNG or JPEG, by the suffix of `path`."""
    path = Path(path)
    check_overlay_suffix(path)
    picture = draw_montage(tiles)
    with output_file(path) as temporary:
        PIL.Image.fromarray(picture).save(temporary, quality=92)


def draw_montage(tiles: Sequence[Tile]) -> np.ndarray:
    """Tiles in rows of four, each over its caption: (H, W, 3) uint8."""
    pictures = [_picture(tile) for tile in tiles]
    width = max(picture.width for picture in pictures) + GAP
    height = max(picture.height for picture in pictures) + CAPTION
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    canvas = PIL.Image.new("RGB", (columns * width - GAP, rows * height))
    draw = PIL.ImageDraw.Draw(canvas)
    font = PIL.ImageFont.load_default(size=18)
    for i, (tile, picture) in enumerate(zip(tiles, pictures, strict=True)):
        x, y = i % columns * width, i // columns * height
        canvas.paste(picture, (x, y))
        draw.text((x + 8, y + height - CAPTION + 2), tile.caption, font=font, fill=(255, 255, 255))
    return np.asarray(canvas)


def _picture(tile: Tile) -> PIL.Image.Image:
    """A tile without its caption, at most `TILE` pixels a side."""
    drawn = draw_overlay(
        tile.background, tile.labels, points=tile.points, labels=tile.signs, boxes=tile.boxes
    )
    picture = PIL.Image.fromarray(drawn)
    picture.thumbnail((TILE, TILE))
    return picture
