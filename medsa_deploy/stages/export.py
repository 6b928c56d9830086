"""A checkpoint → a bundle, proved equal to the checkpoint's own network."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from medsa_deploy import __version__
from medsa_deploy.bundle.files import describe_file
from medsa_deploy.bundle.folder import check_target, new_bundle
from medsa_deploy.bundle.manifest import Manifest, Parity, Role, save_manifest
from medsa_deploy.bundle.sbom import require_library, write_sbom
from medsa_deploy.errors import UsageError
from medsa_deploy.evaluation.cases import Case, parity_cases
from medsa_deploy.evaluation.parity import Array, compare_cases, reference_outputs, require_parity
from medsa_deploy.evaluation.reference_file import save_reference
from medsa_deploy.progress import OnStep
from medsa_deploy.runtime import Session, load
from medsa_deploy.runtime.backends.onnxruntime_cpu import OnnxRuntimeBackend
from medsa_deploy.runtime.backends.registry import LoadOptions

from .inspect import export_extra
from .readings import Reading, try_readings

if TYPE_CHECKING:
    from medsa_deploy.exporters.architecture import Architecture, Guess, Overrides
    from medsa_deploy.exporters.checkpoint import Checkpoint

TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "segment-anything", "numpy")


@dataclass(frozen=True, kw_only=True)
class Export:
    """A bundle that was just written."""

    bundle: Path
    manifest: Manifest
    guesses: tuple[Guess, ...]
    """Facts that the checkpoint does not determine."""
    notes: tuple[str, ...]
    """Changes that were made while the checkpoint was read."""
    readings: tuple[Reading, ...]
    """The readings that were tried on labelled images, the best first, which was taken."""
    seconds: float


def export_checkpoint(
    checkpoint: Path,
    *,
    output: Path | None,
    base: Path | None,
    images: Path | None,
    overrides: Overrides,
    force: bool,
    masks: Path | None = None,
    weights: str | None = None,
    prefix: str | None = None,
    on_step: OnStep = lambda step: None,
) -> Export:
    """Write a checkpoint's bundle, and prove it equal to the checkpoint's own network.

    `output`: by default the checkpoint's name with the suffix `.medsa`. `base`: the SAM checkpoint
    that a file of adapters goes over. `images`: a file or folder, compared besides the seeded ones.
    `masks`: their labels, to find the code that trained the network: see `try_readings`.
    `weights`, `prefix`: which state dict in the file, and which of its keys, if that is open.

    ParityError, and no bundle, if the graphs exceed the limits of `verify` on any of the images.
    """
    target = output or checkpoint.with_suffix(".medsa")
    check_target(target, force=force)
    start = perf_counter()
    require_library("export")
    on_step("read the checkpoint")
    with export_extra():
        from medsa_deploy.exporters.architecture import infer
        from medsa_deploy.exporters.checkpoint import load_checkpoint
    loaded = load_checkpoint(checkpoint, base=base, weights=weights, prefix=prefix)
    readings: tuple[Reading, ...] = ()
    if masks is not None:
        if images is None:
            raise UsageError("--masks holds the labels of --images: give both")
        readings = try_readings(loaded, overrides, images=images, labels=masks, on_step=on_step)
        overrides = replace(overrides, trained_with=readings[0].trained_with)
    architecture = infer(loaded, overrides)
    manifest = _manifest(loaded, architecture)
    cases = parity_cases(manifest, images)
    with new_bundle(target) as folder:
        manifest = _write_bundle(folder, loaded, manifest, cases, on_step)
    return Export(
        bundle=target,
        manifest=manifest,
        guesses=architecture.guesses,
        notes=loaded.notes,
        readings=readings,
        seconds=perf_counter() - start,
    )


def _manifest(loaded: Checkpoint, architecture: Architecture) -> Manifest:
    """A bundle's manifest before it has files."""
    from medsa_deploy.exporters.graphs import contract

    return Manifest(
        source=loaded.source,
        network=architecture.network,
        conventions=architecture.conventions,
        graphs=contract(architecture.network),
        files=(),
        tools=_tools(),
    )


def _write_bundle(
    folder: Path,
    loaded: Checkpoint,
    manifest: Manifest,
    cases: Sequence[Case],
    on_step: OnStep,
) -> Manifest:
    """Graphs, reference and manifest, in `folder`; ParityError unless the graphs are proved."""
    with export_extra():
        from medsa_deploy.exporters.graphs import OPSET, export_graphs, parts_contract
        from medsa_deploy.exporters.networks import build_reference, fold
        from medsa_deploy.exporters.reference import ReferenceBackend
        from medsa_deploy.graph.backend_encoders import write_backend_encoders
    reference = build_reference(manifest.network, loaded.tensors)
    on_step("run the checkpoint's own network")
    expected = reference_outputs(ReferenceBackend(reference), manifest, cases)
    folded = fold(reference)
    del reference  # memory: the exporter makes copies of its own
    parts = parts_contract(folded.image_part, manifest.graphs["decoder"])
    manifest = replace(manifest, graphs=manifest.graphs | parts)
    graphs = export_graphs(
        folded,
        manifest.graphs,
        folder,
        chunk=manifest.network.chunk,
        on_graph=lambda name: on_step(f"export the {name}"),
    )
    del folded
    backend_encoders = write_backend_encoders(graphs["encoder"])
    graphs |= {role: [path] for role, path in backend_encoders.items()}
    files = [
        describe_file(path, folder, role=role, precision="fp32", opset=OPSET)
        for name, paths in graphs.items()
        for path, role in _roles(name, paths)
    ]
    reference_path = folder / "reference.npz"
    save_reference(reference_path, cases[0], expected[0])
    files.append(describe_file(reference_path, folder, role="reference", precision="fp32"))
    manifest = replace(manifest, files=tuple(files))
    manifest = write_sbom(folder, manifest, TOOLS, command="export")
    save_manifest(manifest, folder)
    on_step("prove the graphs equal to it")
    tensors = [outputs.tensors for outputs in expected]
    manifest = replace(
        manifest, parity=(_prove(folder, manifest, backend_encoders, cases, tensors),)
    )
    save_manifest(manifest, folder)
    return manifest


def _prove(
    folder: Path,
    manifest: Manifest,
    backend_encoders: Mapping[Role, Path],
    cases: Sequence[Case],
    expected: Sequence[dict[str, Array]],
) -> Parity:
    """Compare the portable graphs, and each backend's own encoder, with the checkpoint's network.

    ParityError if they exceed the limits.
    """
    with load(folder, options=LoadOptions(portable=True)) as session:
        compared = compare_cases(session, cases, expected)
        backend = session.backend.name
    decoder = folder / manifest.file("decoder").path
    for role, path in backend_encoders.items():
        with Session(manifest, OnnxRuntimeBackend(path, decoder, manifest.graphs)) as session:
            compared.encoders[role] = compare_cases(session, cases, expected)
    parity = compared.summary(cases, precision="fp32", backend=backend)
    require_parity(parity)
    return parity


def _roles(name: Role, paths: Sequence[Path]) -> Iterator[tuple[Path, Role]]:
    """Each file of a graph with its role: the graph itself, then its external weights."""
    graph, *weights = paths
    yield graph, name
    for path in weights:
        yield path, "weights"


def _tools() -> dict[str, str]:
    """Versions of the libraries that write a bundle."""
    return {
        "medsa-deploy": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in TOOLS},
    }
