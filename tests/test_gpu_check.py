"""`make gpu-check` where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from medsa_deploy import cuda

ROOT = Path(__file__).parents[1]


def test_without_a_gpu_it_is_one_line(tmp_path: Path) -> None:
    """Hidden, if this machine has one."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_check.py"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "gpu-check: no NVIDIA driver or GPU was found on this machine\n"


def test_a_gpu_is_described_or_absent() -> None:
    device = cuda.device()
    assert device is None or (device.name and device.capability.startswith("sm"))


def test_a_driver_that_fails_is_no_gpu(monkeypatch, tmp_path: Path) -> None:
    """As when the driver is installed and its GPU is not there: cuInit gives an error's number."""

    class Driver:
        @staticmethod
        def cuInit(flags: int) -> int:
            return 100

        def __getattr__(self, name: str):
            def call(*given: object) -> int:
                raise AssertionError(f"{name} was called after cuInit failed")

            return call

    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver())
    assert cuda.device() is None


def test_a_driver_is_asked_for_name_capability_and_version(monkeypatch) -> None:
    class Driver:
        def cuInit(self, flags: int) -> int:
            return 0

        def cuDriverGetVersion(self, version) -> int:
            version._obj.value = 13010
            return 0

        def cuDeviceGet(self, handle, index: int) -> int:
            handle._obj.value = 7
            return 0

        def cuDeviceGetName(self, name, length: int, handle) -> int:
            assert (length, handle.value) == (256, 7)
            name.value = b"NVIDIA H200"
            return 0

        def cuDeviceGetAttribute(self, value, attribute: int, handle) -> int:
            value._obj.value = {75: 9, 76: 0}[attribute]
            return 0

    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver())
    expected = cuda.Device(name="NVIDIA H200", capability="sm90", driver_cuda="13.1")
    assert cuda.device() == expected
