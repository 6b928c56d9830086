"""A path → a pydicom dataset, within the limits on what is read.

pydicom reads whatever a file announces: millions of items of a sequence, a deflated dataset of any
size. So unusual files are read through a stream that counts, and that looks into the content before
it is inflated. Usual headers are read without: counting costs a tenth of a slice.
"""

from __future__ import annotations

import io
import logging
import zlib
from pathlib import Path
from typing import Any

from medsa_deploy.errors import ImageError, MissingDependencyError

from .decoder import decoder
from .file_texts import library_text, uid_name
from .files import reading
from .limits import check_memory, check_ratio, current_limits, size_text

try:
    from pydicom.filereader import read_partial
    from pydicom.tag import Tag
    from pydicom.uid import (
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        RLELossless,
    )
except ImportError as e:
    raise MissingDependencyError("pydicom", extra="dicom", purpose="reading DICOM") from e

PIXELS = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))
"""Tags of pixels, in floats, doubles and integers."""
PIXEL_NAMES = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")
"""The tag of an item, in either byte order."""
SYNTAXES = "1.2.840.10008.1.2"
"""The beginning of every transfer syntax's UID."""
IN_THIS_PROCESS = (
    DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian,
    ImplicitVRLittleEndian, RLELossless,
)  # fmt: skip
"""Transfer syntaxes whose pixels need no process of their own, unless they are damaged."""
READS_AN_ITEM = 6
READS_BEFORE_COUNT = 2_000
"""Reads after which the items of a file are counted. A usual header takes a few hundred."""
LARGE_HEADER = 2**20
"""Bytes of a header whose items are counted before any of them is parsed."""
USUAL_HEADER = 2**17
"""Bytes that are read in small parts before a header counts as unusual."""
SMALL_PART = 2**10
"""Bytes of a small part; pydicom reads pixels in larger parts."""
INFLATED_STEP = 2**22
"""Bytes that are inflated, or searched for items, at a time."""


def _without_quotations(record: logging.LogRecord) -> bool:
    """Cut what pydicom quotes from files out of its own log, in any program that reads it."""
    record.msg, record.args, record.exc_info = library_text(record.getMessage()), (), None
    return True


logging.getLogger("pydicom").addFilter(_without_quotations)


class _UnusualHeaderError(Exception):
    """A file that must be read again, and counted."""


class _UsualFile(io.FileIO):
    """A file that is refused if its header is long, or if it is deflated."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._bytes = 0

    def readinto(self, buffer: Any, /) -> int | None:
        if len(buffer) <= SMALL_PART:
            self._bytes += len(buffer)
            if self._bytes > USUAL_HEADER:
                raise _UnusualHeaderError
        return super().readinto(buffer)

    def readall(self) -> bytes:
        raise _UnusualHeaderError  # pydicom reads to the end only what it inflates


class _Content(io.BytesIO):
    name = ""
    """pydicom asks every stream for it."""


class _CountedFile(io.BufferedReader):
    """A file, or the bytes of one, that refuses to be read without end."""

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        raw: Any = io.FileIO(path) if content is None else _Content(content)
        super().__init__(raw)
        self.path, self.reads = path, 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads == READS_BEFORE_COUNT:
            self._count_items()
        elif self.reads % READS_BEFORE_COUNT == 0:
            self._check_reads()
        content = super().read(size)
        if size is None or size < 0:  # pydicom reads to the end only what it inflates
            _check_inflated(self.path, content)
        return content

    def _count_items(self) -> None:
        """ImageError for more items than there may be, in all of the stream."""
        place = self.tell()
        self.seek(0)
        counts = [0 for _ in ITEM_TAGS]
        while part := super().read(INFLATED_STEP):
            counts = [n + part.count(tag) for n, tag in zip(counts, ITEM_TAGS, strict=True)]
        _check_count(self.path, max(counts))
        self.seek(place)

    def _check_reads(self) -> None:
        """ImageError for more reads than there may be."""
        most = current_limits().items
        if self.reads > most * READS_AN_ITEM:
            raise ImageError(
                f"{self.path} has a header of more than {self.reads // 2} elements; the limit is "
                f"{most * READS_AN_ITEM // 2}: it is damaged, or raise the limit with --max-memory "
                "(in Python: Limits)"
            )


def load(path: Path) -> Any:
    """The dataset of a file that holds pixels; ImageError if it holds none."""
    with reading(path, "DICOM"):
        size = path.stat().st_size
        check_memory(path, size, f"{size_text(size)} of DICOM")
        # Forced, because old files lack the preamble. They name no transfer syntax either: it
        # follows from the encoding that pydicom has detected.
        dataset = _read_file(path, None, pixels=True)
        if not dataset.file_meta.get("TransferSyntaxUID"):
            implicit, little_endian = dataset.original_encoding
            explicit = ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
        pixels = next((name for name in PIXEL_NAMES if name in dataset), None)
        if pixels is None:
            kind = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")
            content = f"it is {uid_name(kind)}" if kind else "it does not look like DICOM"
            raise ImageError(f"{path} holds no pixel data ({content}); give a DICOM image")
        _check_header(path, dataset, size, pixels)
    return dataset


def load_header(path: Path, names: list[str] | None = None) -> Any:
    """All attributes except the pixels, or only those in `names`; ImageError if it is not DICOM."""
    with reading(path, "DICOM"):
        header = _read_file(path, names, pixels=False)
        if "SOPClassUID" not in header and "Rows" not in header:
            raise ImageError(f"{path} does not look like DICOM; take it out of the folder")
    return header


def content_header(name: Path, content: bytes, names: list[str] | None = None) -> Any:
    """As `load_header`, of a file's bytes; errors call them `name`."""
    with reading(name, "DICOM"), _CountedFile(name, content) as stream:
        header = read_partial(stream, _at_pixels, specific_tags=_tags(names))
        _check_large(name, stream)
    return header


def _check_large(path: Path, stream: io.BufferedReader[Any]) -> None:
    """ImageError for too many items in a large header that has just been read."""
    place = stream.tell()
    if place > LARGE_HEADER:
        stream.seek(0)
        check_items(path, io.BufferedReader.read(stream, place))


def check_items(path: Path, content: bytes) -> None:
    """ImageError if there are more items of sequences in some bytes than there may be."""
    _check_count(path, max(content.count(tag) for tag in ITEM_TAGS))


def _check_count(path: Path, count: int) -> None:
    most = current_limits().items
    if count > most:
        raise ImageError(
            f"{path} announces {count} items of sequences; the limit is {most}: it is damaged, or "
            "raise the limit with --max-memory (in Python: Limits)"
        )


def _read_file(path: Path, names: list[str] | None, *, pixels: bool) -> Any:
    """The dataset of a file, with its pixels or up to them."""
    try:
        with io.BufferedReader(_UsualFile(path), SMALL_PART) as stream:
            return _read_checked(path, stream, names, pixels=pixels)
    except _UnusualHeaderError:
        with _CountedFile(path) as stream:
            return _read_checked(path, stream, names, pixels=pixels)


def _read_checked(
    path: Path, stream: io.BufferedReader[Any], names: list[str] | None, *, pixels: bool
) -> Any:
    dataset = _read(stream, names, pixels=pixels)
    if not pixels:
        _check_large(path, stream)
    return dataset


def _read(stream: Any, names: list[str] | None, *, pixels: bool) -> Any:
    """The dataset of a stream, with its pixels or up to them."""
    stop = None if pixels else _at_pixels
    dataset = read_partial(stream, stop, force=True, specific_tags=_tags(names))
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
    if syntax.startswith(SYNTAXES) and syntax not in IN_THIS_PROCESS:
        decoder.start()  # it gets ready while headers are read
    return dataset


def _at_pixels(tag: Any, vr: str | None, length: int) -> bool:
    return tag in PIXELS


def _tags(names: list[str] | None) -> Any:
    return None if names is None else [Tag(name) for name in names]


def _check_header(path: Path, dataset: Any, size: int, pixels: str) -> None:
    """ImageError for too many items in a large header; pydicom parses them at first use."""
    element = dataset.get_item(pixels)
    header = size - len(element.value or b"")
    if header <= LARGE_HEADER:
        return
    place = getattr(element, "value_tell", 0) or size
    with path.open("rb") as f:
        check_items(path, f.read(place))
        f.seek(place + len(element.value or b""))
        check_items(path, f.read())


def _check_inflated(path: Path, content: bytes) -> None:
    """ImageError if deflated bytes inflate to more than there may be."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    total, items, waiting = 0, 0, content
    while waiting and not inflater.eof:
        part = inflater.decompress(waiting, INFLATED_STEP)
        waiting = inflater.unconsumed_tail
        total += len(part)
        items += part.count(ITEM_TAGS[0])
        _check_count(path, items)
        check_ratio(path, total, len(content))
        check_memory(path, total, f"a dataset of {size_text(total)} or more")
