"""Image → network frame, prompts → network coordinates, logits → masks.

What has to happen around the graphs for the masks to be right. Every preprocessing profile is a
row of one table, `PROFILES`: how the image is laid into the network's square frame, with which
filter, and how its intensities are scaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from . import resampling
from .errors import ImageError, PromptError, UsageError
from .manifest import Conventions, ProfileName

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = "NDArray[np.float32]"

BOX_LABELS = (2, 3)
"""SAM's labels of a box's top-left and bottom-right corner."""

PADDING_LABEL = -1
"""Label of padding points: SAM's, which stands in for an absent box, and EfficientSAM's."""

NO_MASK_PROMPTS = "this network takes no mask prompt: give points or a box"

PART_SHAPES = {
    "points": "(N, 2) or (P, N, 2)",
    "labels": "(N,) or (P, N)",
    "box": "(4,) or (P, 4)",
    "mask": "(4g, 4g), (P, 4g, 4g) or (P, 1, 4g, 4g)",
}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How an image is made into the network's input."""

    fit: Literal["stretch", "longest_side"]
    """Stretched to the frame, or scaled to touch it with its longest side and padded right and
    bottom with zeros, after the intensities are scaled."""
    filter: resampling.Filter
    """`bilinear`: Pillow's, antialiased. `cubic`: scikit-image's, antialiased. `area`: OpenCV's."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from display values 0…255; None: the image's own minimum becomes 0, maximum 1."""
    std: tuple[float, float, float] | None = None
    """What the differences from `mean` are divided by."""

    @property
    def min_max(self) -> bool:
        """Whether it takes intensities of any range; otherwise it takes display values 0…255."""
        return self.mean is None


PROFILES: Mapping[ProfileName, Profile] = {
    "medsa": Profile(
        fit="stretch", filter="bilinear", mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0)
    ),
    "sam": Profile(
        fit="longest_side",
        filter="bilinear",
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
    ),
    "medsam": Profile(fit="stretch", filter="cubic"),
    "litemedsam": Profile(fit="longest_side", filter="area"),
}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """How an image lies in the network's square frame."""

    image_size: tuple[int, int]
    """(H, W) of the caller's image."""
    network_size: int
    """S"""
    content_size: tuple[int, int]
    """(h, w) of the frame that the image covers, from the top left; the rest is padding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One prompt set, as a caller gives it: x, y in pixels of the image."""

    points: Floats
    """(N, 2) x, y; N may be 0."""
    labels: Floats
    """(N,) 1 foreground, 0 background."""
    box: Floats | None
    """(4,) x0, y0, x1, y1."""
    mask: Floats | None
    """(4g, 4g) low-resolution logits of an earlier prediction."""


def display_values(
    pixels: ArrayLike, window: tuple[float, float], *, inverted: bool = False
) -> Floats:
    """Intensities → display values: `window` (low, high) becomes 0…255, clipped, float32.

    `pixels` (H, W) or (H, W, 3) of any real type; `inverted` makes low intensities bright
    (MONOCHROME1). UsageError for a window that is not finite or not low < high, ImageError for NaN
    or infinity.
    """
    low, high = window
    if not 0 < high - low < math.inf:
        raise UsageError(
            f"the intensity window {low:g},{high:g} cannot be used: give two finite numbers, "
            "the lower first"
        )
    values = np.clip(_finite(pixels, np.float64), low, high)
    values = (values - low) / (high - low) * 255
    return np.asarray(255 - values if inverted else values, np.float32)


def preprocess(pixels: ArrayLike, profile: ProfileName, network_size: int) -> tuple[Floats, Frame]:
    """An image → what the image encoder receives, (3, S, S) float32, and how it lies in it.

    `pixels` (H, W) or (H, W, 3): uint8, or any other real type as float32. The profiles `medsa` and
    `sam` take display values 0…255 (see `display_values`), the min–max profiles any range. One
    channel is repeated to three. ImageError for other shapes, an empty image, NaN or infinity, or
    values outside 0…255 where display values are wanted.
    """
    if profile not in PROFILES:
        raise UsageError(f"unknown preprocessing {profile!r}; there are: {', '.join(PROFILES)}")
    row = PROFILES[profile]
    planes = _planes(pixels)
    if not (row.min_max or planes.dtype == np.uint8 or 0 <= planes.min() <= planes.max() <= 255):
        raise ImageError(
            f"the image has values {planes.min():g}…{planes.max():g}, but preprocessing {profile} "
            "takes display values 0…255: give an intensity window"
        )
    frame = frame_of((planes.shape[1], planes.shape[2]), profile, network_size)
    content = resampling.resize(planes, frame.content_size, row.filter)
    h, w = frame.content_size
    image = np.zeros((3, network_size, network_size), np.float32)
    image[:, :h, :w] = _scaled_intensities(content, row)
    return image, frame


def frame_of(image_size: tuple[int, int], profile: ProfileName, network_size: int) -> Frame:
    """Where an image of (H, W) lies in the frame under `profile`."""
    content = network_size, network_size
    if PROFILES[profile].fit == "longest_side":
        # the order of operations is SAM's ResizeLongestSide's, so that ties round alike
        scale = network_size / max(image_size)
        h, w = (max(1, int(side * scale + 0.5)) for side in image_size)
        content = h, w
    return Frame(image_size=image_size, network_size=network_size, content_size=content)


def prompts(
    *,
    points: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    box: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> list[Prompt]:
    """What a caller gives → P prompt sets, each decoded to its own masks.

    `points` (N, 2) or (P, N, 2) x, y in pixels; `labels` (N,) or (P, N), all foreground by default;
    `box` (4,) or (P, 4); `mask` (4g, 4g), (P, 4g, 4g) or (P, 1, 4g, 4g). A part without the set
    axis is for one set; parts for different numbers of sets, an unusable shape and nothing at all
    are PromptErrors. Values are checked by `network_prompt`, which knows the image.
    """
    given = {"points": points, "labels": labels, "box": box, "mask": mask}
    parts = {name: _part(name, value) for name, value in given.items() if value is not None}
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
    point (0, 0), only when there is no box, or as many (−1, −1) as `pad_points` wants. Coordinates
    are pixels of the network's frame (`point_frame` "image": of the image), times `point_scale`,
    x and y swapped for `point_order` "yx". SAM's +0.5 is in the graph. PromptError for what lies
    outside the image, an empty box, labels other than 0 and 1, more points than `pad_points`, or a
    mask whose side is not `mask_size` (4g; None: no mask at all).
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
        # SAM gives every set without a box one such token; a second one changes the masks
        return np.zeros((1 if prompt.box is None else 0, 2), np.float32)
    if points > pad_points > 0:
        raise PromptError(
            f"the prompt has {points} points (a box counts as two), but this network takes at most "
            f"{pad_points}: give fewer clicks"
        )
    return np.full((max(0, pad_points - points), 2), -1, np.float32)


def upsample(logits: Floats, frame: Frame) -> Floats:
    """Low-resolution logits (…, 4g, 4g) float32 → logits of the image's pixels (…, H, W) float32.

    Bilinear to the network's frame, cropped of padding, bilinear to the image, as SAM's
    `postprocess_masks` does in two steps; both are linear, so they are applied as one.
    """
    logits = np.asarray(logits, dtype=np.float32)
    rows, columns = (
        resampling.upsample_operator(n, frame.network_size, content, size)
        for n, content, size in zip(
            logits.shape[-2:], frame.content_size, frame.image_size, strict=True
        )
    )
    return resampling.resample(logits, rows, columns)


def probability_to_logit(threshold: float) -> float:
    """The logit of a probability; UsageError unless 0 < threshold < 1."""
    if not 0 < threshold < 1:
        raise UsageError(f"the threshold {threshold:g} is not a probability between 0 and 1")
    return math.log(threshold) - math.log1p(-threshold)


def label_map(logits: Floats, threshold_logit: float) -> NDArray[np.uint8]:
    """Logits of K classes (K, H, W) → (H, W) uint8: 0 background, k + 1 for class k.

    A pixel belongs to its class with the highest logit if that is above `threshold_logit`.
    """
    if not 1 <= len(logits) <= 255:
        raise UsageError(f"a label map holds 1 to 255 classes, not {len(logits)}")
    best = (logits.argmax(axis=0) + 1).astype(np.uint8)
    return np.where(logits.max(axis=0) > threshold_logit, best, np.uint8(0))


def _planes(pixels: ArrayLike) -> NDArray[Any]:
    """(H, W) or (H, W, 3) → (C, H, W), C = 1 or 3, uint8 or finite float32."""
    array = np.asarray(pixels)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ImageError(
            f"an image has the shape (height, width) or (height, width, 3), not {array.shape}"
        )
    if array.size == 0:
        raise ImageError(f"the image is empty: its shape is {array.shape}")
    if array.dtype != np.uint8:
        array = _finite(array, np.float32)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _finite(pixels: ArrayLike, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """`pixels` as finite floats of `dtype`, or ImageError."""
    array = np.asarray(pixels)
    if array.dtype.kind not in "uif":
        raise ImageError(f"an image has integers or floats, not {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise ImageError("the image has NaN or infinite values: replace them first")
    return array


def _scaled_intensities(content: NDArray[Any], profile: Profile) -> NDArray[Any]:
    """(C, h, w) → (C or 3, h, w) with the profile's mean and std, or min–max over all channels."""
    if profile.mean is None or profile.std is None:
        low, high = float(content.min()), float(content.max())
        return np.asarray((content - low) / max(high - low, 1e-8))
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (profile.mean, profile.std))
    return np.asarray((content.astype(np.float32) - mean) / std)


def _part(name: str, value: ArrayLike) -> Floats:
    """A part of a prompt with its set axis: (P, N, 2), (P, N), (P, 4) or (P, 4g, 4g) float32."""
    try:
        with np.errstate(over="ignore"):
            part = np.array(value, dtype=np.float32)
    except (TypeError, ValueError) as e:
        raise PromptError(f"{name} should be numbers of the shape {PART_SHAPES[name]}: {e}") from e
    if name == "mask" and part.ndim == 4 and part.shape[1] == 1:
        part = part[:, 0]
    dimensions = {"points": 2, "labels": 1, "box": 1, "mask": 2}[name]
    last = {"points": 2, "box": 4}.get(name)
    if part.ndim == dimensions:
        part = part[None]
    if part.ndim != dimensions + 1 or (last and part.shape[-1] != last):
        raise PromptError(
            f"{name} should have the shape {PART_SHAPES[name]}, found {np.shape(value)}"
        )
    return part


def _set_count(parts: Mapping[str, Floats]) -> int:
    """P, the number of prompt sets that every part is for; refuses parts that do not match."""
    counts = {name: len(part) for name, part in parts.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} for {count}" for name, count in counts.items())
        wanted = ", ".join(f"{name} as {PART_SHAPES[name].split(' or ')[-1]}" for name in counts)
        raise PromptError(
            f"the prompt's parts are for different numbers of sets ({found}): for P sets, give "
            f"{wanted}"
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
    """Refuse a point outside the image, naming it, and a label that is not 0 or 1."""
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
    """Refuse a box that is inverted, empty or not within the image."""
    height, width = image_size
    x0, y0, x1, y1 = box
    found = f"the box ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
    if not (x0 < x1 and y0 < y1):
        raise PromptError(
            f"{found} is empty or inverted: give x0, y0, x1, y1 with x0 < x1, y0 < y1"
        )
    if not (x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height):
        raise PromptError(
            f"{found} lies outside the {width}×{height} image (x 0…{width}, y 0…{height})"
        )


def _check_mask(mask: Floats, mask_size: int | None) -> None:
    """Refuse a mask prompt that is not (4g, 4g) or not finite, or any where `mask_size` is None."""
    if mask_size is None:
        raise PromptError(NO_MASK_PROMPTS)
    if mask.shape != (mask_size, mask_size):
        raise PromptError(
            f"the mask prompt has the shape {mask.shape}, expected ({mask_size}, {mask_size}): "
            "give the low-resolution logits of an earlier prediction"
        )
    if not np.isfinite(mask).all():
        raise PromptError("the mask prompt has NaN or infinite values")
