"""A GPU in host memory: as much of pycuda, cuda-bindings and TensorRT's runtime as a session uses.

Nothing that is queued in a stream happens before the stream is waited for, addresses are checked
against what is allocated, and every call wants its context current. An engine is a function on
arrays, and its contexts refuse what TensorRT's refuse. `Machine` counts what is allocated and
injects faults. tests/test_stand_ins.py compares names and arities with the real libraries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from medsa_deploy.nvidia import cuda
from medsa_deploy.runtime.backends import tensorrt

from .cuda_bindings import bindings_driver
from .machine import ALIGNMENT, DEVICE, CudaLogicError, CudaMemoryError, Function, Machine
from .pycuda_driver import PARAMETERS, pycuda_driver
from .tensorrt_runtime import engine_shapes, tensorrt_runtime

__all__ = [
    "ALIGNMENT",
    "DEVICE",
    "PARAMETERS",
    "CudaLogicError",
    "CudaMemoryError",
    "Function",
    "Machine",
    "bindings_driver",
    "engine_shapes",
    "install",
    "tensorrt_runtime",
]


def install(
    monkeypatch: pytest.MonkeyPatch, *, name: str = "tensorrt", version: str = "10.13.0"
) -> Machine:
    """Put the stand-ins where imports find them; the other flavor is hidden."""
    machine = Machine()
    pycuda, bindings = ModuleType("pycuda"), ModuleType("cuda.bindings")
    pycuda.driver, bindings.driver = pycuda_driver(machine), bindings_driver(machine)
    package = ModuleType("cuda")
    package.bindings = bindings
    for module in (pycuda, pycuda.driver, package, bindings, bindings.driver):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for other in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, other, raising=False)
    monkeypatch.setitem(sys.modules, name, tensorrt_runtime(machine, name, version))
    monkeypatch.setattr(cuda, "device", lambda: DEVICE)

    def load_kernels(
        source: str, target: str, load_module: Callable[[bytes], Any], **_: Any
    ) -> Any:
        return load_module(source.encode())

    monkeypatch.setattr(tensorrt, "load_kernels", load_kernels)
    cuda._primary_context.cache_clear()
    return machine
