"""A dataset and the number of a frame → its decoded pixels, within the limits on what is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.errors import ImageError, MissingDependencyError

from .decoder import decoder
from .limits import check_memory, check_plane, current_limits
from .rle_frames import decode_grey

try:
    from pydicom.encaps import get_frame
    from pydicom.pixels.utils import as_pixel_options
    from pydicom.uid import RLELossless
except ImportError as e:
    raise MissingDependencyError("pydicom", extra="dicom", purpose="reading DICOM") from e

MOST_RLE = 64
"""The highest compression ratio of DICOM's RLE: 128 bytes from 2."""


def frame_count(dataset: Any) -> int:
    """The number of frames a dataset announces; 1 if it announces none."""
    return int(dataset.get("NumberOfFrames") or 1)


def check_frame(path: Path, dataset: Any) -> None:
    """ImageError for frames that are too large, or too many, to be read."""
    columns, rows, depth = _size(dataset)
    check_plane(path, (columns, rows), rows * columns * depth)


def check_frames(path: Path, dataset: Any) -> None:
    """ImageError for more frames than there may be, or than the file can hold."""
    count, most = frame_count(dataset), current_limits().items
    columns, rows, _ = _size(dataset)
    if count > path.stat().st_size:
        raise ImageError(
            f"{path} announces {count} frames, more than its size can hold; it is damaged: "
            "copy or export it again"
        )
    if count > most:
        raise ImageError(
            f"{path} announces {count} frames; the limit is {most}: split it, or raise the limit "
            "with --max-memory (in Python: Limits)"
        )
    voxels = count * rows * columns
    if voxels > (most_voxels := current_limits().voxels):
        raise ImageError(
            f"{path} announces {columns}×{rows}×{count} voxels; the limit is {most_voxels}: split "
            "it, or raise the limit with --max-memory (in Python: Limits)"
        )


def check_all_frames(path: Path, dataset: Any) -> None:
    """ImageError if a dataset's frames, all at once, take more memory than there may be."""
    count = frame_count(dataset)
    columns, rows, depth = _size(dataset)
    content = f"{count} frames of {columns}×{rows} pixels"
    check_memory(path, 2 * count * rows * columns * depth, content)


def decoded_frame(dataset: Any, syntax: Any, frame: int) -> tuple[np.ndarray, str]:
    """A frame of compressed pixels, (H, W) or (H, W, 3), and its photometric interpretation.

    Any exception for a frame that cannot be decoded.
    """
    options = as_pixel_options(dataset)
    content = get_frame(
        dataset.PixelData,
        frame,
        number_of_frames=frame_count(dataset),
        extended_offsets=options.pop("extended_offsets", None),
    )
    announced = math.prod(_size(dataset))
    if syntax == RLELossless:
        if announced > len(content) * MOST_RLE:
            raise ValueError(
                f"its header announces {announced} bytes, more than {len(content)} bytes of RLE "
                "can hold"
            )
        if (pixels := decode_grey(content, options)) is not None:
            return pixels, str(options["photometric_interpretation"])
    options |= {"number_of_frames": 1, "pixel_keyword": "PixelData", "pixel_vr": "OB"}
    return decoder.decode({"syntax": str(syntax), "options": options}, content)


def decoded_file_frame(dataset: Any, path: Path, frame: int) -> np.ndarray:
    """A frame (H, W) that gdcm decodes from a file."""
    check_all_frames(path, dataset)
    request = {
        "path": str(path),
        "dtype": "<i2" if dataset.PixelRepresentation else "<u2",
        "shape": (frame_count(dataset), int(dataset.Rows), int(dataset.Columns)),
        "frame": frame,
    }
    pixels, _ = decoder.decode({"gdcm": request}, b"")
    return pixels


def _size(dataset: Any) -> tuple[int, int, int]:
    """Columns, rows and bytes of a pixel; ValueError for sizes that are no numbers."""
    columns, rows = (int(dataset.get(name) or 0) for name in ("Columns", "Rows"))
    samples, bits = (int(dataset.get(n) or 1) for n in ("SamplesPerPixel", "BitsAllocated"))
    return columns, rows, samples * math.ceil(bits / 8)
