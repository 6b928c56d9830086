"""`medsa-deploy doctor --device`: what a shipped platform or this machine lacks for a bundle."""

from __future__ import annotations

import json
import platform
import tomllib
from pathlib import Path
from typing import Any

import onnx
import pytest
from command_line import accept_changes, call, copied

from medsa_deploy import errors
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.kernels import cubins
from medsa_deploy.nvidia import cuda, tensorrt_api
from medsa_deploy.stages.doctor import devices


def checks(*arguments: object) -> dict[str, dict[str, Any]]:
    """Item → its check, as JSON."""
    done = call("doctor", *arguments, "--json")
    assert done.err == ""
    return {check["item"]: check for check in done.json["checks"]}


@pytest.mark.parametrize("name", devices.DEVICES)
def test_every_device_takes_the_runtime(bundle: Path, name: str) -> None:
    done = call("doctor", "--device", name, bundle, "--json")
    assert done.code == 0
    assert (done.json["device"], done.json["bundle"]) == (name, str(bundle))
    states = {check["item"]: check["state"] for check in done.json["checks"]}
    assert states["ONNX Runtime"] == "ok"
    assert states["TensorRT"] == ("missing" if name == "igx" else "ok")
    assert states["Python"] == ("unknown" if name == "x86" else "ok")
    for gpu in devices.DEVICES[name].gpus:
        assert states[f"engines for {gpu}"] == states[f"kernels for {gpu}"] == "missing"


def test_without_a_bundle_the_platform_alone() -> None:
    report = checks("--device", "jetpack6")
    assert set(report) == {"Python", "ONNX Runtime", "TensorRT", "CUDA"}
    assert report["Python"]["needs"] == "3.10 or newer"
    assert report["ONNX Runtime"]["needs"] == "1.17 or newer"
    assert report["TensorRT"]["needs"] == "10.3 or newer, for engines"


def test_the_minima_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={devices.OLDEST_PYTHON}"
    assert f"onnxruntime>={devices.OLDEST_ONNXRUNTIME}" in project["dependencies"]
    extras = project["optional-dependencies"]
    assert f"onnxruntime-gpu>={devices.OLDEST_ONNXRUNTIME}" in extras["gpu"]
    oldest = ".".join(map(str, tensorrt_api.OLDEST["tensorrt"]))
    assert f"tensorrt>={oldest}" in extras["tensorrt"]


def test_in_words(bundle: Path) -> None:
    done = call("doctor", "--device", "jetpack6", bundle)
    assert (done.code, done.err) == (0, "")
    words = " ".join(done.out.split())
    assert "JetPack 6.2 on Jetson Orin" in words
    assert f"kernels for sm87: medsa-deploy build-kernels {bundle} --target sm87" in words


def test_graphs_of_an_earlier_release_need_a_newer_onnxruntime(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied(bundle, tmp_path)
    path = copy / "decoder.onnx"
    assert devices.ir_version(path) == 9
    model = onnx.load(path)
    model.ir_version = 10
    path.write_bytes(model.SerializeToString())
    accept_changes(copy)
    assert checks("--device", "jetpack6", copy)["ONNX Runtime"]["needs"] == "1.18 or newer"
    old = devices.Device(**vars(devices.DEVICES["jetpack6"]) | {"onnxruntime": "1.17.3"})
    monkeypatch.setitem(devices.DEVICES, "jetpack6", old)
    done = call("doctor", "--device", "jetpack6", copy)
    assert done.code == 1
    assert "ONNX Runtime: found 1.17.3, expected 1.18 or newer" in done.err
    assert "pip install 'onnxruntime>=1.18'" in done.out
    assert call("doctor", "--device", "jetpack6", bundle).code == 0


def test_kernels_and_memory(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copied(bundle, tmp_path)
    file = {"path": "x.cubin", "source": "preprocess", "target": "sm87", "bytes": 1}
    entry = file | {"sources_sha256": "0" * 64, "sha256": "0" * 64}
    (copy / "kernels").mkdir()
    text = json.dumps({"compiler": "nvcc", "files": [entry], "schema": cubins.SCHEMA_VERSION})
    (copy / "kernels" / "kernels.json").write_text(text)
    report = checks("--device", "jetpack7", copy)
    assert report["kernels for sm87"]["state"] == "ok"
    assert report["kernels for sm110"]["state"] == "missing"
    assert report["memory"]["state"] == "ok"
    small = devices.Device(**vars(devices.DEVICES["jetpack7"]) | {"memory_gb": 0.001})
    monkeypatch.setitem(devices.DEVICES, "jetpack7", small)
    assert checks("--device", "jetpack7", copy)["memory"]["state"] == "missing"


def test_this_machine(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device", lambda: None)
    report = checks(bundle)
    assert report["Python"]["has"] == platform.python_version()
    assert not any(item.startswith("engines") for item in report)
    gpu = cuda.Device(name="NVIDIA Orin", capability="sm87", driver_cuda="12.6")
    monkeypatch.setattr(cuda, "device", lambda: gpu)
    assert checks(bundle)["CUDA"]["has"] == "12.6"
    assert checks(bundle)["engines for sm87"]["state"] == "missing"


def test_bad_requests(bundle: Path, tmp_path: Path) -> None:
    done = call("doctor", "--device", "toaster")
    assert (done.code, "expected one of jetpack6, jetpack7, igx, x86" in done.error) == (2, True)
    assert call("doctor", "--device", "x86", "--tune", bundle).code == 2
    assert call("doctor", tmp_path / "none.medsa").code == 2


def test_engines_are_of_the_devices_version(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert {file.precision for file in manifest.files} == {"fp32"}
    assert devices._is_version("10.3.0.26", "10.3")
    assert not devices._is_version("10.12.0", "10.3")
    with pytest.raises(errors.BundleError, match="cannot be read"):
        devices.ir_version(bundle / "none.onnx")
