"""A bundle, images and prompts → masks, overlays and scores."""

from __future__ import annotations

from collections.abc import Callable
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
from medsa_deploy.runtime import Embedding, Prediction, Session
from medsa_deploy.transforms import NO_MASK_PROMPTS
from medsa_deploy.transforms.intensities import intensities

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one call, the same on every image: x, y in pixels."""

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    mask: Path | None = None
    """`.npy` with (4g, 4g) logits of an earlier prediction."""

    def __post_init__(self) -> None:
        if not (self.points or self.boxes or self.mask):
            raise PromptError("no prompt: give --point X,Y, --box X0,Y0,X1,Y1 or --mask-input FILE")
        if len(self.boxes) > 1 and (self.points or self.mask):
            raise PromptError(
                "several boxes are several objects; points and a mask prompt go with one box only"
            )
        if not (self.boxes or self.mask or any(self.labels)):
            raise PromptError(
                "there are background clicks only (label 0): add a foreground click or a box; in "
                "an image a click is X,Y or X,Y,LABEL"
            )


@dataclass(frozen=True, kw_only=True)
class MaskTargets:
    """Where results go: files for one image, folders for a folder of images."""

    mask: Path | None = None
    overlay: Path | None = None
    logits: Path | None = None
    """`.npy` (P, K, 4g, 4g), for a further call's mask prompt."""


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """What came of one image."""

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
    """Why another backend than the one asked for made it, where a fallback did."""
    error: str | None = None
    """Why this image of a folder has no mask; the others were segmented."""


def segment_images(
    session: Session,
    image: Path,
    prompts: Prompts,
    outputs: MaskTargets,
    *,
    axis: int | None = None,
    index: int | None = None,
    intensity_window: tuple[float, float] | None = None,
    threshold: float | None = None,
    multimask: bool = False,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> list[Segmentation]:
    """Segment one image, or every image of a folder with the same prompts.

    In a folder an image that cannot be segmented is reported in its place. `on_image` is told how
    many images are done, and of how many.
    """
    if prompts.mask is not None and session.manifest.network.mask_prompt_size is None:
        raise PromptError(NO_MASK_PROMPTS)
    options: dict[str, Any] = {
        "points": prompts.points or None,
        "labels": prompts.labels or None,
        "box": prompts.boxes or None,
        "mask": None if prompts.mask is None else _read_logits(prompts.mask),
        "threshold": threshold,
        "multimask": multimask,
    }

    chunk = session.manifest.network.chunk

    def segment(file: Path, targets: MaskTargets) -> Segmentation:
        found = read_image(file, axis=axis, index=index)
        if chunk > 1:
            raise UsageError(
                f"this network sees {chunk} neighbouring slices at a time: give it a volume, and "
                "prompts in voxels (without --slice)"
            )
        embedding = session.encode(found, intensity_window=intensity_window)
        prediction = session.segment(embedding, **options)
        return _write(session, found, embedding, prediction, prompts, targets)

    if not image.is_dir():
        _check_file_targets(image, prompts.mask, outputs)
        return [segment(image, outputs)]
    files = [file for file in find_images(image) if not is_derived(file)]
    if not files:
        raise ImageError(f"{image} holds what was made from images, and no image")
    _check_folder_targets(image, outputs)
    results = []
    for done, file in enumerate(files):
        on_image(done, len(files))
        try:
            results.append(segment(file, _folder_targets(file, outputs)))
        except (InputError, MissingDependencyError) as e:
            results.append(Segmentation(image=file, error=str(e)))
    on_image(len(files), len(files))
    return results


def _write(
    session: Session,
    image: Image,
    embedding: Embedding,
    prediction: Prediction,
    prompts: Prompts,
    targets: MaskTargets,
) -> Segmentation:
    """Write what came of one image, and report it. Folders are made when there is a mask."""
    labels = _labels(prediction)
    for path in _named(targets):
        path.parent.mkdir(exist_ok=True)
    with ExitStack() as written:  # so that there are all, or none
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
    """What is written as the mask: (H, W) bool for one mask, uint8 labels for several."""
    sets, count = prediction.masks.shape[:2]
    if sets == 1 and (count == 1 or not prediction.classes):
        mask: NDArray[np.bool_] = prediction.masks[0, prediction.best[0]]
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
        several_classes = prediction.classes and count > 1
        total, word = (count, "class") if several_classes else (sets, "box")
        named = names if several_classes else ()
        pixels = {
            named[i] if named else f"{word} {i + 1}": int((labels == i + 1).sum())
            for i in range(total)
        }
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


def _read_logits(path: Path) -> Array:
    """(4g, 4g) logits of one mask, saved by `--save-logits` or by hand."""
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


def _named(outputs: MaskTargets) -> list[Path]:
    """The outputs that are wanted."""
    return [path for path in (outputs.mask, outputs.overlay, outputs.logits) if path is not None]


def _check_file_targets(image: Path, given: Path | None, outputs: MaskTargets) -> None:
    """Refuse outputs that one image cannot be written to, before anything is computed."""
    for path in _named(outputs):
        check_writable(path)
        if path.resolve() == image.resolve():
            raise UsageError(f"{path} is the input image: name another output")
        if given is not None and path.resolve() == given.resolve():
            raise UsageError(f"{path} is the mask prompt: name another output")
    if len({path.resolve() for path in _named(outputs)}) < len(_named(outputs)):
        raise UsageError("two outputs have the same name: give each its own")
    if outputs.mask is not None:
        check_mask_suffix(outputs.mask)
    if outputs.overlay is not None:
        check_overlay_suffix(outputs.overlay)
    if outputs.logits is not None and suffix(outputs.logits) != ".npy":
        raise UsageError(f"{outputs.logits}: logits are written as .npy")


def _check_folder_targets(image: Path, outputs: MaskTargets) -> None:
    """Refuse outputs that a folder of images cannot be written to."""
    for path in _named(outputs):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; for a folder of images, name a folder")
        if not path.exists() and path.suffix:
            raise UsageError(
                f"{path} looks like a file; for a folder of images, name a folder, "
                "or make this one first"
            )
        if not path.parent.is_dir():
            raise UsageError(f"{path.parent} is not a folder: make it first")
        if path.resolve() == image.resolve():
            raise UsageError(f"{path} is the input folder: name another for the outputs")


def _folder_targets(file: Path, outputs: MaskTargets) -> MaskTargets:
    """One image's outputs in the output folders, named after the whole file name."""

    def named(folder: Path | None, ending: str) -> Path | None:
        return None if folder is None else folder / f"{file.name}{ending}"

    return MaskTargets(
        mask=named(outputs.mask, ".mask.png"),
        overlay=named(outputs.overlay, ".overlay.png"),
        logits=named(outputs.logits, ".logits.npy"),
    )
