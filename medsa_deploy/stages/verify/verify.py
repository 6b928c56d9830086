"""A bundle → how its graphs compare with its checkpoint's own network, here and now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medsa_deploy.bundle.files import check_files, sha256
from medsa_deploy.bundle.manifest import Manifest, Parity, load_manifest
from medsa_deploy.errors import InputError, UsageError
from medsa_deploy.evaluation.cases import Case, parity_cases
from medsa_deploy.evaluation.parity import Array, BundleParity, compare_cases, reference_outputs
from medsa_deploy.evaluation.reference_file import load_reference
from medsa_deploy.nvidia import cuda
from medsa_deploy.nvidia.engines import load_engines
from medsa_deploy.progress import OnStep
from medsa_deploy.reports.parity import Result
from medsa_deploy.runtime import load
from medsa_deploy.runtime.loading import OWN_ENCODERS, check_options, files_precision
from medsa_deploy.stages.inspect import export_extra

from . import engine_check
from .engine_check import EngineState, engine_states
from .parity_report import worst_mask, write_report

AGAINST = {
    "checkpoint": "the checkpoint's own network",
    "saved reference": "what the checkpoint's own network gave at export",
}
"""What a bundle is compared with, in words."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How a bundle compares, precision by precision."""

    bundle: Path
    against: str
    """`checkpoint`, or `saved reference`: what the checkpoint's network gave at export."""
    parity: tuple[Parity, ...]
    failures: tuple[str, ...]
    """What exceeds the limits; empty when everything agrees."""
    engines: tuple[EngineState, ...]
    """Engines in the bundle, which are run where there is a GPU."""
    report: Path | None = None
    """The page that shows it, where one was asked for."""


def verify_bundle(
    bundle: Path,
    *,
    checkpoint: Path | None,
    base: Path | None,
    images: Path | None,
    backend: str,
    precision: str | None,
    threads: int | None,
    report: bool = False,
    on_step: OnStep = lambda step: None,
) -> Verification:
    """Compare a bundle with its checkpoint's network, or with what that gave at export.

    Every file is compared with its SHA-256 first. Without `checkpoint` no torch is needed. `report`
    writes `reports/parity.html` into the bundle. On a GPU the engines of these precisions are run
    as well, and their `engine.json` says that they are verified, or no longer.
    """
    made = load_manifest(bundle)
    check_options(backend, threads, precision or "fp32")
    precisions = (
        [precision] if precision else [f.precision for f in made.files if f.role == "encoder"]
    )
    for name in precisions:
        made.file(
            "encoder", files_precision(name)
        )  # refused here, not after minutes of the checkpoint's network
    on_step("compare every file with its SHA-256")
    check_files(made, bundle)
    if checkpoint is None:
        if images is not None:
            raise UsageError(
                "--images compares with the checkpoint's own network: add --checkpoint FILE "
                f"(this bundle was made from {made.source.checkpoint})"
            )
        case, tensors = load_reference(bundle / made.file("reference").path)
        to_run, expected, against = [case], [tensors], "saved reference"
    else:
        to_run, against = parity_cases(made.network, images), "checkpoint"
        on_step("run the checkpoint's own network")
        expected = _checkpoint_outputs(made, checkpoint, base, to_run)
    results = []
    for name in precisions:
        on_step(f"run the {name} graphs in {backend}")
        chosen, recorded = _judged(made, name, to_run)
        some, wanted = [to_run[i] for i in chosen], [expected[i] for i in chosen]
        with load(
            bundle, backend=backend, precision=name, threads=threads, portable=True
        ) as session:
            compared = compare_cases(session, some, wanted)
            comparisons, used = compared.comparisons, session.backend.name
            tf32 = session.backend.facts().get("tf32", False)
            worst = worst_mask(session, some, wanted, comparisons) if report else None
        own: dict[str, BundleParity] = {}
        role = OWN_ENCODERS.get(used)
        if role is not None and made.has(role, files_precision(name)):
            with load(bundle, backend=backend, precision=name, threads=threads) as session:
                own[role] = compare_cases(session, some, wanted)
        one = replace(compared, encoders=own).summary(some, precision=name, backend=used)
        limits = engine_check.engine_limits(name, recorded, tf32=tf32)
        dice = tuple(value for c in comparisons for value in c.mask_dice)
        results.append(Result(parity=one, limits=limits, mask_dice=dice, worst=worst))
    on_step("run the engines, where there are any and a GPU")
    engines = _engines(bundle, made, precisions, to_run, expected)
    return Verification(
        bundle=bundle,
        against=against,
        parity=tuple(result.parity for result in results),
        failures=(
            *(f"{one.parity.precision}: {problem}" for one in results for problem in one.failures),
            *(f"{one.folder}: {problem}" for one in engines for problem in one.failures),
        ),
        engines=engines,
        report=write_report(bundle, made, results, against=AGAINST[against], engines=engines)
        if report
        else None,
    )


def _engines(
    bundle: Path,
    made: Manifest,
    precisions: Sequence[str],
    to_run: Sequence[Case],
    expected: Sequence[dict[str, Array]],
) -> tuple[EngineState, ...]:
    """The engines in the bundle; those of the precisions are run if there is a GPU."""
    states = engine_states(bundle, made)
    if cuda.device() is None:
        return states
    found = []
    for state in states:
        if state.state not in ("built, not run", "verified"):
            found.append(state)
            continue
        precision = load_engines(bundle / state.folder).options.precision
        if precision in precisions:
            chosen, recorded = _judged(made, precision, to_run)
            some, wanted = [to_run[i] for i in chosen], [expected[i] for i in chosen]
            state = engine_check.state_of(bundle, state, some, wanted, recorded)
        found.append(state)
    return tuple(found)


def _judged(
    made: Manifest, precision: str, to_run: Sequence[Case]
) -> tuple[list[int], float | None]:
    """The cases a precision is judged on, and the Dice it had on them where that is what counts.

    INT8 is fitted to a user's images: it is judged on such, and on seeded ones only by what it gave
    for the saved reference when it was made.
    """
    recipe = made.recipe(files_precision(precision))
    if recipe is None or recipe.reference_dice_mean is None:
        return list(range(len(to_run))), None
    theirs = [i for i, case in enumerate(to_run) if not case.seeded]
    return (theirs, None) if theirs else ([0], recipe.reference_dice_mean)


def _checkpoint_outputs(
    made: Manifest, checkpoint: Path, base: Path | None, to_run: Sequence[Case]
) -> list[dict[str, Array]]:
    """Outputs of the checkpoint's own network, which must be the one the bundle was made from."""
    source = made.source
    if source.base is not None and base is None:
        raise UsageError(f"this bundle was made over {source.base}: add --base FILE")
    if source.base is None and base is not None:
        raise UsageError(f"this bundle was made from {source.checkpoint} alone: leave --base out")
    for path, name, digest in (
        (checkpoint, source.checkpoint, source.sha256),
        (base, source.base, source.base_sha256),
    ):
        if path is not None and path.is_file() and (found := sha256(path)) != digest:
            raise InputError(
                f"{path} (SHA-256 {found}) is not the file this bundle was made from: "
                f"{name} (SHA-256 {digest})"
            )
    with export_extra():
        from medsa_deploy.exporters.checkpoint import load_checkpoint
        from medsa_deploy.exporters.reference import ReferenceBackend, build_reference
    loaded = load_checkpoint(checkpoint, base=base)
    reference = ReferenceBackend(build_reference(made.network, loaded.tensors))
    return [outputs.tensors for outputs in reference_outputs(reference, made, to_run)]
