"""Engines of a bundle → how they compare with the checkpoint's network, on this machine's GPU.

Each is run in a child process: TensorRT and TensorRT-RTX cannot meet in one process, and an engine
that ends its process ends no other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from medsa_deploy.bundle.manifest import Manifest, Parity, load_manifest
from medsa_deploy.bundle.strict_json import decode
from medsa_deploy.child import ChildError, OnNote, run_in_child
from medsa_deploy.errors import EngineError, MedsaError, MissingDependencyError, one_line
from medsa_deploy.evaluation.cases import Case
from medsa_deploy.evaluation.parity import (
    Array,
    Limits,
    NetworkOutputs,
    compare_cases,
    limits_of,
    parity_failures,
)
from medsa_deploy.evaluation.reference_file import load_reference, save_reference
from medsa_deploy.nvidia.engines import (
    ENGINE_FILENAME,
    ENGINES_FOLDER,
    load_engines,
    save_engines,
    stale_role,
)
from medsa_deploy.runtime import Session


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """Engines that a bundle holds."""

    folder: str
    """Relative to the bundle."""
    state: str
    """`built, not run`, `verified`, or why the engines cannot be used."""
    parity: Parity | None = None
    """How they compared where they were run."""
    failures: tuple[str, ...] = ()
    """What exceeds the limits, or kept them from running through."""


def engine_states(bundle: Path, manifest: Manifest) -> tuple[EngineState, ...]:
    """The engines in a bundle, by their descriptions alone: nothing is hashed or run."""
    states = []
    for path in sorted((bundle / ENGINES_FOLDER).glob(f"*/{ENGINE_FILENAME}")):
        folder = path.parent
        if folder.name.startswith("."):
            continue
        try:
            described = load_engines(folder)
        except EngineError as e:
            state = str(e)
        else:
            state = "built, not run" if described.state == "built" else described.state
            if role := stale_role(described, manifest):
                state = f"out of date: the {role}'s ONNX file changed since it was built"
        states.append(EngineState(folder=folder.relative_to(bundle).as_posix(), state=state))
    return tuple(states)


def check_engine(
    bundle: Path, folder: Path, cases: Sequence[Case], expected: Sequence[dict[str, Array]]
) -> Parity | str:
    """How the engines in `folder` compare on the cases; else why they cannot be run here.

    DeviceError, or another error of this package, where running them failed.
    """
    with TemporaryDirectory() as work:
        for i, (case, tensors) in enumerate(zip(cases, expected, strict=True)):
            # of a case's outputs the frame is not kept: the process finds it again
            outputs = NetworkOutputs(tensors=tensors, frame=None)  # type: ignore[arg-type]
            save_reference(Path(work) / f"{i}.npz", case, outputs)
        job = {"bundle": str(bundle), "folder": str(folder), "cases": work}
        try:
            answer = run_in_child(check_job, job)
        except (ChildError, OSError) as e:
            raise EngineError(f"its process ended with {one_line(e)}") from e
    if "cannot" in answer:
        return str(answer["cannot"])
    return decode(Parity, answer["parity"], "parity")


def check_job(job: dict[str, str], note: OnNote) -> dict[str, Any]:
    """The child's part of `check_engine`: the parity, or why the engines cannot be run here."""
    references = sorted(Path(job["cases"]).iterdir(), key=lambda path: int(path.stem))
    try:
        return {"parity": asdict(_run(Path(job["bundle"]), Path(job["folder"]), references))}
    except (EngineError, MissingDependencyError) as e:
        return {"cannot": str(e)}


def state_of(
    bundle: Path,
    engines: EngineState,
    cases: Sequence[Case],
    expected: Sequence[dict[str, Array]],
    recorded: float | None,
) -> EngineState:
    """The state of engines after they were run here; `engine.json` says so as well.

    recorded: see `verify.limits_of`.
    """
    folder = bundle / engines.folder
    described = load_engines(folder)
    try:
        parity = check_engine(bundle, folder, cases, expected)
    except MedsaError as e:
        problems: tuple[str, ...] = (str(e),)
    else:
        if isinstance(parity, str):
            return replace(engines, state=f"{engines.state}; not run here: {parity}")
        options = described.options
        limits = engine_limits(options.precision, recorded, tf32=options.tf32)
        problems = tuple(parity_failures(parity, limits))
        engines = replace(engines, parity=parity)
    state: Literal["built", "verified"] = "built" if problems else "verified"
    if described.state != state:
        save_engines(replace(described, state=state), folder)
    words = f"failed: {'; '.join(problems)}" if problems else "verified"
    return replace(engines, state=words, failures=problems)


def engine_limits(precision: str, recorded: float | None, *, tf32: bool) -> Limits:
    """Limits of a precision; products in TF32 are as exact as float16's."""
    return limits_of("fp16" if precision == "fp32" and tf32 else precision, recorded)


def _run(bundle: Path, folder: Path, references: Sequence[Path]) -> Parity:
    """Run the engines on saved cases, in this process."""
    from medsa_deploy.runtime.backends.tensorrt import TensorRTBackend

    manifest = load_manifest(bundle)
    described = load_engines(folder)
    loaded = [load_reference(path) for path in references]
    cases = [case for case, _ in loaded]
    backend = TensorRTBackend(folder, manifest, described.options.flavor)
    with Session(manifest, backend) as session:
        compared = compare_cases(session, cases, [tensors for _, tensors in loaded])
    return compared.summary(cases, precision=described.options.precision, backend=backend.name)
