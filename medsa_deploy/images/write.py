"""A mask → .png, .npy, .nii or .nii.gz, under a temporary name until it is whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import PIL.Image

from medsa_deploy.errors import ImageError, UsageError

from .files import check_suffix, suffix, whole_file
from .image import Image

SUFFIXES = (".png", ".npy", ".nii", ".nii.gz")


def check_mask_suffix(path: str | os.PathLike[str]) -> None:
    """UsageError unless `write_mask` can write `path`; for before anything is computed."""
    check_suffix(Path(path), SUFFIXES, "mask")


def write_mask(path: str | os.PathLike[str], mask: np.ndarray, image: Image) -> None:
    """Write the mask of `image`, (H, W) bool or uint8 labels, in the format of `path`'s suffix.

    PNG: 8-bit greyscale, bool as 0 and 255, labels with the values they have. .npy: the array as it
    is. NIfTI: uint8, bool as 0 and 1; for a slice of a NIfTI a volume of the same shape and
    geometry with the mask in that slice, otherwise (H, W, 1) with an identity affine.
    """
    path = Path(path)
    check_mask_suffix(path)
    if mask.dtype not in (np.bool_, np.uint8):
        raise ImageError(f"{path}: the mask has dtype {mask.dtype}; expected bool or uint8 labels")
    if mask.shape != image.pixels.shape[:2]:
        raise ImageError(
            f"{path}: the mask has shape {mask.shape}, its image {image.pixels.shape[:2]}"
        )
    if path.exists() and image.path.exists() and path.samefile(image.path):
        raise UsageError(f"{path} is the image itself: write the mask to another file")
    with whole_file(path) as temporary:
        _write(temporary, np.ascontiguousarray(mask), image)


def _write(path: Path, mask: np.ndarray, image: Image) -> None:
    if suffix(path) == ".png":
        grey = mask.astype(np.uint8) * 255 if mask.dtype == np.bool_ else mask
        PIL.Image.fromarray(grey).save(path)
    elif suffix(path) == ".npy":
        np.save(path, mask, allow_pickle=False)
    else:
        from .nifti import write_nifti_mask  # nibabel loads only here

        write_nifti_mask(path, mask.astype(np.uint8), image)
