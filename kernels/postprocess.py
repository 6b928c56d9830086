"""Logits' size and an image's → the tables and launches of postprocess.cu; its numpy reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from medsa_deploy import transforms
from medsa_deploy.errors import UsageError
from medsa_deploy.transforms import POSTPROCESSING, Frame, MaskRule
from medsa_deploy.transforms.masks import MOST_CLASSES

from .axes import AxisParameters, AxisTable, Launch, axis_table, tiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Words = NDArray[np.uint32]


class Parameters(ctypes.Structure):
    """`Postprocess` of postprocess.cu."""

    _fields_ = (
        ("logits", ctypes.c_uint64),
        ("rows", AxisParameters),
        ("columns", AxisParameters),
        ("count", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("probabilities", ctypes.c_int),
        ("exclusive", ctypes.c_int),
        ("only", ctypes.c_int),
        ("threshold", ctypes.c_float),
        ("masks", ctypes.c_uint64),
        ("labels", ctypes.c_uint64),
        ("tally", ctypes.c_uint64),
    )


@dataclass(frozen=True, kw_only=True)
class Region:
    """A mask's pixels, or those of one label."""

    area: int
    box: tuple[int, int, int, int] | None
    """x0, y0, x1, y1, the last two exclusive; None for an empty mask."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Postprocessing:
    """Everything that is the same for every decoder run on images of one size."""

    shape: tuple[int, ...]
    """Of the output: (count, H, ceil(W / 32)) uint32 for masks, (H, W) uint8 for a label map."""
    tables: bytes
    """To be copied to device memory once, 16-byte aligned."""
    tally_shape: tuple[int, int]
    """Of the tally: (count, 5) uint32, zero before each run."""
    entry: str
    _parameters: Parameters
    _rows: AxisTable
    _columns: AxisTable

    def launch(self, *, logits: int, output: int, tally: int, tables: int, only: int = 0) -> Launch:
        """The launch for device addresses. `only`: the one class of a label map of competing
        classes whose pixels are 1; 0 for all classes."""
        parameters = Parameters.from_buffer_copy(self._parameters)
        parameters.only = only
        parameters.logits, parameters.tally = logits, tally
        parameters.masks = parameters.labels = output
        parameters.rows = self._rows.parameters(tables)
        parameters.columns = self._columns.parameters(tables + len(self._rows.bytes))
        height, width = len(self._rows.first), len(self._columns.first)
        layers = parameters.count if self.entry == "threshold_masks" else 1
        return Launch(
            source="postprocess",
            entry=self.entry,
            grid=tiles(width, height, layers),
            parameters=parameters,
        )


def postprocessing(
    logits_size: tuple[int, int],
    count: int,
    frame: Frame,
    rule: MaskRule,
    *,
    labels: bool,
    channels: int | None = None,
) -> Postprocessing:
    """Plan the kernel that makes logits (count, *logits_size) into masks at the image's size.

    labels: one label map of `count` classes instead of `count` masks. channels: the logits of masks
    that compete, which are `count` + 1, or more for a launch that makes one class alone.
    """
    if count < 1 or (labels and count > MOST_CLASSES):
        raise UsageError(f"a label map holds 1 to {MOST_CLASSES} classes, not {count}")
    rows, columns = (
        axis_table(
            POSTPROCESSING[rule.postprocess].axis_taps(n, frame.network_size, content, size),
            n,
            np.float32,
        )
        for n, content, size in zip(logits_size, frame.content_size, frame.image_size, strict=True)
    )
    height, width = frame.image_size
    return Postprocessing(
        shape=(height, width) if labels else (count, height, -(-width // 32)),
        tables=rows.bytes + columns.bytes,
        tally_shape=(count, 5),
        entry="label_map" if labels else "threshold_masks",
        _parameters=Parameters(
            count=count,
            channels=channels or count + rule.exclusive,
            probabilities=POSTPROCESSING[rule.postprocess].probabilities,
            exclusive=rule.exclusive,
            threshold=rule.threshold,
        ),
        _rows=rows,
        _columns=columns,
    )


def regions(tally: Words, image_size: tuple[int, int]) -> list[Region]:
    """A tally (count, 5), as the kernels count it, → areas and boxes."""
    height, width = image_size
    return [
        Region(area=area, box=(width - left, height - top, right, bottom) if area else None)
        for area, left, top, right, bottom in tally.tolist()
    ]


def pack(masks: NDArray[np.bool_]) -> Words:
    """(…, H, W) → (…, H, ceil(W / 32)): bit i of word j is pixel 32 j + i."""
    padded = np.pad(masks, [(0, 0)] * (masks.ndim - 1) + [(0, -masks.shape[-1] % 32)])
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4")


def unpack(words: Words, width: int) -> NDArray[np.bool_]:
    """(…, H, ceil(W / 32)) → (…, H, W)."""
    data = words.astype("<u4", copy=False).view(np.uint8)
    return np.unpackbits(data, axis=-1, count=width, bitorder="little").view(np.bool_)


def region(mask: NDArray[np.bool_]) -> Region:
    """Area and box of a mask (H, W)."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return Region(area=0, box=None)
    box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return Region(area=int(mask.sum()), box=box)


def reference_masks(
    logits: NDArray[np.float32], frame: Frame, rule: MaskRule
) -> tuple[Words, list[Region]]:
    """What `threshold_masks` has to give for logits (channels, h, w)."""
    masks = transforms.image_masks(logits, frame, rule)
    return pack(masks), [region(mask) for mask in masks]


def reference_labels(
    logits: NDArray[np.float32], frame: Frame, rule: MaskRule
) -> tuple[NDArray[np.uint8], list[Region]]:
    """What `label_map` has to give for logits of classes (channels, h, w)."""
    values = transforms.pixel_values(logits, frame, rule.postprocess)
    if rule.exclusive:
        labels = transforms.exclusive_labels(values)
    else:
        labels = transforms.label_map(values, rule.threshold)
    return labels, [region(labels == k + 1) for k in range(len(logits) - rule.exclusive)]
