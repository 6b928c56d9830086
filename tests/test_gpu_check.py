"""`make gpu-check` where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fake_gpu
import numpy as np
import pytest

from benchmarks import gpu_check, gpu_kernels
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.kernels import cubins
from medsa_deploy.nvidia import cuda

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
    assert done.stderr == (
        "gpu-check: no NVIDIA driver or GPU was found on this machine; nothing was checked\n"
    )


def test_kernels_are_timed_beside_what_they_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stand-in, whose milliseconds are the host's: that everything is there."""
    machine = fake_gpu.install(monkeypatch)
    monkeypatch.setattr(
        cubins,
        "load_kernels",
        lambda source, target, load_module, driver_cuda: load_module(source.encode()),
    )
    small = {"WARM_UP": 0, "RUNS": 2, "REPEATS": 2, "ROTATED": 1 << 16, "S": 32}
    for name, value in small.items():
        monkeypatch.setattr(gpu_kernels, name, value)
    frames = [
        gpu_kernels.FrameCase(**{**vars(case), "shape": (20, 30, *case.shape[2:])})
        for case in gpu_kernels.FRAMES
    ]
    masks = [
        gpu_kernels.MaskCase(**{**vars(case), "image_size": (20, 30)}) for case in gpu_kernels.MASKS
    ]
    monkeypatch.setattr(gpu_kernels, "FRAMES", frames)
    monkeypatch.setattr(gpu_kernels, "MASKS", masks)
    record = gpu_kernels.measure(fake_gpu.DEVICE)
    assert record["copy_gb_per_s"] > 0
    assert len(record["cases"]) == len(frames) + len(masks)
    for case in record["cases"]:
        timed = {name: ms for name, ms in case.items() if name == "ms" or name.endswith("_ms")}
        floor = timed.pop("floor_ms")
        assert case["share_of_floor"] == pytest.approx(floor / sorted(case["ms"])[-1], rel=5)
        assert all(len(ms) == 2 and min(ms) > 0 for ms in timed.values())
        rivals = 1 if case["case"].get("profile") == "litemedsam" else 3
        assert len(timed) == 1 + rivals
    launched = {entry for case in record["cases"] for entry in case["entries"]}
    assert launched == set(machine.launched)
    assert machine.used == machine.pinned == machine.graphs == 0


def test_other_tools_do_the_same() -> None:
    """What the kernels are timed beside gives the same image and masks."""
    frame = gpu_kernels.FrameCase(element="int16", shape=(30, 40), profile="sam", window=(0, 900))
    for case in (frame, gpu_kernels.MaskCase(count=2, image_size=(50, 70), labels=True)):
        outputs = [np.asarray(tool()) for tool in gpu_kernels.tools(case, "cpu").values()]
        for other in outputs[1:]:
            assert np.abs(other.astype(np.float64) - outputs[0]).mean() < 0.02


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
            def call(*arguments: object) -> int:
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


def test_what_cannot_run_is_said_and_what_fails_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All parts but one are replaced: what they find is on a line each, and in the record."""
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)

    def fails(folder: Path) -> None:
        raise RuntimeError("no such luck")

    def cannot(folder: Path) -> None:
        raise gpu_check.NotRun("pip install something")

    parts = {"good": lambda folder: {"found": 1}, "bad": fails, "absent": cannot}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    assert gpu_check.main() == 1
    record = json.loads((tmp_path / "nvidia-orin" / "gpu_check.json").read_text())
    assert record["good"] == {"outcome": "ok", "found": 1}
    assert record["bad"] == {"outcome": "failed", "said": "RuntimeError: no such luck"}
    assert record["absent"] == {"outcome": "not run", "said": "pip install something"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "good: ok",
        "bad: failed: RuntimeError: no such luck",
        "absent: not run: pip install something",
    ]
    del parts["bad"]
    assert gpu_check.main() == 0


def test_the_encoders_products_are_counted(
    bundle: Path, checkpoint_of: Callable[[str], Path]
) -> None:
    """Of blocks, adapters, patches and neck; attention and the padding of windows are the rest."""
    gflop = gpu_check.encoder_gflop(checkpoint_of("medsa_2d"), bundle)
    facts = load_manifest(bundle).network
    (width,), (depth,) = facts.widths, facts.depths
    block = (12 + 2 * 2 * 0.25) * width**2  # projections, MLP, and two adapters of a quarter
    ends = 3 * facts.patch_size**2 * width + width * 256 + 9 * 256**2
    known = 2e-9 * facts.embedding_size**2 * (depth * block + ends)
    assert known < gflop < 1.6 * known


def test_the_peak_is_of_a_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SIDE", 64)
    assert 0 < gpu_check.matrix_peak(tmp_path, "CPUExecutionProvider") < 100
