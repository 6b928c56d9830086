"""A grey RLE frame → its pixels, decoded in this process after a check that leaves nothing to fail.

RLE is decoded so fast that a process of its own would cost a third more. Its decoder is in Rust,
which cannot overwrite memory but panics if a segment is longer than its place. So segments are
decoded one by one, and their lengths compared, before the frame is put together. A frame that is
unusual in any way is left to `decoder`.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import numpy as np

HEADER = struct.Struct("<16L")
MOST_PIXELS = 2**20
"""Of a frame. A damaged segment may grow to 128 times that, for a moment."""


def decode_grey(content: bytes, options: dict[str, Any]) -> np.ndarray | None:
    """Stored values (H, W) of a frame; None if `decoder` must judge it.

    `options`: pydicom's pixel options.
    """
    rows, columns, bits = (options.get(n) for n in ("rows", "columns", "bits_allocated"))
    stored, signed = options.get("bits_stored"), options.get("pixel_representation")
    if options.get("samples_per_pixel") != 1 or bits not in (8, 16) or signed not in (0, 1):
        return None
    if not (
        rows and columns and 0 < rows * columns <= MOST_PIXELS and stored in range(1, bits + 1)
    ):
        return None
    values = _values(content, rows * columns, bits // 8)
    if values is None:
        return None
    pixels = values.view(f"{'i' if signed else 'u'}{bits // 8}").reshape(rows, columns)
    if unused := bits - stored:  # bits that are not stored may hold anything
        pixels <<= unused
        pixels >>= unused
    return pixels


def _values(content: bytes, pixels: int, count: int) -> np.ndarray | None:
    """(pixels,) uint8 or uint16; None if a segment does not fit. `count`: bytes of a pixel."""
    try:
        from rle.rle import decode_segment
    except ImportError:
        return None
    if len(content) < HEADER.size:
        return None
    announced, *offsets = HEADER.unpack_from(content)
    places = [*offsets[:count], len(content)]
    if announced != count or places[0] != HEADER.size or any(offsets[count:]):
        return None
    values = np.empty(pixels, f"u{count}")
    for place, (start, end) in enumerate(pairwise(places)):
        if not start < end or end - start > 2 * pixels + 2:
            return None
        try:
            plane = np.frombuffer(decode_segment(content[start:end]), np.uint8)
        except ValueError:
            return None
        if len(plane) != pixels:
            return None
        if place == 0:  # the most significant byte comes first
            values[:] = plane
        else:
            values <<= 8
            values |= plane
    return values
