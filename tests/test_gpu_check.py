"""`make gpu-check` where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
import rehearsal

from benchmarks import gpu_check, gpu_kernels, gpu_models
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.nvidia import cuda

ROOT = Path(__file__).parents[1]


def test_without_a_gpu_it_is_one_line(tmp_path: Path) -> None:
    """Hidden, if this machine has one."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--results", tmp_path],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert done.stderr == (
        "gpu-check: no NVIDIA driver or GPU was found on this machine; nothing was checked\n"
    )


def test_kernels_are_timed_beside_what_they_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stand-in, whose milliseconds are the host's: that everything is there."""
    machines: list[fake_gpu.Machine] = []
    install = rehearsal.install
    monkeypatch.setattr(
        rehearsal, "install", lambda patches: machines.append(install(patches)) or machines[0]
    )
    record = rehearsal.kernel_times()
    (machine,) = machines
    assert record["copy_gb_per_s"] > 0
    assert len(record["cases"]) == len(gpu_kernels.FRAMES) + len(gpu_kernels.MASKS)
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

    def part(run: Callable[[Path], Any]) -> gpu_check.Part:
        return gpu_check.Part(run=run, needs="a GPU", minutes=0.5)

    parts = {"good": part(lambda folder: {"found": 1}), "bad": part(fails), "absent": part(cannot)}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    assert gpu_check.main() == 1
    path = tmp_path / "nvidia-orin" / "gpu_check.json"
    record = json.loads(path.read_text())
    for name in parts:
        assert record[name].pop("seconds") < 9
    assert record["good"] == {"outcome": "ok", "found": 1}
    assert record["bad"] == {"outcome": "failed", "said": "RuntimeError: no such luck"}
    assert record["absent"] == {"outcome": "not run", "said": "pip install something"}
    needs = "needs a GPU; about 0.5 min"
    assert capsys.readouterr().out.splitlines() == [
        *(f"good: {needs}", "good: ok"),
        *(f"bad: {needs}", "bad: failed: RuntimeError: no such luck"),
        *(f"absent: {needs}", "absent: not run: pip install something"),
        str(path),
    ]
    del parts["bad"]
    assert gpu_check.main() == 0


def test_a_run_that_is_cut_short_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And parts that are named are added to the record."""
    fake_gpu.install(monkeypatch)

    def cut(folder: Path) -> None:
        raise KeyboardInterrupt

    def part(run: Callable[[Path], Any]) -> gpu_check.Part:
        return gpu_check.Part(run=run, needs="a GPU", minutes=0.5)

    parts = {"first": part(lambda folder: {"found": 1}), "second": part(cut)}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    path = tmp_path / "nvidia-orin" / "gpu_check.json"
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--results", str(tmp_path)])
    assert json.loads(path.read_text())["first"]["found"] == 1
    assert json.loads(path.read_text())["second"] == {"outcome": "begun"}
    parts["second"] = part(lambda folder: {"found": 2})
    assert gpu_check.main(["second", "--results", str(tmp_path)]) == 0
    record = json.loads(path.read_text())
    assert [record[name]["found"] for name in parts] == [1, 2]
    with pytest.raises(SystemExit):
        gpu_check.main(["third"])


def test_the_rehearsal_runs_every_part_to_its_end(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MEDSA_TEST_BUNDLE", str(bundle))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = gpu_check.main(["--rehearse", "--results", str(tmp_path)])
    output = capsys.readouterr().out
    record = json.loads((tmp_path / "nvidia-orin" / "gpu_check.json").read_text())
    assert code == 0, output
    assert record["rehearsal"] is True
    assert {record[name]["outcome"] for name in gpu_check.PARTS} == {"ok"}, output
    for name, part in gpu_check.PARTS.items():
        assert f"{name}: needs {part.needs}; about {part.minutes:g} min" in output
    for name, expected in (("sessions", 6), ("threads", 1), ("full_memory", 1)):
        (message,) = [
            result["said"] for result in record[name].values() if isinstance(result, dict)
        ]
        assert message.startswith(f"{expected} passed")
    assert record["latency"]["tensorrt_graphs"]["profile"]["facts"]["cuda_graphs"] is True
    assert {run["backend"] for run in record["models"]["runs"]} == {"tensorrt", "rtx"}
    assert "MEDSA_REHEARSAL" not in os.environ


def test_everything_takes_fifteen_minutes_on_a_gpu() -> None:
    assert sum(part.minutes for part in gpu_check.PARTS.values()) <= 15


def test_the_document_says_what_has_run_on_a_gpu() -> None:
    """Each row says where it has run; nothing has where there is no record of it."""
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    table = text.partition("## What has run where\n\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    states = {row[0]: row[1] for row in rows[2:]}
    assert len(states) >= 6
    records = [json.loads(path.read_text()) for path in gpu_check.RESULTS.glob("*/gpu_check.json")]
    devices = {record["device"]["name"] for record in records}
    for name, state in states.items():
        ran = state.startswith("run on ") and any(device in state for device in devices)
        assert state == "not run" or ran, name


def test_the_encoders_products_are_counted(
    bundle: Path, checkpoint_of: Callable[[str], Path]
) -> None:
    """Of blocks, adapters, patches and neck; attention and the padding of windows are the rest."""
    gflop = gpu_models.encoder_gflop(checkpoint_of("medsa_2d"), bundle)
    facts = load_manifest(bundle).network
    (width,), (depth,) = facts.widths, facts.depths
    block = (12 + 2 * 2 * 0.25) * width**2  # projections, MLP, and two adapters of a quarter
    ends = 3 * facts.patch_size**2 * width + width * 256 + 9 * 256**2
    known = 2e-9 * facts.embedding_size**2 * (depth * block + ends)
    assert known < gflop < 1.6 * known


def test_the_peak_is_of_a_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_models, "SIDE", 64)
    assert 0 < gpu_models.matrix_peak(tmp_path, "CPUExecutionProvider") < 100
