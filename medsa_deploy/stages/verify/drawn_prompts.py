"""An image and its labels → the masks of a bundle for prompts drawn from the labels.

This is the usual evaluation of promptable networks: a label stands for the clicks of a user. The
same labels always give the same prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.errors import ImageError
from medsa_deploy.evaluation import metrics
from medsa_deploy.evaluation.metrics import Mask
from medsa_deploy.images import Image, Volume
from medsa_deploy.runtime import Embedding, Session
from medsa_deploy.runtime.volumes.chunk_encoder import ChunkEncoder
from medsa_deploy.transforms.intensities import IntensityWindow

PromptKind = Literal["box", "click", "clicks3", "none"]
"""A box around the label; a click at its innermost pixel; that one and two that correct; none, for
a network that segments without."""
CLICKS: dict[PromptKind, int] = {"click": 1, "clicks3": 3}
BOX_MARGIN = 3
"""Pixels by which a box exceeds its mask, like a box drawn by hand."""

Numbers = NDArray[np.unsignedinteger]


def segment_labelled(
    session: Session,
    volume: Volume,
    labels: Numbers,
    prompt: PromptKind,
    window: IntensityWindow = None,
) -> Iterator[tuple[int, Mask]]:
    """Segment a volume for each of its labels separately: (label, its mask (X, Y, Z) bool).

    `labels` (X, Y, Z) are on the volume's grid. Prompts are drawn for each slice, or for each chunk
    if the network's prompts are for a chunk. Slices without a label get no prompt and stay empty;
    without prompts, every slice is segmented.
    """
    height, width = volume.slice_size
    packed = {
        label: np.zeros((len(volume), height, -(-width // 8)), np.uint8)
        for label in _present(labels)
    }
    encoder = ChunkEncoder(session, volume, intensity_window=window)
    by_chunk = session.conventions.prompt_scope == "chunk"
    for start in encoder.starts:
        slices = sorted(encoder.slices(start))
        for group in [slices] if by_chunk else [[index] for index in slices]:
            drawn = np.stack([volume.plane(labels, index) for index in group])
            present = list(packed) if prompt == "none" else _present(drawn)
            if not present:
                continue
            embeddings = [encoder.chunk(start)[index - start] for index in group]
            for label, masks in _segment_each(session, embeddings, drawn, present, prompt).items():
                packed[label][group] = np.packbits(masks, axis=-1)
    for label, planes in packed.items():
        mask = np.zeros(volume.shape, bool)
        for index, bits in enumerate(planes):
            volume.plane(mask, index)[:] = np.unpackbits(bits, axis=-1, count=width)
        yield label, mask


def segment_picture(
    session: Session,
    image: Image,
    labels: Numbers,
    prompt: PromptKind,
    window: IntensityWindow = None,
) -> Iterator[tuple[int, Mask]]:
    """Segment an image for each of its labels separately: (label, its mask (H, W) bool)."""
    embedding = session.encode(image, intensity_window=window)
    present = _present(labels)
    for label, masks in _segment_each(session, [embedding], labels[None], present, prompt).items():
        yield label, masks[0]


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
    """The innermost wrong pixel (x, y) of masks (slices, H, W), and its label.

    The label is 1 for a pixel that the masks lack, 0 for a pixel that they have too much. None if
    the masks are right.
    """
    depths = [
        np.stack([metrics.depth(plane) for plane in wrong])
        for wrong in (label & ~mask, mask & ~label)
    ]
    lacking = bool(depths[0].max() >= depths[1].max())
    chosen = depths[0] if lacking else depths[1]
    if not chosen.any():
        return None
    _, row, column = np.unravel_index(int(chosen.argmax()), chosen.shape)
    return (int(column), int(row)), int(lacking)


def _segment_each(
    session: Session,
    embeddings: Sequence[Embedding],
    labels: Numbers,
    present: Sequence[int],
    prompt: PromptKind,
) -> dict[int, Mask]:
    """Masks (slices, H, W) of each label in `present`, with one prompt set for all slices."""
    numbers = {label: _mask_number(session, label) for label in present}
    if prompt == "none":
        masks = np.stack([np.asarray(session.segment(e).masks)[0] for e in embeddings])
        return {label: masks[:, number] for label, number in numbers.items()}
    return {
        label: _segment(session, embeddings, labels == label, number, prompt)
        for label, number in numbers.items()
    }


def _segment(
    session: Session, embeddings: Sequence[Embedding], label: Mask, number: int, prompt: PromptKind
) -> Mask:
    """The masks for one label; each click after the first is on the worst error so far."""

    def masks(**prompts: Any) -> Mask:
        return np.stack(
            [np.asarray(session.segment(e, **prompts).masks)[0, number] for e in embeddings]
        )

    if prompt == "box":  # as in `run`, slices beyond the box stay empty
        mask = masks(box=box_around(np.logical_or.reduce(label)))
        return mask & label.any(axis=(1, 2), keepdims=True)
    mask, points, signs = np.zeros_like(label), [], []
    for _ in range(CLICKS[prompt]):
        click = next_click(label, mask)
        if click is None:
            break
        points.append(click[0])
        signs.append(click[1])
        mask = masks(points=points, labels=signs)
    return mask


def _present(labels: Numbers) -> list[int]:
    return [int(label) for label in np.unique(labels) if label]


def _mask_number(session: Session, label: int) -> int:
    """Index of a label's mask: its class, or 0 for a network with a single mask."""
    network = session.manifest.network
    if network.outputs == "sam" or network.classes == 1:
        return 0
    if label > network.classes:
        raise ImageError(
            f"there is a label {label}, but this network has {network.classes} classes, numbered "
            "from 1: renumber the labels"
        )
    return label - 1
