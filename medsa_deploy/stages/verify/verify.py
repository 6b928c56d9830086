"""A bundle → how its graphs and engines compare with its checkpoint's own network, run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from medsa_deploy.bundle.checked import CheckedBundle, check_bundle
from medsa_deploy.bundle.files import check_files, sha256
from medsa_deploy.bundle.manifest import Manifest, Parity
from medsa_deploy.errors import InputError, UsageError
from medsa_deploy.evaluation.cases import Case, parity_cases
from medsa_deploy.evaluation.parity import Array, compare_cases, reference_outputs
from medsa_deploy.evaluation.reference_file import load_reference
from medsa_deploy.nvidia import cuda
from medsa_deploy.nvidia.engines import load_engines
from medsa_deploy.progress import OnStep
from medsa_deploy.reports.parity import Result
from medsa_deploy.runtime import Session, load
from medsa_deploy.runtime.backends.registry import (
    BACKENDS,
    BackendName,
    LoadOptions,
    Precision,
    check_options,
    files_precision,
)
from medsa_deploy.stages.inspect import export_extra

from . import engine_check
from .engine_check import EngineState, engine_states
from .parity_report import worst_mask, write_report

AGAINST = {
    "checkpoint": "the checkpoint's own network",
    "saved reference": "the outputs that the checkpoint's own network gave at export",
}
"""The outputs that a bundle is compared with, in words."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How a bundle compares, precision by precision."""

    bundle: Path
    against: str
    """`checkpoint`, or `saved reference`: the outputs of the checkpoint's network at export."""
    parity: tuple[Parity, ...]
    failures: tuple[str, ...]
    """Figures that exceed the limits; empty if all are within them."""
    engines: tuple[EngineState, ...]
    """The bundle's engines, which are run if there is a GPU."""
    report: Path | None = None
    """The page with the figures and the worst masks, if one was asked for."""
    signers: tuple[str, ...] = ()
    """Fingerprints of the trusted keys that signed the bundle; empty if no keys are configured."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Cases, and the outputs of the checkpoint's own network for each of them."""

    cases: Sequence[Case]
    outputs: Sequence[dict[str, Array]]
    against: str
    """A key of `AGAINST`: the source of the outputs."""

    def subset(self, chosen: Sequence[int]) -> Reference:
        """The chosen cases with their outputs."""
        return replace(
            self,
            cases=[self.cases[i] for i in chosen],
            outputs=[self.outputs[i] for i in chosen],
        )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the graphs are run, as for `load`."""

    backend: BackendName
    threads: int | None
    report: bool
    """Whether the worst masks are drawn."""


def check_signed(bundle: Path, trusted: Sequence[Path] | None) -> CheckedBundle:
    """A bundle whose manifest and added files are signed, if keys are given or configured."""
    checked = check_bundle(bundle, trusted)
    checked.check_additions()
    return checked


def verify_bundle(
    bundle: Path,
    *,
    checkpoint: Path | None,
    base: Path | None,
    images: Path | None,
    backend: BackendName,
    precision: Precision | None,
    threads: int | None,
    report: bool = False,
    trusted: Sequence[Path] | None = None,
    on_step: OnStep = lambda step: None,
) -> Verification:
    """Compare a bundle with its checkpoint's network, or with what that gave at export.

    Every file is compared with its SHA-256 first. Without `checkpoint`, torch is not needed.
    `report` writes `reports/parity.html` into the bundle. On a GPU, the engines of the compared
    precisions are run too, and each `engine.json` records whether they were verified.

    UsageError for options that exclude each other. BundleError for missing or changed files.
    InputError for another checkpoint than the one the bundle was made from.
    """
    checked = check_signed(bundle, trusted)
    manifest = checked.manifest
    check_options(backend, threads, precision or "fp32")
    encoders = [file.precision for file in manifest.files if file.role == "encoder"]
    precisions = [precision] if precision else cast(list[Precision], encoders)
    for name in precisions:  # refused now, not after minutes of the checkpoint's network
        manifest.file("encoder", files_precision(name))
    on_step("compare every file with its SHA-256")
    check_files(manifest, bundle)
    reference = _reference(bundle, manifest, checkpoint, base, images, on_step)
    options = RunOptions(backend=backend, threads=threads, report=report)
    results = []
    for name in precisions:
        on_step(f"run the {name} graphs in {backend}")
        results.append(_verify_precision(bundle, manifest, name, reference, options))
    on_step("run the engines, if there are any and a GPU")
    engines = _engines(bundle, manifest, precisions, reference)
    failures = [(r.parity.precision, failure) for r in results for failure in r.failures]
    failures += [(engine.folder, failure) for engine in engines for failure in engine.failures]
    page = None
    if report:
        against = AGAINST[reference.against]
        page = write_report(bundle, manifest, results, against=against, engines=engines)
    return Verification(
        bundle=bundle,
        against=reference.against,
        parity=tuple(result.parity for result in results),
        failures=tuple(f"{part}: {failure}" for part, failure in failures),
        engines=engines,
        report=page,
        signers=checked.trust.signers,
    )


def _reference(
    bundle: Path,
    manifest: Manifest,
    checkpoint: Path | None,
    base: Path | None,
    images: Path | None,
    on_step: OnStep,
) -> Reference:
    """The outputs that the bundle's graphs should give: the checkpoint's, else the saved ones."""
    if checkpoint is None:
        if images is not None:
            raise UsageError(
                "--images compares with the checkpoint's own network: add --checkpoint FILE "
                f"(this bundle was made from {manifest.source.checkpoint})"
            )
        case, tensors = load_reference(bundle / manifest.file("reference").path)
        return Reference(cases=[case], outputs=[tensors], against="saved reference")
    cases = parity_cases(manifest, images)
    on_step("run the checkpoint's own network")
    outputs = _checkpoint_outputs(manifest, checkpoint, base, cases)
    return Reference(cases=cases, outputs=outputs, against="checkpoint")


def _verify_precision(
    bundle: Path,
    manifest: Manifest,
    precision: Precision,
    reference: Reference,
    options: RunOptions,
) -> Result:
    """Run one precision's portable graphs, and the backend's own encoder if the bundle has it."""
    reference, recorded_dice = _judged_on(reference, manifest, precision)
    cases, expected = reference.cases, reference.outputs

    def open_session(*, portable: bool) -> Session:
        return load(
            bundle,
            backend=options.backend,
            precision=precision,
            threads=options.threads,
            options=LoadOptions(portable=portable),
        )

    with open_session(portable=True) as session:
        compared = compare_cases(session, cases, expected)
        backend = session.backend.name
        tf32 = session.backend.facts().get("tf32", False)
        comparisons = compared.comparisons
        worst = worst_mask(session, cases, expected, comparisons) if options.report else None
    role = BACKENDS[backend].encoder_role
    if role is not None and manifest.has(role, files_precision(precision)):
        with open_session(portable=False) as session:
            compared.encoders[role] = compare_cases(session, cases, expected)
    return Result(
        parity=compared.summary(cases, precision=precision, backend=backend),
        limits=engine_check.engine_limits(precision, recorded_dice, tf32=tf32),
        mask_dice=tuple(value for comparison in comparisons for value in comparison.mask_dice),
        worst=worst,
    )


def _engines(
    bundle: Path, manifest: Manifest, precisions: Sequence[str], reference: Reference
) -> tuple[EngineState, ...]:
    """The engines in the bundle; those of `precisions` are run if there is a GPU."""
    states = engine_states(bundle, manifest)
    if cuda.device() is None:
        return states
    return tuple(_run_engine(bundle, manifest, state, precisions, reference) for state in states)


def _run_engine(
    bundle: Path,
    manifest: Manifest,
    state: EngineState,
    precisions: Sequence[str],
    reference: Reference,
) -> EngineState:
    """An engine's state after it was run; unchanged if it cannot be run or was not asked for."""
    if state.state not in ("built, not run", "verified"):
        return state
    precision = load_engines(bundle / state.folder).options.precision
    if precision not in precisions:
        return state
    reference, recorded_dice = _judged_on(reference, manifest, precision)
    return engine_check.state_of(bundle, state, reference.cases, reference.outputs, recorded_dice)


def _judged_on(
    reference: Reference, manifest: Manifest, precision: str
) -> tuple[Reference, float | None]:
    """The cases that a precision is judged on, and the mean Dice it once had on them, if recorded.

    INT8 is fitted to a user's images, so it is judged on the user's images. Without any, it is
    judged on the saved reference's case, by the Dice recorded when INT8 was made.
    """
    recipe = manifest.recipe(files_precision(precision))
    if recipe is None or recipe.reference_dice_mean is None:
        return reference, None
    user_cases = [i for i, case in enumerate(reference.cases) if not case.seeded]
    if user_cases:
        return reference.subset(user_cases), None
    return reference.subset([0]), recipe.reference_dice_mean


def _checkpoint_outputs(
    manifest: Manifest, checkpoint: Path, base: Path | None, cases: Sequence[Case]
) -> list[dict[str, Array]]:
    """Outputs of the checkpoint's own network, which must be the one the bundle was made from."""
    source = manifest.source
    if source.base is not None and base is None:
        raise UsageError(f"this bundle was made over {source.base}: add --base FILE")
    if source.base is None and base is not None:
        raise UsageError(f"this bundle was made from {source.checkpoint} alone: leave --base out")
    for path, name, digest in (
        (checkpoint, source.checkpoint, source.sha256),
        (base, source.base, source.base_sha256),
    ):
        if path is not None and path.is_file() and (actual := sha256(path)) != digest:
            raise InputError(
                f"{path} (SHA-256 {actual}) is not the file this bundle was made from: "
                f"{name} (SHA-256 {digest})"
            )
    with export_extra():
        from medsa_deploy.exporters.checkpoint import load_checkpoint
        from medsa_deploy.exporters.networks import build_reference
        from medsa_deploy.exporters.reference import ReferenceBackend
    loaded = load_checkpoint(
        checkpoint, base=base, weights=source.weights or None, prefix=source.prefix or None
    )
    backend = ReferenceBackend(build_reference(manifest.network, loaded.tensors))
    return [outputs.tensors for outputs in reference_outputs(backend, manifest, cases)]
