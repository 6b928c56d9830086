"""A bundle, images and prompts → masks, overlays and scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.errors import InputError, PromptError, UsageError
from medsa_deploy.images import (
    Image,
    check_mask_suffix,
    check_overlay_suffix,
    find_images,
    read_image,
    write_mask,
    write_overlay,
)
from medsa_deploy.runtime import Embedding, Prediction, Session
from medsa_deploy.runtime.session import intensities

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


@dataclass(frozen=True, kw_only=True)
class Outputs:
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
    error: str | None = None
    """Why this image of a folder has no mask; the others were segmented."""


def run(
    session: Session,
    image: Path,
    prompts: Prompts,
    outputs: Outputs,
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
    options: dict[str, Any] = {"threshold": threshold, "multimask": multimask}
    if not image.is_dir():
        targets = _file_targets(image, outputs)
        found = read_image(image, axis=axis, index=index)
        return [_segment(session, found, prompts, targets, intensity_window, options)]
    files = find_images(image)
    _check_folders(outputs)
    results = []
    for done, file in enumerate(files):
        on_image(done, len(files))
        try:
            targets = _folder_targets(file, image, outputs)
            found = read_image(file, axis=axis, index=index)
            results.append(_segment(session, found, prompts, targets, intensity_window, options))
        except InputError as e:
            results.append(Segmentation(image=file, error=str(e)))
    on_image(len(files), len(files))
    return results


def _segment(
    session: Session,
    image: Image,
    prompts: Prompts,
    targets: Outputs,
    window: tuple[float, float] | None,
    options: dict[str, Any],
) -> Segmentation:
    """One image: encode, decode, write."""
    embedding = session.encode(image, intensity_window=window)
    prediction = session.segment(
        embedding,
        points=prompts.points or None,
        labels=prompts.labels or None,
        box=prompts.boxes or None,
        mask=None if prompts.mask is None else _read_logits(prompts.mask),
        **options,
    )
    labels = _labels(prediction)
    if targets.mask is not None:
        write_mask(targets.mask, labels, image)
    if targets.overlay is not None:
        _write_overlay(targets.overlay, session, image, labels, prompts, window)
    if targets.logits is not None:
        with targets.logits.open("wb") as f:
            np.save(f, prediction.low_res_logits)
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
    targets: Outputs,
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
    )


def _write_overlay(
    path: Path,
    session: Session,
    image: Image,
    labels: NDArray[Any],
    prompts: Prompts,
    window: tuple[float, float] | None,
) -> None:
    background, _ = intensities(image, session.conventions, window)
    signs = prompts.labels or (1,) * len(prompts.points)
    write_overlay(
        path, background, labels, points=prompts.points, labels=signs, boxes=prompts.boxes
    )


def _read_logits(path: Path) -> Array:
    """(4g, 4g) logits of one mask, saved by `--save-logits` or by hand."""
    try:
        logits = np.load(path, allow_pickle=False)
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


def _file_targets(image: Path, outputs: Outputs) -> Outputs:
    """Outputs of one image, their suffixes checked before anything is computed."""
    for path in (outputs.mask, outputs.overlay, outputs.logits):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path.parent} is not a folder: make it first")
        if path is not None and path.resolve() == image.resolve():
            raise UsageError(f"{path} is the input image: name another output")
    if outputs.mask is not None:
        check_mask_suffix(outputs.mask)
    if outputs.overlay is not None:
        check_overlay_suffix(outputs.overlay)
    if outputs.logits is not None and outputs.logits.suffix != ".npy":
        raise UsageError(f"{outputs.logits}: logits are written as .npy")
    return outputs


def _check_folders(outputs: Outputs) -> None:
    for path in (outputs.mask, outputs.overlay, outputs.logits):
        if path is not None and path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; for a folder of images, name a folder")


def _folder_targets(file: Path, folder: Path, outputs: Outputs) -> Outputs:
    """One image's outputs in the output folders, named after the whole file name."""

    def named(target: Path | None, ending: str) -> Path | None:
        if target is None:
            return None
        target.mkdir(parents=True, exist_ok=True)
        if target.resolve() == folder.resolve():
            raise UsageError(f"{target} is the input folder: name another for the outputs")
        return target / f"{file.name}{ending}"

    return Outputs(
        mask=named(outputs.mask, ".mask.png"),
        overlay=named(outputs.overlay, ".overlay.png"),
        logits=named(outputs.logits, ".logits.npy"),
    )
