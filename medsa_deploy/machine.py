"""This machine's processor, cores, memory and system: all that makes it faster than another."""

from __future__ import annotations

import os
import platform
import sys

CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the memory of a container: of cgroups version 2, and of version 1."""


def processor() -> str:
    """The processor's name, as the system reports it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def memory_gb() -> float | None:
    """Installed memory in GB; None if the system does not report it."""
    size = _installed_bytes()
    return None if size is None else round(size / 1e9, 1)


def memory_bytes() -> int | None:
    """Bytes of memory that this process may use: of the machine, or of its container if less.

    None if the system reports neither.
    """
    sizes = [_installed_bytes() or 0]
    for path in CONTAINER_LIMITS:
        try:
            with open(path, encoding="ascii") as f:
                sizes.append(int(f.read()))
        except (OSError, ValueError):  # no container, or "max"
            continue
    return min((size for size in sizes if size > 0), default=None)


def resident_bytes() -> int | None:
    """Bytes of memory that this process has in RAM; None if the system does not report it.

    >>> resident_bytes() is None or resident_bytes() > 1e6
    True
    """
    try:
        with open("/proc/self/statm", "rb") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def _installed_bytes() -> int | None:
    """Bytes of the machine's memory; None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def system() -> str:
    """Operating system, its version and the architecture."""
    return f"{platform.system()} {platform.release()} ({platform.machine()})"
