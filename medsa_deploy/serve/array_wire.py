"""Arrays ⇄ the packed bytes of nnInteractive's protocol, checked before they are unpacked.

magic "NNIA", version 1, codec, number of axes, length of the type's name, the name, axes (int64),
number of chunks (uint32); for each chunk its length (uint64), its packed length (uint64) and a
Blosc2 frame. Little endian.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from medsa_deploy.errors import ImageError, MissingDependencyError

from .refusals import TooLargeError

MAGIC, VERSION = b"NNIA", 1
ZSTD, LZ4 = 1, 2
HEADER = struct.Struct("<4sBBBB")
CHUNK = struct.Struct("<QQ")
MOST_CHUNK = 2**30
MOST_AXES = 4
TYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
         "float16", "float32", "float64")  # fmt: skip


def blosc() -> Any:
    """The library; MissingDependencyError."""
    try:
        import blosc2
    except ImportError as e:
        raise MissingDependencyError("blosc2", extra="serve", purpose="nnInteractive") from e
    return blosc2


def pack(array: np.ndarray) -> bytes:
    """An array of any of `TYPES` → bytes.

    >>> unpack(pack(np.eye(3, dtype=np.uint8)), most_bytes=100).trace()
    3
    """
    library = blosc()
    array = np.ascontiguousarray(array)
    name = array.dtype.name.encode()
    content = array.tobytes()
    chunks = [content[i : i + MOST_CHUNK] for i in range(0, len(content), MOST_CHUNK)]
    parts = [
        HEADER.pack(MAGIC, VERSION, LZ4, array.ndim, len(name)),
        name,
        struct.pack(f"<{array.ndim}q", *array.shape),
        struct.pack("<I", len(chunks)),
    ]
    for chunk in chunks:
        packed = library.compress2(
            chunk,
            typesize=array.itemsize,
            codec=library.Codec.LZ4,
            clevel=1,
            filters=[library.Filter.NOFILTER],
        )
        parts += [CHUNK.pack(len(chunk), len(packed)), packed]
    return b"".join(parts)


def unpack(content: bytes, *, most_bytes: int) -> np.ndarray:
    """Bytes → the array; ImageError for bytes that are damaged, TooLargeError beyond a size."""
    try:
        return _unpack(content, most_bytes)
    except (struct.error, UnicodeDecodeError, TypeError, ValueError, RuntimeError) as e:
        raise ImageError(f"the packed array is damaged: {e!s:.80}") from e


def _unpack(content: bytes, most_bytes: int) -> np.ndarray:
    library = blosc()
    magic, version, codec, axes, name_length = HEADER.unpack_from(content)
    if magic != MAGIC or version != VERSION or codec not in (ZSTD, LZ4) or axes > MOST_AXES:
        raise ValueError(f"its header is {content[:8]!r}")
    place = HEADER.size
    name = content[place : place + name_length].decode("ascii")
    if name not in TYPES:
        raise ValueError(f"its type is {name!r:.20}")
    dtype = np.dtype(name)
    shape = struct.unpack_from(f"<{axes}q", content, place + name_length)
    size = math.prod(shape) * dtype.itemsize
    if any(length < 0 for length in shape):
        raise ValueError(f"its shape is {shape}")
    if size > most_bytes:
        raise TooLargeError(
            f"the array takes {size / 2**20:.0f} MB, more than the {most_bytes / 2**20:.0f} MB "
            "that are left"
        )
    place += name_length + 8 * axes
    (count,) = struct.unpack_from("<I", content, place)
    place += 4
    values = np.empty(size, np.uint8)
    filled = 0
    for _ in range(count):
        length, packed_length = CHUNK.unpack_from(content, place)
        place += CHUNK.size
        packed = content[place : place + packed_length]
        place += packed_length
        if len(packed) != packed_length or packed_length < 32 or length > size - filled:
            raise ValueError("a chunk is cut off, or longer than the array")
        if not length or library.get_cbuffer_sizes(packed)[:2] != (length, packed_length):
            raise ValueError("a chunk does not have the length that it announces")
        library.decompress2(packed, dst=values[filled : filled + length])
        filled += length
    if filled != size:
        raise ValueError(f"it holds {filled} bytes, expected {size}")
    return values.view(dtype).reshape(shape)
