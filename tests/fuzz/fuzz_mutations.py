"""A random generator and intact files → a damaged file; most formats are damaged inside.

Random bytes alone are refused by the first checksum. So chunks of a PNG get their checksum again,
what is compressed is damaged before it is compressed, and JSON is damaged as a tree.
"""

from __future__ import annotations

import base64
import copy
import gzip
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from fuzz_seeds import signed

from medsa_deploy.bundle.manifest_text import document_to_text

Mutation = Callable[[Random, Sequence[bytes]], bytes]
EDGES = (
    0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 1023, 4096, 2**15 - 1, 2**15,
    2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
"""Integers at which types and limits end."""
NUMBERS = (b"0", b"-1", b"1e400", b"nan", b"inf", b"65536", b"4294967296", b"99999999999", b"")
DIGITS = re.compile(rb"-?\d+(?:\.\d+)?")
HEADER_BYTES = 400
"""Bytes in which most formats have their header; half of the changes are there."""
MOST_GROWTH = 65_536
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 0.5, 1e308, float("nan"), float("inf"), 2**63, -(2**31), "", "a",
    "a\nb", "../../etc/passwd", "\ud800", "0" * 5000, [], [0], {}, {"a": 1}, [[[[]]]],
)  # fmt: skip
"""JSON's values of every type."""
PIXELS = b"\xe0\x7f\x10\x00"
SHORT_LENGTHS = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
"""Value representations with two bytes of length."""


def mutated(random: Random, content: bytes, *, start: int = 0) -> bytes:
    """`content` with one to a few changes, at `start` or later."""
    data = bytearray(content)
    for _ in range(1 + min(random.getrandbits(3), random.getrandbits(3))):
        if len(data) <= start:
            break
        _CHANGES[random.randrange(len(_CHANGES))](random, data, _place(random, data, start))
    return bytes(data[: len(content) + MOST_GROWTH])


def _place(random: Random, data: bytearray, start: int) -> int:
    end = len(data)
    if random.random() < 0.5:
        end = min(end, start + HEADER_BYTES)
    return random.randrange(start, end)


def _flip(random: Random, data: bytearray, place: int) -> None:
    data[place] ^= 1 << random.randrange(8)


def _set_byte(random: Random, data: bytearray, place: int) -> None:
    data[place] = random.randrange(256)


def _set_integer(random: Random, data: bytearray, place: int) -> None:
    width = random.choice((1, 2, 4, 8))
    value = random.choice(EDGES) % 2 ** (8 * width)
    order = random.choice(("little", "big"))
    data[place : place + width] = value.to_bytes(width, order)[: len(data) - place]


def _add(random: Random, data: bytearray, place: int) -> None:
    data[place] = (data[place] + random.randint(-4, 4)) % 256


def _delete(random: Random, data: bytearray, place: int) -> None:
    del data[place : place + random.choice((1, 2, 4, 8, 64))]


def _insert(random: Random, data: bytearray, place: int) -> None:
    data[place:place] = random.randbytes(random.choice((1, 2, 4, 8, 64)))


def _repeat(random: Random, data: bytearray, place: int) -> None:
    part = data[place : place + random.choice((1, 2, 8, 32, 256))]
    data[place:place] = bytes(part) * random.choice((1, 1, 1, 2, 16))


def _cut(random: Random, data: bytearray, place: int) -> None:
    if random.random() < 0.3:
        del data[place:]


def _copy(random: Random, data: bytearray, place: int) -> None:
    source = random.randrange(len(data))
    part = data[source : source + random.choice((1, 2, 4, 8, 64))]
    data[place : place + len(part)] = part


def _set_number(random: Random, data: bytearray, place: int) -> None:
    if match := DIGITS.search(data, place):
        data[match.start() : match.end()] = random.choice(NUMBERS)


_CHANGES = (
    _flip, _set_byte, _set_byte, _set_integer, _set_integer, _add, _delete, _insert, _repeat, _cut,
    _copy, _set_number,
)  # fmt: skip


def damage_bytes(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Any bytes of a file; at times the rest of another file follows."""
    content = random.choice(seeds)
    if random.random() < 0.05:
        other = random.choice(seeds)
        content = content[: random.randrange(len(content))] + other[random.randrange(len(other)) :]
    return mutated(random, content)


def damage_png(random: Random, seeds: Sequence[bytes]) -> bytes:
    """A chunk of a PNG, with a checksum that fits; pixels before they are compressed."""
    content = random.choice(seeds)
    if random.random() < 0.2:
        return mutated(random, content)
    chunks, place = [], 8
    while place < len(content):
        (size,) = struct.unpack_from(">L", content, place)
        kind, body = content[place + 4 : place + 8], content[place + 8 : place + 8 + size]
        chunks.append((kind, body))
        place += 12 + size
    number = random.randrange(len(chunks))
    kind, body = chunks[number]
    if kind == b"IDAT" and random.random() < 0.5:
        body = zlib.compress(mutated(random, zlib.decompress(body)), 1)
    elif random.random() < 0.1:
        kind = mutated(random, kind)[:4].ljust(4, b"a")
    elif body:
        body = mutated(random, body)
    chunks[number] = (kind, body)
    if random.random() < 0.1:
        chunks.insert(random.randrange(len(chunks)), random.choice(chunks))
    return content[:8] + b"".join(
        struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def damage_gzip(random: Random, seeds: Sequence[bytes]) -> bytes:
    """The content of a gzip file, or at times its own bytes."""
    content = random.choice(seeds)
    if random.random() < 0.3:
        return mutated(random, content)
    return gzip.compress(mutated(random, gzip.decompress(content)), 1, mtime=0)


def damage_dicom(random: Random, seeds: Sequence[bytes]) -> bytes:
    """An element of a dataset: its value, length, type or place; or any bytes."""
    content = random.choice(seeds)
    start = 132 if content[128:132] == b"DICM" else 0
    elements = _elements(content, start)
    if len(elements) < 3 or random.random() < 0.4:
        return mutated(random, content, start=start if start < len(content) else 0)
    parts = [content[a:b] for a, b in elements]
    number = random.randrange(len(parts))
    part = parts[number]
    match random.randrange(5):
        case 0:
            parts.insert(random.randrange(len(parts)), part)
        case 1:
            del parts[number]
        case 2:
            parts[number] = part[:4] + parts[random.randrange(len(parts))][4:]
        case 3:
            parts[number] = mutated(random, part)
        case _:
            parts[number] = part[:8] + mutated(random, part[8:]) if len(part) > 8 else part
    return content[: elements[0][0]] + b"".join(parts) + content[elements[-1][1] :]


def _elements(content: bytes, place: int) -> list[tuple[int, int]]:
    """Begin and end of each explicit little endian element, up to the first that is unusual."""
    elements = []
    while place + 8 <= len(content):
        vr = content[place + 4 : place + 6]
        if vr in SHORT_LENGTHS:
            (size,) = struct.unpack_from("<H", content, place + 6)
            end = place + 8 + size
        elif vr.isalpha() and vr.isupper() and place + 12 <= len(content):
            (size,) = struct.unpack_from("<L", content, place + 8)
            end = place + 12 + size
        else:
            break
        if end > len(content):
            break
        elements.append((place, end))
        place = end
    return elements


def damage_frames(random: Random, seeds: Sequence[bytes]) -> bytes:
    """The encoded pixels of a DICOM; at times its header."""
    if random.random() < 0.25:
        return damage_dicom(random, seeds)
    content = random.choice(seeds)
    place = content.rfind(PIXELS)
    return mutated(random, content, start=place + 12 if place > 0 else 0)


def damage_deflated(random: Random, seeds: Sequence[bytes]) -> bytes:
    """A deflated dataset before it is deflated, or at times its own bytes."""
    content = random.choice(seeds)
    (size,) = struct.unpack_from("<L", content, 140)
    place = 144 + size
    if random.random() < 0.3:
        return mutated(random, content, start=132)
    inflated = zlib.decompress(content[place:], -zlib.MAX_WBITS)
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    return content[:place] + packer.compress(mutated(random, inflated)) + packer.flush()


def damage_archive(random: Random, seeds: Sequence[bytes]) -> bytes:
    """An entry of a ZIP, mostly its pickle; or the bytes of a file."""
    content = random.choice(seeds)
    if not content.startswith(b"PK") or random.random() < 0.2:
        return mutated(random, content)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as target:
        names = source.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        damaged = random.choice(pickles if pickles and random.random() < 0.8 else names)
        for info in source.infolist():
            body = source.read(info)
            target.writestr(info, mutated(random, body) if info.filename == damaged else body)
    return buffer.getvalue()


def changed_tree(random: Random, value: Any) -> Any:
    """A JSON value with one to three changes; `value` is not changed."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        nodes: list[tuple[Any, Any]] = []
        _collect(value, nodes)
        if not nodes:
            break
        owner, key = random.choice(nodes)
        match random.randrange(6):
            case 0:
                del owner[key]
            case 1:
                owner[key] = copy.deepcopy(random.choice(nodes)[0])
            case 2 if isinstance(owner, dict):
                owner[random.choice(("", "a", key + "s"))] = owner.pop(key)
            case 3 if isinstance(owner[key], int | float):
                owner[key] = owner[key] * random.choice((-1, 2, 0.5, 1e9)) + random.choice((0, 1))
            case _:
                owner[key] = copy.deepcopy(random.choice(VALUES))
    return value


def _collect(value: Any, nodes: list[tuple[Any, Any]]) -> None:
    """Every place in a tree, as its container and key."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        nodes.append((value, key))
        if isinstance(value[key], dict | list):
            _collect(value[key], nodes)


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def damage_json(random: Random, seeds: Sequence[bytes]) -> bytes:
    """A JSON tree; at times the bytes of its text."""
    content = random.choice(seeds)
    if random.random() < 0.2:
        return mutated(random, content)
    return _text(changed_tree(random, json.loads(content)))


def damage_manifest(random: Random, seeds: Sequence[bytes]) -> bytes:
    """A manifest's tree, with a digest that fits; at times its bytes."""
    content = random.choice(seeds)
    if random.random() < 0.1:
        return mutated(random, content)
    data = json.loads(content)
    data.pop("digest")
    changed = changed_tree(random, data)
    try:
        return document_to_text(changed).encode()
    except (TypeError, ValueError):  # NaN, half of a surrogate pair: no text with a digest has them
        return _text(changed)


def damage_safetensors(random: Random, seeds: Sequence[bytes]) -> bytes:
    """The header's tree, or any bytes."""
    content = random.choice(seeds)
    if random.random() < 0.4:
        return mutated(random, content)
    (size,) = struct.unpack_from("<Q", content)
    header = _text(changed_tree(random, json.loads(content[8 : 8 + size])))
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def damage_signature(random: Random, seeds: Sequence[bytes]) -> bytes:
    """A signature's tree, or its statement, signed again."""
    content = random.choice(seeds)
    if random.random() < 0.5:
        return damage_json(random, seeds)
    data = json.loads(content)
    statement = json.loads(base64.b64decode(data["dsseEnvelope"]["payload"]))
    return signed(data, _text(changed_tree(random, statement)))
