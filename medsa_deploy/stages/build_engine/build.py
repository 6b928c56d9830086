"""A bundle → TensorRT or TensorRT-RTX engines in it: graphs that are missing, one plan, builds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from medsa_deploy.bundle.atomic import write_text
from medsa_deploy.bundle.checked import check_changeable
from medsa_deploy.bundle.files import sha256
from medsa_deploy.bundle.folder import new_bundle
from medsa_deploy.bundle.manifest import MANIFEST_FILENAME, load_manifest
from medsa_deploy.bundle.sbom import SBOM_FILENAME, ListedFile, require_library, sbom_text
from medsa_deploy.errors import UsageError
from medsa_deploy.libraries import Library, installed_library
from medsa_deploy.nvidia import cuda, engine_builder
from medsa_deploy.nvidia.engines import Engine, EngineFile, load_engines, save_engines
from medsa_deploy.progress import OnCount, OnStep
from medsa_deploy.stages.quantize.quantize import quantize_bundle

from .plan import (
    EnginePlan,
    EngineRequest,
    PlannedEngine,
    check_request,
    find_library,
    lacks_graphs,
    plan_engines,
)


@dataclass(frozen=True, kw_only=True)
class EngineBuild:
    """What a build did."""

    plan: EnginePlan
    built: bool
    """False for a plan alone, and for engines that were up to date."""
    engine: Engine | None
    """What the folder holds now; None for a plan alone."""
    seconds: float


def build_engines(
    bundle: Path | None,
    request: EngineRequest,
    *,
    force: bool = False,
    dry_run: bool = False,
    on_note: OnStep = lambda note: None,
    on_step: OnStep = lambda step: None,
    on_progress: OnCount = lambda done, total: None,
) -> EngineBuild:
    """Build the engines of a bundle if they are missing or something they depend on changed.

    Without a bundle, those of the newest in the working folder. Missing graphs of the precision are
    made first, so that one plan sees all graphs. `dry_run` plans and writes nothing.
    """
    start = perf_counter()
    if bundle is None:
        bundle = newest_bundle(Path())
        on_note(f"no bundle named: {bundle}, the newest here")
    check_changeable(bundle)
    manifest = load_manifest(bundle)
    library = find_library(request, on_note)
    check_request(bundle, manifest, request, library)
    if not dry_run:
        require_library("rtx" if library.flavor == "rtx" else "tensorrt")
    if not dry_run and lacks_graphs(manifest, request.precision):
        _make_graphs(bundle, request, on_step, on_progress)
    plan = plan_engines(bundle, request, library, force=force, on_note=on_note)
    engine: Engine | None = None
    if not dry_run and plan.reasons:
        engine = _build(plan, request.timing_cache, on_step, on_progress)
    elif not dry_run:
        engine = load_engines(plan.folder)
    return EngineBuild(
        plan=plan,
        built=not dry_run and bool(plan.reasons),
        engine=engine,
        seconds=perf_counter() - start,
    )


def newest_bundle(folder: Path) -> Path:
    """The bundle in `folder` whose manifest is newest."""
    manifests = [
        path
        for path in folder.glob(f"*/{MANIFEST_FILENAME}")
        if not path.parent.name.startswith(".")
    ]
    if not manifests:
        raise UsageError(
            f"there is no bundle in {folder.resolve()}: name one, or make one with "
            "medsa-deploy export CHECKPOINT"
        )
    return max(manifests, key=lambda path: path.stat().st_mtime_ns).parent


def _make_graphs(
    bundle: Path, request: EngineRequest, on_step: OnStep, on_progress: OnCount
) -> None:
    """Add graphs of the request's precision to the bundle."""
    quantize_bundle(
        bundle,
        precision="fp16" if request.precision == "fp16" else "int8",
        calibration=request.calibration if request.precision == "int8" else (),
        on_step=on_step,
        on_image=on_progress,
    )


def _build(
    plan: EnginePlan, timing_cache: Path | None, on_step: OnStep, on_progress: OnCount
) -> Engine:
    """Build into a temporary folder, which takes the plan's name when it is whole."""
    parent = plan.folder.parent
    parent.mkdir(exist_ok=True)
    try:
        with new_bundle(plan.folder) as folder:
            files = []
            for planned in plan.engines:
                on_step(f"build the {planned.role}")
                files.append(_build_one(plan, planned, folder, timing_cache, on_progress))
            device = cuda.device() if plan.library.flavor == "tensorrt" else None
            engine = Engine(
                options=plan.options,
                version=plan.library.version,
                device=device.name if device else None,
                state="built",
                files=tuple(files),
            )
            save_engines(engine, folder)
            write_text(folder / SBOM_FILENAME, _sbom(plan, engine))
    finally:
        if not any(parent.iterdir()):
            parent.rmdir()
    return engine


def _sbom(plan: EnginePlan, engine: Engine) -> str:
    """The engines' own bill of materials: the bundle's stays as it is, and so does a signature."""
    name = "tensorrt-rtx" if engine.options.flavor == "rtx" else "tensorrt"
    builder = installed_library(name) or Library(name=name, version=engine.version, licence="")
    writers = [builder, *filter(None, map(installed_library, ("medsa-deploy", "onnx")))]
    targets = ", ".join(engine.options.targets)
    files = [
        ListedFile(
            path=file.path,
            sha256=file.sha256,
            properties={"role": file.role, "precision": engine.options.precision},
            ancestors=tuple(file.sources),
            steps=f"built by {name} {engine.version} for {targets}",
        )
        for file in engine.files
    ]
    return sbom_text(load_manifest(plan.bundle), files, writers, command="build-engine")


def _build_one(
    plan: EnginePlan,
    planned: PlannedEngine,
    folder: Path,
    timing_cache: Path | None,
    on_progress: OnCount,
) -> EngineFile:
    """Build one engine into `folder`."""
    onnx = plan.bundle / next(iter(planned.sources))
    path = folder / f"{planned.role}.engine"
    outcome = engine_builder.build(
        engine_builder.Job(
            onnx=str(onnx),
            output=str(path),
            options=plan.options,
            profile=planned.profile,
            timing_cache=None if timing_cache is None else str(timing_cache),
        ),
        on_progress=lambda percent: on_progress(percent, 100),
    )
    return EngineFile(
        role=planned.role,
        path=path.name,
        bytes=path.stat().st_size,
        sha256=sha256(path),
        sources=planned.sources,
        profile=planned.profile,
        attention=outcome.attention,
        seconds=outcome.seconds,
    )
