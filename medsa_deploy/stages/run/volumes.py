"""A session, a volume and prompts in its voxels → a label map file in the volume's geometry."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from medsa_deploy.errors import PromptError, UsageError
from medsa_deploy.images import (
    SegmentationDetails,
    Volume,
    check_overlay_suffix,
    check_segmentation_target,
    read_volume,
    write_segmentation,
)
from medsa_deploy.images.files import check_writable, output_file
from medsa_deploy.images.image import Nan
from medsa_deploy.images.measurements import voxel_millilitres
from medsa_deploy.images.montage import Tile, spread, write_montage
from medsa_deploy.images.write import check_report_target
from medsa_deploy.progress import OnCount
from medsa_deploy.runtime import Session
from medsa_deploy.runtime.volumes.segment import VolumeOptions, VolumePrediction, segment_volume
from medsa_deploy.runtime.volumes.structures import (
    MOST_LABELS,
    SlicePrompts,
    Structure,
    slice_prompts,
)
from medsa_deploy.transforms.intensities import intensities

from .prompt_file import read_prompts, structure_of

MOST_TILES = 12
"""Slices that a montage shows at most."""


SEGMENTATION_SUFFIX = {"npy": ".npy", "nrrd": ".nrrd", "tiff": ".tif"}
"""Kind of a volume → suffix of its segmentation, unless named; NIfTI for the others."""


@dataclass(frozen=True, kw_only=True)
class VolumeSelection:
    """Which volume of a path is read, and how; see `medsa_deploy.read_volume`."""

    axis: int | None = None
    volume: int | None = None
    series: str | None = None
    orientation: int | None = None
    phase: int | None = None
    nan: Nan = "refuse"

    def read(self, path: Path) -> Volume:
        """The volume."""
        return read_volume(path, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """The size of one label's segmentation."""

    label: int
    name: str
    voxels: int
    millilitres: float | None
    """None if the file does not give the size of a voxel."""


@dataclass(frozen=True, kw_only=True)
class VolumeSegmentation:
    """The result for one volume."""

    volume: Path
    mask: Path
    overlay: Path | None
    measurements: Path | None
    shape: tuple[int, int, int]
    """(X, Y, Z) in stored order."""
    axis: int
    """The axis along which the volume is sliced."""
    slices: tuple[int, ...]
    """Indices of the slices that were segmented."""
    labels: tuple[LabelReport, ...]
    intensity_window: tuple[float, float] | None
    timings_ms: dict[str, float]
    """Medians per slice: `encode`, `decode`."""
    seconds: float
    degraded: str | None
    """Why a fallback segmented part of it instead of the backend that was asked for."""


def structures_of(
    points: Sequence[tuple[float, ...]], boxes: Sequence[tuple[float, ...]], prompts: Path | None
) -> list[Structure]:
    """The structures of a prompt file; or one structure from points and a box; or one per box.

    No structure without prompts, for a network that segments without.
    """
    if prompts is not None:
        if points or boxes:
            raise PromptError("--prompts holds all prompts: leave --point and --box out")
        return read_prompts(prompts)
    if not (points or boxes):
        return []
    if len(boxes) <= 1:
        return [structure_of(points, boxes)]
    if points:
        raise PromptError(
            "several boxes are several structures; points go with one box only, or into --prompts"
        )
    return [structure_of([], [box]) for box in boxes]


def segment_volume_file(
    session: Session,
    path: Path,
    structures: Sequence[Structure],
    options: VolumeOptions,
    *,
    mask: Path | None = None,
    overlay: Path | None = None,
    measurements: Path | None = None,
    details: SegmentationDetails | None = None,
    selection: VolumeSelection | None = None,
    on_slice: OnCount = lambda done, total: None,
) -> VolumeSegmentation:
    """Segment a volume and write the label map and, if `overlay` is given, a montage of slices.

    `mask`: .nii.gz, .nii, .npy, or .dcm for a DICOM series; by default a file in the working folder
    that is named after the volume. `measurements`: a report on the .dcm. If one file cannot be
    written, none is.
    """
    start = perf_counter()
    volume = (selection or VolumeSelection()).read(path)
    name = path.resolve().name  # "." has no name
    target = mask or Path(f"{name}.seg{SEGMENTATION_SUFFIX.get(volume.kind, '.nii.gz')}")
    _check_targets(volume, target, overlay, measurements)
    prediction = segment_volume(session, volume, structures, options, on_slice=on_slice)
    with ExitStack() as written:  # renames the overlay once the mask is written
        if overlay is not None:
            temporary = written.enter_context(output_file(overlay))
            write_volume_overlay(temporary, session, volume, prediction, structures)
        write_segmentation(
            target,
            prediction.labels,
            volume,
            names=prediction.names,
            details=details,
            measurements=measurements,
        )
    return VolumeSegmentation(
        volume=path,
        mask=target,
        overlay=overlay,
        measurements=measurements,
        shape=volume.shape,
        axis=volume.axis,
        slices=prediction.slices,
        labels=_labels(prediction, volume),
        intensity_window=prediction.intensity_window,
        timings_ms=prediction.timings_ms,
        seconds=perf_counter() - start,
        degraded=prediction.degraded,
    )


def _labels(prediction: VolumePrediction, volume: Volume) -> tuple[LabelReport, ...]:
    planes = [volume.plane(prediction.labels, index) for index in prediction.slices]
    # slice by slice, since bincount needs 8 bytes for each voxel of 1 byte
    plane_counts = [np.bincount(plane.ravel(), minlength=MOST_LABELS + 1) for plane in planes]
    counts = np.sum(plane_counts, axis=0)
    voxel_ml = voxel_millilitres(volume)
    return tuple(
        LabelReport(
            label=label,
            name=name,
            voxels=int(counts[label]),
            millilitres=None if voxel_ml is None else float(counts[label] * voxel_ml),
        )
        for label, name in enumerate(prediction.names, 1)
    )


def write_volume_overlay(
    path: Path,
    session: Session,
    volume: Volume,
    prediction: VolumePrediction,
    structures: Sequence[Structure],
) -> None:
    """Write a montage of the slices that hold a label; without labels, of all segmented slices."""
    slices_with_labels = [i for i in prediction.slices if volume.plane(prediction.labels, i).any()]
    prompts = [slice_prompts(structure, volume) for structure in structures]
    tiles = [
        _tile(session, volume, prediction, prompts, index)
        for index in spread(slices_with_labels or prediction.slices, MOST_TILES)
    ]
    write_montage(path, tiles)


def _tile(
    session: Session,
    volume: Volume,
    prediction: VolumePrediction,
    prompts: Sequence[SlicePrompts],
    index: int,
) -> Tile:
    background, _ = intensities(
        volume.slice(index), session.conventions, prediction.intensity_window
    )
    shown = [by_slice[index] for by_slice in prompts if index in by_slice]
    return Tile(
        caption=f"slice {index}",
        background=background,
        labels=volume.plane(prediction.labels, index),
        points=[(float(x), float(y)) for prompt in shown for x, y in prompt.points],
        signs=[int(label) for prompt in shown for label in prompt.labels],
        boxes=[prompt.box.tolist() for prompt in shown if prompt.box is not None],
    )


def _check_targets(
    volume: Volume, mask: Path, overlay: Path | None, measurements: Path | None
) -> None:
    """UsageError for outputs that cannot be written, before anything is computed."""
    for path in (mask, overlay, measurements):
        if path is not None:
            check_writable(path)
    check_segmentation_target(mask, volume)
    check_report_target(measurements, mask)
    if overlay is not None:
        check_overlay_suffix(overlay)
        if overlay.resolve() == mask.resolve():
            raise UsageError("two outputs have the same name: give each its own")
