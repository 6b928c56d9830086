"""A picture that Pillow has opened → refused, if its header announces more than there may be.

Pillow reads headers when it opens a file, and decodes later: everything is compared in between.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.ImageFile

from medsa_deploy.errors import ImageError

from .files import MOST_GZIP
from .limits import check_plane, check_ratio, current_limits, size_text

PAGE_ITEMS = 25
"""Items of the limits that a page of a TIFF counts as: each is compared with all before it."""
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL = 258, 277
MOST_EXPANSION = {"raw": 1, "tiff_adobe_deflate": MOST_GZIP, "tiff_deflate": MOST_GZIP}
"""TIFF compression → the most bytes that a byte may become; other compressions have no bound."""
BYTES_OF_MODE = {"1": 1, "L": 1, "P": 1, "LA": 4, "PA": 4, "I;16": 2, "I;16B": 2, "I;16L": 2}
"""Pillow's mode → bytes of a pixel in its memory; 4 for others."""
PIXEL_COUNT = re.compile(r"\((\d+) pixels\)")


def check_picture(path: Path, picture: PIL.ImageFile.ImageFile) -> None:
    """ImageError for a picture that is too large, or larger than its file can hold."""
    columns, rows = picture.size
    announced, expansion = columns * rows, 0
    if picture.format == "PNG":
        announced, expansion = announced // 8, MOST_GZIP  # a bit for each pixel, or more
    elif picture.format == "TIFF":
        announced = announced * _tiff_bits(picture) // 8
        expansion = MOST_EXPANSION.get(str(picture.info.get("compression")), 0)
    size = path.stat().st_size
    if expansion and announced > size * expansion:
        raise ImageError(
            f"{path} announces {columns}×{rows} pixels, {size_text(announced)} or more; a file of "
            f"{size_text(size)} cannot hold them: it is damaged or cut off, copy or export it again"
        )
    check_plane(path, (columns, rows), columns * rows * BYTES_OF_MODE.get(picture.mode, 4))
    check_ratio(path, announced, size)


def check_pages(path: Path) -> None:
    """ImageError for a TIFF of more pages than there may be."""
    most = max(1, current_limits().items // PAGE_ITEMS)
    with path.open("rb") as f:
        for count, _ in enumerate(_directories(f, os.path.getsize(path)), 1):
            if count > most:
                raise ImageError(
                    f"{path} announces more than {most} pages, the limit: split it, or raise the "
                    "limit with --max-memory (in Python: Limits)"
                )


def announced_size(error: BaseException) -> str:
    """`180 million pixels`, of Pillow's error for a picture that is too large."""
    match = PIXEL_COUNT.search(str(error))
    return "too much" if match is None else f"{int(match[1]) / 1e6:.0f} million pixels"


def _directories(f: Any, size: int) -> Iterator[int]:
    """The places of a TIFF's directories, each once."""
    order = "<" if f.read(4)[:2] == b"II" else ">"
    (place,) = struct.unpack(order + "L", f.read(4))
    known: set[int] = set()
    while 0 < place < size and place not in known:
        known.add(place)
        yield place
        f.seek(place)
        if len(head := f.read(2)) < 2:
            return
        (entries,) = struct.unpack(order + "H", head)
        f.seek(place + 2 + 12 * entries)
        if len(following := f.read(4)) < 4:
            return
        (place,) = struct.unpack(order + "L", following)


def _tiff_bits(picture: Any) -> int:
    """Bits of a pixel of a TIFF; 1 or more."""
    bits = picture.tag_v2.get(BITS_PER_SAMPLE, 1)
    samples = picture.tag_v2.get(SAMPLES_PER_PIXEL, 1)
    first = bits[0] if isinstance(bits, tuple) else bits
    count = samples[0] if isinstance(samples, tuple) else samples
    return max(1, math.prod((int(first), int(count))))
