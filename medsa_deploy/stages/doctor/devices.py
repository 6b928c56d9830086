"""A device, and a bundle for it → what it needs, what the device has, and what is missing.

The devices are platforms that are shipped, with the versions that their vendor installs; or this
machine. Nothing is run on them.
"""

from __future__ import annotations

import platform as python_platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from medsa_deploy import machine
from medsa_deploy.bundle.manifest import File, Manifest, load_manifest
from medsa_deploy.errors import BundleError, UsageError
from medsa_deploy.kernels.cubins import load as load_cubins
from medsa_deploy.kernels.cubins import takes_cubins
from medsa_deploy.libraries import installed_library
from medsa_deploy.nvidia import cuda, tensorrt_api
from medsa_deploy.nvidia.engines import ENGINE_FILENAME, ENGINES_FOLDER, load_engines

DeviceName = Literal["jetpack6", "jetpack7", "igx", "x86"]
State = Literal["ok", "missing", "unknown"]

OLDEST_PYTHON = "3.10"
OLDEST_ONNXRUNTIME = "1.17"
OLDEST_FOR_FORMAT = {9: "1.17", 10: "1.18"}
"""Version of the ONNX file format → the oldest ONNX Runtime that reads it. Graphs of an export or a
precision have 9; those of earlier releases 10."""
WORKING_FACTOR = 3
"""A session takes about this many times the size of its graphs: weights as they are read, weights
as they are laid out for the processor, and activations."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A platform and what is installed on it; None where that is not known."""

    title: str
    processor: str
    python: str | None
    onnxruntime: str | None
    """Installed, or the newest that its Python can install."""
    cuda: str | None
    tensorrt: str | None
    gpus: tuple[str, ...]
    """Compute capabilities of its GPUs."""
    memory_gb: float | None
    """Of its smallest model."""


DEVICES: dict[DeviceName, Device] = {
    "jetpack6": Device(
        title="JetPack 6.2 on Jetson Orin",
        processor="aarch64",
        python="3.10",
        onnxruntime="1.23.2",
        cuda="12.6",
        tensorrt="10.3",
        gpus=("sm87",),
        memory_gb=4,
    ),
    "jetpack7": Device(
        title="JetPack 7.2 on Jetson Orin and Thor",
        processor="aarch64",
        python="3.12",
        onnxruntime="1.32.0",
        cuda="13.2",
        tensorrt="10.16",
        gpus=("sm87", "sm110"),
        memory_gb=4,
    ),
    "igx": Device(
        title="IGX-SW 1.0 on IGX Orin",
        processor="aarch64",
        python="3.10",
        onnxruntime="1.23.2",
        cuda="12.2",
        tensorrt="8.6",
        gpus=("sm87",),
        memory_gb=64,
    ),
    "x86": Device(
        title="a PC with an NVIDIA GPU",
        processor="x86_64",
        python=None,
        onnxruntime="1.32.0",
        cuda=None,
        tensorrt="11.4",
        gpus=(),
        memory_gb=None,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that is needed."""

    item: str
    needs: str
    has: str
    state: State
    required: bool
    """Whether nothing runs without it. Engines and kernels are faster, not necessary."""
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """What a device lacks for a bundle."""

    device: str
    title: str
    bundle: Path | None
    checks: tuple[Check, ...]

    @property
    def missing(self) -> tuple[Check, ...]:
        """The checks that keep the runtime or the bundle from running at all."""
        return tuple(c for c in self.checks if c.required and c.state == "missing")


def check_device(name: str | None, bundle: Path | None) -> DeviceReport:
    """Compare a named device, or this machine for None, with the runtime's needs and a bundle's.

    UsageError for an unknown name, BundleError for a bundle that cannot be read.
    """
    if name is None:
        device = this_device()
    elif name in DEVICES:
        device = DEVICES[name]
    else:
        raise UsageError(f"--device is {name}, expected one of {', '.join(get_args(DeviceName))}")
    manifest = None if bundle is None else load_manifest(bundle)
    checks = [_python(device), _onnxruntime(device, manifest, bundle), _tensorrt(device)]
    checks.append(_cuda(device))
    if manifest is not None and bundle is not None:
        checks += [*_precisions(device, manifest), _memory(device, manifest)]
        checks += [check for gpu in device.gpus for check in _native_code(device, gpu, bundle)]
    return DeviceReport(
        device=name or "this machine", title=device.title, bundle=bundle, checks=tuple(checks)
    )


def this_device() -> Device:
    """This machine. TensorRT is not imported: its version is that of its package."""
    gpu = cuda.device()
    libraries = [installed_library(name) for name in ("onnxruntime", "onnxruntime-gpu")]
    versions = [library.version for library in libraries if library is not None]
    tensorrt = installed_library("tensorrt")
    return Device(
        title=machine.system(),
        processor=python_platform.machine(),
        python=python_platform.python_version(),
        onnxruntime=versions[-1] if versions else None,
        cuda=None if gpu is None else gpu.driver_cuda,
        tensorrt=None if tensorrt is None else tensorrt.version,
        gpus=() if gpu is None else (gpu.capability,),
        memory_gb=machine.memory_gb(),
    )


def ir_version(path: Path) -> int | None:
    """The format version at the beginning of an ONNX file; None if another field comes first."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as e:
        raise BundleError(f"{path} cannot be read ({e.strerror}): copy the bundle again") from e
    return start[1] if len(start) == 2 and start[0] == 0x08 and start[1] < 0x80 else None


def _numbers(version: str) -> tuple[int, ...]:
    return tensorrt_api.version_numbers(version)


def _compared(has: str | None, needs: str) -> State:
    if has is None:
        return "unknown"
    return "ok" if _numbers(has) >= _numbers(needs) else "missing"


def _python(device: Device) -> Check:
    state = _compared(device.python, OLDEST_PYTHON)
    return Check(
        item="Python",
        needs=f"{OLDEST_PYTHON} or newer",
        has=device.python or "not known",
        state=state,
        required=True,
        remedy="install a newer Python beside the system's" if state == "missing" else None,
    )


def _onnxruntime(device: Device, manifest: Manifest | None, bundle: Path | None) -> Check:
    formats = [
        ir_version(bundle / file.path)
        for file in (manifest.files if manifest else ())
        if bundle is not None and file.path.endswith(".onnx")
    ]
    oldest = [OLDEST_FOR_FORMAT.get(number or 0, OLDEST_ONNXRUNTIME) for number in formats]
    needs = max([OLDEST_ONNXRUNTIME, *oldest], key=_numbers)
    state: State = "missing" if device.onnxruntime is None else _compared(device.onnxruntime, needs)
    return Check(
        item="ONNX Runtime",
        needs=f"{needs} or newer",
        has=device.onnxruntime or "not installed",
        state=state,
        required=True,
        remedy=f"pip install 'onnxruntime>={needs}'" if state == "missing" else None,
    )


def _tensorrt(device: Device) -> Check:
    needs = ".".join(map(str, tensorrt_api.OLDEST["tensorrt"]))
    state: State = "missing" if device.tensorrt is None else _compared(device.tensorrt, needs)
    return Check(
        item="TensorRT",
        needs=f"{needs} or newer, for engines",
        has=device.tensorrt or "not installed",
        state=state,
        required=False,
        remedy=None
        if state == "ok"
        else "run with ONNX Runtime, or install TensorRT: pip install 'medsa-deploy[tensorrt]'",
    )


def _cuda(device: Device) -> Check:
    return Check(
        item="CUDA",
        needs="a driver, for engines and kernels",
        has=device.cuda or ("not known" if not device.gpus else "no driver"),
        state="unknown" if device.cuda is None else "ok",
        required=False,
    )


def _precisions(device: Device, manifest: Manifest) -> list[Check]:
    """Which of the bundle's precisions this processor and GPU compute."""
    checks = []
    for precision in sorted({file.precision for file in manifest.files}):
        state: State = "ok"
        remedy = None
        if precision == "int8-cpu" and device.processor not in ("x86_64", "AMD64"):
            state, remedy = "unknown", "it is quantized for x86 processors: compare with profile"
        elif precision == "int8" and not device.gpus:
            state, remedy = "unknown", "it is for engines: build them on the device"
        checks.append(
            Check(
                item=f"precision {precision}",
                needs="a processor or GPU that computes it",
                has=", ".join((device.processor, *device.gpus)),
                state=state,
                required=False,
                remedy=remedy,
            )
        )
    return checks


def _memory(device: Device, manifest: Manifest) -> Check:
    """The largest precision's graphs, as a session opens them."""
    sizes: dict[str, int] = {}
    for file in manifest.files:
        if _is_opened(file):
            sizes[file.precision] = sizes.get(file.precision, 0) + file.bytes
    needed_gb = WORKING_FACTOR * max(sizes.values(), default=0) / 1e9
    state: State = "unknown"
    if device.memory_gb is not None:
        state = "ok" if needed_gb <= device.memory_gb else "missing"
    return Check(
        item="memory",
        needs=f"about {needed_gb:.1f} GB for a session",
        has="not known" if device.memory_gb is None else f"{device.memory_gb:g} GB",
        state=state,
        required=False,
        remedy="use a smaller precision, or a model with more memory" * (state == "missing")
        or None,
    )


def _is_opened(file: File) -> bool:
    return file.role in ("encoder", "decoder", "weights")


def _native_code(device: Device, gpu: str, bundle: Path) -> list[Check]:
    """Engines and kernels of a bundle for one GPU of the device."""
    engines = [
        load_engines(path.parent)
        for path in sorted((bundle / ENGINES_FOLDER).glob(f"*/{ENGINE_FILENAME}"))
        if not path.parent.name.startswith(".")
    ]
    fitting = [
        f"{engine.options.flavor} {engine.version} {engine.options.precision}"
        for engine in engines
        if gpu in engine.options.targets
        and (engine.options.flavor == "rtx" or _is_version(engine.version, device.tensorrt))
    ]
    kernels = load_cubins(bundle)
    targets = sorted({file.target for file in kernels.files} if kernels else ())
    usable = takes_cubins(gpu, targets)
    return [
        Check(
            item=f"engines for {gpu}",
            needs=f"built by TensorRT {device.tensorrt or 'of the device'}",
            has=", ".join(fitting) or "none",
            state="ok" if fitting else "missing",
            required=False,
            remedy=None
            if fitting or _tensorrt(device).state != "ok"
            else f"on the device: medsa-deploy build-engine {bundle} --fp16",
        ),
        Check(
            item=f"kernels for {gpu}",
            needs=f"compiled for {gpu}",
            has=", ".join(targets) or "none",
            state="ok" if usable else "missing",
            required=False,
            remedy=None if usable else f"medsa-deploy build-kernels {bundle} --target {gpu}",
        ),
    ]


def _is_version(built: str, installed: str | None) -> bool:
    """Whether an engine's version is the device's, as far as the device's is known."""
    return installed is not None and built.split(".")[:2] == installed.split(".")[:2]
