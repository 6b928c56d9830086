"""Stand-ins for a GPU and its libraries → all that `make gpu-check` does, on a machine without one.

Engines are built in no time: their files name the ONNX files, which ONNX Runtime computes on the
processor. Kernels are host C++. What runs is the package's own code, in this process.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import onnxruntime
import pytest
from fake_gpu import DEVICE, Function, Machine

from medsa_deploy.evaluation import latency_worker
from medsa_deploy.kernels import cubins
from medsa_deploy.nvidia import engine_builder, tensorrt_api
from medsa_deploy.nvidia.engine_builder import Job, Outcome
from medsa_deploy.nvidia.tensorrt_api import Flavor, Library
from medsa_deploy.stages import profile
from medsa_deploy.stages.verify import engine_check

VARIABLE = "MEDSA_REHEARSAL"
"""Of the environment: set where tests that need a GPU run on the stand-ins."""
VERSIONS: dict[Flavor, str] = {"tensorrt": "10.13.0", "rtx": "1.7.1"}
CAPACITY = 128 << 20
"""Bytes of GPU memory."""


def rehearsing() -> bool:
    """Whether tests that need a GPU run on the stand-ins."""
    return VARIABLE in os.environ


class OnnxFunctions(dict[str, Function]):
    """Path of an ONNX file → what it computes."""

    def __missing__(self, path: str) -> Function:
        if not Path(path).is_file():
            raise KeyError(path)
        session = onnxruntime.InferenceSession(path)
        names = [tensor.name for tensor in session.get_outputs()]

        def function(**inputs: np.ndarray) -> dict[str, np.ndarray]:
            return dict(zip(names, session.run(names, inputs), strict=True))

        tensors = (*session.get_inputs(), *session.get_outputs())
        function.tensors = {tensor.name: tuple(tensor.shape) for tensor in tensors}
        self[path] = function
        return function


def install(monkeypatch: pytest.MonkeyPatch, flavor: Flavor = "tensorrt") -> Machine:
    """Put the stand-ins where this process finds them; engines run by one library."""
    module = tensorrt_api.MODULES[flavor]
    machine = fake_gpu.install(monkeypatch, name=module, version=VERSIONS[flavor])
    machine.functions, machine.capacity = OnnxFunctions(), CAPACITY

    def load_kernels(source: str, target: str, load_module: Any, **options: Any) -> Any:
        return load_module(source.encode())

    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(cubins, "load_kernels", load_kernels)
    monkeypatch.setattr(tensorrt_api, "installed", lambda flavor: True)
    monkeypatch.setattr(tensorrt_api, "query_library", library)
    monkeypatch.setattr(engine_builder, "build", build)
    monkeypatch.setattr(engine_check, "run_in_child", run_here)
    monkeypatch.setattr(profile, "measure_in_child", latency_worker.measure)
    return machine


def library(flavor: Flavor) -> Library:
    """What an installed library says of itself."""
    targets = (DEVICE.capability,) if flavor == "rtx" else ()
    return Library(flavor=flavor, version=VERSIONS[flavor], targets=targets)


def build(job: Job, *, on_progress: Any = None) -> Outcome:
    """Write an engine that names its graph."""
    plan = {"name": str(Path(job.onnx).resolve()), "profile": job.profile}
    Path(job.output).write_text(json.dumps(plan))
    return Outcome(attention="unknown", seconds=0.0)


def run_here(function: Any, job: Any) -> Any:
    """A child's work, in this process."""
    answer = function(json.loads(json.dumps(job)), lambda note: None)
    return json.loads(json.dumps(answer))


def put_sanitizer(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A compute-sanitizer that runs its program and finds nothing."""
    path = folder / "bin" / "compute-sanitizer"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift 2; done\nexec "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")


def kernel_times() -> dict[str, Any]:
    """Those of gpu_kernels.py, for small frames and masks, a few times."""
    from benchmarks import gpu_kernels

    small = {"WARM_UP": 0, "RUNS": 2, "REPEATS": 2, "ROTATED": 1 << 16, "S": 32}
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch)
        for name, value in small.items():
            monkeypatch.setattr(gpu_kernels, name, value)
        frames = [replace(case, shape=(20, 30, *case.shape[2:])) for case in gpu_kernels.FRAMES]
        masks = [replace(case, image_size=(20, 30)) for case in gpu_kernels.MASKS]
        monkeypatch.setattr(gpu_kernels, "FRAMES", frames)
        monkeypatch.setattr(gpu_kernels, "MASKS", masks)
        return gpu_kernels.measure(DEVICE)
