"""A NIfTI → `Volume`, a slice of one → `Image`, and masks back into the same geometry.

Everything is in stored voxel order: no axis is flipped or permuted to look anatomical, so a mask
goes back to exactly the voxels it was made from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.volumeutils import apply_read_scaling

from medsa_deploy.errors import ImageError

from .files import reading, suffix
from .image import Image, Plane, choose_slice
from .volume import Volume

# Header fields that place voxels in the world, and the order slices were acquired in. Only these go
# from an image to its mask: not the intensity scaling, not free text, which may name a patient.
GEOMETRY = (
    "pixdim", "xyzt_units", "dim_info", "slice_start", "slice_end", "slice_code", "slice_duration",
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
UNITS_MM = {1: 1000.0, 2: 1.0, 3: 0.001}
"""mm in metre, millimetre, micrometre, by the lowest three bits of xyzt_units; unknown: mm."""
MOST_GZIP = 1032
"""gzip packs no more bytes than this into one."""


def read_nifti(path: Path, *, axis: int | None, index: int | None) -> Image:
    """The slice `index` along `axis` of a NIfTI, with the header's intensity scaling applied.

    Rows are the first of the two remaining axes, columns the second. The default axis is one of
    size 1 if there is one, else the one of largest spacing, the last of several equally large.
    Unscaled values keep their dtype (uint8: display values); scaled ones become float32.
    """
    source = _load_numbers(path)
    shape = _volume_shape(path, source.shape)
    if axis is None:
        axis = _default_axis(shape, source.header.get_zooms())
    plane = choose_slice(path, shape, axis, index)
    subscript: list[int | slice] = [slice(None)] * 3 + [0] * (len(source.shape) - 3)
    subscript[plane.axis] = plane.index
    with reading(path, "NIfTI"):
        # Subscripting dataobj, unlike get_fdata, reads this slice alone.
        pixels = np.asanyarray(source.dataobj[tuple(subscript[: len(source.shape)])])
    pixels = pixels.reshape([size for k, size in enumerate(shape) if k != plane.axis])
    return Image(pixels=pixels, path=path, plane=plane)


@dataclass(frozen=True, kw_only=True, eq=False)
class NiftiSlices:
    """The slices of one volume of a NIfTI, scaled when they are read."""

    path: Path
    source: Any
    """nibabel's image; its header goes to the mask."""
    voxels: np.ndarray
    """(X, Y, Z) stored values: mapped from an uncompressed file, otherwise held once."""
    axis: int

    def read(self, index: int) -> Image:
        """The slice, with slope and intercept applied if the header has any."""
        with reading(self.path, "NIfTI"):
            stored = np.array(np.moveaxis(self.voxels, self.axis, 0)[index])
            pixels = apply_read_scaling(stored, *_scaling(self.source))
        shape = self.voxels.shape
        plane = Plane(axis=self.axis, index=index, shape=(shape[0], shape[1], shape[2]))
        return Image(pixels=pixels, path=self.path, plane=plane)


def is_nifti_volume(path: Path) -> bool:
    """Whether a NIfTI holds more than one plane, by its header."""
    shape = _load(path).shape
    return len(shape) >= 3 and (1 not in shape[:3] or math.prod(shape[3:]) != 1)


def read_nifti_volume(path: Path, *, axis: int | None, volume: int | None) -> Volume:
    """A 3-D NIfTI, or one `volume` of a 4-D; the default axis is that of `read_nifti`."""
    source = _load_numbers(path)
    number = _choose_volume(path, source.shape, volume)
    shape = _volume_shape(path, source.shape[:3])
    if axis is None:
        axis = _default_axis(shape, source.header.get_zooms())
    choose_slice(path, shape, axis, 0)
    stored = _stored_voxels(path, source, number).reshape(shape)
    slope, inter = _scaling(source)
    unit = UNITS_MM.get(int(source.header["xyzt_units"]) & 7, 1.0)
    rows, columns = (k for k in range(3) if k != axis)
    return Volume(
        path=path,
        kind="nifti",
        files=(path,),
        shape=shape,
        axis=axis,
        plane_axes=(rows, columns),
        spacing_mm=_spacing(source.header.get_zooms(), unit),
        affine=np.diag([unit, unit, unit, 1.0]) @ source.affine,
        dtype=np.dtype(np.float32)
        if (slope, inter) != (1, 0) or stored.dtype.kind == "f"
        else stored.dtype.newbyteorder("="),
        slices=NiftiSlices(path=path, source=source, voxels=stored, axis=axis),
    )


def write_nifti_labels(path: Path, labels: np.ndarray, volume: Volume) -> None:
    """Write `labels` (X, Y, Z) uint8 in the geometry of `volume`.

    The geometry of a NIfTI is copied field by field. That of a DICOM series is its affine, with
    codes 1 (scanner). Without any there is the spacing, with codes 0 (unknown).
    """
    if isinstance(volume.slices, NiftiSlices):
        nibabel.save(_label_image(labels, volume.slices.source), path)
        return
    written = nibabel.Nifti1Image(labels, volume.affine)
    written.header.set_zooms(volume.spacing_mm)
    written.header.set_xyzt_units("mm")
    if volume.affine is not None:
        written.set_sform(volume.affine, code="scanner")
        # A quaternion cannot shear; a gantry tilt is in the sform alone.
        written.set_qform(volume.affine, code="scanner", strip_shears=True)
    nibabel.save(written, path)


def write_nifti_mask(path: Path, mask: np.ndarray, image: Image) -> None:
    """Write `mask` (H, W) uint8 where `image` came from: a volume of its shape and geometry.

    The rest of the volume is 0. For an image that is no slice of a NIfTI: (H, W, 1) with an
    identity affine.
    """
    if image.plane is None:
        volume = nibabel.Nifti1Image(mask[..., np.newaxis], np.eye(4))
    else:
        volume = _mask_volume(mask, image.path, image.plane)
    nibabel.save(volume, path)


def _mask_volume(mask: np.ndarray, path: Path, plane: Plane) -> Any:
    """`mask` as a NIfTI of the same class, shape and geometry as the one at `path`."""
    source = _load(path)
    if _volume_shape(path, source.shape[:3]) != plane.shape:
        raise ImageError(
            f"{path} has changed since it was read: its shape was {plane.shape}, "
            f"now it is {source.shape}"
        )
    voxels = np.zeros(plane.shape, np.uint8)
    np.moveaxis(voxels, plane.axis, 0)[plane.index] = mask
    return _label_image(voxels, source)


def _label_image(labels: np.ndarray, source: Any) -> Any:
    """`labels` (X, Y, Z) uint8 as an image of the class and geometry of `source`.

    It has the very shape of `source`, but only the first three axes where that holds several
    volumes.
    """
    shape = source.shape if math.prod(source.shape[3:]) == 1 else labels.shape
    header = type(source.header)()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(shape)
    for field in GEOMETRY:
        header[field] = source.header[field]
    # Without an affine of its own the new image leaves the header's qform and sform as they are.
    return type(source)(labels.reshape(shape), None, header)


def _load(path: Path) -> Any:
    with reading(path, "NIfTI"):
        source = nibabel.load(path)
    if not isinstance(source, nibabel.Nifti1Image):
        raise ImageError(f"{path} is {type(source).__name__}, not NIfTI; convert it to .nii")
    return source


def _load_numbers(path: Path) -> Any:
    source = _load(path)
    if source.get_data_dtype().kind not in "biuf":
        raise ImageError(f"{path} holds {source.get_data_dtype()} voxels; expected real numbers")
    return source


def _scaling(source: Any) -> tuple[float, float]:
    """(slope, intercept); 1 and 0 where the header has none."""
    return source.dataobj.slope, source.dataobj.inter


def _stored_voxels(path: Path, source: Any, number: int) -> np.ndarray:
    """Volume `number` as it is stored, unscaled: mapped if it is alone and uncompressed."""
    proxy = source.dataobj
    needed = proxy.offset + math.prod(source.shape) * proxy.dtype.itemsize
    most = path.stat().st_size * (MOST_GZIP if suffix(path) == ".nii.gz" else 1)
    if needed > most:  # or nibabel would allocate all that a damaged header asks for
        raise ImageError(
            f"{path} cannot be read as NIfTI: its header announces {needed} bytes, more than the "
            "file can hold; it is damaged or cut off, copy or export it again"
        )
    with reading(path, "NIfTI"):
        unscaled = ArrayProxy(proxy.file_like, (source.shape, proxy.dtype, proxy.offset))
        if math.prod(source.shape[3:]) == 1:
            return np.asanyarray(unscaled)
        rest = (0,) * (len(source.shape) - 4)
        return np.asarray(unscaled[(slice(None), slice(None), slice(None), number, *rest)])


def _choose_volume(path: Path, stored: tuple[int, ...], volume: int | None) -> int:
    """The index of the volume asked for; a lone one needs no choice."""
    count = math.prod(stored[3:])
    if math.prod(stored[4:]) != 1:
        raise ImageError(
            f"{path} has shape {stored}; expected (X, Y, Z) or (X, Y, Z, volumes): extract one "
            "volume into a file of its own"
        )
    if volume is None and count == 1:
        return 0
    if volume is None or not 0 <= volume < count:
        found = "none was given" if volume is None else f"{volume} was given"
        raise ImageError(
            f"{path} has shape {stored}: choose one of its volumes (--volume) 0…{count - 1}; "
            f"{found}"
        )
    return volume


def _spacing(zooms: tuple[float, ...], unit: float) -> tuple[float, float, float]:
    """mm along three axes; 1.0 where the header has no usable number."""
    mm = [abs(float(zoom)) * unit for zoom in (*zooms[:3], 0.0, 0.0, 0.0)]
    x, y, z = (value if 0 < value < math.inf else 1.0 for value in mm[:3])
    return x, y, z


def _volume_shape(path: Path, stored: tuple[int, ...]) -> tuple[int, int, int]:
    """(X, Y, Z) of a stored shape; a missing third axis and trailing axes count as 1."""
    if len(stored) < 2 or 0 in stored:
        raise ImageError(f"{path} has shape {stored}; expected an image or a volume")
    if any(size != 1 for size in stored[3:]):
        raise ImageError(
            f"{path} has shape {stored}: {np.prod(stored[3:])} volumes, not one; "
            "extract one volume into a file of its own"
        )
    x, y, z = (*stored, 1)[:3]
    return int(x), int(y), int(z)


def _default_axis(shape: tuple[int, int, int], zooms: tuple[float, ...]) -> int:
    """The axis across the slices: of size 1, else of largest spacing, the last among equals."""
    if 1 in shape:
        return max(k for k in range(3) if shape[k] == 1)
    spacing = np.nan_to_num(np.asarray(zooms[:3], float))
    # Spacings computed from an affine differ in the last digits; they are still a tie.
    return int(np.flatnonzero(spacing >= spacing.max() * (1 - 1e-4))[-1])
