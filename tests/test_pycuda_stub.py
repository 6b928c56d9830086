"""`Gpu` and `CapturedGraph` through the real pycuda and cuda-bindings, on a driver that is a stub.

stub_libcuda.c records calls and works in host memory. pycuda is built from source, so it is not
among the libraries that `make test` installs. Without a CUDA toolkit, build it from its sdist with
`./configure.py --cuda-inc-dir=… --cudadrv-lib-dir=… --no-cuda-enable-curand`: the headers are those
of nvidia-cuda-runtime, -crt, -cccl and -profiler-api, the library any shared one named libcuda.so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

STUB = Path(__file__).with_name("stub_libcuda.c")
STREAM = "0x5001"
"""The first stream that the stub hands out."""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None,
    reason="the stub of the CUDA driver needs Linux and gcc",
)
needs_pycuda = pytest.mark.skipif(
    find_spec("pycuda") is None,
    reason="pycuda is not installed: pip install pycuda, which needs CUDA's headers",
)

BEGIN = """
import json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
import numpy as np
from medsa_deploy import errors
from medsa_deploy.nvidia.cuda import CapturedGraph, Gpu, device
"""

MEMORY = """
gpu = Gpu()
with gpu.current():
    address, values, copy = gpu.allocate(32), gpu.pinned(8), gpu.pinned(8)
    values[:] = np.arange(8)
    gpu.upload(address, values)
    gpu.clear(address, 8)
    gpu.write(address + 8, np.float32(7).tobytes())
    gpu.download(copy, address)
    gpu.wait()
    copied = copy.tolist()
    gpu.unpin(copy)
read = gpu.read(address, (2, 4)).tolist()
with gpu.current():
    gpu.free(address)
    gpu.allocate(16)
gpu.close()
print(json.dumps([device().capability, copied, read]))
"""

LAUNCH = """
gpu = Gpu()
with gpu.current():
    module = gpu.module(b"cubin of nothing")
    for _ in range(2):
        gpu.launch(module, "entry", (1, 2, 3), (32, 8, 1), bytes(range(20)))
    gpu.join_default_stream()
del module
gpu.close()
"""

ERRORS = """
gpu = Gpu()
caught = []
for call in (lambda: gpu.module(b"none"), lambda: gpu.allocate(1 << 40)):
    try:
        with gpu.current():
            call()
    except errors.MedsaError as e:
        caught.append([type(e).__name__, str(e)])
gpu.close()
print(json.dumps(caught))
"""

CAPTURE = """
queued = []
graph = CapturedGraph(0x5001, lambda: queued.append(1))
graph.launch()
graph.launch()
graph.close()
print(json.dumps(queued))
"""


OWNERS = """
from medsa_deploy.nvidia.cuda import check_owner
said = []
for address in (0, 1 << 20, 5, 1 << 40):
    try:
        check_owner(address)
    except errors.UsageError as e:
        said.append(str(e))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stub, compiled."""
    path = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    options = ("-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-Wl,-soname,{path.name}")
    subprocess.run(["gcc", *options, "-o", path, STUB, "-ldl"], check=True)
    return path


def run(
    library: Path, folder: Path, code: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A program that has the stub for a driver; it, and the calls of the driver in their order."""
    log = folder / "calls"
    stub = {"LD_PRELOAD": str(library), "STUB_LOG": str(log)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", BEGIN + code],
        env=os.environ | stub | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, log.read_text().splitlines()


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_pycuda
def test_memory_goes_through_pycuda(library: Path, tmp_path: Path) -> None:
    done, calls = run(library, tmp_path, MEMORY)
    values = [0, 0, 7, 3, 4, 5, 6, 7]
    assert answer(done) == ["sm87", values, [values[:4], values[4:]]]
    in_order = [
        "cuStreamCreate flags=1",
        "cuMemAlloc 32 depth=1",
        "cuMemHostAlloc 32 flags=0",
        f"cuMemcpyHtoDAsync 32 {STREAM}",
        f"cuMemsetD8Async 8 {STREAM}",
        "cuMemcpyHtoD 4",
        f"cuStreamWaitEvent {STREAM}",
        f"cuMemcpyDtoHAsync 32 {STREAM}",
        f"cuStreamSynchronize {STREAM}",
        "cuMemFreeHost",
        "cuMemcpyDtoH 32",
        f"cuStreamDestroy {STREAM}",
    ]
    remaining = iter(calls)
    assert all(call in remaining for call in in_order), calls
    for allocated, freed in (("cuMemAlloc ", "cuMemFree"), ("cuMemHostAlloc ", "cuMemFreeHost")):
        assert sum(call.startswith(allocated) for call in calls) == calls.count(freed) == 2


@needs_pycuda
def test_kernels_are_launched_with_a_structure_by_value(library: Path, tmp_path: Path) -> None:
    done, calls = run(library, tmp_path, LAUNCH)
    assert done.returncode == 0, done.stderr
    launch = f"cuLaunchKernel entry grid=1,2,3 block=32,8,1 {STREAM} {bytes(range(20)).hex()}"
    assert calls.count(launch) == 2
    assert "cuEventRecord (nil)" in calls
    assert calls.index("cuModuleUnload") > calls.index(launch)


@needs_pycuda
def test_errors_of_pycuda_are_errors_of_this_package(library: Path, tmp_path: Path) -> None:
    done, _ = run(library, tmp_path, ERRORS)
    kernels, memory = answer(done)
    assert kernels[0] == "BuildError"
    assert "the driver does not take the kernels (cuModuleLoadDataEx failed" in kernels[1]
    assert memory[0] == "DeviceMemoryError"
    assert "the GPU's memory is full (cuMemAlloc failed: out of memory)" in memory[1]


def test_a_graph_is_captured_through_cuda_bindings(library: Path, tmp_path: Path) -> None:
    done, calls = run(library, tmp_path, CAPTURE)
    assert answer(done) == [1]
    assert calls == [
        f"cuStreamBeginCapture {STREAM} mode=1",
        f"cuStreamEndCapture {STREAM}",
        "cuGraphInstantiate 0xa0 flags=0",
        "cuGraphDestroy 0xa0",
        f"cuGraphLaunch 0xb0 {STREAM}",
        f"cuGraphLaunch 0xb0 {STREAM}",
        "cuGraphExecDestroy 0xb0",
    ]


def test_the_gpu_of_an_array_is_asked_for_through_cuda_bindings(
    library: Path, tmp_path: Path
) -> None:
    done, calls = run(library, tmp_path, OWNERS)
    nobodys, theirs = answer(done)
    assert "0x5 is not memory of a GPU: CUDA_ERROR_INVALID_VALUE" in nobodys
    assert "the array is on stub 1 (GPU 1), this session on stub 0 (GPU 0)" in theirs
    assert calls == ["cuPointerGetAttribute 9"] * 3


def test_a_capture_that_fails_is_an_error_of_the_device(library: Path, tmp_path: Path) -> None:
    done, calls = run(library, tmp_path, CAPTURE, STUB_UNCAPTURABLE="1")
    assert (
        "DeviceError: cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALID" in done.stderr
    )
    assert len(calls) == 2
