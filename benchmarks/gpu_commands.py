"""Commands and tests of this project → what they said, for `gpu_check.py` on this machine's GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from medsa_deploy.nvidia import cuda, tensorrt_api

ROOT = Path(__file__).parents[1]
PROVIDER = "CUDAExecutionProvider"


RUNS = 30
"""Of a profile."""


def rehearsing() -> bool:
    """Whether the stand-ins of the tests take the GPU's place."""
    return "MEDSA_REHEARSAL" in os.environ


class NotRun(Exception):
    """Something is missing; the message names it and what to install."""


def build(bundle: Path, flavor: tensorrt_api.Flavor, precision: str) -> dict[str, Any]:
    """Build engines for this machine's GPU: what they are, or what was said instead."""
    device = cuda.device()
    assert device is not None
    options = ["--target", device.capability] if flavor == "rtx" else []
    options += ["--no-tf32"] if precision == "fp32" else []
    done = run_medsa(
        "build-engine", bundle, f"--{precision}", "--flavor", flavor, *options, "--json"
    )
    built = not done.returncode
    result: dict[str, Any] = {"flavor": flavor, "precision": precision, "built": built}
    if not built:
        return result | {"said": done.stderr.strip().splitlines()[-1:]}
    written = json.loads(done.stdout)
    return result | {"engine": written["engine"], "seconds": written["seconds"]}


def pytest_of(
    *arguments: str, watched: tuple[str, ...] = (), env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Tests marked gpu, in a process of their own that another may watch."""
    options = ("-m", "gpu", "-q", "-p", "no:cacheprovider")
    command = [*watched, sys.executable, "-m", "pytest", *options, *arguments]
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = outer | (env or {})
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
    """The command line, as its own process; on the stand-ins, in this one."""
    words = [str(argument) for argument in arguments]
    if not rehearsing():
        command = [sys.executable, "-m", "medsa_deploy.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, check=check)
    import pytest
    import rehearsal
    from command_line import call

    with pytest.MonkeyPatch.context() as monkeypatch:
        rehearsal.install(monkeypatch, "rtx" if "rtx" in words else "tensorrt")
        done = call(*words)
    completed = subprocess.CompletedProcess(words, done.code, done.out, done.err)
    if check:
        completed.check_returncode()
    return completed


def profile(bundle: Path, backend: str, precision: str, *options: str) -> dict[str, Any]:
    """A backend's profile, or what it says where it cannot run."""
    runs = 2 if rehearsing() else RUNS
    words = ("--backend", backend, "--precision", precision, "--runs", runs, *options, "--json")
    done = run_medsa("profile", bundle, *words)
    return {"said": last_lines(done)} if done.returncode else {"profile": json.loads(done.stdout)}


def export(folder: Path) -> Path:
    """A bundle of a small Med-SA network in `folder`, from a golden case; made once.

    MEDSA_TEST_BUNDLE names one that is exported already. `a.pth` beside it is its checkpoint.
    """
    import torch

    bundle = folder / "a.medsa"
    if bundle.exists():
        return bundle
    sys.path.insert(0, str(ROOT / "tests"))
    from golden_cases import GoldenCase

    state = GoldenCase("medsa_2d").state_dict
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, folder / "a.pth")
    if exported := os.environ.get("MEDSA_TEST_BUNDLE"):
        shutil.copytree(exported, bundle)
    else:
        run_medsa("export", folder / "a.pth", check=True)
    return bundle
