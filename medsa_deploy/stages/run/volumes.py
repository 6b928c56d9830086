"""A bundle, a volume and prompts in its voxels → a segmentation of the volume's geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from medsa_deploy.errors import PromptError, UsageError
from medsa_deploy.images import (
    Volume,
    check_overlay_suffix,
    check_segmentation_target,
    holds_volume,
    read_volume,
    write_segmentation,
)
from medsa_deploy.images.files import check_writable, output_file, suffix
from medsa_deploy.images.montage import Tile, spread, write_montage
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

TILES = 12
"""Slices of a montage."""


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """What one label holds."""

    label: int
    name: str
    voxels: int
    millilitres: float | None
    """None where the file does not say how large a voxel is."""


@dataclass(frozen=True, kw_only=True)
class VolumeSegmentation:
    """What came of one volume."""

    volume: Path
    mask: Path
    overlay: Path | None
    shape: tuple[int, int, int]
    """(X, Y, Z) in stored order."""
    axis: int
    """The axis slices are taken along."""
    slices: tuple[int, ...]
    """Slices that were segmented."""
    labels: tuple[LabelReport, ...]
    intensity_window: tuple[float, float] | None
    timings_ms: dict[str, float]
    """Medians of a slice: `encode`, `decode`."""
    seconds: float
    degraded: str | None
    """Why another backend than the one asked for made some of it, where a fallback did."""


def takes_volume(
    image: Path,
    index: int | None,
    *,
    points: Sequence[tuple[float, ...]] = (),
    boxes: Sequence[tuple[float, ...]] = (),
    mask: Path | None = None,
    asked: bool = False,
) -> bool:
    """Whether `run` segments a volume rather than images: it is one, and no slice is asked for.

    A single plane is a volume of one slice if an option is `asked` for that only volumes have, or
    prompts or the output are a volume's. ImageError for what cannot be read, UsageError for a
    slice of a folder.
    """
    asked |= any(len(row) == 4 for row in points) or any(len(row) == 6 for row in boxes)
    asked |= mask is not None and suffix(mask) == ".dcm"
    found = holds_volume(image, lone=asked)
    if found and index is not None and image.is_dir():
        raise UsageError(
            f"--slice {index} is for a NIfTI or .npy volume; {image} is a DICOM series: leave it "
            "out, or give the file of one slice"
        )
    return found and index is None


def structures_of(
    points: Sequence[tuple[float, ...]], boxes: Sequence[tuple[float, ...]], prompts: Path | None
) -> list[Structure]:
    """What the options of a call prompt: a prompt file, or one structure, or one for each box."""
    if prompts is not None:
        if points or boxes:
            raise PromptError("--prompts holds all prompts: leave --point and --box out")
        return read_prompts(prompts)
    if not (points or boxes):
        raise PromptError(
            "no prompt: give --point X,Y,Z, --box X0,Y0,Z0,X1,Y1,Z1 or --prompts FILE"
        )
    if len(boxes) <= 1:
        return [structure_of(list(points), list(boxes))]
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
    axis: int | None = None,
    number: int | None = None,
    on_slice: Callable[[int, int], None] = lambda done, total: None,
) -> VolumeSegmentation:
    """Segment a volume and write the label map, and a montage of its slices if wanted.

    `mask`: .nii.gz, .nii, .npy, or .dcm for a DICOM series; by default beside the working folder's
    other files, named after the volume. `number`: which volume of a 4-D NIfTI.
    """
    start = perf_counter()
    volume = read_volume(path, axis=axis, volume=number)
    name = path.resolve().name  # of the folder that "." is
    target = mask or Path(f"{name}.seg{'.npy' if volume.kind == 'npy' else '.nii.gz'}")
    _check_targets(volume, target, overlay)
    prediction = segment_volume(session, volume, structures, options, on_slice=on_slice)
    with ExitStack() as written:  # so that there are both, or neither
        if overlay is not None:
            temporary = written.enter_context(output_file(overlay))
            write_volume_overlay(temporary, session, volume, prediction, structures)
        write_segmentation(target, prediction.labels, volume, names=prediction.names)
    return VolumeSegmentation(
        volume=path,
        mask=target,
        overlay=overlay,
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
    # slice by slice: bincount takes 8 bytes for a voxel of 1
    counted = [np.bincount(plane.ravel(), minlength=MOST_LABELS + 1) for plane in planes]
    counts = np.sum(counted, axis=0)
    # the determinant, since slices may be sheared: a tilted gantry's lie closer than their centres
    voxel = None if volume.affine is None else abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    return tuple(
        LabelReport(
            label=label,
            name=name,
            voxels=int(counts[label]),
            millilitres=None if voxel is None else float(counts[label] * voxel),
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
    """A montage of the slices that hold a label, or else were segmented."""
    held = [i for i in prediction.slices if volume.plane(prediction.labels, i).any()]
    prompts = [slice_prompts(one, volume) for one in structures]
    tiles = [
        _tile(session, volume, prediction, prompts, index)
        for index in spread(held or prediction.slices, TILES)
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
    here = [of_slices[index] for of_slices in prompts if index in of_slices]
    return Tile(
        caption=f"slice {index}",
        background=background,
        labels=volume.plane(prediction.labels, index),
        points=[(float(x), float(y)) for prompt in here for x, y in prompt.points],
        signs=[int(label) for prompt in here for label in prompt.labels],
        boxes=[prompt.box.tolist() for prompt in here if prompt.box is not None],
    )


def _check_targets(volume: Volume, mask: Path, overlay: Path | None) -> None:
    """Refuse what cannot be written, before anything is computed."""
    for path in (mask, overlay):
        if path is not None:
            check_writable(path)
    check_segmentation_target(mask, volume)
    if overlay is not None:
        check_overlay_suffix(overlay)
        if overlay.resolve() == mask.resolve():
            raise UsageError("two outputs have the same name: give each its own")
