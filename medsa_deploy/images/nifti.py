"""A NIfTI → `Volume`, or one of its slices → `Image`; a mask → a NIfTI of the same geometry.

Voxels keep their stored order. No axis is flipped or permuted to look anatomical, so a mask lands
on exactly the voxels it was computed from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.volumeutils import apply_read_scaling

from medsa_deploy.errors import ImageError

from .files import MOST_GZIP, reading
from .image import Image, Plane, choose_slice
from .limits import check_plane, check_ratio, check_volume_size
from .nifti_files import files_of, is_compressed, load
from .volume import Volume, default_axis, usable_affine, warn_of_spacing

GEOMETRY = (
    "pixdim", "xyzt_units", "dim_info", "slice_start", "slice_end", "slice_code", "slice_duration",
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
"""Header fields with the place of the voxels and the order of acquisition. Only these are copied
from an image to its mask: not the intensity scaling, and no free text, which may name a patient."""
COLOURS = ("R", "G", "B")
"""Fields of a voxel in an RGB24 or RGBA32 NIfTI."""
UNITS_MM = {1: 1000.0, 2: 1.0, 3: 0.001}
"""mm in a metre, millimetre and micrometre, by the lowest three bits of xyzt_units."""


def read_nifti(path: Path, *, axis: int | None, index: int | None) -> Image:
    """Slice `index` along `axis` of a NIfTI, with the header's intensity scaling applied.

    Rows are the first of the two remaining axes, columns the second. The default axis is an axis of
    size 1, else the axis of largest spacing; among equals, the last. Unscaled values keep their
    dtype (uint8: display values); scaled values become float32.
    """
    source = _load_voxels(path)
    shape = _volume_shape(path, source.shape)
    if axis is None:
        axis = default_axis(shape, _spacing_mm(path, source))
    plane = choose_slice(path, shape, axis, index)
    _check_size(path, source, plane.axis)
    if not is_compressed(files_of(path, source)[0]):  # mapped: costs this slice alone
        stored = _stored_voxels(path, source, 0).reshape(shape)
        return NiftiSlices(path=path, source=source, voxels=stored, axis=axis).read(plane.index)
    subscript: list[int | slice] = [slice(None)] * 3 + [0] * (len(source.shape) - 3)
    subscript[plane.axis] = plane.index
    with reading(path, "NIfTI"):
        # Subscripting dataobj, unlike get_fdata, reads this slice alone.
        pixels = np.asanyarray(source.dataobj[tuple(subscript[: len(source.shape)])])
    pixels = pixels.reshape([size for k, size in enumerate(shape) if k != plane.axis])
    return Image(pixels=_channels(pixels), path=path, plane=plane)


@dataclass(frozen=True, kw_only=True, eq=False)
class NiftiSlices:
    """The slices of one volume of a NIfTI; each is scaled when it is read."""

    path: Path
    source: Any
    """nibabel's image; masks copy its header."""
    voxels: np.ndarray
    """(X, Y, Z) stored values: mapped from an uncompressed file, otherwise in memory."""
    axis: int

    def read(self, index: int) -> Image:
        """The slice, with slope and intercept applied if the header has any."""
        with reading(self.path, "NIfTI"):
            stored = np.array(np.moveaxis(self.voxels, self.axis, 0)[index])
            pixels = _channels(apply_read_scaling(stored, *_scaling(self.source)))
        shape = self.voxels.shape
        plane = Plane(axis=self.axis, index=index, shape=(shape[0], shape[1], shape[2]))
        return Image(pixels=pixels, path=self.path, plane=plane)


def is_nifti_volume(path: Path) -> bool:
    """Whether the header of a NIfTI announces more than one plane."""
    shape = load(path).shape
    return len(shape) >= 3 and (1 not in shape[:3] or math.prod(shape[3:]) != 1)


def read_nifti_volume(path: Path, *, axis: int | None, volume: int | None) -> Volume:
    """A 3-D NIfTI, or one `volume` of a 4-D NIfTI; the default axis is that of `read_nifti`."""
    source = _load_voxels(path)
    number = _choose_volume(path, source.shape, volume)
    shape = _volume_shape(path, source.shape[:3])
    spacing_mm = _spacing_mm(path, source)
    if axis is None:
        axis = default_axis(shape, spacing_mm)
    choose_slice(path, shape, axis, 0)
    _check_size(path, source, axis)
    stored = _stored_voxels(path, source, number).reshape(shape)
    slope, inter = _scaling(source)
    unit = _unit_mm(source)
    rows, columns = (k for k in range(3) if k != axis)
    return Volume(
        path=path,
        kind="nifti",
        files=files_of(path, source),
        shape=shape,
        axis=axis,
        plane_axes=(rows, columns),
        spacing_mm=spacing_mm,
        affine=usable_affine(path, np.diag([unit, unit, unit, 1.0]) @ source.affine),
        dtype=_pixel_dtype(stored.dtype, scaled=(slope, inter) != (1, 0)),
        colour=stored.dtype.names is not None,
        slices=NiftiSlices(path=path, source=source, voxels=stored, axis=axis),
    )


def write_nifti_labels(path: Path, labels: np.ndarray, volume: Volume) -> None:
    """Write `labels` (X, Y, Z) uint8 in the geometry of `volume`.

    From a NIfTI, the geometry is copied field by field. From a DICOM series, it is the affine, with
    codes 1 (scanner). From a volume without an affine, it is the spacing, with codes 0 (unknown).
    """
    if isinstance(volume.slices, NiftiSlices):
        nibabel.save(_label_image(labels, volume.slices.source), path)
        return
    written = nibabel.Nifti1Image(labels, volume.affine)
    written.header.set_zooms(volume.spacing_mm)
    written.header.set_xyzt_units("mm")
    if volume.affine is not None:
        written.set_sform(volume.affine, code="scanner")
        # A quaternion cannot hold the shear of a gantry tilt; only the sform does.
        written.set_qform(volume.affine, code="scanner", strip_shears=True)
    nibabel.save(written, path)


def write_nifti_mask(path: Path, mask: np.ndarray, image: Image) -> None:
    """Write `mask` (H, W) uint8 into a volume with the shape and geometry of `image`'s volume.

    All other slices are 0. If `image` is not a slice of a NIfTI, the file is (H, W, 1) with an
    identity affine.
    """
    if image.plane is None:
        volume = nibabel.Nifti1Image(mask[..., np.newaxis], np.eye(4))
    else:
        volume = _mask_volume(mask, image.path, image.plane)
    nibabel.save(volume, path)


def _mask_volume(mask: np.ndarray, path: Path, plane: Plane) -> Any:
    """`mask` in a NIfTI with the class, shape and geometry of the NIfTI at `path`."""
    source = load(path)
    if _volume_shape(path, source.shape[:3]) != plane.shape:
        raise ImageError(
            f"{path} has changed since it was read: its shape is {source.shape}, it was "
            f"{plane.shape}: run again"
        )
    voxels = np.zeros(plane.shape, np.uint8)
    np.moveaxis(voxels, plane.axis, 0)[plane.index] = mask
    return _label_image(voxels, source)


def _label_image(labels: np.ndarray, source: Any) -> Any:
    """`labels` (X, Y, Z) uint8 as a nibabel image with the class and geometry of `source`.

    Its shape is that of `source`, or of the first three axes if `source` holds several volumes.
    """
    shape = source.shape if math.prod(source.shape[3:]) == 1 else labels.shape
    header = type(source.header)()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(shape)
    for field in GEOMETRY:
        header[field] = source.header[field]
    # Given None as affine, nibabel keeps the header's qform and sform as they are.
    return type(source)(labels.reshape(shape), None, header)


def _load_voxels(path: Path) -> Any:
    """nibabel's image of a NIfTI; ImageError unless its voxels are real numbers or colours."""
    source = load(path)
    dtype = source.get_data_dtype()
    if dtype.kind not in "biuf" and (dtype.names or ())[:3] != COLOURS:
        raise ImageError(f"{path} holds {dtype} voxels; expected real numbers or RGB")
    return source


def _channels(pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W) of numbers as they are; of RGB or RGBA as (H, W, 3) uint8."""
    if pixels.dtype.names is None:
        return pixels
    return np.stack([pixels[channel] for channel in COLOURS], axis=-1)


def _pixel_dtype(stored: np.dtype, *, scaled: bool) -> np.dtype:
    """The type of a slice's pixels."""
    if stored.names is not None:
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if scaled or stored.kind == "f" else stored.newbyteorder("=")


def _scaling(source: Any) -> tuple[float, float]:
    """(slope, intercept) of the header; (1, 0) without scaling."""
    return source.dataobj.slope, source.dataobj.inter


def _check_size(path: Path, source: Any, axis: int) -> None:
    """ImageError for more than the file can hold, or than there may be; nibabel would allocate it.

    `axis`: along which slices are read.
    """
    proxy = source.dataobj
    voxels = math.prod(source.shape) * proxy.dtype.itemsize
    data, *_ = files_of(path, source)
    size, compressed = data.stat().st_size, is_compressed(data)
    announced = proxy.offset + voxels
    if announced > size * (MOST_GZIP if compressed else 1):
        raise ImageError(
            f"{path} cannot be read as NIfTI: its header announces {announced} bytes, more than "
            "the file can hold; it is damaged or cut off, copy or export it again"
        )
    if compressed:
        check_ratio(path, announced, size)
    shape = (*source.shape, 1, 1)[:3]
    plane = math.prod(shape) // shape[axis]
    check_plane(path, [n for k, n in enumerate(shape) if k != axis], plane * proxy.dtype.itemsize)
    in_memory = math.prod(shape) * proxy.dtype.itemsize if compressed else 0
    check_volume_size(path, shape, proxy.dtype, in_memory, plane)


def _stored_voxels(path: Path, source: Any, number: int) -> np.ndarray:
    """The stored, unscaled voxels of volume `number`; mapped if it is alone and uncompressed."""
    proxy = source.dataobj
    with reading(path, "NIfTI"):
        unscaled = ArrayProxy(proxy.file_like, (source.shape, proxy.dtype, proxy.offset))
        if math.prod(source.shape[3:]) == 1:
            return np.asanyarray(unscaled)
        position = [number if size > 1 else 0 for size in source.shape[3:]]
        index = (slice(None), slice(None), slice(None), *position)
        return np.asarray(unscaled[index])


def _choose_volume(path: Path, stored: tuple[int, ...], volume: int | None) -> int:
    """The index of the volume to read; a lone volume needs no choice."""
    count = math.prod(stored[3:])
    if sum(size != 1 for size in stored[3:]) > 1:
        raise ImageError(
            f"{path} has shape {stored}; expected (X, Y, Z) or one axis of volumes: extract one "
            "volume into a file of its own"
        )
    if volume is None and count == 1:
        return 0
    if volume is None or not 0 <= volume < count:
        choice = "none was given" if volume is None else f"{volume} was given"
        raise ImageError(
            f"{path} has shape {stored}: choose one of its volumes (--volume) 0…{count - 1}; "
            f"{choice}"
        )
    return volume


def _unit_mm(source: Any) -> float:
    """mm in the unit of the header's lengths; 1.0 for an unknown unit."""
    return UNITS_MM.get(int(source.header["xyzt_units"]) & 7, 1.0)


def _spacing_mm(path: Path, source: Any) -> tuple[float, float, float]:
    """mm along the three axes, from the affine that places the voxels (sform, else qform).

    1.0 for an axis without a usable length. A header whose pixdim says something else is reported.
    """
    unit = _unit_mm(source)
    lengths = [float(length) * unit for length in voxel_sizes(source.affine)]
    x, y, z = (length if 0 < length < math.inf else 1.0 for length in lengths)
    declared = tuple(abs(float(zoom)) * unit for zoom in source.header.get_zooms()[:3])
    warn_of_spacing(path, "pixdim", declared, "affine", (x, y, z))
    return x, y, z


def _volume_shape(path: Path, stored: tuple[int, ...]) -> tuple[int, int, int]:
    """(X, Y, Z) of a stored shape; a missing third axis counts as 1, as do trailing axes."""
    if len(stored) < 2 or 0 in stored:
        raise ImageError(f"{path} has shape {stored}; expected an image or a volume")
    if any(size != 1 for size in stored[3:]):
        raise ImageError(
            f"{path} has shape {stored}: {np.prod(stored[3:])} volumes, not one; "
            "extract one volume into a file of its own"
        )
    x, y, z = (*stored, 1)[:3]
    return int(x), int(y), int(z)
