"""Content → a file that is there whole or not at all: a temporary name first, then a rename.

Every file this package writes goes through here, so that a full disk, an error, an interrupt or a
power cut leaves the previous file, or none. `bundle/folder.py` does the same for folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .durable import sync_file, sync_folder
from .leftovers import remove_files, temporary_name

INNER_SUFFIXES = (".nii", ".img", ".hdr", ".seg", ".ome", ".mask", ".overlay", ".logits")
"""Suffixes that may come before a last one: `.nii.gz`, `.seg.nrrd`, `.mask.png`."""
_CLEANED: set[Path] = set()
"""Folders in which this process has removed what killed ones left: once is enough."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` at the end; its suffixes are lower case.

    The block writes the temporary file. If the block fails or is interrupted, the temporary file is
    removed and an earlier file at `path` stays as it was. The content is on the disk before it gets
    its name. OSError if the file cannot be written or renamed.

    >>> with whole_file(Path("mask.npy")) as temporary:
    ...     np.save(temporary, np.zeros((256, 256), np.uint8))
    """
    if path.parent not in _CLEANED:
        _CLEANED.add(path.parent)
        remove_files(path.parent)
    temporary = path.with_name(temporary_name(_ending(path)))
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _ending(path: Path) -> str:
    """The suffix that tells a format, with the one before it if that is a format's too.

    Other words between points may be a patient's, and temporary files may stay after a kill.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if suffixes[:-1] and suffixes[0] in INNER_SUFFIXES else suffixes[-1:])


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
