"""run, verify and profile on the GPU of fake_gpu, and on a machine without one."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import fake_gpu
import numpy as np
import PIL.Image
import pytest
from command_line import call, start
from fake_engines import bundle_of, describe, write
from fake_gpu import Machine
from fake_network import SHAPE, SIDE, BrightPixels

from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.evaluation import latency_worker
from medsa_deploy.nvidia import tensorrt_api
from medsa_deploy.stages import profile

CHAIN = ("--backend", "tensorrt", "--fallback", "rtx", "--fallback", "onnxruntime")
IMAGE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return fake_gpu.install(monkeypatch)


@pytest.fixture
def bundle(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its network is in the engines, and in place of ONNX Runtime."""
    engine_bundle = bundle_of(machine, tmp_path / "a.medsa")
    network = load_manifest(engine_bundle).network
    monkeypatch.setattr(
        "medsa_deploy.runtime.backends.onnxruntime_cpu.OnnxRuntimeBackend",
        lambda *_, **__: BrightPixels(network),
    )
    PIL.Image.fromarray(IMAGE).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    return engine_bundle


def run(bundle: Path, image: str, *options: str) -> tuple[dict, str]:
    done = call("run", bundle, image, "--json", *options)
    assert done.code == 0, done.err
    return done.json, done.err


@pytest.mark.parametrize("plainly", [False, True])
def test_run_on_engines(bundle: Path, machine: Machine, plainly: bool) -> None:
    options = ["--no-cuda-graphs"] if plainly else []
    for folder in ("b", "c"):
        (bundle.parent / folder).mkdir()
        for i in range(4):
            PIL.Image.fromarray(np.roll(IMAGE, i, 0)).save(bundle.parent / folder / f"{i}.png")
    document, messages = run(bundle, "b", "--point", "20,30", "-o", "gpu", *CHAIN[:2], *options)
    assert [mask["degraded"] for mask in document] == [None] * 4
    assert messages == ""
    assert (machine.replayed > 0) == (not plainly)
    run(bundle, "b", "--point", "20,30", "-o", "cpu")
    for i in range(4):
        gpu, cpu = (bundle.parent / name / f"{i}.png.mask.png" for name in ("gpu", "cpu"))
        assert gpu.read_bytes() == cpu.read_bytes()


def test_a_degraded_mask_says_so(bundle: Path, machine: Machine) -> None:
    machine.refuses = "IExecutionContext::enqueueV3: Error Code 3"
    document, messages = run(bundle, "a.png", "--point", "20,30", *CHAIN)
    assert document["degraded"].startswith("tensorrt: ")
    assert "Error Code 3" in document["degraded"]
    assert "; rtx: " in document["degraded"]
    assert f"warning: onnxruntime is used, because {document['degraded']}" in messages
    done = call("run", bundle, "a.png", "--point", "20,30", *CHAIN[:2])
    assert done.code == 3
    assert "Error Code 3" in done.error


def test_a_degraded_volume_says_so(bundle: Path, machine: Machine) -> None:
    np.save("v.npy", np.random.default_rng(0).integers(0, 256, SHAPE[::-1]).astype(np.uint8))
    options = ("--point", "2,4,3", "-o", "seg.npy")
    document, messages = run(bundle, "v.npy", *options, *CHAIN)
    assert (document["degraded"], messages) == (None, "")
    machine.refuses = "Error Code 3"
    document, messages = run(bundle, "v.npy", *options, *CHAIN)
    assert "Error Code 3" in document["degraded"]
    assert "warning: onnxruntime is used, because tensorrt: " in messages


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_ctrl_c_in_a_stream(bundle: Path, machine: Machine, monkeypatch, stop: int) -> None:
    """While a GPU is waited for: masks that are there are whole, and all memory is free."""
    monkeypatch.setattr("os._exit", sys.exit)  # how an interrupted command ends
    (bundle.parent / "b").mkdir()
    for i in range(4):
        PIL.Image.fromarray(np.roll(IMAGE, i, 0)).save(bundle.parent / "b" / f"{i}.png")
    waited = []

    def on_wait() -> None:
        waited.append(1)
        if len(waited) == stop:
            signal.raise_signal(signal.SIGINT)

    machine.on_wait = on_wait
    done = call("run", bundle, "b", "--point", "20,30", "-o", "m", *CHAIN)
    assert done.code == 130
    assert done.error == "interrupted; no partial output was left behind"
    assert machine.used == machine.pinned == machine.graphs == 0
    masks = sorted(bundle.parent.glob("m/*"))
    assert [path.name for path in masks] == [f"{i}.png.mask.png" for i in range(len(masks))]
    assert all(path.read_bytes()[-8:-4] == b"IEND" for path in masks)


def test_verify_on_engines(bundle: Path, machine: Machine) -> None:
    done = call("verify", bundle, "--backend", "tensorrt", "--json")
    assert done.code == 0, done.err
    (parity,) = done.json["parity"]
    assert (parity["backend"], parity["precision"]) == ("tensorrt", "fp32")
    assert parity["tensors"]["low_res_masks"]["max_abs"] == 0


def test_profile_on_engines(bundle: Path, machine: Machine, monkeypatch) -> None:
    """Every stage lasts until the GPU is done; layers are timed without CUDA graphs."""
    monkeypatch.setattr(profile, "measure_in_child", latency_worker.measure)  # in this process
    machine.on_wait = lambda: time.sleep(0.01)
    done = call("profile", bundle, "--backend", "tensorrt", "--runs", "3", "-o", "p.json")
    assert done.code == 0, done.err
    assert "time its layers" not in done.err
    assert machine.replayed == 3 * 3  # an encoding and two clicks a run, none while timed
    words = " ".join(done.out.split())
    assert "NVIDIA Orin" in words
    assert "without the GPU's" in words
    document = call("profile", bundle, "--backend", "tensorrt", "--runs", "3", "--json").json
    assert document["threads"] is None
    for graph in ("encoder", "decoder"):
        timed = document["layers"][graph]
        names = [(layer["block"], layer["kind"]) for layer in timed["layers"]]
        assert names == [("patch_embed", "convolution"), ("blocks.0", "fused subgraph")]
        assert timed["kinds"] == {"convolution": 0.25, "fused subgraph": 0.25}
        assert timed["count"] == 3
    assert document["machine"]["gpu"] == "NVIDIA Orin"
    assert document["versions"]["tensorrt"] == "10.13.0"
    for stage in ("encode", "decode"):
        assert min(document["stages"][stage]["samples_ms"]) >= 10
    for name, least in (("next click", 10), ("first click", 20)):
        assert min(document["stages"][name]["samples_ms"]) >= least
    plainly = ("--no-cuda-graphs", "--compare", "p.json", "--max-slowdown", "99")
    options = ("--backend", "tensorrt", "--runs", "3", *plainly)
    document = call("profile", bundle, *options, "--json").json
    assert machine.replayed == 2 * 3 * 3  # as before
    assert document["facts"]["cuda_graphs"] is False
    assert document["comparison"]["differences"] == ["CUDA graphs: replayed then only"]
    assert machine.used == machine.pinned == 0


def test_cuda_graphs_are_the_engines(bundle: Path) -> None:
    done = call("run", bundle, "a.png", "--point", "9,9", "--no-cuda-graphs")
    assert done.code == 2
    assert "onnxruntime replays no CUDA graphs, only tensorrt and rtx do: leave out" in done.error


@pytest.mark.parametrize("command", ["run", "verify", "profile"])
@pytest.mark.parametrize("backend", ["tensorrt", "rtx", "onnxruntime-cuda"])
def test_what_is_not_installed_or_built_is_one_line(
    bundle: Path, command: str, backend: str
) -> None:
    """No stand-ins: processes of their own, on engines that none built."""
    (bundle / "engines" / "x" / "engine.json").unlink()
    prompt = ["a.png", "--point", "9,9"] if command == "run" else []
    done = start(command, bundle, *prompt, "--backend", backend)
    assert done.code == 2, done.err
    expected = {
        "tensorrt": "holds no TensorRT fp32 engines: build them with medsa-deploy build-engine",
        "rtx": "holds no TensorRT-RTX fp32 engines: build them with medsa-deploy build-engine",
        "onnxruntime-cuda": "pip install 'medsa-deploy[gpu]'",
    }
    assert expected[backend] in done.error


@pytest.mark.tensorrt
@pytest.mark.parametrize("command", ["run", "profile"])
def test_engines_without_a_gpu_are_one_line(machine: Machine, bundle: Path, command: str) -> None:
    manifest = load_manifest(bundle)
    version = tensorrt_api.query_library("rtx").version
    write(bundle / "engines" / "y", manifest, describe("rtx"), version)
    prompt = ["a.png", "--point", "9,9"] if command == "run" else []
    hidden = {"CUDA_VISIBLE_DEVICES": "-1"}
    done = start(command, bundle, *prompt, "--backend", "rtx", env=os.environ | hidden)
    assert done.code == 2, done.err
    assert "no NVIDIA driver or GPU was found" in done.error
    assert "run the bundle with --backend onnxruntime" in done.error
