"""Image files → `Image`; masks and overlays → files.

`read_image` reads one two-dimensional image from PNG, JPEG, TIFF, BMP, .npy, a slice of a NIfTI or
a single-frame DICOM; `write_mask` and `write_overlay` write what came out. nibabel and pydicom load
when the first file that needs them is met.
"""

from __future__ import annotations

from .image import Image, Plane
from .overlay import check_overlay_suffix, draw_overlay, write_overlay
from .read import find_images, read_image
from .write import check_mask_suffix, write_mask

__all__ = [
    "Image",
    "Plane",
    "check_mask_suffix",
    "check_overlay_suffix",
    "draw_overlay",
    "find_images",
    "read_image",
    "write_mask",
    "write_overlay",
]
