"""How much of this machine one file may take while it is read: a budget, compared with headers.

A file of a few kilobytes may announce gigabytes. Readers compare what a header announces with the
budget before they decode, so that such a file is refused in milliseconds.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path

from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.machine import memory_bytes

VARIABLE = "MEDSA_MAX_MEMORY"
"""Environment variable with the budget, such as 4GB; child processes inherit it."""
USUAL_MEMORY = 8 * 10**9
"""Bytes of a machine that does not report its memory."""
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?\s*", re.I)
POWERS = " KMGT"
USUAL_RATIO = 200
"""Images compress less than this. Content that inflates more counts as suspicious."""
WORKING_BYTES = 24
"""Bytes of memory for a pixel while an image is read, beside what its file stores: the copies of
libraries, float32 intensities and display values. Measured: 15 to 22."""


def _half_of_memory() -> int:
    return (memory_bytes() or USUAL_MEMORY) // 2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one file may take while it is read; anything above is refused before it is spent.

    >>> Limits(memory=2 * 10**9).memory
    2000000000
    """

    memory: int = field(default_factory=_half_of_memory)
    """Bytes of memory, at the peak. Default: half of the machine's, or of the container's."""
    pixels: int = 178_956_970
    """Pixels of one picture, slice or frame. Pillow refuses more, whatever is set here."""
    voxels: int = 2**33
    """Voxels of one volume."""
    decompressed: int = 2**29
    """Bytes of content that inflates to more than 200 times its size; images never do."""
    items: int = 250_000
    """Items of DICOM sequences, frames of a DICOM, 25 times the pages of a TIFF."""
    seconds: float = 30.0
    """Time for the decoding of one DICOM frame."""

    def __post_init__(self) -> None:
        values = (self.memory, self.pixels, self.voxels, self.decompressed, self.items)
        if min(values) < 1 or not self.seconds > 0:
            raise UsageError(f"{self} has a limit below 1: give limits above 0")

    @classmethod
    def of_memory(cls, memory: int) -> Limits:
        """Limits for `memory` bytes; above the default, other limits of memory rise with it."""
        usual = cls()
        factor = max(1.0, memory / usual.memory)
        return replace(
            usual,
            memory=memory,
            voxels=math.ceil(usual.voxels * factor),
            decompressed=math.ceil(usual.decompressed * factor),
            items=math.ceil(usual.items * factor),
        )


_current: ContextVar[Limits | None] = ContextVar("limits", default=None)


def current_limits() -> Limits:
    """The limits that hold here: of `reading_within`, of MEDSA_MAX_MEMORY, or the defaults.

    UsageError if the variable is no size.
    """
    return _current.get() or _process_limits(os.environ.get(VARIABLE))


@functools.lru_cache(maxsize=8)
def _process_limits(size: str | None) -> Limits:
    return Limits() if not size else Limits.of_memory(parse_size(size, VARIABLE))


@contextmanager
def reading_within(limits: Limits | None) -> Iterator[None]:
    """Let `limits` hold for what is read in the block; None changes nothing.

    >>> with reading_within(Limits(seconds=5)):
    ...     current_limits().seconds
    5
    """
    token = _current.set(limits or _current.get())
    try:
        yield
    finally:
        _current.reset(token)


def parse_size(text: str, name: str) -> int:
    """`4GB`, `500M`, `2GiB` or a number of bytes → bytes; UsageError, with the option's `name`.

    The size of every option: a GB is 10^9 bytes, a GiB 2^30.

    >>> parse_size("1.5 GB", "--max-memory"), parse_size("2GiB", "--cache")
    (1500000000, 2147483648)
    """
    match = SIZE.fullmatch(text)
    size = 0
    if match is not None:
        unit = 1024 if match[3] else 1000
        size = int(float(match[1]) * unit ** POWERS.index((match[2] or " ").upper()))
    if size < 1:
        raise UsageError(f"{name} {text!r} is no size: expected one such as 500MB or 4GB")
    return size


def check_memory(path: Path, needed: int, content: str) -> None:
    """ImageError if reading a file takes `needed` bytes, more than there may be.

    `content`: the header's figures, such as "512×512×2000 voxels of int16".
    """
    memory = current_limits().memory
    if needed > memory:
        raise ImageError(
            f"{path} announces {content}, which take {size_text(needed)} of memory to read; the "
            f"limit is {size_text(memory)}: crop it, or raise the limit with --max-memory "
            "(in Python: Limits)"
        )


def check_plane(path: Path, size: Sequence[int], stored: int) -> None:
    """ImageError for a picture, slice or frame of `size` that is too large to be read.

    `stored`: bytes of its pixels as the file stores them.
    """
    pixels, most = math.prod(size), current_limits().pixels
    if pixels > most:
        raise ImageError(
            f"{path} announces {_shape(size)} pixels, {pixels / 1e6:.0f} million; the limit is "
            f"{most / 1e6:.0f} million pixels; crop it or scale it down first (in Python, Limits "
            "has the limit)"
        )
    check_memory(path, stored + pixels * WORKING_BYTES, f"{_shape(size)} pixels")


def check_volume_size(
    path: Path, shape: Sequence[int], kind: object, in_memory: int, plane: int
) -> None:
    """ImageError for a volume that is too large to be read.

    `kind`: the type of its voxels. `in_memory`: bytes of voxels that are held at a time, 0 if the
    file is mapped. `plane`: pixels of its largest slice. The labels of a segmentation take a byte a
    voxel.
    """
    voxels, most = math.prod(shape), current_limits().voxels
    content = f"{_shape(shape)} voxels of {kind}"
    if voxels > most:
        raise ImageError(
            f"{path} announces {content}, {voxels / 1e6:.0f} million; the limit is "
            f"{most / 1e6:.0f} million: crop it, or raise the limit with --max-memory (in Python: "
            "Limits)"
        )
    check_memory(path, in_memory + voxels + plane * WORKING_BYTES, content)


def check_ratio(path: Path, announced: int, stored: int) -> None:
    """ImageError if `stored` bytes inflate to `announced` bytes as no image does."""
    most = current_limits().decompressed
    if announced > most and announced > stored * USUAL_RATIO:
        raise ImageError(
            f"{path} inflates from {size_text(stored)} to {size_text(announced)}, as no image "
            f"does; the limit is {size_text(most)}: it is damaged or made to fill the memory; "
            "otherwise raise the limit with --max-memory (in Python: Limits)"
        )


def size_text(size: int) -> str:
    """Bytes for people.

    >>> size_text(3_900_000_000), size_text(2000)
    ('3.9 GB', '2 kB')
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def _shape(size: Sequence[int]) -> str:
    """`512×512×2000`"""
    return "×".join(map(str, size))
