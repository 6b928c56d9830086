"""A bundle → the same bundle with graphs of another precision, compared with its float32 graphs.

The graphs are written to a temporary folder inside the bundle. They move to their names if they
agree, and the manifest that lists them is replaced last. Until then the bundle does not change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Literal

from medsa_deploy.bundle.additions import add_files, work_folder
from medsa_deploy.bundle.checked import check_changeable
from medsa_deploy.bundle.files import check_files, describe_file
from medsa_deploy.bundle.manifest import File, Manifest, Parity, load_manifest
from medsa_deploy.bundle.recipe import Recipe
from medsa_deploy.bundle.sbom import SBOM_FILENAME, require_library, write_sbom
from medsa_deploy.errors import UsageError
from medsa_deploy.evaluation.cases import parity_cases
from medsa_deploy.graph.files import import_onnx
from medsa_deploy.progress import OnStep
from medsa_deploy.runtime.backends.interface import PARTS
from medsa_deploy.runtime.backends.registry import BACKEND_ENCODERS, GRAPH_ROLES, check_options

from .calibration import find_sources, hold_out, image_cases
from .candidates import CandidateRunner
from .float16 import QuantizedGraphs, make_float16
from .int8 import Base, make_int8

logger = logging.getLogger(__name__)

PRECISIONS = ("fp16", "int8", "int8-cpu")
"""Precisions that can be added; files of these names that no manifest lists are leftovers."""

LIBRARIES = ("onnx", "onnxruntime", "numpy")
"""Libraries that make the graphs."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A precision that was added to a bundle."""

    bundle: Path
    precision: str
    """`fp16`, `int8` or `int8-cpu`."""
    recipe: Recipe
    parity: Parity
    """Against the float32 graphs, run by ONNX Runtime."""
    files: tuple[File, ...]
    seconds: float


def quantize_bundle(
    bundle: Path,
    *,
    precision: Literal["fp16", "int8"],
    calibration: Sequence[Path] = (),
    target: Literal["tensorrt", "cpu"] = "tensorrt",
    images: Path | None = None,
    threads: int | None = None,
    on_step: OnStep = lambda step: None,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> Quantization:
    """Add float16 or INT8 graphs to a bundle; ParityError if their masks differ from float32's.

    `images`: a file or folder of images to compare masks on, beside the seeded cases. For int8:
    `calibration` are files and folders of images to measure the ranges of activations on; masks are
    compared on `images` alone, or on a few calibration images that are left out. `target` is the
    backend that will run the graphs. Graphs of the same precision are replaced.
    """
    start = perf_counter()
    if precision == "fp16" and calibration:
        raise UsageError("calibration images are for int8; float16 needs none")
    check_options("onnxruntime", threads)
    import_onnx()
    require_library("quantize")
    check_changeable(bundle)
    manifest = load_manifest(bundle)
    sources = find_sources(calibration, manifest.network.chunk) if precision == "int8" else []
    on_step("compare every file with its SHA-256")
    check_files(manifest, bundle)
    to_run = parity_cases(manifest, images)
    with work_folder(bundle) as folder:
        on_step("run the float32 graphs")
        additions: list[QuantizedGraphs] = []
        in_bundle = manifest.recipe("fp16") is not None
        if precision == "fp16" or (target == "tensorrt" and not in_bundle):
            runner = CandidateRunner(bundle, manifest, to_run, threads)
            additions.append(make_float16(runner, folder, on_step))
        if precision == "int8":
            base = _base(bundle, manifest, additions, target)
            sources, judged = hold_out(sources)
            judged_cases = [c for c in to_run if not c.seeded] or image_cases(judged, manifest)
            runner = CandidateRunner(bundle, manifest, judged_cases, threads)
            reference = CandidateRunner(bundle, manifest, to_run[:1], threads)
            additions.append(make_int8(runner, reference, folder, base, sources, on_step, on_image))
        result = _add(bundle, folder, additions)
    added = additions[-1]
    return Quantization(
        bundle=bundle,
        precision=added.recipe.precision,
        recipe=added.recipe,
        parity=added.parity,
        files=tuple(f for f in result.files if f.precision == added.recipe.precision),
        seconds=perf_counter() - start,
    )


def _base(
    bundle: Path,
    manifest: Manifest,
    additions: Sequence[QuantizedGraphs],
    target: Literal["tensorrt", "cpu"],
) -> Base:
    """The graphs that an INT8 encoder is combined with: new or earlier float16, or float32."""
    if target == "cpu":
        return Base(precision="fp32", decoder=bundle / manifest.file("decoder").path)
    recipe = additions[0].recipe if additions else manifest.recipe("fp16")
    if additions:
        decoder = additions[0].graphs["decoder"][0]
    else:
        decoder = bundle / manifest.file("decoder", "fp16").path
    assert recipe is not None
    return Base(precision="fp16", decoder=decoder, float32_blocks=recipe.float32_blocks)


def _add(bundle: Path, folder: Path, additions: Sequence[QuantizedGraphs]) -> Manifest:
    """Move new graphs and a new bill of materials from `folder` into the bundle.

    They take the place of graphs of the same precisions.
    """
    manifest = load_manifest(bundle)  # another precision may have been added meanwhile
    for added in additions:
        manifest = _merged(manifest, added)
    earlier = bundle / SBOM_FILENAME if manifest.has("sbom") else None
    manifest = write_sbom(folder, manifest, LIBRARIES, command="quantize", earlier=earlier)
    graphs = [file for added in additions for files in added.graphs.values() for file in files]
    add_files(bundle, [*graphs, folder / SBOM_FILENAME], manifest)
    listed = {entry.path for entry in manifest.files}
    for precision in PRECISIONS:
        for file in bundle.glob(f"*coder*.{precision}.onnx*"):
            if file.name not in listed:
                file.unlink(missing_ok=True)
    return manifest


def _merged(manifest: Manifest, added: QuantizedGraphs) -> Manifest:
    """The manifest with one precision's graphs added, or replaced."""
    precision = added.recipe.precision
    files = tuple(_entries(manifest, added))
    replaced = {f.path: f.sha256 for f in files}
    stale = {
        f.precision
        for f in manifest.files
        if f.role in GRAPH_ROLES and replaced.get(f.path, f.sha256) != f.sha256
    } - {precision}
    for name in sorted(stale):
        logger.warning(
            "%s was made over an earlier %s and is removed: make it again", name, precision
        )
    gone = stale | {precision}
    return replace(
        manifest,
        files=(
            *(f for f in manifest.files if f.precision not in gone or f.role not in GRAPH_ROLES),
            *files,
        ),
        parity=(*(p for p in manifest.parity if p.precision not in gone), added.parity),
        recipes=(*(r for r in manifest.recipes if r.precision not in gone), added.recipe),
    )


def _entries(manifest: Manifest, added: QuantizedGraphs) -> list[File]:
    """The manifest's entries for new files, which are still in the work folder."""
    entries = []
    for role, paths in added.graphs.items():
        opset = manifest.file("encoder" if role in BACKEND_ENCODERS else role).opset
        for i, path in enumerate(paths):
            entries.append(
                describe_file(
                    path,
                    path.parent,
                    role=role if i == 0 else "weights",
                    precision=added.recipe.precision,
                    opset=opset if i == 0 else None,
                )
            )
    if added.decoder_of is not None:
        entries += [
            replace(shared, precision=added.recipe.precision)
            for shared in manifest.files
            if shared.precision == added.decoder_of and shared.role in ("decoder", *PARTS)
        ]
    return entries
