"""An image and its labels → the masks a bundle gives for prompts drawn from those labels.

So promptable networks are evaluated: the label says where a user would click, the network what is
there. Nothing is random: the same labels give the same prompts.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medsa_deploy import metrics
from medsa_deploy.errors import ImageError
from medsa_deploy.images import Image, Volume
from medsa_deploy.metrics import Mask
from medsa_deploy.runtime import Embedding, Session

PromptKind = Literal["box", "click", "clicks3"]
"""A box around the label; a click at its innermost pixel; that one and two that correct."""
CLICKS: dict[PromptKind, int] = {"click": 1, "clicks3": 3}
BOX_MARGIN = 3
"""Pixels by which a box exceeds what it holds, as a hand-drawn one does."""

Window = tuple[float, float] | None
Numbers = NDArray[np.unsignedinteger]


def segment_labelled(
    session: Session, volume: Volume, labels: Numbers, prompt: PromptKind, window: Window = None
) -> dict[int, Mask]:
    """Segment every slice that has labels, for each label by itself: {label: (X, Y, Z) bool}.

    `labels` (X, Y, Z) lie like the volume. Slices without a label get no prompt, and stay empty.
    """
    found = {label: np.zeros(volume.shape, bool) for label in _present(labels)}
    if window is None and session.conventions.intensity_window is None:
        raw = volume.dtype != np.uint8 and not volume.rendered
        window = volume.intensity_range() if raw else None  # one scale for all slices
    for index in range(len(volume)):
        plane = volume.plane(labels, index)
        if plane.any():
            masks = segment_picture(session, volume.slice(index), plane, prompt, window)
            for label, mask in masks.items():
                volume.plane(found[label], index)[:] = mask
    return found


def segment_picture(
    session: Session, image: Image, labels: Numbers, prompt: PromptKind, window: Window = None
) -> dict[int, Mask]:
    """Segment an image for each of its labels by itself: {label: (H, W) bool}."""
    embedding = session.encode(image, intensity_window=window)
    return {
        label: _segment(session, embedding, labels == label, _mask_number(session, label), prompt)
        for label in _present(labels)
    }


def box_around(mask: Mask) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a mask's bounding box with a margin, within the image."""
    rows, columns = np.nonzero(mask)
    height, width = mask.shape
    return (
        max(int(columns.min()) - BOX_MARGIN, 0),
        max(int(rows.min()) - BOX_MARGIN, 0),
        min(int(columns.max()) + 1 + BOX_MARGIN, width),
        min(int(rows.max()) + 1 + BOX_MARGIN, height),
    )


def next_click(label: Mask, mask: Mask) -> tuple[tuple[int, int], int] | None:
    """(x, y) where the mask is most wrong, and 1 if it lacks that pixel, 0 if it has it wrongly.

    That is the innermost pixel of what it lacks or has too much; None when it is right.
    """
    depths = [metrics.depth(label & ~mask), metrics.depth(mask & ~label)]
    lacking = bool(depths[0].max() >= depths[1].max())
    chosen = depths[0] if lacking else depths[1]
    if not chosen.any():
        return None
    row, column = np.unravel_index(int(chosen.argmax()), chosen.shape)
    return (int(column), int(row)), int(lacking)


def _segment(
    session: Session, embedding: Embedding, label: Mask, number: int, prompt: PromptKind
) -> Mask:
    """The mask for one label; each further click goes where the mask before is most wrong."""
    if prompt == "box":
        masks = session.segment(embedding, box=box_around(label)).masks
        return np.asarray(masks[0, number])
    mask, points, signs = np.zeros_like(label), [], []
    for _ in range(CLICKS[prompt]):
        click = next_click(label, mask)
        if click is None:
            break
        points.append(click[0])
        signs.append(click[1])
        prediction = session.segment(embedding, points=points, labels=signs)
        mask = np.asarray(prediction.masks[0, number])
    return mask


def _present(labels: Numbers) -> list[int]:
    return [int(label) for label in np.unique(labels) if label]


def _mask_number(session: Session, label: int) -> int:
    """Which of the network's masks is a label's: its class, or the only one there is."""
    network = session.manifest.network
    if network.outputs != "classes" or network.classes == 1:
        return 0
    if label > network.classes:
        raise ImageError(
            f"there is a label {label}, but this network has {network.classes} classes, numbered "
            "from 1: renumber the labels"
        )
    return label - 1
