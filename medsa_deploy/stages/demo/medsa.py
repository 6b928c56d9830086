"""The first five minutes: a trained Med-SA exported in 3D, proved, and run on a real volume.

The checkpoint is this project's own (`assets/MODEL_CARD.md`): small, with HyP-Adpt and SD-Trans,
trained on phantoms and on slices of the MNI T1 template other than the ones segmented here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsa_deploy.bundle.manifest import Parity
from medsa_deploy.evaluation.metrics import dice
from medsa_deploy.images import read_volume, write_segmentation
from medsa_deploy.progress import OnStep
from medsa_deploy.runtime import Session, Structure, VolumePrediction, load, segment_volume
from medsa_deploy.stages.inspect import export_extra
from medsa_deploy.stages.run.volumes import write_volume_overlay

from .mni_template import AXIAL, Mask, inner_point, structures, template
from .proved_bundle import export_asset

CHECKPOINT = "medsa_demo"
"""Of the assets."""
CLASSES = ("white matter", "grey matter", "brain", "phantom")
CHUNK = 8
HELD_OUT = range(88, 96)
"""Axial slices of the template that the checkpoint was not trained on, one chunk."""
CLICKS = 3
TISSUES = CLASSES[:2]


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """The results of the demonstration."""

    bundle: Path
    parity: Parity
    export_seconds: float
    verified: bool
    """Whether the bundle alone, without the checkpoint, was verified."""
    clicks: tuple[tuple[float, float, float], ...]
    """x, y, z in voxels of the template."""
    dice: dict[str, float]
    """Structure → Dice over the held-out slices."""
    timings_ms: dict[str, float]
    """Medians of a slice: `encode`, `decode`."""
    segmentation: Path
    montage: Path


def demonstrate(folder: Path, *, on_step: OnStep = lambda step: None) -> Demonstration:
    """Export the checkpoint into `folder`, prove it, and segment slices of the MNI template."""
    volume = template()
    with export_extra():
        from medsa_deploy.exporters.architecture import Overrides
    overrides = Overrides(classes=len(CLASSES), class_names=CLASSES, depth_chunk=CHUNK)
    export, verified = export_asset(CHECKPOINT, folder, overrides, images=volume, on_step=on_step)
    on_step(f"segment slices {HELD_OUT[0]}…{HELD_OUT[-1]} of the MNI T1 template")
    labels = structures(HELD_OUT)
    clicks = _clicks(labels["brain"][len(HELD_OUT) // 2], HELD_OUT[len(HELD_OUT) // 2])
    targets = folder / "segmentation.nii.gz", folder / "montage.png"
    with load(export.bundle) as session:
        tissues = _segment(session, volume, clicks, TISSUES, targets)
        brain = _segment(session, volume, clicks, ("brain",), None)
    return Demonstration(
        bundle=export.bundle,
        parity=export.manifest.parity[0],
        export_seconds=export.seconds,
        verified=verified,
        clicks=clicks,
        dice={name: _dice(tissues, name, labels) for name in TISSUES}
        | {"brain": _dice(brain, "brain", labels)},
        timings_ms=tissues.timings_ms,
        segmentation=targets[0],
        montage=targets[1],
    )


def _segment(
    session: Session,
    path: Path,
    clicks: tuple[tuple[float, float, float], ...],
    classes: tuple[str, ...],
    targets: tuple[Path, Path] | None,
) -> VolumePrediction:
    """The classes wanted of the clicks; written as a segmentation and a montage."""
    volume = read_volume(path, axis=AXIAL)
    labels = (1,) * len(clicks)
    structures = [Structure(points=clicks, labels=labels, class_name=name) for name in classes]
    prediction = segment_volume(session, volume, structures)
    if targets is not None:
        segmentation, montage = targets
        write_segmentation(segmentation, prediction.labels, volume, names=prediction.names)
        write_volume_overlay(montage, session, volume, prediction, structures[:1])
    return prediction


def _clicks(label: Mask, index: int) -> tuple[tuple[float, float, float], ...]:
    """Clicks in a structure on one slice (H, W), one in each third of its width, in voxels."""
    columns = np.flatnonzero(label.any(axis=0))
    clicks = []
    for part in np.array_split(columns, CLICKS):
        third = np.zeros_like(label)
        third[:, part] = label[:, part]
        x, y = inner_point(third)
        clicks.append(
            (float(y), float(x), float(index))
        )  # rows run along the template's first axis
    return tuple(clicks)


def _dice(prediction: VolumePrediction, name: str, labels: dict[str, Mask]) -> float:
    """Dice of one structure over the held-out slices."""
    segmented = np.moveaxis(prediction.labels, AXIAL, 0)[list(HELD_OUT)]
    return dice(segmented == prediction.names.index(name) + 1, labels[name])
