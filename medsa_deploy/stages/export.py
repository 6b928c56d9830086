"""Checkpoint → bundle, with its proof."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from medsa_deploy import __version__
from medsa_deploy.bundle.files import describe_file
from medsa_deploy.bundle.folder import check_target, new_bundle
from medsa_deploy.bundle.manifest import Manifest, Role, save_manifest
from medsa_deploy.evaluation.cases import Case, parity_cases
from medsa_deploy.evaluation.parity import compare_cases, reference_outputs, require_parity
from medsa_deploy.evaluation.reference_file import save_reference
from medsa_deploy.progress import OnStep
from medsa_deploy.runtime import Session, load
from medsa_deploy.runtime.backends.onnxruntime_cpu import OnnxRuntimeBackend

from .inspect import export_extra, read_checkpoint

if TYPE_CHECKING:
    from medsa_deploy.exporters.architecture import Architecture, Guess, Overrides
    from medsa_deploy.exporters.checkpoint import Checkpoint

TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "segment-anything", "numpy")


@dataclass(frozen=True, kw_only=True)
class Export:
    """A bundle that was just made."""

    bundle: Path
    manifest: Manifest
    guesses: tuple[Guess, ...]
    notes: tuple[str, ...]
    seconds: float


def export_checkpoint(
    checkpoint: Path,
    *,
    output: Path | None,
    base: Path | None,
    images: Path | None,
    overrides: Overrides,
    force: bool,
    on_step: OnStep = lambda step: None,
) -> Export:
    """Checkpoint → bundle, proved equal to the checkpoint's own network.

    ParityError, and no bundle, when relative L2 or the share of differing mask pixels exceeds the
    limits of `verify` on the seeded images or the user's.
    """
    target = output or checkpoint.with_suffix(".medsa")
    check_target(target, force=force)
    start = perf_counter()
    on_step("read the checkpoint")
    loaded, architecture = read_checkpoint(checkpoint, base, overrides)
    to_prove = parity_cases(architecture.network, images)
    with new_bundle(target) as folder:
        made = _write_bundle(folder, loaded, architecture, to_prove, on_step)
    return Export(
        bundle=target,
        manifest=made,
        guesses=architecture.guesses,
        notes=loaded.notes,
        seconds=perf_counter() - start,
    )


def _write_bundle(
    folder: Path,
    loaded: Checkpoint,
    architecture: Architecture,
    to_prove: Sequence[Case],
    on_step: OnStep,
) -> Manifest:
    """Graphs, reference and manifest, in `folder`; ParityError unless the graphs are proved."""
    with export_extra():
        from medsa_deploy.exporters.folded import fold
        from medsa_deploy.exporters.graphs import OPSET, contract, export_graphs, parts_contract
        from medsa_deploy.exporters.reference import ReferenceBackend, build_reference
        from medsa_deploy.graph.backend_encoders import write_backend_encoders
    made = Manifest(
        source=loaded.source,
        network=architecture.network,
        conventions=architecture.conventions,
        graphs=contract(architecture.network),
        files=(),
        tools=_tools(),
    )
    reference = build_reference(architecture.network, loaded.tensors)
    on_step("run the checkpoint's own network")
    expected = reference_outputs(ReferenceBackend(reference), made, to_prove)
    folded = fold(reference)
    del reference  # memory: the exporter makes copies of its own
    parts = parts_contract(folded.image_part, made.graphs["decoder"])
    made = replace(made, graphs=made.graphs | parts)
    graphs = export_graphs(
        folded,
        made.graphs,
        folder,
        chunk=made.network.chunk,
        on_graph=lambda name: on_step(f"export the {name}"),
    )
    del folded
    own = write_backend_encoders(graphs["encoder"])
    graphs |= {role: [path] for role, path in own.items()}
    files = [
        describe_file(path, folder, role=role, precision="fp32", opset=OPSET)
        for name, paths in graphs.items()
        for path, role in _roles(name, paths)
    ]
    saved = folder / "reference.npz"
    save_reference(saved, to_prove[0], expected[0])
    files.append(describe_file(saved, folder, role="reference", precision="fp32"))
    made = replace(made, files=tuple(files))
    save_manifest(made, folder)
    on_step("prove the graphs equal to it")
    wanted = [outputs.tensors for outputs in expected]
    with load(folder, portable=True) as session:
        compared = compare_cases(session, to_prove, wanted)
        backend = session.backend.name
    decoder = graphs["decoder"][0]
    for role, path in own.items():
        with Session(made, OnnxRuntimeBackend(path, decoder, made.graphs)) as session:
            compared.encoders[role] = compare_cases(session, to_prove, wanted)
    proof = compared.summary(to_prove, precision="fp32", backend=backend)
    require_parity(proof)
    made = replace(made, parity=(proof,))
    save_manifest(made, folder)
    return made


def _roles(name: Role, paths: Sequence[Path]) -> Iterator[tuple[Path, Role]]:
    """Each file of a graph with its role: the graph itself, then its external weights."""
    graph, *weights = paths
    yield graph, name
    for path in weights:
        yield path, "weights"


def _tools() -> dict[str, str]:
    """Versions of what makes a bundle."""
    return {
        "medsa-deploy": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in TOOLS},
    }
