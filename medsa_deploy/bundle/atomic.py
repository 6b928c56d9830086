"""Content → a file that is there whole or not at all: a temporary name first, then a rename.

Every file this package writes goes through here, so that a full disk, an error or an interrupt
leaves the previous file, or none. `bundle/folder.py` does the same for folders.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` at the end; its suffixes are lower case.

    The block writes the temporary file. If the block fails or is interrupted, the temporary file is
    removed and an earlier file at `path` stays as it was. OSError if the file cannot be renamed.

    >>> with whole_file(Path("mask.npy")) as temporary:
    ...     np.save(temporary, np.zeros((256, 256), np.uint8))
    """
    temporary = path.with_name(
        f".medsa-{secrets.token_hex(8)}{''.join(path.suffixes[-2:]).lower()}"
    )
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; OSError if it cannot be written.

    >>> write_bytes(Path("cache.bin"), b"content")
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all; OSError if it cannot be written.

    >>> write_text(Path("report.html"), "<p>Dice 0.95</p>")
    """
    write_bytes(path, text.encode())
