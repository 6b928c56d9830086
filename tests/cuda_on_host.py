"""The kernels' sources as host C++, run on numpy arrays: a block's threads are fibers."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from medsa_deploy import kernels
from medsa_deploy.kernels.axes import BLOCK, Launch

SOURCES = Path(kernels.__file__).parent
FLAGS = (
    *("-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-include", str(SOURCES / "host/cuda_host.h")),
)


def compile_host(*arguments: str | Path) -> None:
    """g++ with the shim; its messages where it fails."""
    done = subprocess.run(["g++", *FLAGS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@cache
def library() -> ctypes.CDLL:
    """The kernels, compiled once a run."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.so"
        compile_host("-O2", "-shared", "-fPIC", SOURCES / "host/library.cpp", "-o", path)
        return ctypes.CDLL(str(path))


def run(launch: Launch, *, seed: int = 0) -> None:
    """One launch; addresses are those of numpy arrays. `seed`: the order in which threads run."""
    lib = library()
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
