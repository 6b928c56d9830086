"""What this machine's GPU can do: the kernels, engines built on it and for it, and models on it.

    make gpu-check                     → benchmarks/results/GPU/gpu_check.json
    make gpu-check PARTS="kernels engines"
    make gpu-check REHEARSE=1          every part on stand-ins, without a GPU

Parts, most valuable first. Each says what it needs and about how long it takes, 15 minutes in all;
then that it is ok, failed, or not run for want of something that is named. The record is written
after each part, so that a run that is cut short keeps what it had; parts that are named are added.

- kernels: on random frames and logits against their references;
- sanitizer: the same under every tool of compute-sanitizer;
- engines: of a small network with seeded weights, built by TensorRT on this GPU, and by
  TensorRT-RTX for it, by its compute capability and as "the current device";
- sessions: engines and ONNX Runtime's CUDA provider against ONNX Runtime on the processor;
- latency: of the small network, with CUDA graphs and without;
- threads: two sessions in two threads, while a third is opened;
- full_memory: a session on a GPU without free memory;
- kernel_times: see gpu_kernels.py;
- models: a Med-SA ViT-B at 1024×1024: see gpu_models.py.

Exit code 1 if a part failed, 2 without an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.gpu_commands import (
    ROOT,
    NotRun,
    build,
    export,
    installed_flavors,
    knows_this_gpu,
    need,
    onnxruntime_has_cuda,
    profile,
    pytest_of,
    rehearsing,
    run_python,
)
from benchmarks.gpu_models import models
from medsa_deploy.bundle.atomic import write_text
from medsa_deploy.nvidia import cuda, tensorrt_api

RESULTS = Path(__file__).parent / "results"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED_EXAMPLES = 15
"""Random cases of a test under compute-sanitizer."""
PYCUDA = "pip install '.[cuda]'"

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


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to check."""

    run: Callable[[Path], dict[str, Any]]
    """Takes the folder that all parts share and gives results; NotRun if something is missing, or
    another error."""
    needs: str
    """What it takes on a machine with a GPU."""
    minutes: float
    """About how long it takes there."""


def main(arguments: Sequence[str] = ()) -> int:
    """Check everything, say what came of each part, and write the record."""
    parser = argparse.ArgumentParser(prog="gpu-check", description="Check this machine's GPU.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--rehearse", action="store_true", help="on stand-ins, without a GPU")
    parser.add_argument("--results", type=Path, help="folder of the record")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    names = [name for name in PARTS if name in options.parts or not options.parts]
    results = options.results or RESULTS
    if options.rehearse and options.results is None:
        results = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    with tempfile.TemporaryDirectory() as folder:
        with stand_ins(Path(folder)) if options.rehearse else nullcontext():
            return check(names, Path(folder), results)


def check(names: Sequence[str], folder: Path, results: Path) -> int:
    """Check some parts, add them to the record in `results`, and give the exit code."""
    device = cuda.device()
    if device is None:
        print(
            "gpu-check: no NVIDIA driver or GPU was found on this machine; nothing was checked",
            file=sys.stderr,
        )
        return 2
    path = results / re.sub(r"\W+", "-", device.name.lower()).strip("-") / "gpu_check.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        **(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": asdict(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "rehearsal": rehearsing(),
    }
    for name in names:
        part = PARTS[name]
        print(f"{name}: needs {part.needs}; about {part.minutes:g} min", flush=True)
        record[name] = {"outcome": "begun"}  # what is there stays, if it hangs
        write_text(path, json.dumps(record, indent=2) + "\n")
        start = perf_counter()
        record[name] = outcome(part, folder) | {"seconds": round(perf_counter() - start, 1)}
        message = record[name].get("said")
        print(f"{name}: {record[name]['outcome']}{f': {message}' if message else ''}", flush=True)
        write_text(path, json.dumps(record, indent=2) + "\n")
    print(path)
    return int(any(record[name]["outcome"] == "failed" for name in names))


@contextmanager
def stand_ins(folder: Path) -> Iterator[None]:
    """The stand-ins of the tests in place of a GPU, its libraries and compute-sanitizer."""
    sys.path.insert(0, str(ROOT / "tests"))
    import pytest
    import rehearsal

    with pytest.MonkeyPatch.context() as monkeypatch:
        rehearsal.install(monkeypatch)
        rehearsal.put_sanitizer(monkeypatch, folder)
        yield


def outcome(part: Part, folder: Path) -> dict[str, Any]:
    """What a part found, and whether it ran."""
    try:
        return {"outcome": "ok"} | part.run(folder)
    except NotRun as e:
        return {"outcome": "not run", "said": str(e)}
    except Exception as e:  # the other parts are of use without it
        return {"outcome": "failed", "said": f"{type(e).__name__}: {e}"}


def worst(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Results by name, with one outcome for all."""
    failed = any(result["outcome"] == "failed" for result in results.values())
    return {"outcome": "failed" if failed else "ok", **results}


def kernels(folder: Path) -> dict[str, Any]:
    """The kernels against their references, on this GPU."""
    need("pycuda", PYCUDA)
    env = {"MEDSA_TEST_EXAMPLES": "3"} if rehearsing() else {}
    return pytest_of("tests/test_gpu_kernels.py", env=env)


def sanitizer(folder: Path) -> dict[str, Any]:
    """The same under compute-sanitizer, tool by tool."""
    need("pycuda", PYCUDA)
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = os.pathsep.join(str(Path(home) / "bin") for home in homes if home)
    name = "compute-sanitizer"
    program = shutil.which(name) or shutil.which(name, path=places)
    if program is None:
        raise NotRun(f"{name} was not found: it comes with the CUDA toolkit")
    results = {}
    for tool in SANITIZERS[:1] if rehearsing() else SANITIZERS:
        watched = (program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
        env = {"MEDSA_TEST_EXAMPLES": "1" if rehearsing() else str(SANITIZED_EXAMPLES)}
        results[tool] = pytest_of(
            "tests/test_gpu_kernels.py", "-k", "random", watched=watched, env=env
        )
    return worst(results)


def kernel_times(folder: Path) -> dict[str, Any]:
    """See gpu_kernels.py."""
    need("pycuda", PYCUDA)
    if rehearsing():
        import rehearsal

        return rehearsal.kernel_times()
    return dict(json.loads(run_python("benchmarks/gpu_kernels.py").stdout))


def engines(folder: Path) -> dict[str, Any]:
    """Engines of a small network, by every library that is here."""
    flavors = installed_flavors()
    if not flavors:
        raise NotRun("neither TensorRT nor TensorRT-RTX is installed: pip install '.[tensorrt]'")
    bundle = export(folder)
    usable = [flavor for flavor in flavors if knows_this_gpu(flavor)]
    results: dict[str, Any] = {"built": [build(bundle, *case) for case in cases(usable)]}
    if "rtx" in flavors and not rehearsing():
        results["rtx_for_current_device"] = for_current(bundle)
    failed = not all(engine["built"] for engine in results["built"])
    return {"outcome": "failed" if failed else "ok", **results}


def sessions(folder: Path) -> dict[str, Any]:
    """Every other test of a session on a GPU, with the engines of each library; ONNX Runtime's."""
    results = by_flavor(folder, "not onnxruntime and not threads and not memory")
    if onnxruntime_has_cuda():
        results["onnxruntime"] = pytest_of("tests/test_gpu.py", "-k", "onnxruntime")
    return worst(results)


def threads(folder: Path) -> dict[str, Any]:
    """Two sessions in two threads, while a third is opened."""
    return worst(by_flavor(folder, "threads", rehearsed="rtx"))


def full_memory(folder: Path) -> dict[str, Any]:
    """A session on a GPU without free memory."""
    return worst(by_flavor(folder, "memory"))


def by_flavor(
    folder: Path, expression: str, *, rehearsed: tensorrt_api.Flavor = "tensorrt"
) -> dict[str, dict[str, Any]]:
    """Tests of a session with the engines of each library; NotRun if there is none.

    rehearsed: the library that a rehearsal takes.
    """
    need("pycuda", PYCUDA)
    flavors = [flavor for flavor in installed_flavors() if knows_this_gpu(flavor)]
    if not flavors:
        raise NotRun("no library of engines: pip install '.[cuda,tensorrt]'")
    bundle = export(folder)
    return {
        flavor: pytest_of(
            *("tests/test_gpu.py", "-k", expression),
            env={"MEDSA_TEST_FLAVOR": flavor, "MEDSA_TEST_BUNDLE": str(bundle)},
        )
        for flavor in ([rehearsed] if rehearsing() else flavors)
    }


def latency(folder: Path) -> dict[str, Any]:
    """Of the small network's engines, with CUDA graphs and without."""
    need("pycuda", PYCUDA)
    flavors = [flavor for flavor in installed_flavors() if knows_this_gpu(flavor)]
    if not flavors:
        raise NotRun("no library of engines: pip install '.[cuda,tensorrt]'")
    bundle, results = export(folder), {}
    for flavor in flavors:
        engine = build(bundle, flavor, "fp32")
        for name, options in (("graphs", ()), ("no_graphs", ("--no-cuda-graphs",))):
            result = profile(bundle, flavor, "fp32", *options) if engine["built"] else engine
            replayed = result.get("profile", {}).get("facts", {}).get("cuda_graphs")
            state = "ok" if replayed == (name == "graphs") else "failed"
            results[f"{flavor}_{name}"] = {"outcome": state, **result}
    return worst(results)


def cases(flavors: list[tensorrt_api.Flavor]) -> Iterator[tuple[tensorrt_api.Flavor, str]]:
    """Every installed library with every precision that needs no images."""
    precisions = ("fp32",) if rehearsing() else ("fp32", "fp16")
    yield from ((flavor, precision) for flavor in flavors for precision in precisions)


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


PARTS: dict[str, Part] = {
    "kernels": Part(run=kernels, needs=f"pycuda ({PYCUDA}) and nvcc or NVRTC", minutes=1),
    "sanitizer": Part(run=sanitizer, needs="the same, and compute-sanitizer", minutes=3),
    "engines": Part(run=engines, needs="TensorRT or TensorRT-RTX, and torch", minutes=1.5),
    "sessions": Part(run=sessions, needs="engines and pycuda; or onnxruntime-gpu", minutes=1.5),
    "latency": Part(run=latency, needs="engines, pycuda and cuda-bindings", minutes=0.5),
    "threads": Part(run=threads, needs="engines and pycuda", minutes=0.5),
    "full_memory": Part(run=full_memory, needs="engines and pycuda", minutes=0.5),
    "kernel_times": Part(run=kernel_times, needs="pycuda, torch and OpenCV", minutes=1),
    "models": Part(run=models, needs="all of the above, and 8 GB of GPU memory", minutes=5.5),
}

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
