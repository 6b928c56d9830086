"""The NVIDIA driver → the GPU of this machine. Every call of CUDA is made in this module.

The driver's own library is asked, which every machine with an NVIDIA GPU has, Jetsons included.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU."""

    name: str
    capability: str
    """Compute capability as compilers write it: `sm86` for 8.6."""
    driver_cuda: str
    """Newest version of CUDA that the driver can run."""


def device() -> Device | None:
    """The first GPU that CUDA shows; None without an NVIDIA driver or GPU."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    handle, version, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    calls = (
        (driver.cuInit, 0),
        (driver.cuDriverGetVersion, ctypes.byref(version)),
        (driver.cuDeviceGet, ctypes.byref(handle), 0),
        (driver.cuDeviceGetName, name, len(name), handle),
        (driver.cuDeviceGetAttribute, ctypes.byref(major), MAJOR, handle),
        (driver.cuDeviceGetAttribute, ctypes.byref(minor), MINOR, handle),
    )
    if any(function(*given) for function, *given in calls):  # each gives 0, or an error's number
        return None
    return Device(
        name=name.value.decode(errors="replace"),
        capability=f"sm{major.value}{minor.value}",
        driver_cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )
