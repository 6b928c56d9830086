"""A bundle → how its graphs compare with its checkpoint's own network, here and now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medsa_deploy import manifest, verify
from medsa_deploy.errors import InputError, UsageError
from medsa_deploy.manifest import Manifest, Parity
from medsa_deploy.runtime import load
from medsa_deploy.runtime.session import check_options
from medsa_deploy.verify import Array, Case

from .checkpoints import export_extra
from .engines import EngineState, engine_states
from .proof import Progress, cases, parity, reference_outputs


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
    """Engines in the bundle, which are not run here."""


def verify_bundle(
    bundle: Path,
    *,
    checkpoint: Path | None,
    base: Path | None,
    images: Path | None,
    backend: str,
    precision: str | None,
    threads: int | None,
    on_step: Progress = lambda step: None,
) -> Verification:
    """Compare a bundle with its checkpoint's network, or with what that gave at export.

    Every file is compared with its SHA-256 first. Without `checkpoint` no torch is needed.
    """
    made = manifest.load(bundle)
    check_options(backend, threads)
    precisions = (
        [precision] if precision else [f.precision for f in made.files if f.role == "encoder"]
    )
    for name in precisions:
        made.file("encoder", name)  # refused here, not after minutes of the checkpoint's network
    on_step("compare every file with its SHA-256")
    manifest.check_files(made, bundle)
    if checkpoint is None:
        if images is not None:
            raise UsageError(
                "--images compares with the checkpoint's own network: add --checkpoint FILE "
                f"(this bundle was made from {made.source.checkpoint})"
            )
        case, tensors = verify.load_reference(bundle / made.file("reference").path)
        to_run, expected, against = [case], [tensors], "saved reference"
    else:
        to_run, against = cases(made.network, images), "checkpoint"
        on_step("run the checkpoint's own network")
        expected = _checkpoint_outputs(made, checkpoint, base, to_run)
    found, failures = [], list[str]()
    for name in precisions:
        on_step(f"run the {name} graphs in {backend}")
        chosen, recorded = _judged(made, name, to_run)
        with load(bundle, backend=backend, precision=name, threads=threads) as session:
            one = parity(session, [to_run[i] for i in chosen], [expected[i] for i in chosen], name)
        found.append(one)
        problems = verify.failures(one, recorded_dice=recorded)
        failures += [f"{name}: {problem}" for problem in problems]
    return Verification(
        bundle=bundle,
        against=against,
        parity=tuple(found),
        failures=tuple(failures),
        engines=engine_states(bundle, made),
    )


def _judged(
    made: Manifest, precision: str, to_run: Sequence[Case]
) -> tuple[list[int], float | None]:
    """The cases a precision is judged on, and the Dice it had on them where that is what counts.

    INT8 is fitted to a user's images: it is judged on such, and on seeded ones only by what it gave
    for the saved reference when it was made.
    """
    recipe = made.recipe(precision)
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
        if path is not None and path.is_file() and (found := manifest.sha256(path)) != digest:
            raise InputError(
                f"{path} (SHA-256 {found}) is not the file this bundle was made from: "
                f"{name} (SHA-256 {digest})"
            )
    with export_extra():
        from medsa_deploy.exporters.checkpoint import load_checkpoint
        from medsa_deploy.exporters.reference import build_reference
    loaded = load_checkpoint(checkpoint, base=base)
    reference = build_reference(made.network, loaded.tensors)
    return [outputs.tensors for outputs in reference_outputs(reference, made, to_run)]
