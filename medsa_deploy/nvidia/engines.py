"""A folder of engines ⇄ its description, `engine.json`; whether it may be loaded on this machine.

A serialized engine is native code that is bound to a library version, to GPUs and to the ONNX file
it was built from, and it says little when one of them differs. `engine.json` stands beside the
engines and says all three; `check_loadable` compares before a byte is deserialized.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medsa_deploy.bundle.atomic import write_text
from medsa_deploy.bundle.files import sha256
from medsa_deploy.bundle.manifest import Manifest, Role, Tensor
from medsa_deploy.bundle.strict_json import decode
from medsa_deploy.errors import (
    BundleError,
    EngineChangedError,
    EngineDeviceError,
    EngineError,
    EngineFlavorError,
    EngineStaleError,
    EngineVersionError,
)

from . import cuda, tensorrt_api
from .tensorrt_api import Flavor

logger = logging.getLogger(__name__)

ENGINE_SCHEMA = 1
ENGINE_FILENAME = "engine.json"
ENGINES_FOLDER = "engines"
"""Where a bundle keeps its engines: `engines/FLAVOR-PRECISION-TARGETS/`."""

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AxisRange:
    """Sizes that one dynamic axis may take: an optimization profile's, along that axis."""

    min: int
    opt: int
    """The size that kernels are chosen for."""
    max: int


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of the builder; other options make another engine."""

    flavor: Flavor
    precision: str
    """Precision of the ONNX files; the builder adds none of its own but TF32."""
    targets: tuple[str, ...]
    """Compute capabilities the engines run on, such as `sm86`; TensorRT's is its own GPU's."""
    batch: AxisRange
    """B: images of an encoder run."""
    points: AxisRange
    """N: points of a prompt, its padding point included; 0 for a mask alone or no prompt."""
    prompts: AxisRange
    """P: prompts of a decoder run."""
    embeddings: AxisRange
    """E: embeddings of a decoder run."""
    tf32: bool
    """Whether float32 products may be computed in TF32."""
    fused_attention: bool
    """Whether attention may become one fused kernel; else it stays products and a softmax."""
    workspace_gb: float | None
    """Limit of the builder's scratch memory; None for the library's own."""
    optimization_level: int | None
    """TensorRT's 0…5; None for its default."""


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """One serialized engine and the ONNX file it was built from."""

    role: Role
    path: str
    """File name, in the folder of `engine.json`."""
    bytes: int
    sha256: str
    sources: dict[str, str]
    """The ONNX file it was built from, then its weights' file where they are apart, as the bundle's
    manifest names them → SHA-256."""
    profile: dict[str, tuple[Shape, Shape, Shape]]
    """Input → its smallest, optimal and largest shape."""
    attention: Literal["fused", "plain", "unknown"]
    """Whether the engine holds fused attention kernels; TensorRT's do not show it."""
    seconds: float
    """Time the build took."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Everything `engine.json` holds."""

    options: EngineOptions
    version: str
    """Of TensorRT or TensorRT-RTX; an engine loads in the same version only."""
    device: str | None
    """Name of the GPU it was built on; None where it was built without one."""
    state: Literal["built", "verified"]
    """`built`: parser and compiler took the graphs. `verified`: compared on a device as well."""
    files: tuple[EngineFile, ...]
    schema: int = ENGINE_SCHEMA

    def file(self, role: Role) -> EngineFile:
        """The engine of `role`."""
        (file,) = (file for file in self.files if file.role == role)
        return file


def folder_name(options: EngineOptions) -> str:
    """FLAVOR-PRECISION-TARGETS, such as `rtx-fp16-sm86+sm89`."""
    return f"{options.flavor}-{options.precision}-{'+'.join(options.targets)}"


def optimization_profile(
    inputs: tuple[Tensor, ...], options: EngineOptions
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Smallest, optimal and largest shape of each input of a graph."""
    axes = {"B": options.batch, "E": options.embeddings, "P": options.prompts, "N": options.points}

    def shape(tensor: Tensor, size: Literal["min", "opt", "max"]) -> Shape:
        return tuple(
            getattr(axes[axis], size) if isinstance(axis, str) else axis for axis in tensor.shape
        )

    return {t.name: (shape(t, "min"), shape(t, "opt"), shape(t, "max")) for t in inputs}


def save_engines(engine: Engine, folder: Path) -> None:
    """Write `engine.json` into the folder of the engines."""
    text = json.dumps(dataclasses.asdict(engine), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / ENGINE_FILENAME, text + "\n")


def load_engines(folder: Path) -> Engine:
    """Read and validate `engine.json`; the engines are not opened."""
    path = folder / ENGINE_FILENAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise EngineChangedError(f"{path} cannot be read ({e}): build the engines again") from e
    if not isinstance(data, dict) or data.get("schema") != ENGINE_SCHEMA:
        raise EngineVersionError(
            f"{path} is not of the schema this medsa-deploy reads, version {ENGINE_SCHEMA}: "
            "build the engines again"
        )
    try:
        engine = decode(Engine, data, ENGINE_FILENAME)
    except BundleError as e:
        raise EngineChangedError(f"{folder}: {e}: build the engines again") from e
    names = [file.path for file in engine.files]
    if sorted(file.role for file in engine.files) != ["decoder", "encoder"] or any(
        Path(name).name != name for name in names
    ):
        raise EngineChangedError(
            f"{path} names {', '.join(names) or 'no engines'}, expected an encoder and a decoder "
            "beside it: build the engines again"
        )
    return engine


def find_engines(bundle: Path, flavor: Flavor, precision: str, device: cuda.Device | None) -> Path:
    """The folder of a bundle's engines for a GPU; EngineError if there is none.

    Of several folders, the one for the fewest kinds of GPU.
    """
    name = f"{tensorrt_api.NAMES[flavor]} {precision}"
    candidates = []
    for path in sorted((bundle / ENGINES_FOLDER).glob(f"*/{ENGINE_FILENAME}")):
        if path.parent.name.startswith("."):
            continue
        engine = load_engines(path.parent)
        if (engine.options.flavor, engine.options.precision) == (flavor, precision):
            fits = device is not None and device.capability in engine.options.targets
            candidates.append((not fits, len(engine.options.targets), path.parent))
    if candidates:
        return min(candidates)[-1]
    target = f" --target {device.capability}" if device and flavor == "rtx" else ""
    raise EngineError(
        f"{bundle} holds no {name} engines: build them with medsa-deploy build-engine {bundle} "
        f"--{precision} --flavor {flavor}{target}"
    )


def check_loadable(
    folder: Path, manifest: Manifest, *, library: tensorrt_api.Library, device: cuda.Device | None
) -> Engine:
    """The engines of `folder`, once nothing keeps them from running here.

    manifest: of the bundle that they are in. library: the library that will load them. Cheap facts
    are compared first, the engines' bytes last, and they are never deserialized. EngineError says
    which engines to build.
    """
    engine = load_engines(folder)
    again = (
        f"build them with {build_command(engine.options, folder.parent.parent, library, device)}"
    )
    _check_library(engine, folder, library, again)
    _check_device(engine, folder, device, again)
    if role := stale_role(engine, manifest):
        raise EngineStaleError(
            f"{folder}: its {role} was built from another {next(iter(engine.file(role).sources))} "
            f"than the bundle holds now: {again}"
        )
    check_engine_files(engine, folder, again)
    return engine


def check_engine_files(engine: Engine, folder: Path, again: str) -> None:
    """EngineChangedError, ending in `again`, unless the engines are those that were built.

    Reads every byte.
    """
    for file in engine.files:
        path = folder / file.path
        try:
            size = path.stat().st_size
            digest = sha256(path) if size == file.bytes else None
        except OSError as e:
            raise EngineChangedError(f"{path} cannot be read ({e.strerror}): {again}") from e
        if digest != file.sha256:
            wrong = f"{size} bytes, expected {file.bytes}" if digest is None else "another SHA-256"
            raise EngineChangedError(
                f"{path} is not the engine that {ENGINE_FILENAME} describes ({wrong}): {again}"
            )


def stale_role(engine: Engine, manifest: Manifest) -> Role | None:
    """The engine whose ONNX file the bundle no longer holds; None when both are there."""
    hashes = {file.path: file.sha256 for file in manifest.files}
    return next((f.role for f in engine.files if not f.sources.items() <= hashes.items()), None)


def build_command(
    options: EngineOptions,
    bundle: Path,
    library: tensorrt_api.Library,
    device: cuda.Device | None = None,
) -> str:
    """The command line that builds engines like these for `library`, and for `device` if given."""
    words = ["medsa-deploy build-engine", str(bundle), f"--{options.precision}"]
    words.append(f"--flavor {library.flavor}")
    if library.flavor == "rtx":
        targets = (device.capability,) if device else options.targets
        words += [f"--target {target}" for target in targets]
    return " ".join(words)


def _check_library(engine: Engine, folder: Path, library: tensorrt_api.Library, again: str) -> None:
    if engine.options.flavor != library.flavor:
        raise EngineFlavorError(
            f"{folder} holds {tensorrt_api.NAMES[engine.options.flavor]} engines; "
            f"{tensorrt_api.NAMES[library.flavor]} is to load them: {again}"
        )
    if engine.version != library.version:
        raise EngineVersionError(
            f"{folder} was built by {tensorrt_api.NAMES[library.flavor]} {engine.version}; "
            f"{library.version} is installed, and an engine loads in its own version only: {again}"
        )


def _check_device(engine: Engine, folder: Path, device: cuda.Device | None, again: str) -> None:
    if device is None:
        raise EngineDeviceError(
            f"{folder}: no NVIDIA driver or GPU was found, and engines run on one: install the "
            "driver, or run the bundle with --backend onnxruntime"
        )
    if device.capability not in engine.options.targets:
        raise EngineDeviceError(
            f"{folder} was built for {', '.join(engine.options.targets)}; this machine's "
            f"{device.name} is {device.capability}: {again}"
        )
    if engine.device not in (None, device.name):
        logger.warning(
            "%s was built on %s, and this machine's GPU is %s, of the same compute capability: its "
            "kernels may be slower here, or refused: %s",
            folder,
            engine.device,
            device.name,
            again,
        )
