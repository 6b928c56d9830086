"""TensorRT 10.x and 11 through the same code: a stand-in for each API shows what a build asks.

Polygraphy itself is real. What a version removed is absent from the stand-in, so using it fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from command_line import accept_changes, call, contents, copied

from medsa_deploy import errors
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.nvidia import cuda, engine_builder, tensorrt_api
from medsa_deploy.nvidia.engines import AxisRange, EngineOptions, check_loadable, load_engines

FAKE = Path(__file__).parent / "fake_tensorrt"
DEVICE = cuda.Device(name="NVIDIA Orin", capability="sm87", driver_cuda="12.6")
VERSIONS = ("10.3.0", "10.12.0.36", "11.4.0")


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Installs the stand-in for a version, with a GPU; gives what the builders were asked for."""
    log = tmp_path / "asked.jsonl"

    def install(version: str, device: cuda.Device | None = DEVICE):
        monkeypatch.setenv("FAKE_TENSORRT", version)
        monkeypatch.setenv("FAKE_TENSORRT_LOG", str(log))
        monkeypatch.setenv("PYTHONPATH", str(FAKE))
        monkeypatch.setattr(sys, "path", [str(FAKE), *sys.path])
        monkeypatch.setattr(cuda, "device", lambda: device)
        return lambda: [json.loads(line) for line in log.read_text().splitlines()]

    return install


@pytest.mark.parametrize("version", VERSIONS)
def test_one_path_builds_with_every_version(
    tensorrt, bundle: Path, tmp_path: Path, version: str
) -> None:
    requests = tensorrt(version)
    copy = copied(bundle, tmp_path)
    done = call("build-engine", copy, "--fp32", "--json")
    assert done.code == 0, done.err
    assert "TensorRT and a GPU are here, so TensorRT engines for this GPU" in done.err
    folder = copy / "engines" / "tensorrt-fp32-sm87"
    engine = load_engines(folder)
    assert (engine.version, engine.device, engine.state) == (version, "NVIDIA Orin", "built")
    assert (folder / "encoder.engine").read_bytes() == b"an engine of " + version.encode()
    assert [file.attention for file in engine.files] == ["unknown", "unknown"]
    encoder, decoder = requests()
    assert "STRONGLY_TYPED" in encoder["network_flags"]
    assert encoder["flags"] == decoder["flags"] == ["TF32"]
    assert encoder["profiles"] == [{"image": [[b, 3, 256, 256] for b in (1, 1, 4)]}]
    assert decoder["profiles"][0]["point_coords"] == [[1, 0, 2], [1, 2, 2], [8, 16, 2]]
    assert "workspace" not in encoder
    assert "optimization_level" not in encoder
    library = tensorrt_api.Library(flavor="tensorrt", version=version, targets=())
    manifest = load_manifest(copy)
    assert check_loadable(folder, manifest, library=library, device=DEVICE) == engine


@pytest.mark.parametrize("version", VERSIONS)
def test_options_reach_the_builder(tensorrt, bundle: Path, tmp_path: Path, version: str) -> None:
    requests = tensorrt(version)
    copy = copied(bundle, tmp_path)
    cache = tmp_path / "kernels.cache"
    options = ["--workspace", "2", "--optimization-level", "4", "--timing-cache", cache]
    for _ in range(2):
        done = call(
            *("build-engine", copy, "--fp32", "--flavor", "tensorrt", "--force", *options),
            *("--no-tf32", "--no-fused-attention"),
        )
        assert done.code == 0, done.err
    encoder, decoder, *_, last = requests()
    assert encoder["flags"] == []
    assert encoder["workspace"] == 2 << 30
    assert encoder["optimization_level"] == 4
    assert (encoder["softmax"], decoder["softmax"]) == (4, 7)
    assert encoder["read_past_a_relu"] == decoder["read_past_a_relu"] == 0
    assert cache.read_bytes() == b"times of kernels"
    assert last["timing_caches"][0] == len(b"times of kernels")
    assert "fused_attention changed" not in done.out
    plain = call("build-engine", copy, "--fp32", "--flavor", "tensorrt", *options, "--no-tf32")
    assert "because: fused_attention changed from False to True" in plain.out
    assert requests()[-1]["read_past_a_relu"] == 7


@pytest.mark.parametrize("version", ["8.6.1", "10.2.0"])
def test_older_versions_are_refused(tensorrt, bundle: Path, tmp_path: Path, version: str) -> None:
    tensorrt(version)
    copy = copied(bundle, tmp_path)
    before = contents(copy)
    done = call("build-engine", copy, "--fp32")
    assert done.code == 2
    assert (
        f"error: TensorRT cannot be used: TensorRT {version} is installed; 10.3 or newer is "
        in (done.err)
    )
    assert contents(copy) == before


def test_operators_that_an_old_parser_lacks_are_named(
    tensorrt, bundle: Path, tmp_path: Path
) -> None:
    """Before a build; a newer parser says so itself."""
    copy = copied(bundle, tmp_path)
    path = copy / "decoder.onnx"
    model = onnx.load(path)
    model.graph.node.add(op_type="Det", input=["image_embeddings"], output=["d"], name="det")
    onnx.save(model, path)
    accept_changes(copy)
    tensorrt("10.3.0")
    done = call("build-engine", copy, "--fp32")
    assert done.code == 2
    assert "decoder.onnx has Det, which the parser of TensorRT 10.3.0 lacks" in done.error
    model.opset_import[0].version = 23
    model.graph.node.pop()
    onnx.save(model, path)
    accept_changes(copy)
    done = call("build-engine", copy, "--fp32")
    assert (done.code, "has operators of opset 23" in done.error) == (2, True)


def test_a_target_is_the_gpu_that_is_here(tensorrt, bundle: Path) -> None:
    tensorrt("10.13.0")
    done = call("build-engine", bundle, "--fp32", "--target", "sm89", "--dry-run")
    assert done.code == 2
    assert "TensorRT builds for the GPU it runs on, NVIDIA Orin (sm87)" in done.err
    done = call("build-engine", bundle, "--fp32", "--target", "sm87", "--dry-run")
    assert done.code == 0


def test_without_a_gpu_tensorrt_is_refused_and_rtx_the_default(tensorrt, bundle: Path) -> None:
    tensorrt("11.0.0", device=None)
    done = call("build-engine", bundle, "--fp32", "--flavor", "tensorrt")
    assert done.code == 2
    assert "no NVIDIA driver or GPU was found: build there, or build TensorRT-RTX" in done.error
    done = call("build-engine", bundle, "--fp32", "--dry-run", "--json")
    assert done.json["plan"]["options"]["flavor"] == "rtx"


def test_two_flavors_do_not_meet_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", object())
    with pytest.raises(errors.EngineFlavorError, match="TensorRT is loaded in this process"):
        tensorrt_api.load("rtx")


def test_a_removed_flag_shows(tensorrt, bundle: Path, tmp_path: Path) -> None:
    """The stand-ins are not lenient: a precision flag works on 10 and fails on 11."""
    code = (
        "import os, tensorrt as trt; from polygraphy.backend.trt import *\n"
        "network = create_network(strongly_typed=True)\n"
        "CreateConfig(fp16=True)(*network)"
    )
    codes = []
    for version in ("10.13.0", "11.0.0"):
        tensorrt(version)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        codes.append(done.returncode)
    assert codes == [0, 1]


def test_a_builder_without_polygraphy_names_the_extra(
    tensorrt, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt("10.13.0")
    (tmp_path / "polygraphy.py").write_text("raise ModuleNotFoundError('polygraphy')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{FAKE}")
    single = AxisRange(min=1, opt=1, max=1)
    job = engine_builder.Job(
        onnx=str(bundle / "encoder.onnx"),
        output=str(tmp_path / "x.engine"),
        options=EngineOptions(
            flavor="tensorrt",
            precision="fp32",
            targets=("sm87",),
            batch=single,
            points=single,
            prompts=single,
            embeddings=single,
            tf32=True,
            fused_attention=True,
            workspace_gb=None,
            optimization_level=None,
        ),
        profile={},
    )
    with pytest.raises(errors.MissingDependencyError, match=r"'medsa-deploy\[tensorrt\]'"):
        engine_builder.build(job)
