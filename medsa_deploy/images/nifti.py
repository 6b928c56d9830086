"""A slice of a NIfTI → `Image`, and a mask back into a volume of the same geometry.

Everything is in stored voxel order: no axis is flipped or permuted to look anatomical, so a mask
goes back to exactly the voxels it was made from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medsa_deploy.errors import ImageError

from .files import reading
from .image import Image, Plane, choose_slice

# Header fields that place voxels in the world, and the order slices were acquired in. Only these go
# from an image to its mask: not the intensity scaling, not free text, which may name a patient.
GEOMETRY = (
    "pixdim", "xyzt_units", "dim_info", "slice_start", "slice_end", "slice_code", "slice_duration",
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


def read_nifti(path: Path, *, axis: int | None, index: int | None) -> Image:
    """The slice `index` along `axis` of a NIfTI, with the header's intensity scaling applied.

    Rows are the first of the two remaining axes, columns the second. The default axis is one of
    size 1 if there is one, else the one of largest spacing, the last of several equally large.
    Unscaled values keep their dtype (uint8: display values); scaled ones become float32.
    """
    source = _load(path)
    if source.get_data_dtype().kind not in "biuf":
        raise ImageError(f"{path} holds {source.get_data_dtype()} voxels; expected real numbers")
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
    if _volume_shape(path, source.shape) != plane.shape:
        raise ImageError(
            f"{path} has changed since it was read: its shape was {plane.shape}, "
            f"now it is {source.shape}"
        )
    voxels = np.zeros(plane.shape, np.uint8)
    np.moveaxis(voxels, plane.axis, 0)[plane.index] = mask
    header = type(source.header)()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(source.shape)
    for field in GEOMETRY:
        header[field] = source.header[field]
    # Without an affine of its own the new image leaves the header's qform and sform as they are.
    return type(source)(voxels.reshape(source.shape), None, header)


def _load(path: Path) -> Any:
    with reading(path, "NIfTI"):
        source = nibabel.load(path)
    if not isinstance(source, nibabel.Nifti1Image):
        raise ImageError(f"{path} is {type(source).__name__}, not NIfTI; convert it to .nii")
    return source


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
