"""Image files → `Image` or `Volume`; masks, overlays and segmentations → files.

`read_image` reads one two-dimensional image: PNG, JPEG, TIFF, BMP, .npy, a slice of a NIfTI or a
single-frame DICOM. `write_mask` and `write_overlay` write its mask. `read_volume` reads a NIfTI, a
.npy, a folder with a DICOM series or a multi-frame DICOM, slice by slice. `write_segmentation`
writes labels with the volume's geometry, and `read_labels` reads the labels of any file. nibabel,
pydicom and highdicom are imported when a file needs them.
"""

from __future__ import annotations

from .image import Image, Plane
from .label_files import read_labels
from .labels import Labels
from .overlay import check_overlay_suffix, draw_overlay, write_overlay
from .read import find_images, holds_volume, is_derived, is_volume, read_image, read_volume
from .segments import SegmentationDetails
from .volume import Volume
from .write import (
    check_mask_suffix,
    check_segmentation_suffix,
    check_segmentation_target,
    write_mask,
    write_segmentation,
)

__all__ = [
    "Image",
    "Labels",
    "Plane",
    "SegmentationDetails",
    "Volume",
    "check_mask_suffix",
    "check_overlay_suffix",
    "check_segmentation_suffix",
    "check_segmentation_target",
    "draw_overlay",
    "find_images",
    "holds_volume",
    "is_derived",
    "is_volume",
    "read_image",
    "read_labels",
    "read_volume",
    "write_mask",
    "write_overlay",
    "write_segmentation",
]
