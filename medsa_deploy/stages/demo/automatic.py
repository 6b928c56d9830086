"""A network that needs no click: a trained SAMed exported, proved, and run on a real volume.

The checkpoint is this project's own (`assets/MODEL_CARD.md`): low-rank updates and a decoder for
three tissues over the encoder of the Med-SA demonstration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsa_deploy.bundle.manifest import Parity
from medsa_deploy.evaluation.metrics import dice
from medsa_deploy.images import read_volume, write_segmentation
from medsa_deploy.progress import OnCount, OnStep
from medsa_deploy.runtime import load
from medsa_deploy.stages.inspect import export_extra
from medsa_deploy.stages.run.volumes import write_volume_overlay

from .medsa import CHECKPOINT as BASE
from .mni_template import AXIAL, Mask, structures, template
from .proved_bundle import export_asset

CHECKPOINT = "samed_demo"
"""Of the assets."""
CLASSES = ("white matter", "grey matter", "fluid")
IMAGE_SIZE = 256
HELD_OUT = (*range(44, 52), *range(88, 96), *range(114, 122))
"""Axial slices of the template that neither checkpoint was trained on."""


@dataclass(frozen=True, kw_only=True)
class AutomaticDemonstration:
    """The results of the demonstration."""

    bundle: Path
    parity: Parity
    export_seconds: float
    verified: bool
    """Whether the bundle alone, without the checkpoint, was verified."""
    slices: int
    """Slices that were segmented."""
    dice: dict[str, float]
    """Structure → Dice over the held-out slices."""
    timings_ms: dict[str, float]
    """Medians of a slice: `encode`, `decode`."""
    segmentation: Path
    montage: Path


def demonstrate_automatic(
    folder: Path,
    *,
    on_step: OnStep = lambda step: None,
    on_slice: OnCount = lambda done, total: None,
) -> AutomaticDemonstration:
    """Export the checkpoint into `folder`, prove it, and segment the whole MNI template."""
    path = template()
    with export_extra():
        from medsa_deploy.exporters.architecture import Overrides
    overrides = Overrides(image_size=IMAGE_SIZE, class_names=CLASSES)
    export, verified = export_asset(CHECKPOINT, folder, overrides, base=BASE, on_step=on_step)
    on_step("segment the MNI T1 template")
    volume = read_volume(path, axis=AXIAL)
    segmentation, montage = folder / "tissues.nii.gz", folder / "montage.png"
    with load(export.bundle) as session:
        prediction = session.segment_volume(volume, [], on_slice=on_slice)
        write_segmentation(segmentation, prediction.labels, volume, names=prediction.names)
        write_volume_overlay(montage, session, volume, prediction, [])
    return AutomaticDemonstration(
        bundle=export.bundle,
        parity=export.manifest.parity[0],
        export_seconds=export.seconds,
        verified=verified,
        slices=len(prediction.slices),
        dice=_dice(np.moveaxis(prediction.labels, AXIAL, 0)[list(HELD_OUT)]),
        timings_ms=prediction.timings_ms,
        segmentation=segmentation,
        montage=montage,
    )


def _dice(labels: np.ndarray) -> dict[str, float]:
    """Dice of the tissues and of the brain in label maps (slices, H, W) of the held-out slices."""
    truth = structures(HELD_OUT)
    masks: dict[str, Mask] = {name: labels == k for k, name in enumerate(CLASSES, 1)}
    masks["brain"] = masks["white matter"] | masks["grey matter"]
    return {name: dice(mask, truth[name]) for name, mask in masks.items()}
