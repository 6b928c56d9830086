"""Temporary files and folders: their names, and the removal of those whose writer is gone.

A name says which process wrote it, so that the next command on the folder can tell what a killed
process left from what another command is writing now.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

STRANGER_SECONDS = 24 * 3600.0
"""Age at which what another machine or container, or an earlier version, left is removed."""
_NAME = re.compile(
    r"\.medsa-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>[0-9a-f]{8}\d+)-[0-9a-f]{8}(\..*)?"
)
_EARLIER = re.compile(r"\.medsa-[0-9a-f]{16}(\..*)?|\.new-.*\.tmp|\..+\.[0-9a-f]{16}\.tmp")
"""Names that earlier versions gave."""


def temporary_name(suffix: str) -> str:
    """A hidden name that says which process uses it; `suffix` ends it.

    >>> is_temporary(temporary_name(".png"))
    True
    """
    return f".medsa-{_host()}-{os.getpid()}-{_start(os.getpid())}-{secrets.token_hex(4)}{suffix}"


def is_temporary(name: str) -> bool:
    """Whether a file name is one of a temporary file or folder, of this or an earlier version.

    >>> is_temporary("manifest.json")
    False
    """
    return bool(_NAME.fullmatch(name) or _EARLIER.fullmatch(name))


def leftovers(folder: Path) -> list[Path]:
    """Temporary files and folders in `folder` whose writer is gone; none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            paths = [Path(entry.path) for entry in entries if is_temporary(entry.name)]
    except OSError:
        return []
    return [path for path in paths if _writer_is_gone(path)]


def remove_files(folder: Path) -> None:
    """Remove temporary files whose writer is gone; folders stay, for `bundle/recovery.py`."""
    for path in leftovers(folder):
        if path.is_symlink() or not path.is_dir():
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _writer_is_gone(path: Path) -> bool:
    """Whether the process that wrote a temporary file has ended."""
    match = _NAME.fullmatch(path.name)
    if match is not None and match["host"] == _host() and os.name == "posix":
        start = _start(int(match["pid"]))
        return start is None or start != match["start"]
    with suppress(OSError):
        return time.time() - path.lstat().st_mtime > STRANGER_SECONDS
    return False


@cache
def _host() -> str:
    """Eight digits for this machine and this container: process numbers are theirs."""
    parts = [socket.gethostname()]
    for path in ("/etc/machine-id", "/proc/self/ns/pid"):
        with suppress(OSError):
            parts.append(os.readlink(path) if "ns" in path else Path(path).read_text())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


@cache
def _boot() -> str:
    """Eight digits for this start of the machine; zeros if the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return "0" * 8


def _start(pid: int) -> str | None:
    """When a process began, as boot and clock ticks; None if there is no such process."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    else:
        state, *fields = status.rpartition(")")[2].split()
        return None if state in "ZX" else f"{_boot()}{fields[18]}"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return f"{_boot()}0"
