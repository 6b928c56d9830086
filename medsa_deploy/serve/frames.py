"""Masks and progress → the bytes of an answer that comes piece by piece.

A frame is a JSON object and, for a slice, its labels. On the wire: the length of the JSON (uint32),
the length of the labels in bytes (uint32), the JSON, the labels; all little endian. Labels are runs
along the rows of the slice, each a uint32: the label in the upper 8 bits, the length in the others.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

LENGTH_BITS = 24
MOST_LENGTH = 2**LENGTH_BITS - 1


def frame(facts: Mapping[str, Any], labels: bytes = b"") -> bytes:
    """One frame.

    >>> frame({"kind": "end"})[8:]
    b'{"kind":"end"}'
    """
    text = json.dumps(facts, separators=(",", ":")).encode()
    return struct.pack("<II", len(text), len(labels)) + text + labels


def runs(plane: NDArray[np.uint8]) -> bytes:
    """The labels (H, W) of a slice as runs.

    >>> np.frombuffer(runs(np.array([[0, 0, 3]], np.uint8)), "<u4").tolist()
    [2, 50331649]
    """
    flat = np.ascontiguousarray(plane).ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=np.uint8(flat[0] ^ 1)))
    lengths = np.diff(starts, append=len(flat))
    labels = flat[starts].astype(np.uint32)
    if len(flat) > MOST_LENGTH and lengths.max() > MOST_LENGTH:
        parts = -(-lengths // MOST_LENGTH)
        labels = np.repeat(labels, parts)
        remainders = lengths - (parts - 1) * MOST_LENGTH
        lengths = np.full(len(labels), MOST_LENGTH)
        lengths[np.cumsum(parts) - 1] = remainders
    words = labels << np.uint32(LENGTH_BITS) | lengths.astype(np.uint32)
    content: bytes = words.astype("<u4").tobytes()
    return content
