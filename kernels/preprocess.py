"""A frame's format and a profile → tables and launches of preprocess.cu; its numpy reference."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from medsa_deploy import transforms
from medsa_deploy.bundle.manifest import PreprocessingName
from medsa_deploy.errors import UsageError
from medsa_deploy.transforms import PREPROCESSING, Frame
from medsa_deploy.transforms.resampling import FILTER_TAPS, ROUNDED

from .axes import AxisParameters, AxisTable, Launch, axis_table, fixed_point, pillow_taps, tiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

Element = Literal["uint8", "uint16", "int16", "float32"]

ENTRIES: Mapping[Element, str] = {"uint8": "u8", "uint16": "u16", "int16": "i16", "float32": "f32"}
"""What an element's entries end in."""

TRUNCATE, HALF_EVEN, HALF_UP = range(3)
"""`Rounding` of preprocess.cu."""

WHOLE_LEVELS = ROUNDED | {"bilinear"}
"""Filters that make whole grey levels of a uint8 image; the others are resized as a window is."""

EXTREMES_BYTES = 32
"""`extremes` of preprocess.cu, and what aligns that which follows it."""
UNUSABLE = 16
"""Bytes from there to the number that is not 0 where a float32 frame has NaN or infinity."""


class Parameters(ctypes.Structure):
    """`Preprocess` of preprocess.cu."""

    _fields_ = (
        ("frame", ctypes.c_uint64),
        ("pitch", ctypes.c_int64),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("flip", ctypes.c_int),
        ("low", ctypes.c_float),
        ("remainder", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("least", ctypes.c_float),
        ("most", ctypes.c_float),
        ("rounding", ctypes.c_int),
        ("mean", ctypes.c_float * 3),
        ("std", ctypes.c_float * 3),
        ("rows", AxisParameters),
        ("columns", AxisParameters),
        ("size", ctypes.c_int),
        ("half", ctypes.c_int),
        ("output", ctypes.c_uint64),
        ("content", ctypes.c_uint64),
        ("extremes", ctypes.c_uint64),
    )


@dataclass(frozen=True, kw_only=True)
class FrameFormat:
    """How a frame lies in device memory."""

    element: Element
    height: int
    width: int
    channels: Literal[1, 3] = 1
    """Three are interleaved."""
    pitch: int
    """Bytes from a row to the next, a multiple of the element's size; negative where rows go up."""


@dataclass(frozen=True, kw_only=True)
class Intensities:
    """How stored values become what a profile takes."""

    slope: float = 1.0
    intercept: float = 0.0
    """Stored value × slope + intercept, as DICOM's rescale."""
    window: tuple[float, float] | None = None
    """(low, high), after the rescale, become 0…255. None: uint8 display values, or any values for a
    min–max profile."""
    inverted: bool = False
    """Low intensities are bright (MONOCHROME1); for uint8 or with a window."""

    @property
    def plain(self) -> bool:
        """Whether uint8 values are display values as they are, but for the inversion."""
        return self.window is None and (self.slope, self.intercept) == (1.0, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Preprocessing:
    """Everything that is the same for every frame of one format."""

    frame: Frame
    """How an image lies in the network's frame."""
    output_bytes: int
    """(3, S, S) of float32 or float16."""
    tables: bytes
    """To be copied to device memory once, 16-byte aligned."""
    scratch_bytes: int
    """Device memory that a min–max profile or a float32 frame needs; 0 for others. Its first
    EXTREMES_BYTES have to be zero before each frame."""
    entries: tuple[str, ...]
    """What is launched, in order."""
    _format: FrameFormat
    _parameters: Parameters
    _rows: AxisTable
    _columns: AxisTable

    def launches(
        self, *, frame: int, output: int, tables: int, scratch: int = 0
    ) -> tuple[Launch, ...]:
        """The launches for device addresses: of the frame's first row, of the output, the tables
        and the scratch memory."""
        parameters = Parameters.from_buffer_copy(self._parameters)
        parameters.frame, parameters.output = frame, output
        parameters.rows = self._rows.parameters(tables)
        parameters.columns = self._columns.parameters(tables + len(self._rows.bytes))
        parameters.extremes, parameters.content = scratch, scratch + EXTREMES_BYTES
        side, (h, w) = self.frame.network_size, self.frame.content_size
        grid = tiles(side, side, self._format.channels)
        content = tiles(w, h, self._format.channels)
        return tuple(
            Launch(
                source="preprocess",
                entry=entry,
                grid=content if entry.startswith("resize") else grid,
                parameters=parameters,
            )
            for entry in self.entries
        )


def preprocessing(
    frame_format: FrameFormat,
    profile: PreprocessingName,
    network_size: int,
    intensities: Intensities,
    *,
    half: bool = False,
) -> Preprocessing:
    """Plan the kernels that make frames of one format into the encoder's input.

    half: float16 instead of float32. UsageError for intensities that the profile cannot take.
    """
    _check(frame_format, profile, intensities)
    row = PREPROCESSING[profile]
    levels = frame_format.element == "uint8" and intensities.plain
    if levels and row.filter not in WHOLE_LEVELS:
        levels, intensities = False, replace(intensities, window=(0.0, 255.0))
    size = frame_format.height, frame_format.width
    frame = transforms.frame_of(size, profile, network_size)
    rows, columns = (
        _table(profile, n, m, levels=levels) for n, m in zip(size, frame.content_size, strict=True)
    )
    parameters = Parameters(
        pitch=frame_format.pitch,
        height=frame_format.height,
        width=frame_format.width,
        channels=frame_format.channels,
        flip=255 if intensities.inverted else 0,
        rounding=_rounding(profile, frame),
        mean=row.mean or (0, 0, 0),
        std=row.std or (1, 1, 1),
        size=network_size,
        half=half,
    )
    _set_window(parameters, intensities)
    name = "levels" if levels else ENTRIES[frame_format.element]
    content = math.prod(frame.content_size) * frame_format.channels * 4 if row.min_max else 0
    checked = ("find_unusable",) if frame_format.element == "float32" else ()
    resized = (f"resize_{name}", "normalise") if row.min_max else (f"preprocess_{name}",)
    return Preprocessing(
        frame=frame,
        output_bytes=3 * network_size**2 * (2 if half else 4),
        tables=rows.bytes + columns.bytes,
        scratch_bytes=EXTREMES_BYTES + content if content or checked else 0,
        entries=(*checked, *resized),
        _format=frame_format,
        _parameters=parameters,
        _rows=rows,
        _columns=columns,
    )


def reference(
    pixels: NDArray[np.generic],
    profile: PreprocessingName,
    network_size: int,
    intensities: Intensities,
    *,
    half: bool = False,
) -> NDArray[np.floating]:
    """What the kernels have to give, (3, S, S), for a frame (H, W) or (H, W, 3)."""
    image, _ = transforms.preprocess(shown(pixels, intensities), profile, network_size)
    return image.astype(np.float16 if half else np.float32)


def shown(pixels: NDArray[np.generic], intensities: Intensities) -> NDArray[np.generic]:
    """Stored values → what `transforms.preprocess` takes, as readers and `Session.encode` do it."""
    values = pixels
    if (intensities.slope, intensities.intercept) != (1.0, 0.0):
        rescaled = pixels.astype(np.float64) * intensities.slope + intensities.intercept
        values = rescaled.astype(np.float32)
    if intensities.window is not None:
        return transforms.display_values(values, intensities.window, inverted=intensities.inverted)
    return 255 - values if intensities.inverted else values


def _check(frame_format: FrameFormat, profile: PreprocessingName, intensities: Intensities) -> None:
    if min(frame_format.height, frame_format.width) < 1:
        raise UsageError(f"a frame has at least one pixel, not {frame_format}")
    size = np.dtype(frame_format.element).itemsize
    row_bytes = frame_format.width * frame_format.channels * size
    if abs(frame_format.pitch) < row_bytes or frame_format.pitch % size:
        raise UsageError(
            f"a pitch of {frame_format.pitch} bytes does not fit rows of {row_bytes} bytes: give a "
            f"multiple of {size} that is no smaller"
        )
    low, high = intensities.window or (0, 1)
    if not 0 < high - low < math.inf:
        raise UsageError(
            f"the intensity window {low:g},{high:g} cannot be used: give two finite numbers, "
            "the lower first"
        )
    if not 0 < abs(intensities.slope) < math.inf or not math.isfinite(intensities.intercept):
        raise UsageError(
            f"the rescale {intensities.slope:g}, {intensities.intercept:g} cannot be used: give a "
            "finite slope that is not 0, and a finite intercept"
        )
    display = frame_format.element == "uint8" and intensities.plain
    if intensities.window is None and not display:
        if not PREPROCESSING[profile].min_max:
            raise UsageError(
                f"preprocessing {profile} takes display values 0…255: give an intensity window"
            )
        if intensities.inverted:
            raise UsageError("values without a window cannot be inverted: give one")


def _table(profile: PreprocessingName, n: int, m: int, *, levels: bool) -> AxisTable:
    """The profile's filter on one axis, with the weights of the entry that will read it."""
    filter_ = PREPROCESSING[profile].filter
    if filter_ == "bilinear":
        taps = pillow_taps(n, m)
        if levels:
            return fixed_point(axis_table(taps, n, np.float64))
    else:
        taps = FILTER_TAPS[filter_](n, m)
    return axis_table(taps, n, np.float64 if levels else np.float32)


def _rounding(profile: PreprocessingName, frame: Frame) -> int:
    """How whole grey levels are made of a resized uint8 image, as in `resampling.resize`."""
    if PREPROCESSING[profile].filter == "cubic":
        return TRUNCATE
    (height, width), (h, w) = frame.image_size, frame.content_size
    return HALF_UP if (height, width) == (2 * h, 2 * w) else HALF_EVEN


def _set_window(parameters: Parameters, intensities: Intensities) -> None:
    """Fold rescale, window and inversion into one subtraction and one product."""
    low, scale = 0.0, 1.0
    parameters.least, parameters.most = -math.inf, math.inf
    if intensities.window is not None:
        low, high = intensities.window
        scale = 255 / (high - low)
        if intensities.inverted:
            low, scale = high, -scale
        parameters.least, parameters.most = 0.0, 255.0
    low = (low - intensities.intercept) / intensities.slope
    parameters.low = low
    parameters.remainder = low - parameters.low  # the field has rounded it to float32
    parameters.scale = scale * intensities.slope
