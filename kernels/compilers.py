"""CUDA C++ → cubins, by nvcc or NVRTC. Neither needs a driver or a GPU.

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
HEADER = "device.cuh"
"""What the sources include, from their own folder."""


class Compiler(Protocol):
    """What makes cubins."""

    @property
    def name(self) -> str:
        """Which compiler, and its version."""

    @property
    def targets(self) -> tuple[str, ...]:
        """GPUs it compiles for: `sm75`, …, in order."""

    def cubin(self, source: Path, target: str) -> tuple[bytes, str]:
        """A source for one target → its cubin, and the compiler's messages; or BuildError."""


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

    @cached_property
    def targets(self) -> tuple[str, ...]:
        return _in_order(re.findall(r"compute_(\d+)", self._run("--list-gpu-arch")))

    def cubin(self, source: Path, target: str) -> tuple[bytes, str]:
        _check_target(self, target)
        with TemporaryDirectory(prefix="medsa-") as folder:
            output = Path(folder) / "kernel.cubin"
            messages = self._run(
                *("-cubin", f"-arch={_architecture(target)}", f"-std={STANDARD}"),
                *(*self.options, "-o", str(output), str(source)),
            )
            return output.read_bytes(), messages

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
            return self._result("nvrtcGetCUBIN", program), messages
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
def find_compiler(target: str | None = None) -> Compiler:
    """nvcc on the PATH or in a toolkit's usual place, else NVRTC; if both, one for `target`.

    MissingDependencyError if neither is installed.
    """
    compilers: list[Compiler] = []
    if path := find_nvcc():
        compilers.append(Nvcc(path=path))
    if path := find_nvrtc():
        compilers.append(Nvrtc(path))
    if not compilers:
        raise MissingDependencyError(
            "nvidia-cuda-nvrtc", extra="kernels", purpose="compiling CUDA kernels without nvcc"
        )
    if target is None:
        return compilers[0]
    return next((compiler for compiler in compilers if target in compiler.targets), compilers[0])


def find_nvcc() -> str | None:
    """Path of nvcc: on the PATH, in $CUDA_HOME or $CUDA_PATH, or in /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


def find_nvrtc() -> str | None:
    """Path of NVRTC's library in the package nvidia-cuda-nvrtc; newest CUDA first."""
    spec = find_spec("nvidia")
    pattern = "*/bin/**/nvrtc64_*.dll" if sys.platform == "win32" else "*/lib/libnvrtc.so.*"
    folders = list(spec.submodule_search_locations or ()) if spec else []
    libraries = [path for folder in folders for path in Path(folder).glob(pattern)]
    newest = max(libraries, key=_version, default=None)
    return None if newest is None else str(newest)


def _version(path: Path) -> list[int]:
    """The numbers in a library's name."""
    return [int(number) for number in re.findall(r"\d+", path.name)]


def _in_order(numbers: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"sm{number}" for number in sorted(set(map(int, numbers))))


def _architecture(target: str) -> str:
    """`sm_86` for `sm86`."""
    return target.replace("sm", "sm_")


def _check_target(compiler: Compiler, target: str) -> None:
    if target not in compiler.targets:
        raise BuildError(
            f"{compiler.name} does not compile for {target!r}; it does for: "
            f"{', '.join(compiler.targets)}"
        )
