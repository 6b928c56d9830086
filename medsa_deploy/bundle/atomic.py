"""Files that appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with the same suffixes, that becomes `path` at the end.

    If the block fails or is interrupted, the temporary file is removed and an older `path` is
    untouched. OSError if the file cannot be renamed.

    >>> with whole_file(Path("mask.png")) as temporary:  # doctest: +SKIP
    ...     temporary.write_bytes(data)
    """
    temporary = path.with_name(f".medsa-{secrets.token_hex(8)}{''.join(path.suffixes[-2:])}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; OSError if it cannot be written."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all; OSError if it cannot be written."""
    write_bytes(path, text.encode())
