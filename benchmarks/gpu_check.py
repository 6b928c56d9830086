"""What this machine's GPU can do: engines built on it and for it, and every test that needs a GPU.

    make gpu-check     → benchmarks/results/GPU/gpu_check.json

A small network with seeded weights is exported and its engines built: by TensorRT on this GPU, and
by TensorRT-RTX for it, by its compute capability and as "the current device". What fails is
recorded in its own words. Without an NVIDIA GPU: one line, exit code 2.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medsa_deploy import cuda, trt

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

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


def main() -> None:
    """Check everything and write the record."""
    device = cuda.device()
    if device is None:
        print("gpu-check: no NVIDIA driver or GPU was found on this machine", file=sys.stderr)
        raise SystemExit(2)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": asdict(device),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(Path(folder))
        record["engines"] = [build(bundle, *case) for case in cases()]
        if trt.installed("rtx"):
            record["rtx_for_current_device"] = for_current(bundle)
    flavors = [flavor for flavor in trt.FLAVORS if trt.installed(flavor)]
    record["tests"] = {flavor: tests(flavor) for flavor in flavors}
    path = RESULTS / re.sub(r"\W+", "-", device.name.lower()).strip("-") / "gpu_check.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(path)


def export(folder: Path) -> Path:
    """A bundle of a small Med-SA network, from a golden case."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from golden_cases import GoldenCase

    state = GoldenCase("medsa_2d").state_dict
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, folder / "a.pth")
    run_medsa("export", folder / "a.pth", check=True)
    return folder / "a.medsa"


def cases() -> list[tuple[trt.Flavor, str]]:
    """Every installed library with every precision that needs no images."""
    return [(f, p) for f in trt.FLAVORS if trt.installed(f) for p in ("fp32", "fp16")]


def build(bundle: Path, flavor: trt.Flavor, precision: str) -> dict[str, Any]:
    """Build engines for this machine's GPU: what they are, or what was said instead."""
    device = cuda.device()
    assert device is not None
    target = ["--target", device.capability] if flavor == "rtx" else []
    done = run_medsa(
        "build-engine", bundle, f"--{precision}", "--flavor", flavor, *target, "--json"
    )
    found: dict[str, Any] = {"flavor": flavor, "precision": precision, "built": not done.returncode}
    if done.returncode:
        return found | {"said": done.stderr.strip().splitlines()[-1:]}
    made = json.loads(done.stdout)
    return found | {"engine": made["engine"], "seconds": made["seconds"]}


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
        "targets": trt.ask("rtx").targets,
        "reached": reached,
        "exit_code": done.returncode,
        "said": (done.stdout + done.stderr).strip().splitlines()[-5:] if done.returncode else [],
    }


def tests(flavor: trt.Flavor) -> dict[str, Any]:
    """Every test marked gpu, with engines of one library."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q"],
        cwd=ROOT,
        env=os.environ | {"MEDSA_TEST_FLAVOR": flavor},
        capture_output=True,
        text=True,
        check=False,
    )
    return {"exit_code": done.returncode, "said": done.stdout.strip().splitlines()[-5:]}


def run_medsa(*arguments: object, check: bool = False) -> subprocess.CompletedProcess[str]:
    """The command line, as its own process."""
    return subprocess.run(
        [sys.executable, "-m", "medsa_deploy.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=check,
    )


if __name__ == "__main__":
    main()
