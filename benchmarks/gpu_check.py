"""What this machine's GPU can do: the kernels, engines built on it and for it, and models on it.

    make gpu-check     → benchmarks/results/GPU/gpu_check.json

Parts, each of which is said to be ok, failed, or not run for want of something that is named:

- kernels: on random frames and logits against their references;
- sanitizer: the same under every tool of compute-sanitizer;
- kernel_times: see gpu_kernels.py;
- engines: of a small network with seeded weights, built by TensorRT on this GPU, and by
  TensorRT-RTX for it, by its compute capability and as "the current device";
- sessions: every test of tests/test_gpu.py, with the engines of each library;
- models: a Med-SA ViT-B at 1024×1024 with seeded weights, by every backend of a GPU in float32 and
  float16: `medsa-deploy profile`, and the encoder's share of the measured float16 matrix peak.

Exit code 1 if a part failed, 2 without an NVIDIA GPU.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from medsa_deploy.nvidia import cuda, tensorrt_api

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PROVIDER = "CUDAExecutionProvider"
SIDE = 8192
"""Side of the matrices whose product is the peak."""
RUNS = 30
Part = Callable[[Path], dict[str, Any]]
"""Takes an empty folder and gives results; NotRun if something is missing, or another error."""

FOR_CURRENT = """
import os, sys
os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
from polygraphy.backend.trt import (
    EngineBytesFromNetwork, EngineFromBytes, NetworkFromOnnxPath, Profile
)
network = NetworkFromOnnxPath(sys.argv[1], strongly_typed=True)
shape = (1, 3, int(sys.argv[2]), int(sys.argv[2]))
config = CreateConfigRTX(use_gpu=True, profiles=[Profile().add("image", shape, shape, shape)])
plan = EngineBytesFromNetwork(network, config)()
print("built", flush=True)
engine = EngineFromBytes(plan)()
assert engine is not None, "not deserialized"
print("loaded", flush=True)
assert engine.create_execution_context() is not None, "no execution context"
print("ready", flush=True)
"""


class NotRun(Exception):
    """Something is missing; the message names it and what to install."""


def main() -> int:
    """Check everything, say what came of each part, and write the record."""
    device = cuda.device()
    if device is None:
        print(
            "gpu-check: no NVIDIA driver or GPU was found on this machine; nothing was checked",
            file=sys.stderr,
        )
        return 2
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": asdict(device),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    path = RESULTS / re.sub(r"\W+", "-", device.name.lower()).strip("-") / "gpu_check.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        record[name] = outcome(part)
        message = record[name].get("said")
        print(f"{name}: {record[name]['outcome']}{f': {message}' if message else ''}", flush=True)
        path.write_text(json.dumps(record, indent=2) + "\n")  # what is there stays, if one hangs
    print(path)
    return int(any(record[name]["outcome"] == "failed" for name in PARTS))


def outcome(part: Part) -> dict[str, Any]:
    """What a part found, and whether it ran."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return {"outcome": "ok"} | part(Path(folder))
    except NotRun as e:
        return {"outcome": "not run", "said": str(e)}
    except Exception as e:  # the other parts are of use without it
        return {"outcome": "failed", "said": f"{type(e).__name__}: {e}"}


def kernels(folder: Path) -> dict[str, Any]:
    """The kernels against their references, on this GPU."""
    need("pycuda", "pip install '.[cuda]'")
    return pytest_of("tests/test_gpu_kernels.py")


def sanitizer(folder: Path) -> dict[str, Any]:
    """The same under compute-sanitizer, tool by tool."""
    need("pycuda", "pip install '.[cuda]'")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = os.pathsep.join(str(Path(home) / "bin") for home in homes if home)
    name = "compute-sanitizer"
    program = shutil.which(name) or shutil.which(name, path=places)
    if program is None:
        raise NotRun(f"{name} was not found: it comes with the CUDA toolkit")
    results = {}
    for tool in SANITIZERS:
        watched = (program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
        results[tool] = pytest_of("tests/test_gpu_kernels.py", "-k", "random", watched=watched)
    worst = "failed" if any(result["outcome"] == "failed" for result in results.values()) else "ok"
    return {"outcome": worst, **results}


def kernel_times(folder: Path) -> dict[str, Any]:
    """See gpu_kernels.py."""
    need("pycuda", "pip install '.[cuda]'")
    done = run_python("benchmarks/gpu_kernels.py")
    return dict(json.loads(done.stdout))


def engines(folder: Path) -> dict[str, Any]:
    """Engines of a small network, by every library that is here."""
    flavors = installed_flavors()
    if not flavors:
        raise NotRun("neither TensorRT nor TensorRT-RTX is installed: pip install '.[tensorrt]'")
    bundle = export(folder)
    usable = [flavor for flavor in flavors if knows_this_gpu(flavor)]
    results: dict[str, Any] = {"built": [build(bundle, *case) for case in cases(usable)]}
    if "rtx" in flavors:
        results["rtx_for_current_device"] = for_current(bundle)
    failed = not all(engine["built"] for engine in results["built"])
    return {"outcome": "failed" if failed else "ok", **results}


def sessions(folder: Path) -> dict[str, Any]:
    """Every test of a session on a GPU, with the engines of each library; and ONNX Runtime's."""
    need("pycuda", "pip install '.[cuda]'")
    results = {
        flavor: pytest_of(
            "tests/test_gpu.py", "-k", "not onnxruntime", env={"MEDSA_TEST_FLAVOR": flavor}
        )
        for flavor in installed_flavors()
        if knows_this_gpu(flavor)
    }
    if onnxruntime_has_cuda():
        results["onnxruntime"] = pytest_of("tests/test_gpu.py", "-k", "onnxruntime")
    if not results:
        raise NotRun("no backend of a GPU: pip install '.[cuda,tensorrt]', or '.[gpu]'")
    failed = any(result["outcome"] == "failed" for result in results.values())
    return {"outcome": "failed" if failed else "ok", **results}


def models(folder: Path) -> dict[str, Any]:
    """A ViT-B by every backend of a GPU: latencies of every stage, and the encoder's share."""
    from export import vit_b_checkpoint

    flavors = [f for f in installed_flavors() if knows_this_gpu(f) and find_spec("pycuda")]
    backends = [*flavors, *(["onnxruntime-cuda"] if onnxruntime_has_cuda() else [])]
    if not backends:
        raise NotRun("no backend of a GPU: pip install '.[cuda,tensorrt]', or '.[gpu]'")
    vit_b_checkpoint(folder / "b.pth", rel_pos_scale=0.0)
    bundle = folder / "b.medsa"
    run_medsa("export", folder / "b.pth", check=True)
    run_medsa("quantize", bundle, "--fp16", check=True)
    gflop = encoder_gflop(folder / "b.pth", bundle)
    peak = matrix_peak(folder) if "onnxruntime-cuda" in backends else None
    runs = [
        profiled(bundle, backend, precision, gflop, peak)
        for backend in backends
        for precision in ("fp32", "fp16")
    ]
    failed = not all("profile" in run for run in runs)
    return {
        "outcome": "failed" if failed else "ok",
        "encoder_gflop": gflop,
        "float16_peak_tflop_per_s": peak,
        "runs": runs,
    }


def profiled(
    bundle: Path, backend: str, precision: str, gflop: float, peak: float | None
) -> dict[str, Any]:
    """A backend's profile, with what it says where it cannot run; engines are built first."""
    result: dict[str, Any] = {"backend": backend, "precision": precision}
    if backend in tensorrt_api.FLAVORS:
        result["engine"] = build(bundle, backend, precision)  # type: ignore[arg-type]
        if not result["engine"]["built"]:
            return result
    options = ("--backend", backend, "--precision", precision, "--runs", RUNS, "--json")
    done = run_medsa("profile", bundle, *options)
    if done.returncode:
        return result | {"said": last_lines(done)}
    result["profile"] = json.loads(done.stdout)
    encode = result["profile"]["stages"]["encode"]["p50_ms"]
    result["encoder_tflop_per_s"] = gflop / encode
    if peak is not None:
        result["encoder_share_of_float16_peak"] = gflop / encode / peak
    return result


def encoder_gflop(checkpoint: Path, bundle: Path) -> float:
    """Billions of additions and multiplications of the encoder's products, for one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from medsa_deploy.bundle.manifest import load_manifest
    from medsa_deploy.exporters.checkpoint import load_checkpoint
    from medsa_deploy.exporters.networks import build_reference

    network = load_manifest(bundle).network
    reference = build_reference(network, load_checkpoint(checkpoint).tensors).to("meta")
    side = network.image_size
    with FlopCounterMode(display=False) as counter:
        reference.image_encoder(torch.empty(1, 3, side, side, device="meta"))
    return float(counter.get_total_flops() / 1e9)


def matrix_peak(folder: Path, provider: str = PROVIDER) -> float:
    """TFLOP/s of the best of ten float16 products by ONNX Runtime's CUDA provider."""
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper, save

    half, shape = TensorProto.FLOAT16, [SIDE, SIDE]
    device = "cuda" if provider == PROVIDER else "cpu"
    a, b, c = (helper.make_tensor_value_info(name, half, shape) for name in "abc")
    product = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph, path = helper.make_graph([product], "peak", [a, b], [c]), folder / "peak.onnx"
    opset = helper.make_opsetid("", 20)
    save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    session = ort.InferenceSession(path, providers=[provider])
    binding, random = session.io_binding(), np.random.default_rng(0)
    for name in "ab":
        values = random.normal(0, 0.01, shape).astype(np.float16)
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values, device))
    binding.bind_output("c", device)
    seconds = []
    for _ in range(12):
        start = perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        seconds.append(perf_counter() - start)
    return 2 * SIDE**3 / min(seconds[2:]) / 1e12


def export(folder: Path) -> Path:
    """A bundle of a small Med-SA network, from a golden case."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from golden_cases import GoldenCase

    state = GoldenCase("medsa_2d").state_dict
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, folder / "a.pth")
    run_medsa("export", folder / "a.pth", check=True)
    return folder / "a.medsa"


def cases(flavors: list[tensorrt_api.Flavor]) -> Iterator[tuple[tensorrt_api.Flavor, str]]:
    """Every installed library with every precision that needs no images."""
    yield from ((flavor, precision) for flavor in flavors for precision in ("fp32", "fp16"))


def build(bundle: Path, flavor: tensorrt_api.Flavor, precision: str) -> dict[str, Any]:
    """Build engines for this machine's GPU: what they are, or what was said instead."""
    device = cuda.device()
    assert device is not None
    target = ["--target", device.capability] if flavor == "rtx" else []
    done = run_medsa(
        "build-engine", bundle, f"--{precision}", "--flavor", flavor, *target, "--json"
    )
    built = not done.returncode
    result: dict[str, Any] = {"flavor": flavor, "precision": precision, "built": built}
    if not built:
        return result | {"said": done.stderr.strip().splitlines()[-1:]}
    written = json.loads(done.stdout)
    return result | {"engine": written["engine"], "seconds": written["seconds"]}


def for_current(bundle: Path) -> dict[str, Any]:
    """Whether TensorRT-RTX builds for whatever GPU is here, listed as a target or not; loads it."""
    size = json.loads((bundle / "manifest.json").read_text())["network"]["image_size"]
    done = subprocess.run(
        [sys.executable, "-c", FOR_CURRENT, str(bundle / "encoder.onnx"), str(size)],
        capture_output=True,
        text=True,
        check=False,
    )
    reached = [word for word in ("built", "loaded", "ready") if word in done.stdout.split()]
    return {
        "targets": tensorrt_api.query_library("rtx").targets,
        "reached": reached,
        "exit_code": done.returncode,
        "said": (done.stdout + done.stderr).strip().splitlines()[-5:] if done.returncode else [],
    }


def pytest_of(
    *arguments: str, watched: tuple[str, ...] = (), env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Tests marked gpu, in a process of their own that another may watch."""
    command = [*watched, sys.executable, "-m", "pytest", "-m", "gpu", "-q", *arguments]
    environment = os.environ | (env or {})
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    state = "failed" if done.returncode else "ok"
    return {"outcome": state, "said": last_lines(done) if done.returncode else tail(done.stdout)}


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    """A script of this project, as its own process; RuntimeError with what it said if it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(last_lines(done))
    return done


def need(library: str, install: str) -> None:
    """NotRun where a library is not installed."""
    if find_spec(library) is None:
        raise NotRun(f"{library} is not installed: {install}")


def installed_flavors() -> list[tensorrt_api.Flavor]:
    """TensorRT and TensorRT-RTX, as far as they are here."""
    return [flavor for flavor in tensorrt_api.FLAVORS if tensorrt_api.installed(flavor)]


def knows_this_gpu(flavor: tensorrt_api.Flavor) -> bool:
    """Whether a library builds for the GPU that is here; TensorRT-RTX says for which it does."""
    device = cuda.device()
    return (
        flavor == "tensorrt"
        or (device and device.capability) in tensorrt_api.query_library(flavor).targets
    )


def onnxruntime_has_cuda() -> bool:
    """Whether ONNX Runtime is the build for GPUs."""
    import onnxruntime

    return PROVIDER in onnxruntime.get_available_providers()


def tail(text: str) -> str:
    """The last line."""
    return (text.strip().splitlines() or [""])[-1]


def last_lines(done: subprocess.CompletedProcess[str]) -> str:
    """How a process that failed ended."""
    return " | ".join((done.stdout + done.stderr).strip().splitlines()[-5:])


def run_medsa(*arguments: object, check: bool = False) -> subprocess.CompletedProcess[str]:
    """The command line, as its own process."""
    return subprocess.run(
        [sys.executable, "-m", "medsa_deploy.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=check,
    )


PARTS: dict[str, Part] = {
    "kernels": kernels,
    "sanitizer": sanitizer,
    "kernel_times": kernel_times,
    "engines": engines,
    "sessions": sessions,
    "models": models,
}

if __name__ == "__main__":
    raise SystemExit(main())
