"""A checkpoint that several codes may have trained, and labelled images → the reading that fits.

Keys do not show every convention. Each reading is tried: the checkpoint's own network segments the
images by that code's conventions, and its masks are compared with the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from medsa_deploy.bundle.manifest import Manifest
from medsa_deploy.errors import CheckpointError, ImageError, InputError, UsageError
from medsa_deploy.evaluation import metrics
from medsa_deploy.progress import OnStep
from medsa_deploy.runtime import Session

from .inspect import export_extra
from .verify.accuracy import default_prompt, segmented_accuracy
from .verify.drawn_prompts import PromptKind
from .verify.matched_files import pair_files

if TYPE_CHECKING:
    from medsa_deploy.exporters.architecture import Overrides
    from medsa_deploy.exporters.checkpoint import Checkpoint
    from medsa_deploy.exporters.training import TrainingCode

MOST_IMAGES = 8
"""Images that are tried, from the first: each costs a run of the network for every reading."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A code that may have trained the network, and how well its conventions fit the labels."""

    trained_with: TrainingCode
    prompt: PromptKind | None = None
    """Prompts drawn from the labels."""
    dice: float | None = None
    """Mean over all labels of all images."""
    images: int = 0
    error: str | None = None
    """Why the checkpoint cannot be read so."""


def try_readings(
    checkpoint: Checkpoint,
    overrides: Overrides,
    *,
    images: Path,
    labels: Path,
    on_step: OnStep = lambda step: None,
) -> tuple[Reading, ...]:
    """Every reading of a checkpoint, the best first; those that cannot be measured come last.

    `images`, `labels`: two files, or two folders whose files are matched by name. ImageError if no
    reading can be measured, UsageError if the reading is set.
    """
    if overrides.trained_with is not None:
        raise UsageError("--masks finds the code that --trained-with names: give one of them")
    metrics.require_scipy()
    pairs, _ = pair_files(labels, images, "image")
    with export_extra():
        from medsa_deploy.exporters.families.registry import possible_codes
    readings = []
    for code in possible_codes(checkpoint.evidence):
        on_step(f"try the conventions of {code}")
        readings.append(_measured(checkpoint, overrides, code, pairs[:MOST_IMAGES]))
    if all(reading.dice is None for reading in readings):
        errors = "; ".join(f"{reading.trained_with}: {reading.error}" for reading in readings)
        raise ImageError(f"no reading of the checkpoint could be measured on {images}: {errors}")
    return tuple(sorted(readings, key=lambda r: -1.0 if r.dice is None else r.dice, reverse=True))


def _measured(
    checkpoint: Checkpoint,
    overrides: Overrides,
    code: TrainingCode,
    pairs: Sequence[tuple[Path, Path]],
) -> Reading:
    """One reading, with its Dice or the reason why there is none."""
    from medsa_deploy.exporters.architecture import infer
    from medsa_deploy.exporters.graphs import contract
    from medsa_deploy.exporters.networks import build_reference
    from medsa_deploy.exporters.reference import ReferenceBackend

    try:
        architecture = infer(checkpoint, replace(overrides, trained_with=code))
        network = architecture.network
        manifest = Manifest(
            source=checkpoint.source,
            network=network,
            conventions=architecture.conventions,
            graphs=contract(network),
            files=(),
        )
        backend = ReferenceBackend(build_reference(network, checkpoint.tensors))
        prompt = default_prompt(manifest)
        with Session(manifest, backend) as session:
            dices = [
                figures.dice
                for truth, image in pairs
                for figures in segmented_accuracy(session, truth, image, prompt).classes
            ]
    except (CheckpointError, InputError) as e:
        return Reading(trained_with=code, error=str(e))
    if not dices:
        return Reading(trained_with=code, error="the labels are empty")
    return Reading(trained_with=code, prompt=prompt, dice=mean(dices), images=len(pairs))
