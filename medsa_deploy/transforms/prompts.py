"""Prompts in pixels of the image → points and labels in the network's coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from medsa_deploy.bundle.manifest import Conventions
from medsa_deploy.errors import PromptError, UsageError

from .image import Frame
from .intensities import Floats

BOX_LABELS = (2, 3)
"""SAM's labels of a box's top-left and bottom-right corner."""
PADDING_LABEL = -1
"""Label of padding points: SAM's, which stands in for an absent box, and EfficientSAM's."""
NO_MASK_PROMPTS = "this network takes no mask prompt: give points or a box"
PART_SHAPES = {
    "points": "(N, 2) or (P, N, 2)",
    "labels": "(N,) or (P, N)",
    "box": "(4,) or (P, 4)",
    "boxes": "(P, 4)",
    "mask": "(4g, 4g), (P, 4g, 4g) or (P, 1, 4g, 4g)",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One prompt set: x, y in pixels of the image."""

    points: Floats
    """(N, 2) x, y; N may be 0."""
    labels: Floats
    """(N,) 1 foreground, 0 background."""
    box: Floats | None
    """(4,) x0, y0, x1, y1."""
    mask: Floats | None
    """(4g, 4g) low-resolution logits of an earlier prediction."""


UNPROMPTED = Prompt(
    points=np.zeros((0, 2), np.float32), labels=np.zeros(0, np.float32), box=None, mask=None
)
"""The prompt set of a network that segments without a click."""


def prompts_for(conventions: Conventions, **parts: ArrayLike | None) -> list[Prompt]:
    """`prompts` of the same parts; one empty set for a network that needs none and was given none.

    Errors as for `prompts`.
    """
    if conventions.prompts != "required" and all(part is None for part in parts.values()):
        return [UNPROMPTED]
    return prompts(**parts)


def prompts(
    *,
    points: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    box: ArrayLike | None = None,
    boxes: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> list[Prompt]:
    """The arguments of a call → P prompt sets, each decoded to its own masks.

    `points` (N, 2) or (P, N, 2) x, y in pixels. `labels` (N,) or (P, N), all foreground by default.
    `box` (4,) or (P, 4), or `boxes` (P, 4). `mask` (4g, 4g), (P, 4g, 4g) or (P, 1, 4g, 4g). A part
    without the set axis is for one set. `network_prompt` checks the values, because it knows the
    image.

    PromptError for parts that are for different numbers of sets, an unusable shape, or no part.
    UsageError for `box` together with `boxes`.

    >>> [prompt.box.tolist() for prompt in prompts(boxes=[(0, 0, 8, 6), (2, 1, 9, 9)])]
    [[0.0, 0.0, 8.0, 6.0], [2.0, 1.0, 9.0, 9.0]]
    """
    if box is not None and boxes is not None:
        raise UsageError(
            "both box and boxes were given, expected one of them: box (4,) for one object, boxes "
            "(P, 4) for several"
        )
    parts = {
        name: _part(name, value)
        for name, value in {"points": points, "labels": labels, "box": box, "mask": mask}.items()
        if value is not None
    }
    if boxes is not None:
        parts["box"] = _part("boxes", boxes)
    count = _set_count(parts)
    points_of = parts.get("points", np.zeros((count, 0, 2), np.float32))
    labels_of = parts.get("labels", np.ones(points_of.shape[:2], np.float32))
    return [
        Prompt(
            points=points_of[i],
            labels=labels_of[i],
            box=parts["box"][i] if "box" in parts else None,
            mask=parts["mask"][i] if "mask" in parts else None,
        )
        for i in range(count)
    ]


def network_prompt(
    prompt: Prompt, frame: Frame, conventions: Conventions, *, mask_size: int | None
) -> tuple[Floats, Floats]:
    """A prompt set → the decoder's `point_coords` (N', 2) and `point_labels` (N',), float32.

    Points first, then the box's two corners with labels 2 and 3, then padding of label −1: one
    point (0, 0) after points without a box, or as many (−1, −1) as `pad_points` wants. A mask alone
    has no points at all: N' is 0. Coordinates
    are pixels of the network's frame (`point_frame` "image": of the image), times `point_scale`,
    x and y swapped for `point_order` "yx". SAM's +0.5 is in the graph. `mask_size`: 4g; None for a
    network without mask prompts. PromptError for points and boxes outside the image, an empty box,
    labels other than 0 and 1, more points than `pad_points`, or a mask of another size.
    """
    _check_points(prompt, frame.image_size)
    if prompt.box is not None:
        _check_box(prompt.box, frame.image_size)
    if prompt.mask is not None:
        _check_mask(prompt.mask, mask_size)
    corners = np.zeros((0, 2)) if prompt.box is None else prompt.box.reshape(2, 2)
    coords = np.concatenate([prompt.points, corners], dtype=np.float64)
    if conventions.point_frame == "network":
        (height, width), (h, w) = frame.image_size, frame.content_size
        coords *= (w / width, h / height)
    padding = _padding(prompt, len(coords), conventions.pad_points)
    coords = np.concatenate([coords * conventions.point_scale, padding])
    labels = [*prompt.labels, *BOX_LABELS[: len(corners)], *[PADDING_LABEL] * len(padding)]
    if conventions.point_order == "yx":
        coords = coords[:, ::-1]
    return np.ascontiguousarray(coords, dtype=np.float32), np.array(labels, np.float32)


def _padding(prompt: Prompt, points: int, pad_points: int | None) -> Floats:
    """(n, 2) coordinates of the padding points of a set that has `points`, box corners included."""
    if pad_points is None:
        # SAM pads points without a box, but not a mask alone; another token changes the masks
        padded = len(prompt.points) > 0 and prompt.box is None
        return np.zeros((1 if padded else 0, 2), np.float32)
    if points > pad_points > 0:
        raise PromptError(
            f"the prompt has {points} points (a box counts as two), but this network takes at most "
            f"{pad_points}: give fewer clicks"
        )
    return np.full((max(0, pad_points - points), 2), -1, np.float32)


def _part(name: str, value: ArrayLike) -> Floats:
    """A part of a prompt with its set axis: (P, N, 2), (P, N), (P, 4) or (P, 4g, 4g) float32."""
    try:
        with np.errstate(over="ignore"):
            part = np.array(value, dtype=np.float32)
    except (TypeError, ValueError) as e:
        raise PromptError(f"{name} should be numbers of the shape {PART_SHAPES[name]}: {e}") from e
    if name == "mask" and part.ndim == 4 and part.shape[1] == 1:
        part = part[:, 0]
    dimensions = {"points": 2, "labels": 1, "box": 1, "boxes": 1, "mask": 2}[name]
    last = {"points": 2, "box": 4, "boxes": 4}.get(name)
    if part.ndim == dimensions and name != "boxes":
        part = part[None]
    if part.ndim != dimensions + 1 or (last and part.shape[-1] != last):
        raise PromptError(
            f"{name} should have the shape {PART_SHAPES[name]}, found {np.shape(value)}"
        )
    return part


def _set_count(parts: Mapping[str, Floats]) -> int:
    """P, the number of prompt sets that every part is for; PromptError if parts do not match."""
    counts = {name: len(part) for name, part in parts.items()}
    if len(set(counts.values())) > 1:
        sets = ", ".join(f"{name} for {count}" for name, count in counts.items())
        shapes = ", ".join(f"{name} as {PART_SHAPES[name].split(' or ')[-1]}" for name in counts)
        raise PromptError(
            f"the prompt's parts are for different numbers of sets ({sets}): for P sets, give "
            f"{shapes}"
        )
    number = parts["points"].shape[1] if "points" in parts else 0
    if "labels" in parts and parts["labels"].shape[1] != number:
        raise PromptError(
            f"{number} points have {parts['labels'].shape[1]} labels: give one label, 1 or 0, for "
            "each point"
        )
    if not (number or "box" in parts or "mask" in parts) or 0 in counts.values():
        raise PromptError("the prompt is empty: give points, a box or a mask")
    return next(iter(counts.values()))


def _check_points(prompt: Prompt, image_size: tuple[int, int]) -> None:
    """PromptError for a point outside the image, and for a label other than 0 and 1."""
    height, width = image_size
    for number, ((x, y), label) in enumerate(zip(prompt.points, prompt.labels, strict=True), 1):
        if not (0 <= x < width and 0 <= y < height):
            raise PromptError(
                f"point {number} ({x:g}, {y:g}) lies outside the {width}×{height} image "
                f"(x 0…{width - 1}, y 0…{height - 1})"
            )
        if label not in (0, 1):
            raise PromptError(
                f"point {number} ({x:g}, {y:g}) has the label {label:g}: give 1 for foreground, "
                "0 for background"
            )


def _check_box(box: Floats, image_size: tuple[int, int]) -> None:
    """PromptError for a box that is inverted, empty or not within the image."""
    height, width = image_size
    x0, y0, x1, y1 = box
    box_text = f"the box ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
    if not (x0 < x1 and y0 < y1):
        raise PromptError(
            f"{box_text} is empty or inverted: give x0, y0, x1, y1 with x0 < x1, y0 < y1"
        )
    if not (x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height):
        raise PromptError(
            f"{box_text} lies outside the {width}×{height} image (x 0…{width}, y 0…{height})"
        )


def _check_mask(mask: Floats, mask_size: int | None) -> None:
    """PromptError for a mask of another size, with NaN, or for a network without mask prompts."""
    if mask_size is None:
        raise PromptError(NO_MASK_PROMPTS)
    if mask.shape != (mask_size, mask_size):
        raise PromptError(
            f"the mask prompt has the shape {mask.shape}, expected ({mask_size}, {mask_size}): "
            "give the low-resolution logits of an earlier prediction"
        )
    if not np.isfinite(mask).all():
        raise PromptError("the mask prompt has NaN or infinite values")
