"""A bundle and a request for engines → the plan of a build: library, targets, profiles, reasons."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf
from pathlib import Path

from medsa_deploy.bundle.files import check_file
from medsa_deploy.bundle.manifest import Manifest, Role, load_manifest
from medsa_deploy.errors import EngineError, UsageError
from medsa_deploy.nvidia import cuda, tensorrt_api
from medsa_deploy.nvidia.engines import (
    ENGINES_FOLDER,
    AxisRange,
    EngineOptions,
    Shape,
    check_engine_files,
    folder_name,
    load_engines,
    optimization_profile,
    stale_role,
)
from medsa_deploy.nvidia.tensorrt_api import Flavor, Library
from medsa_deploy.progress import OnStep

ROLES: tuple[Role, Role] = ("encoder", "decoder")
RTX_IGNORES = {
    "optimization_level": "--optimization-level",
    "timing_cache": "--timing-cache",
}
"""Options without effect on TensorRT-RTX: it leaves the choice of kernels to the device."""


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """What a user asks for; None leaves the choice to `plan_engines`."""

    precision: str = "fp16"
    flavor: Flavor | None = None
    targets: tuple[str, ...] = ()
    """Compute capabilities, such as `sm86`; TensorRT-RTX only, which needs no GPU to build."""
    batch: AxisRange | None = None
    points: AxisRange | None = None
    prompts: AxisRange | None = None
    embeddings: AxisRange | None = None
    calibration: tuple[Path, ...] = ()
    """Images that INT8 graphs are fitted to, if the bundle has no INT8 graphs yet."""
    workspace_gb: float | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    tf32: bool = True
    fused_attention: bool = True


@dataclass(frozen=True, kw_only=True)
class PlannedEngine:
    """One engine to build."""

    role: Role
    sources: dict[str, str]
    """ONNX file and its weights' file → SHA-256; empty if the graph has to be made first."""
    profile: dict[str, tuple[Shape, Shape, Shape]]
    """Input → its smallest, optimal and largest shape."""


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """What a build would do."""

    bundle: Path
    folder: Path
    library: Library
    options: EngineOptions
    engines: tuple[PlannedEngine, ...]
    makes_graphs: bool
    """Whether graphs of the precision are made first."""
    reasons: tuple[str, ...]
    """Why the engines have to be built; empty when they are up to date."""


def find_library(request: EngineRequest, on_note: OnStep) -> Library:
    """The library to build with; UsageError if it is not installed or has no GPU to build on."""
    flavor = request.flavor
    if flavor is None:
        has_tensorrt = tensorrt_api.installed("tensorrt") and cuda.device() is not None
        flavor = "tensorrt" if has_tensorrt else "rtx"
        on_note(
            "no --flavor given: TensorRT and a GPU are here, so TensorRT engines for this GPU"
            if has_tensorrt
            else "no --flavor given: no TensorRT with a GPU here, so TensorRT-RTX engines"
        )
    if flavor == "tensorrt":
        otherwise = "or build TensorRT-RTX engines, which need neither, with --flavor rtx"
        if not tensorrt_api.installed(flavor):
            raise UsageError(
                "TensorRT is not installed: pip install 'medsa-deploy[tensorrt]' on a machine with "
                f"an NVIDIA GPU, {otherwise}"
            )
        if cuda.device() is None:
            raise UsageError(
                "TensorRT builds on the GPU its engines run on, and no NVIDIA driver or GPU was "
                f"found: build there, {otherwise}"
            )
    return tensorrt_api.query_library(flavor)


def check_request(
    bundle: Path, manifest: Manifest, request: EngineRequest, library: Library
) -> None:
    """UsageError for a request that fails whatever the graphs hold, before minutes of making them.

    That is an unknown target, options that exclude each other, or INT8 without images.
    """
    _options(manifest, request, library, on_note=lambda note: None)
    if request.precision == "int8" and not request.calibration and lacks_graphs(manifest, "int8"):
        raise UsageError(
            f"{bundle} has no int8 graphs: add --calibration with a folder of your images, or make "
            f"them with medsa-deploy quantize {bundle} --int8 --calibration IMAGES"
        )


def lacks_graphs(manifest: Manifest, precision: str) -> bool:
    """Whether a bundle has no graphs of a precision, so that they are made before engines."""
    return not set(ROLES) <= {file.role for file in manifest.files if file.precision == precision}


def plan_engines(
    bundle: Path,
    request: EngineRequest,
    library: Library,
    *,
    force: bool = False,
    on_note: OnStep = lambda note: None,
) -> EnginePlan:
    """What a build of a checked request would do with the bundle's graphs, and why.

    The graphs' files are compared with their SHA-256. UsageError for a target that the graphs'
    float32 blocks exclude.
    """
    manifest = load_manifest(bundle)
    options = _options(manifest, request, library, on_note)
    for file in manifest.files:
        if file.precision == options.precision:
            check_file(file, bundle)
    makes_graphs = lacks_graphs(manifest, options.precision)
    folder = bundle / ENGINES_FOLDER / folder_name(options)
    reasons = [f"{options.precision} graphs are made first"] if makes_graphs else []
    return EnginePlan(
        bundle=bundle,
        folder=folder,
        library=library,
        options=options,
        engines=tuple(
            PlannedEngine(
                role=role,
                sources={} if makes_graphs else _sources(manifest, role, options.precision),
                profile=optimization_profile(manifest.graphs[role].inputs, options),
            )
            for role in ROLES
        ),
        makes_graphs=makes_graphs,
        reasons=(*reasons, *_reasons(folder, options, library, manifest, force)),
    )


def _sources(manifest: Manifest, role: Role, precision: str) -> dict[str, str]:
    """The ONNX file of a role, and its weights' file if it has one → SHA-256."""
    graph = manifest.file(role, precision)
    weights = [f for f in manifest.files if f.role == "weights" and f.path == f"{graph.path}.data"]
    return {file.path: file.sha256 for file in (graph, *weights)}


def _options(
    manifest: Manifest, request: EngineRequest, library: Library, on_note: OnStep
) -> EngineOptions:
    """The request with every choice manifest."""
    for name, option in RTX_IGNORES.items():
        if library.flavor == "rtx" and getattr(request, name) is not None:
            raise UsageError(f"{option} has no effect on TensorRT-RTX: leave it out")
    if request.workspace_gb is not None and not 0 < request.workspace_gb < inf:
        raise UsageError(f"--workspace {request.workspace_gb:g}: expected more than 0 GB")
    ranges = _ranges(manifest, request)
    return EngineOptions(
        flavor=library.flavor,
        precision=request.precision,
        targets=_targets(request, library, _has_float32(manifest, request.precision), on_note),
        **ranges,
        tf32=request.tf32,
        fused_attention=request.fused_attention,
        workspace_gb=request.workspace_gb,
        optimization_level=request.optimization_level,
    )


def _has_float32(manifest: Manifest, precision: str) -> bool:
    """Whether graphs of a precision hold float32 products: all do, or blocks that masks needed."""
    return precision == "fp32" or any(
        recipe.float32_blocks for recipe in manifest.recipes if recipe.precision == precision
    )


def _targets(
    request: EngineRequest, library: Library, float32: bool, on_note: OnStep
) -> tuple[str, ...]:
    """Compute capabilities to build for, sorted."""
    if library.flavor == "tensorrt":
        device = cuda.device()
        assert device is not None
        if request.targets and request.targets != (device.capability,):
            raise UsageError(
                f"--target {' '.join(request.targets)}: TensorRT builds for the GPU it runs on, "
                f"{device.name} ({device.capability}): leave --target out, or use --flavor rtx"
            )
        return (device.capability,)
    name = f"TensorRT-RTX {library.version}"
    if unknown := [target for target in request.targets if target not in library.targets]:
        raise UsageError(
            f"{name} does not build for {', '.join(unknown)}; it builds for: "
            f"{', '.join(library.targets)}"
        )
    able = tensorrt_api.float32_targets(library.targets) if float32 else library.targets
    if unable := [target for target in request.targets or library.targets if target not in able]:
        limit = f"{name} compiles no float32 products for {', '.join(unable)}"
        if request.targets:
            hint = "build them with --fp16, or" if request.precision == "fp32" else "build"
            raise UsageError(f"{limit}: {hint} for: {', '.join(able)}")
        on_note(f"{limit}: left out")
    return tuple(target for target in able if target in (request.targets or able))


def _ranges(manifest: Manifest, request: EngineRequest) -> dict[str, AxisRange]:
    """Sizes of the dynamic axes: those asked for, else the defaults.

    A session encodes one chunk of a 3D network at a time, and gathers the clicks of its slices.
    A mask alone and no prompt are 0 points; efficient_sam's prompts all have the same number.
    """
    network = manifest.network
    chunk, padded = network.chunk, manifest.conventions.pad_points
    batch = request.batch or (
        AxisRange(min=1, opt=1, max=4) if chunk == 1 else AxisRange(min=chunk, opt=chunk, max=chunk)
    )
    if any(size % chunk for size in (batch.min, batch.opt, batch.max)):
        raise UsageError(
            f"--batch {_text(batch)}: this network encodes {chunk} slices together, so all three "
            f"are multiples of {chunk}"
        )
    if network.slices and not batch.min == batch.max == network.slices:
        raise UsageError(
            f"--batch {_text(batch)}: this network takes {network.slices} slices, no more and no "
            "less: leave --batch out"
        )
    points = AxisRange(min=0, opt=2, max=max(16, 4 * chunk))
    if padded:
        points = AxisRange(min=padded, opt=padded, max=padded)
    if manifest.conventions.prompts == "none":
        points = AxisRange(min=0, opt=0, max=0)
    return {
        "batch": batch,
        "points": request.points or points,
        "prompts": request.prompts or AxisRange(min=1, opt=1, max=8),
        "embeddings": request.embeddings or AxisRange(min=1, opt=1, max=1),
    }


def _reasons(
    folder: Path, options: EngineOptions, library: Library, manifest: Manifest, force: bool
) -> list[str]:
    """Why the engines in `folder` have to be built; empty if they are up to date."""
    if not folder.is_dir():
        return ["not built yet"]
    try:
        engine = load_engines(folder)
        check_engine_files(engine, folder, "they are built again")
    except EngineError as e:
        return [str(e)]
    reasons = ["--force"] if force else []
    if engine.version != library.version:
        name = tensorrt_api.NAMES[library.flavor]
        reasons.append(f"built by {name} {engine.version}; {library.version} is installed")
    if role := stale_role(engine, manifest):
        reasons.append(f"the {role}'s ONNX file changed since it was built")
    for field in fields(EngineOptions):
        before, now = getattr(engine.options, field.name), getattr(options, field.name)
        if before != now:
            reasons.append(f"{field.name} changed from {_text(before)} to {_text(now)}")
    return reasons


def _text(value: object) -> str:
    """A setting as the command line has it."""
    if isinstance(value, AxisRange):
        return f"{value.min},{value.opt},{value.max}"
    return "the default" if value is None else str(value)
