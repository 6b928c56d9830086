"""What a killed command left → the state before its change, or after it; never one between.

Two kinds of temporary folder matter: an earlier bundle that lost its name (`.old`), and a work
folder with a note of files that were being moved into a bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from medsa_deploy.errors import UsageError

from .durable import sync_folder
from .leftovers import leftovers
from .lock import changing
from .manifest_text import MANIFEST_FILENAME

NOTE_FILENAME = "moves.json"
"""In a work folder: names that are moved, names that are removed, and the new manifest's hash."""
EARLIER = ".earlier"
"""Suffix of a replaced file, in the work folder."""


def tidy(folder: Path) -> list[Path]:
    """Remove what killed commands left in a folder, their changes undone or finished.

    The paths that were removed; none in a folder that cannot be written to, or that another command
    is changing.
    """
    if not leftovers(folder):
        return []
    try:
        with changing(folder):
            return recover_all(folder)
    except (UsageError, OSError):
        return []


def recover_all(folder: Path) -> list[Path]:
    """See `tidy`; for a caller that keeps others from changing the folder."""
    removed = []
    for path in leftovers(folder):
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                if path.suffix == ".old":
                    _put_back(path)
                finish_or_undo(path)
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _put_back(leftover: Path) -> None:
    """Give an earlier bundle its name back, if its replacement was killed between two renames."""
    for earlier in leftover.iterdir():
        target = leftover.parent / earlier.name
        if not os.path.lexists(target):
            earlier.rename(target)


def finish_or_undo(work: Path) -> None:
    """Finish the moves of a work folder if the new manifest is in place, else undo them.

    It can be interrupted and repeated.
    """
    bundle = work.parent
    try:
        note = json.loads((work / NOTE_FILENAME).read_text(encoding="utf-8"))
        moves, obsolete, expected = note["moves"], note["obsolete"], note["manifest_sha256"]
        names = [*moves, *obsolete]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            return  # not a note of this package
    except (OSError, ValueError, KeyError, TypeError):
        return  # killed before the first move
    content = (bundle / MANIFEST_FILENAME).read_bytes()
    if hashlib.sha256(content).hexdigest() == expected:
        for name in obsolete:
            (bundle / name).unlink(missing_ok=True)
    else:
        for name in moves:
            _undo(bundle / name, work / name)
    sync_folder(bundle)


def _undo(published: Path, new: Path) -> None:
    """Move a new file back into the work folder, and the file that it replaced into the bundle."""
    if not new.exists() and published.exists():
        published.replace(new)
    earlier = new.with_name(f"{new.name}{EARLIER}")
    if earlier.exists():
        earlier.replace(published)
