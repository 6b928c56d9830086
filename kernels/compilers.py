"""CUDA C++ → cubins or PTX, by nvcc or NVRTC. Neither needs a driver or a GPU.

nvcc comes with a CUDA toolkit. NVRTC, the same compiler as a library, comes from a package index.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from medsa_deploy.errors import BuildError, MissingDependencyError

STANDARD = "c++17"
VIRTUAL = "compute"
"""What targets of PTX begin with: `compute86`."""
HEADER = "device.cuh"
"""What the sources include, from their own folder."""


class Compiler(Protocol):
    """What makes cubins, each for one kind of GPU, and PTX, which a driver compiles for its own."""

    @property
    def name(self) -> str:
        """Which compiler, and its version."""

    @property
    def cuda(self) -> int | None:
        """Major version of the CUDA that it belongs to; None if it does not say."""

    @property
    def targets(self) -> tuple[str, ...]:
        """GPUs it compiles for: `sm75`, …, in order."""

    def cubin(self, source: Path, target: str) -> tuple[bytes, str]:
        """A source for one target → its cubin, and the compiler's messages; or BuildError.

        target: `sm86` for a cubin; `compute86` for PTX that newer GPUs than that take as well.
        """


@dataclass(frozen=True, kw_only=True)
class Nvcc:
    """nvcc of a CUDA toolkit."""

    path: str
    options: tuple[str, ...] = ()
    """Further command-line options."""

    @cached_property
    def name(self) -> str:
        match = re.search(r"release [\d.]+, V([\d.]+)", self._run("--version"))
        return f"nvcc {match[1] if match else 'of an unknown version'}"

    @property
    def cuda(self) -> int | None:
        return _major(self.name)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        return _in_order(re.findall(r"compute_(\d+)", self._run("--list-gpu-arch")))

    def cubin(self, source: Path, target: str) -> tuple[bytes, str]:
        _check_target(self, target)
        with TemporaryDirectory(prefix="medsa-") as folder:
            output = Path(folder) / "kernel"
            messages = self._run(
                "-ptx" if _is_ptx(target) else "-cubin",
                *(f"-arch={_architecture(target)}", f"-std={STANDARD}"),
                *(*self.options, "-o", str(output), str(source)),
            )
            end = b"\0" if _is_ptx(target) else b""  # text, which a driver reads to its end
            return output.read_bytes() + end, messages

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run(
                [self.path, *arguments], capture_output=True, text=True, check=False
            )
        except OSError as e:
            raise BuildError(f"{self.path} cannot be run ({e.strerror}): reinstall it") from e
        if done.returncode:
            raise BuildError(f"{self.path} failed:\n{done.stderr or done.stdout}".rstrip())
        return done.stdout + done.stderr


class Nvrtc:
    """NVRTC, NVIDIA's compiler as a library."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    @cached_property
    def name(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"NVRTC {major.value}.{minor.value}"

    @property
    def cuda(self) -> int | None:
        return _major(self.name)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        architectures = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", architectures)
        return _in_order(map(str, architectures))

    def cubin(self, source: Path, target: str) -> tuple[bytes, str]:
        _check_target(self, target)
        header = (source.parent / HEADER).read_bytes()
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.read_bytes(),
            source.name.encode(),
            1,
            (ctypes.c_char_p * 1)(header),
            (ctypes.c_char_p * 1)(HEADER.encode()),
        )
        try:
            options = [f"--gpu-architecture={_architecture(target)}", f"--std={STANDARD}"]
            encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = self._library.nvrtcCompileProgram(program, len(options), encoded)
            messages = self._result("nvrtcGetProgramLog", program).rstrip(b"\0").decode().strip()
            if failed:
                raise BuildError(f"{self.name} failed on {source.name}:\n{messages}")
            form = "nvrtcGetPTX" if _is_ptx(target) else "nvrtcGetCUBIN"
            return self._result(form, program), messages
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _result(self, function: str, program: ctypes.c_void_p) -> bytes:
        """What a pair of functions gives, `function` and the one that says its size."""
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        result = ctypes.create_string_buffer(size.value)
        self._call(function, program, result)
        return result.raw

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            message = self._library.nvrtcGetErrorString(code).decode()
            raise BuildError(f"NVRTC's {function} failed: {message}")


@cache
def find_compiler(target: str | None = None, driver_cuda: int | None = None) -> Compiler:
    """nvcc on the PATH or in a toolkit's usual place, else NVRTC; if both, one for `target`.

    driver_cuda: major version of the newest CUDA that the driver runs; it may refuse what a newer
    compiler made, so such a compiler is only taken if there is no other. MissingDependencyError if
    none is installed.
    """
    compilers: list[Compiler] = []
    if path := find_nvcc():
        compilers.append(Nvcc(path=path))
    if path := find_nvrtc(driver_cuda):
        compilers.append(Nvrtc(path))
    if not compilers:
        raise MissingDependencyError(
            "nvidia-cuda-nvrtc", extra="kernels", purpose="compiling CUDA kernels without nvcc"
        )

    def faults(compiler: Compiler) -> tuple[bool, bool]:
        too_new = driver_cuda is not None and (compiler.cuda or 0) > driver_cuda
        return too_new, target is not None and target not in compiler.targets

    return min(compilers, key=faults)


def find_nvcc() -> str | None:
    """Path of nvcc: on the PATH, in $CUDA_HOME or $CUDA_PATH, or in /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


def find_nvrtc(driver_cuda: int | None = None) -> str | None:
    """Path of NVRTC's library in the packages nvidia-cuda-nvrtc and nvidia-cuda-nvrtc-cu12.

    The newest; with `driver_cuda`, the newest of those that are no newer than it, if there are any.
    """
    spec = find_spec("nvidia")
    pattern = "*/bin/**/nvrtc64_*.dll" if sys.platform == "win32" else "*/lib/libnvrtc.so.*"
    folders = list(spec.submodule_search_locations or ()) if spec else []
    libraries = [path for folder in folders for path in Path(folder).glob(pattern)]
    known = [path for path in libraries if driver_cuda and _cuda_of(path) <= driver_cuda]
    newest = max(known or libraries, key=_cuda_of, default=None)
    return None if newest is None else str(newest)


def _cuda_of(path: Path) -> int:
    """Major version of CUDA of `libnvrtc.so.12` or `nvrtc64_120_0.dll`."""
    match = re.search(r"\.so\.(\d+)|nvrtc64_(\d+)\d_", path.name)
    return int(match[1] or match[2]) if match else 0


def _major(name: str) -> int | None:
    """The first number of the version in a compiler's name."""
    match = re.search(r" (\d+)\.", name)
    return int(match[1]) if match else None


def _in_order(numbers: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"sm{number}" for number in sorted(set(map(int, numbers))))


def _is_ptx(target: str) -> bool:
    return target.startswith(VIRTUAL)


def _architecture(target: str) -> str:
    """`sm_86` for `sm86`, `compute_86` for `compute86`."""
    return re.sub(r"(\D+)(\d+)", r"\1_\2", target)


def _check_target(compiler: Compiler, target: str) -> None:
    if target.replace(VIRTUAL, "sm") not in compiler.targets:
        raise BuildError(
            f"{compiler.name} does not compile for {target!r}; it does for: "
            f"{', '.join(compiler.targets)}"
        )
