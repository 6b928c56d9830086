"""A session, an image or a folder of images, and prompts → mask files, overlays and scores."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.errors import (
    ImageError,
    InputError,
    MissingDependencyError,
    PromptError,
    UsageError,
)
from medsa_deploy.images import (
    Image,
    check_mask_suffix,
    check_overlay_suffix,
    find_images,
    is_derived,
    read_image,
    write_mask,
    write_overlay,
)
from medsa_deploy.images.files import check_writable, output_file, suffix
from medsa_deploy.images.image import Nan
from medsa_deploy.progress import OnCount
from medsa_deploy.runtime import Embedding, Prediction, Session
from medsa_deploy.transforms import NO_MASK_PROMPTS
from medsa_deploy.transforms.intensities import IntensityWindow, intensities

from .prompt_file import row_text

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts for an image, or for every image of a folder: x, y in pixels."""

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    """For each point: 1 foreground, 0 background."""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """x0, y0, x1, y1; several boxes are several objects."""
    mask: Path | None = None
    """`.npy` with (4g, 4g) logits of an earlier prediction."""

    def __post_init__(self) -> None:
        if len(self.boxes) > 1 and (self.points or self.mask):
            raise PromptError(
                "several boxes are several objects; points and a mask prompt go with one box only"
            )
        if self.points and not (self.boxes or self.mask or any(self.labels)):
            raise PromptError(
                "there are background clicks only (label 0): add a foreground click or a box; in "
                "an image a click is X,Y or X,Y,LABEL"
            )


@dataclass(frozen=True, kw_only=True)
class MaskTargets:
    """Where results are written: files for an image or a volume, folders for a folder of images."""

    mask: Path | None = None
    overlay: Path | None = None
    logits: Path | None = None
    """`.npy` (P, K, 4g, 4g), for the mask prompt of a later call."""

    def paths(self) -> list[Path]:
        """The paths that are set."""
        return [path for path in (self.mask, self.overlay, self.logits) if path is not None]


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How an image is read and segmented."""

    axis: int | None = None
    """Axis along which a volume is sliced."""
    index: int | None = None
    """The slice of a volume to segment as an image."""
    intensity_window: IntensityWindow = None
    """Intensities of black and white; "auto": percentiles; None: the bundle's, or the file's."""
    nan: Nan = "refuse"
    """Whether NaN is a fault, or background."""
    threshold: float | None = None
    """Probability above which a pixel belongs to a mask; None: the bundle's."""
    multimask: bool = False
    """Decode SAM's three candidates, and write the best."""


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """The result for one image."""

    image: Path
    mask: Path | None = None
    overlay: Path | None = None
    logits: Path | None = None
    scores: tuple[tuple[float, ...], ...] = ()
    """Predicted IoU, (P, K)."""
    pixels: dict[str, int] | None = None
    """Mask pixels by label: `mask`, or the class names, or the number of each box."""
    image_size: tuple[int, int] | None = None
    """(H, W)"""
    intensity_window: tuple[float, float] | None = None
    timings_ms: dict[str, float] | None = None
    degraded: str | None = None
    """Why a fallback segmented the image instead of the backend that was asked for."""
    error: str | None = None
    """Why this image of a folder has no mask; the other images were segmented."""


def prompts_of(
    points: Sequence[tuple[float, ...]], boxes: Sequence[tuple[float, ...]], mask: Path | None
) -> Prompts:
    """Prompts from rows of numbers: points of 2, or 3 with a label, and boxes of 4."""
    for row in points:
        if len(row) not in (2, 3) or row[2:] not in ((), (0,), (1,)):
            raise UsageError(
                f"--point {row_text(row)}: expected X,Y or X,Y,LABEL with label 1 or 0 in an image"
            )
    for row in boxes:
        if len(row) != 4:
            raise UsageError(f"--box {row_text(row)}: expected X0,Y0,X1,Y1 in an image")
    return Prompts(
        points=tuple((row[0], row[1]) for row in points),
        labels=tuple(int(row[2]) if len(row) == 3 else 1 for row in points),
        boxes=tuple((row[0], row[1], row[2], row[3]) for row in boxes),
        mask=mask,
    )


def segment_image(
    session: Session,
    path: Path,
    prompts: Prompts,
    targets: MaskTargets,
    options: ImageOptions = ImageOptions(),
) -> Segmentation:
    """Segment one image and write the results; if one cannot be written, none are."""
    logits = _mask_logits(session, prompts)
    check_file_targets(path, prompts.mask, targets)
    return _segment(session, path, prompts, logits, targets, options)


def segment_folder(
    session: Session,
    folder: Path,
    prompts: Prompts,
    targets: MaskTargets,
    options: ImageOptions = ImageOptions(),
    *,
    on_image: OnCount = lambda done, total: None,
) -> list[Segmentation]:
    """Segment every image of a folder with the same prompts.

    An image that cannot be segmented has an `error` in its result. `on_image` gets the number of
    images that are done, and of all images. Masks, overlays and label maps in the folder are
    skipped.
    """
    logits = _mask_logits(session, prompts)
    images = [path for path in find_images(folder) if not is_derived(path)]
    if not images:
        raise ImageError(
            f"{folder} holds only files derived from images, such as masks: give a folder of images"
        )
    _check_folder_targets(folder, targets)
    results = []
    for done, path in enumerate(images):
        on_image(done, len(images))
        try:
            file_targets = _folder_targets(path, targets)
            results.append(_segment(session, path, prompts, logits, file_targets, options))
        except (InputError, MissingDependencyError) as e:
            results.append(Segmentation(image=path, error=str(e)))
    on_image(len(images), len(images))
    return results


def _segment(
    session: Session,
    path: Path,
    prompts: Prompts,
    logits: Array | None,
    targets: MaskTargets,
    options: ImageOptions,
) -> Segmentation:
    """Segment one image; `logits`: the mask prompt, read from its file."""
    image = read_image(path, axis=options.axis, index=options.index, nan=options.nan)
    chunk = session.manifest.network.chunk
    if chunk > 1:
        raise UsageError(
            f"this network sees {chunk} neighbouring slices at a time: give it a volume, and "
            "prompts in voxels (without --slice)"
        )
    embedding = session.encode(image, intensity_window=options.intensity_window)
    prediction = session.segment(
        embedding,
        points=prompts.points or None,
        labels=prompts.labels or None,
        box=prompts.boxes or None,
        mask=logits,
        threshold=options.threshold,
        multimask=options.multimask,
    )
    return _write(session, image, embedding, prediction, prompts, targets)


def _write(
    session: Session,
    image: Image,
    embedding: Embedding,
    prediction: Prediction,
    prompts: Prompts,
    targets: MaskTargets,
) -> Segmentation:
    """Write the results of one image, all or none, and report them.

    Output folders are made here, so that there are none if no image could be segmented.
    """
    labels = _labels(prediction)
    for path in targets.paths():
        path.parent.mkdir(exist_ok=True)
    with ExitStack() as written:  # renames the temporary files once every result is written
        if targets.overlay is not None:
            overlay = written.enter_context(output_file(targets.overlay))
            _write_overlay(overlay, session, image, embedding, labels, prompts)
        if targets.logits is not None:
            logits = written.enter_context(output_file(targets.logits))
            np.save(logits, prediction.low_res_logits)
        if targets.mask is not None:
            write_mask(targets.mask, labels, image)
    return _report(session, image, embedding, prediction, labels, targets)


def _labels(prediction: Prediction) -> NDArray[Any]:
    """The mask to write: (H, W) bool for one mask, uint8 labels for several."""
    sets, count = prediction.masks.shape[:2]
    if sets == 1 and (count == 1 or not prediction.classes):
        mask: NDArray[np.bool_] = np.asarray(prediction.masks)[0, prediction.best[0]]
        return mask
    return prediction.label_map()


def _report(
    session: Session,
    image: Image,
    embedding: Embedding,
    prediction: Prediction,
    labels: NDArray[Any],
    targets: MaskTargets,
) -> Segmentation:
    names = session.conventions.class_names if prediction.classes else ()
    if labels.dtype == np.bool_:
        pixels = {(names or ("mask",))[0]: int(labels.sum())}
    else:
        sets, count = prediction.masks.shape[:2]
        if prediction.classes and count > 1:
            label_names = names or [f"class {label}" for label in range(1, count + 1)]
        else:
            label_names = [f"box {label}" for label in range(1, sets + 1)]
        pixels = {name: int((labels == i).sum()) for i, name in enumerate(label_names, 1)}
    return Segmentation(
        image=image.path,
        mask=targets.mask,
        overlay=targets.overlay,
        logits=targets.logits,
        scores=tuple(tuple(map(float, row)) for row in prediction.scores),
        pixels=pixels,
        image_size=embedding.frame.image_size,
        intensity_window=embedding.intensity_window,
        timings_ms=embedding.timings_ms | prediction.timings_ms,
        degraded=prediction.degraded,
    )


def _write_overlay(
    path: Path,
    session: Session,
    image: Image,
    embedding: Embedding,
    labels: NDArray[Any],
    prompts: Prompts,
) -> None:
    background, _ = intensities(image, session.conventions, embedding.intensity_window)
    signs = prompts.labels or (1,) * len(prompts.points)
    write_overlay(
        path, background, labels, points=prompts.points, labels=signs, boxes=prompts.boxes
    )


def _mask_logits(session: Session, prompts: Prompts) -> Array | None:
    """The mask prompt, (4g, 4g) float32; PromptError if it is not usable."""
    if prompts.mask is None:
        return None
    if session.manifest.mask_prompt_size is None:
        raise PromptError(NO_MASK_PROMPTS)
    return _read_logits(prompts.mask)


def _read_logits(path: Path) -> Array:
    """(4g, 4g) logits of one mask, from `--save-logits` or another program."""
    if not path.is_file():
        raise PromptError(f"{path} does not exist: --mask-input takes a .npy file of logits")
    try:
        with path.open("rb") as f:
            logits = np.lib.format.read_array(f, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise PromptError(f"{path} is not a .npy file of logits: {e}") from e
    while logits.ndim > 2 and len(logits) == 1:
        logits = logits[0]
    if logits.ndim != 2 or logits.dtype.kind != "f":
        raise PromptError(
            f"{path} holds {logits.dtype} of shape {logits.shape}, expected float logits (4g, 4g): "
            "save one mask of an earlier prediction's low_res_logits"
        )
    return np.asarray(logits, np.float32)


def check_file_targets(image: Path, mask_prompt: Path | None, targets: MaskTargets) -> None:
    """UsageError for outputs that one image cannot be written to, before anything is computed."""
    paths = targets.paths()
    for path in paths:
        check_writable(path)
        if path.resolve() == image.resolve():
            raise UsageError(f"{path} is the input image: name another output")
        if mask_prompt is not None and path.resolve() == mask_prompt.resolve():
            raise UsageError(f"{path} is the mask prompt: name another output")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("two outputs have the same name: give each its own")
    if targets.mask is not None:
        check_mask_suffix(targets.mask)
    if targets.overlay is not None:
        check_overlay_suffix(targets.overlay)
    if targets.logits is not None and suffix(targets.logits) != ".npy":
        raise UsageError(f"{targets.logits}: logits are written as .npy")


def _check_folder_targets(folder: Path, targets: MaskTargets) -> None:
    """UsageError for outputs that a folder of images cannot be written to."""
    for path in targets.paths():
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; for a folder of images, name a folder")
        if not path.exists() and path.suffix:
            raise UsageError(
                f"{path} looks like a file; for a folder of images, name a folder, "
                "or make this one first"
            )
        if not path.parent.is_dir():
            raise UsageError(f"{path.parent} is not a folder: make it first")
        if path.resolve() == folder.resolve():
            raise UsageError(f"{path} is the input folder: name another for the outputs")


def _folder_targets(image: Path, targets: MaskTargets) -> MaskTargets:
    """One image's files in the output folders, named after the image's whole file name."""

    def file(folder: Path | None, ending: str) -> Path | None:
        return None if folder is None else folder / f"{image.name}{ending}"

    return MaskTargets(
        mask=file(targets.mask, ".mask.png"),
        overlay=file(targets.overlay, ".overlay.png"),
        logits=file(targets.logits, ".logits.npy"),
    )
