"""The kernels' sources as host C++, run on numpy arrays: a block's threads are fibers."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from medsa_deploy import kernels
from medsa_deploy.kernels.axes import BLOCK, Launch

SOURCES = Path(kernels.__file__).parent
FLAGS = (
    *("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-gnu-unique"),
    *("-include", str(SOURCES / "host/cuda_host.h")),
)
ROUNDED = ("-ffp-contract=off",)
FUSED = ("-ffp-contract=fast", *(("-mfma",) if platform.machine() == "x86_64" else ()))


def can_fuse() -> bool:
    """Whether this processor has fused multiply-add, which nvcc makes of a product and a sum."""
    if platform.machine() != "x86_64":
        return platform.machine() == "aarch64"
    return " fma " in Path("/proc/cpuinfo").read_text(encoding="utf-8")


CONTRACTIONS = (ROUNDED, FUSED) if can_fuse() else (ROUNDED,)
"""Flags of every arithmetic that the kernels are tried in."""


def compile_host(*arguments: str | Path) -> None:
    """g++ with the shim; its messages where it fails."""
    done = subprocess.run(["g++", *FLAGS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@cache
def library(contraction: tuple[str, ...] = ROUNDED) -> ctypes.CDLL:
    """The kernels, compiled once a run."""
    return load(SOURCES / "host/library.cpp", *contraction)


def load(source: Path, *flags: str) -> ctypes.CDLL:
    """A host C++ file as a library in this process."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.so"
        compile_host("-O2", "-shared", "-fPIC", *flags, source, "-o", path)
        return ctypes.CDLL(str(path))


def run(launch: Launch, *, seed: int = 0, contraction: tuple[str, ...] = ROUNDED) -> None:
    """One launch; addresses are those of numpy arrays. `seed`: the order in which threads run."""
    lib = library(contraction)
    dimensions = ctypes.c_uint * 3
    outcome = getattr(lib, f"launch_{launch.source}")(
        ctypes.cast(getattr(lib, launch.entry), ctypes.c_void_p),
        ctypes.byref(launch.parameters),
        dimensions(*launch.grid),
        dimensions(*BLOCK),
        ctypes.c_uint(seed),
    )
    assert outcome == 0, f"threads of {launch.entry} were left waiting for each other"


def address(array: np.ndarray) -> int:
    return array.ctypes.data
