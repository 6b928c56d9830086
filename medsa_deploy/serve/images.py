"""Files or an array → a volume in memory, whose slices know their place.

A picture is a volume of one slice.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.errors import ImageError
from medsa_deploy.images import Image, Volume, holds_volume, read_image, read_volume
from medsa_deploy.images.measurements import voxel_millilitres
from medsa_deploy.images.picture import picture_volume
from medsa_deploy.images.volume import check_volume, default_axis
from medsa_deploy.runtime import Session
from medsa_deploy.runtime.volumes.chunk_encoder import volume_window
from medsa_deploy.transforms.intensities import IntensityWindow

from .cached_session import PlacedImage
from .refusals import TooLargeError

WIRE_TYPES = {"uint8": "u1", "int16": "i2", "uint16": "u2"}
"""Types of pixels that are sent as they are."""
LEVELS = 65535


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldSlices:
    """The slices of a volume in memory."""

    images: Sequence[PlacedImage]

    def read(self, index: int) -> Image:
        """A slice."""
        return self.images[index]


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenImage:
    """A user's image or volume."""

    volume: Volume
    source: Volume
    """Of DICOM, the volume with the headers of its files, for a SEG; otherwise the same volume."""
    owner: str
    """Names it in the cache."""
    picture: bool
    """Whether it is a picture rather than a volume."""
    size_bytes: int
    wire: tuple[str, float, float]
    """Type of the pixels that are sent, and the slope and intercept that lead to the file's."""
    windows: dict[tuple[str, IntensityWindow], IntensityWindow] = field(default_factory=dict)
    """By bundle and choice, what `window` has measured."""

    def window(self, bundle: str, session: Session, chosen: IntensityWindow) -> IntensityWindow:
        """What a choice of window means for a bundle; measured, and warned of, once."""
        key = bundle, chosen
        if key not in self.windows:
            self.windows[key] = volume_window(session, self.volume, chosen)
        return self.windows[key]

    def facts(self) -> dict[str, Any]:
        """What a client needs to show it."""
        volume = self.volume
        high = volume.robust_window() if not self.volume.dtype == "uint8" else (0.0, 255.0)
        kind, slope, intercept = self.wire
        return {
            "kind": "picture" if self.picture else volume.kind,
            "shape": list(volume.shape),
            "axis": volume.axis,
            "plane_axes": list(volume.plane_axes),
            "slices": len(volume),
            "slice_size": list(volume.slice_size),
            "spacing_mm": list(volume.spacing_mm),
            "directions": _directions(volume),
            "voxel_ml": None if self.picture else voxel_millilitres(volume),
            "colour": volume.colour,
            "inverted": volume.inverted,
            "window": list(high),
            "range": list(volume.intensity_range()),
            "pixels": {"type": kind, "slope": slope, "intercept": intercept},
        }

    def pixels(self, first: int, last: int) -> bytes:
        """Pixels of slices `first` … `last` − 1 for a client, little endian, row by row."""
        kind, slope, intercept = self.wire
        planes = []
        for index in range(first, last):
            plane = self.volume.slice(index).pixels
            if plane.dtype.name not in WIRE_TYPES:
                plane = np.rint((plane.astype(np.float64) - intercept) / slope)
            planes.append(np.ascontiguousarray(plane, dtype=f"<{kind}").tobytes())
        return b"".join(planes)


def open_files(
    path: Path, *, most_bytes: int, check: Callable[[], None] = lambda: None
) -> OpenImage:
    """The volume or picture of a file or folder; ImageError, TooLargeError.

    `most_bytes`: memory that its pixels may take. `check` is called for every slice.
    """
    if holds_volume(path, lone=True):
        return _in_memory(read_volume(path), picture=False, most_bytes=most_bytes, check=check)
    if path.is_dir():
        entries = [entry for entry in path.iterdir() if entry.is_file()]
        if len(entries) != 1:
            raise ImageError(
                f"{len(entries)} files were sent, which are no DICOM series: send one image, one "
                "volume, or the files of one series"
            )
        return open_files(entries[0], most_bytes=most_bytes, check=check)
    volume = picture_volume(read_image(path))
    return _in_memory(volume, picture=True, most_bytes=most_bytes, check=check)


def open_array(array: np.ndarray, spacing_mm: Sequence[float], *, most_bytes: int) -> OpenImage:
    """The volume of an array (X, Y, Z); slices lie along the axis of largest spacing.

    Among equal spacings it is the first axis: viewers keep arrays as (slice, row, column).
    """
    if array.ndim != 3 or 0 in array.shape:
        raise ImageError(f"the image has shape {array.shape}, expected (1, X, Y, Z)")
    if array.dtype.kind not in "biuf":
        raise ImageError(f"the image holds {array.dtype}, expected real numbers")
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    x, y, z = array.shape
    shape, spacing = (x, y, z), _spacing(spacing_mm)
    axis = 2 - default_axis((z, y, x), (spacing[2], spacing[1], spacing[0]))
    rows, columns = (k for k in range(3) if k != axis)
    volume = Volume(
        path=Path("image"),
        kind="npy",
        files=(),
        shape=shape,
        axis=axis,
        plane_axes=(rows, columns),
        spacing_mm=spacing,
        affine=np.diag([*spacing, 1.0]),
        dtype=np.dtype(np.float32) if array.dtype.kind == "f" else array.dtype,
        slices=_ArrayPlanes(array=np.moveaxis(array, axis, 0)),
    )
    return _in_memory(check_volume(volume), picture=False, most_bytes=most_bytes)


@dataclass(frozen=True, kw_only=True, eq=False)
class _ArrayPlanes:
    """The slices of an array (N, H, W)."""

    array: np.ndarray

    def read(self, index: int) -> Image:
        return Image(pixels=np.ascontiguousarray(self.array[index]), path=Path("image"))


def _directions(volume: Volume) -> list[str] | None:
    """For each stored axis the side of the patient that it leads to: R, L, A, P, S or I."""
    if volume.affine is None or volume.kind == "npy":
        return None
    from nibabel.orientations import aff2axcodes

    codes = aff2axcodes(volume.affine)
    return None if None in codes else list(codes)


def _spacing(spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    """Three lengths, 1 mm where the client gave none; ImageError."""
    if not spacing_mm:
        return 1.0, 1.0, 1.0
    values = np.asarray(spacing_mm, np.float64).ravel()
    if values.shape != (3,) or not (np.isfinite(values) & (values > 0)).all():
        raise ImageError(f"the spacing is {list(spacing_mm)!r:.60}, expected three lengths in mm")
    return float(values[0]), float(values[1]), float(values[2])


def _in_memory(
    volume: Volume,
    *,
    picture: bool,
    most_bytes: int,
    check: Callable[[], None] = lambda: None,
) -> OpenImage:
    """The volume with its slices in memory; TooLargeError beyond `most_bytes`."""
    owner = secrets.token_hex(16)
    images, size = [], 0
    for index in range(len(volume)):
        check()
        image = volume.slice(index)
        arrays = (image.pixels, image.display, image.background)
        size += sum(array.nbytes for array in arrays if array is not None)
        if size > most_bytes:
            raise TooLargeError(
                f"the image takes more than the {most_bytes / 2**20:.0f} MB of memory that are "
                "left: send a smaller one, or try again later"
            )
        values = {part.name: getattr(image, part.name) for part in fields(Image)}
        images.append(PlacedImage(**values, owner=owner, index=index))
    stored = replace(volume, slices=HeldSlices(images=images))
    return OpenImage(
        volume=stored,
        source=volume if volume.kind == "dicom" else stored,
        owner=owner,
        picture=picture,
        size_bytes=size,
        wire=_wire(stored, images),
    )


def _wire(volume: Volume, images: Sequence[Image]) -> tuple[str, float, float]:
    """How pixels are sent: small integers as they are, all others on 65536 levels."""
    names = {image.pixels.dtype.name for image in images}
    if len(names) == 1 and (kind := WIRE_TYPES.get(names.pop())):
        return kind, 1.0, 0.0
    low, high = volume.intensity_range()
    return "u2", (high - low) / LEVELS or 1.0, low
