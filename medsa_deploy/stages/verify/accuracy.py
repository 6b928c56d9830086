"""Label files, with segmentations or images → the accuracy of a bundle's masks.

Every class of every file is measured separately, in a volume over all slices. A class that is
neither in the labels nor in the segmentation is not counted: it would raise the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import numpy as np

from medsa_deploy.bundle.manifest import Manifest, load_manifest
from medsa_deploy.errors import ImageError, InputError, UsageError
from medsa_deploy.evaluation import metrics
from medsa_deploy.evaluation.metrics import Mask
from medsa_deploy.images import is_volume, read_image, read_labels, read_volume
from medsa_deploy.images.labels import on_one_grid, on_picture, on_volume, without_thin_axes
from medsa_deploy.images.read import format_of
from medsa_deploy.runtime import BackendName, Precision, Session, load
from medsa_deploy.transforms.intensities import IntensityWindow

from .drawn_prompts import PromptKind, segment_labelled, segment_picture
from .matched_files import pair_files

Unit = Literal["mm", "px"]
HD95 = "larger of the two directed 95th percentiles of surface distances"
"""As MONAI defines it; see `metrics.hausdorff`."""
Spacing = tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class ClassAccuracy:
    """One class in one file."""

    label: int
    name: str
    dice: float
    iou: float
    hd95: float | None
    """In the file's unit; None if a mask is empty."""
    hd95_undefined: str | None = None
    """The reason for no distance."""
    label_pixels: int
    segmented_pixels: int


@dataclass(frozen=True, kw_only=True)
class FileAccuracy:
    """One label file against its segmentation, or the masks of its image."""

    labels: Path
    compared: Path
    """The segmentation or the image."""
    unit: Unit = "px"
    """Of distances: mm, or pixels if no file gives a spacing."""
    classes: tuple[ClassAccuracy, ...] = ()
    note: str | None = None
    """The reason for no figures, if it is not an error."""
    error: str | None = None
    """The reason why this file of a folder could not be measured."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over several files."""

    mean: float
    median: float
    worst: float
    worst_file: Path
    """The label file."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One class over all files, or every class of every file."""

    name: str
    label: int | None
    """None for all classes."""
    count: int
    dice: Spread
    iou: Spread
    hd95: Spread | None
    """Over the defined distances; None without any, or if their units differ."""
    hd95_undefined: int
    """Number of empty masks or labels, which have no distance."""
    unit: Unit | None


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy of each file, and summaries over all files."""

    bundle: Path
    precision: str | None
    """None if segmentations were compared."""
    backend: str | None
    prompt: PromptKind | None
    files: tuple[FileAccuracy, ...]
    summary: tuple[Summary, ...]
    """All classes together, then each class; empty if no file could be measured."""
    unlabelled: tuple[Path, ...]
    """Segmentations or images without a label file, left out."""
    failures: tuple[str, ...]
    """Figures below the least Dice that was requested."""
    hd95_definition: str = HD95


def measure_accuracy(
    bundle: Path,
    *,
    labels: Path,
    segmentation: Path | None,
    images: Path | None,
    prompt: PromptKind | None = None,
    class_names: tuple[str, ...] = (),
    min_dice: float | None = None,
    intensity_window: IntensityWindow = None,
    backend: BackendName = "onnxruntime",
    precision: Precision | None = None,
    threads: int | None = None,
    axis: int | None = None,
    number: int | None = None,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Compare segmentations with labels, or segment images with prompts drawn from the labels.

    `labels` and `segmentation` or `images` are two files, or two folders whose files are matched by
    name. A file of a folder that cannot be measured is reported in its place. Torch and the
    checkpoint are not needed. `axis`: the axis along which volumes are cut into slices; `number`:
    the volume of a 4-D NIfTI. UsageError for options that exclude each other.
    """
    for_images = prompt, intensity_window, precision, axis, number
    _check_options(segmentation, images, for_images, min_dice)
    metrics.require_scipy()
    names = class_names or load_manifest(bundle).conventions.class_names
    if segmentation is not None:
        pairs, unlabelled = pair_files(labels, segmentation, "segmentation")
        files = _measure_pairs(pairs, lambda a, b: _compare_files(a, b, names), on_file)
        return _accuracy(bundle, None, None, None, files, unlabelled, min_dice)
    assert images is not None
    pairs, unlabelled = pair_files(labels, images, "image")
    precision = precision or "fp32"
    with load(bundle, backend=backend, precision=precision, threads=threads) as session:
        chosen = prompt or default_prompt(session.manifest)
        files = _measure_pairs(
            pairs,
            lambda a, b: segmented_accuracy(
                session, a, b, chosen, names, intensity_window, axis=axis, number=number
            ),
            on_file,
        )
    return _accuracy(bundle, precision, backend, chosen, files, unlabelled, min_dice)


def default_prompt(manifest: Manifest) -> PromptKind:
    """A box, or nothing for a network that needs no prompt."""
    return "box" if manifest.conventions.prompts == "required" else "none"


def compare_masks(
    label: int, name: str, truth: Mask, mask: Mask, spacing: Sequence[float]
) -> ClassAccuracy:
    """The figures of one class; the masks have no axes of length 1."""
    distance = metrics.hausdorff(truth, mask, spacing)
    undefined = None
    if math.isinf(distance):
        undefined = f"the {'segmentation' if truth.any() else 'label'} is empty"
    return ClassAccuracy(
        label=label,
        name=name,
        dice=metrics.dice(truth, mask),
        iou=metrics.iou(truth, mask),
        hd95=None if undefined else distance,
        hd95_undefined=undefined,
        label_pixels=int(np.count_nonzero(truth)),
        segmented_pixels=int(np.count_nonzero(mask)),
    )


def _check_options(
    segmentation: Path | None,
    images: Path | None,
    for_images: Sequence[object],
    min_dice: float | None,
) -> None:
    """UsageError for a bad combination. `for_images`: options for `images` only; None if absent."""
    if (segmentation is None) == (images is None):
        raise UsageError(
            "--labels is compared with one thing: give --segmentation (what run wrote), or "
            "--images (they are segmented with prompts drawn from the labels)"
        )
    if segmentation is not None and any(option is not None for option in for_images):
        raise UsageError(
            "--prompt, --intensity-window, --precision, --axis and --volume are for --images: "
            "segmentations are compared as they are"
        )
    if min_dice is not None and not 0 <= min_dice <= 1:
        raise UsageError(f"--min-dice {min_dice:g}: expected a number from 0 to 1")


def _measure_pairs(
    pairs: Sequence[tuple[Path, Path]],
    measure: Callable[[Path, Path], FileAccuracy],
    on_file: Callable[[int, int], None],
) -> list[FileAccuracy]:
    """The figures of every pair. The error of a single pair is raised; of several, reported."""
    files = []
    for done, (labels, compared) in enumerate(pairs):
        on_file(done, len(pairs))
        try:
            files.append(measure(labels, compared))
        except InputError as e:
            if len(pairs) == 1:
                raise
            files.append(FileAccuracy(labels=labels, compared=compared, error=str(e)))
    on_file(len(pairs), len(pairs))
    if not any(file.classes or file.error for file in files):
        raise ImageError(
            f"{files[0].labels} is empty: every pixel is background, there is nothing to measure"
            if len(files) == 1
            else f"all {len(files)} label files are empty: there is nothing to measure"
        )
    return files


def _compare_files(labels: Path, segmentation: Path, names: Sequence[str]) -> FileAccuracy:
    """Two files that lie on one grid, class by class."""
    truth, segmented = read_labels(labels), read_labels(segmentation)
    true_values, segmented_values, spacing = on_one_grid(truth, segmented)
    present = sorted({*truth.present(), *segmented.present()})
    called = {**segmented.names, **truth.names}
    masks = ((label, true_values == label, segmented_values == label) for label in present)
    return _file(labels, segmentation, masks, spacing, _label_names(present, names, called))


def segmented_accuracy(
    session: Session,
    labels: Path,
    path: Path,
    prompt: PromptKind,
    names: Sequence[str] = (),
    window: IntensityWindow = None,
    *,
    axis: int | None = None,
    number: int | None = None,
) -> FileAccuracy:
    """An image's masks for prompts drawn from its labels, class by class."""
    truth = read_labels(labels)
    if not truth.values.any():
        return FileAccuracy(labels=labels, compared=path, note="no labels, so no prompts")
    spacing: Spacing
    if path.is_dir() or is_volume(path) or format_of(path) in ("nifti", "dicom"):
        volume = read_volume(path, axis=axis, volume=number)
        values, spacing = on_volume(truth, volume)
        label_masks = segment_labelled(session, volume, values, prompt, window)
    else:
        image = read_image(path)
        height, width = image.pixels.shape[:2]
        values, spacing = on_picture(truth, (height, width), path)
        label_masks = segment_picture(session, image, values, prompt, window)
    masks = (
        (label, without_thin_axes(values == label)[0], without_thin_axes(mask)[0])
        for label, mask in label_masks
    )
    _, thick = without_thin_axes(values, spacing)
    return _file(labels, path, masks, thick, _label_names(truth.present(), names, truth.names))


def _file(
    labels: Path,
    compared: Path,
    masks: Iterable[tuple[int, Mask, Mask]],
    spacing: Spacing,
    names: dict[int, str],
) -> FileAccuracy:
    """`masks`: (label, the label's mask, the mask compared with it), one in memory at a time."""
    classes = tuple(
        compare_masks(label, names[label], true_mask, mask, spacing or (1.0,) * true_mask.ndim)
        for label, true_mask, mask in masks
    )
    return FileAccuracy(
        labels=labels,
        compared=compared,
        unit="px" if spacing is None else "mm",
        classes=classes,
        note=None if classes else "neither has any label",
    )


def _label_names(
    labels: Sequence[int], names: Sequence[str], called: Mapping[int, str]
) -> dict[int, str]:
    """The name of each label: the user's or the bundle's, else the file's."""
    return {
        label: names[label - 1] if label <= len(names) else called.get(label, f"class {label}")
        for label in labels
    }


def _accuracy(
    bundle: Path,
    precision: str | None,
    backend: str | None,
    prompt: PromptKind | None,
    files: list[FileAccuracy],
    unlabelled: list[Path],
    min_dice: float | None,
) -> Accuracy:
    """The files' figures, their summaries, and failures."""
    cases = [(file, figures) for file in files for figures in file.classes]
    summary = [_summary("all", None, cases)] if cases else []
    names = {figures.label: figures.name for _, figures in cases}
    for label, name in sorted(names.items()):
        of_class = [(file, figures) for file, figures in cases if figures.label == label]
        summary.append(_summary(name, label, of_class))
    failures = []
    if min_dice is not None and cases and summary[0].dice.mean < min_dice:
        failures.append(f"mean Dice {summary[0].dice.mean:.4f} < {min_dice:g}")
    return Accuracy(
        bundle=bundle,
        precision=precision,
        backend=backend,
        prompt=prompt,
        files=tuple(files),
        summary=tuple(summary),
        unlabelled=tuple(unlabelled),
        failures=tuple(failures),
    )


def _summary(
    name: str, label: int | None, cases: Sequence[tuple[FileAccuracy, ClassAccuracy]]
) -> Summary:
    units = {file.unit for file, _ in cases}
    distances = [(figures.hd95, file.labels) for file, figures in cases if figures.hd95 is not None]
    return Summary(
        name=name,
        label=label,
        count=len(cases),
        dice=_spread([(figures.dice, file.labels) for file, figures in cases], min),
        iou=_spread([(figures.iou, file.labels) for file, figures in cases], min),
        hd95=_spread(distances, max) if distances and len(units) == 1 else None,
        hd95_undefined=len(cases) - len(distances),
        unit=units.pop() if len(units) == 1 else None,
    )


def _spread(figures: Sequence[tuple[float, Path]], worst: Callable[..., Any]) -> Spread:
    """The spread of (figure, file) pairs; `worst` is min or max."""
    values = [value for value, _ in figures]
    value, file = worst(figures, key=itemgetter(0))
    return Spread(mean=mean(values), median=median(values), worst=value, worst_file=file)
