"""A mask → .png, .tif, .npy or NIfTI; labels of a volume → NIfTI, NRRD, .mha, .npy, .tif, .dcm."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import PIL.Image

from medsa_deploy.errors import ImageError, UsageError

from .files import check_suffix, output_file, suffix
from .image import Image
from .label_tables import json_table, snap_table, table_paths
from .raster import write_tiff
from .segments import Segment, SegmentationDetails, segments, warn_of_unknown
from .volume import Volume

SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".nii", ".nii.gz")
SEGMENTATION_SUFFIXES = (
    ".nii", ".nii.gz", ".nrrd", ".seg.nrrd", ".mha", ".npy", ".tif", ".tiff", ".dcm",
)  # fmt: skip


def check_mask_suffix(path: str | os.PathLike[str]) -> None:
    """UsageError unless `write_mask` knows the suffix of `path`; call it before any work."""
    check_suffix(Path(path), SUFFIXES, "mask")


def write_mask(path: str | os.PathLike[str], mask: np.ndarray, image: Image) -> None:
    """Write the mask of `image`, (H, W) bool or uint8 labels, in the format of `path`'s suffix.

    PNG, TIFF: 8-bit greyscale, bool as 0 and 255, labels with their values. .npy: the array as it
    is.
    NIfTI: uint8, bool as 0 and 1. For a slice of a NIfTI, the file is a volume of the same shape
    and geometry with the mask in that slice; for other images it is (H, W, 1) with an identity
    affine. ImageError if the mask does not fit the image or the file cannot be written; UsageError
    if `path` is the image itself or has an unknown suffix.
    """
    path = Path(path)
    check_mask_suffix(path)
    if mask.dtype not in (np.bool_, np.uint8):
        raise ImageError(f"{path}: the mask has dtype {mask.dtype}; expected bool or uint8 labels")
    if mask.shape != image.pixels.shape[:2]:
        raise ImageError(
            f"{path}: the mask has shape {mask.shape}, its image {image.pixels.shape[:2]}: give "
            "the mask of this image"
        )
    if path.exists() and image.path.exists() and path.samefile(image.path):
        raise UsageError(f"{path} is the image itself: write the mask to another file")
    with output_file(path) as temporary:
        _write(temporary, np.ascontiguousarray(mask), image)


def _write(path: Path, mask: np.ndarray, image: Image) -> None:
    """Write a mask in the format of `path`'s suffix."""
    if suffix(path) in (".png", ".tif", ".tiff"):
        grey = mask.astype(np.uint8) * 255 if mask.dtype == np.bool_ else mask
        if suffix(path) == ".png":
            PIL.Image.fromarray(grey).save(path)
        else:
            write_tiff(path, grey[np.newaxis])
    elif suffix(path) == ".npy":
        np.save(path, mask, allow_pickle=False)
    else:
        from .nifti import write_nifti_mask  # imports nibabel, for NIfTI alone

        write_nifti_mask(path, mask.astype(np.uint8), image)


def check_segmentation_suffix(path: str | os.PathLike[str]) -> None:
    """UsageError unless `write_segmentation` knows the suffix of `path`."""
    check_suffix(Path(path), SEGMENTATION_SUFFIXES, "segmentation")


def check_segmentation_target(path: str | os.PathLike[str], volume: Volume) -> None:
    """Refuse a target that `write_segmentation` cannot write; call it before any work.

    UsageError for an unknown suffix, for a file of the volume itself, and for a DICOM segmentation
    of a volume that is not DICOM. ImageError for a DICOM without an attribute that a segmentation
    must copy.
    """
    _check_target(Path(path), volume)
    if suffix(Path(path)) == ".dcm":
        from .dicom_seg import check_dicom_source

        check_dicom_source(Path(path), volume)


def write_segmentation(
    path: str | os.PathLike[str],
    labels: np.ndarray,
    volume: Volume,
    *,
    names: Sequence[str] = (),
    details: SegmentationDetails | None = None,
    measurements: str | os.PathLike[str] | None = None,
) -> None:
    """Write the labels of `volume`, (X, Y, Z) uint8 in its stored order, by the suffix of `path`.

    0 is background; label k is called `names[k - 1]`. .nii, .nii.gz: with the shape, affine,
    spacing, codes and units of a NIfTI, or the affine of another volume; tables of the labels stand
    beside it (`label_tables`). .nrrd, .mha: with its affine; .seg.nrrd also has names and colours,
    as 3D Slicer reads them. .npy: the array. .tif: a page for each slice. .dcm: a DICOM
    segmentation with a segment for each label, its codes and colour; `measurements` names a second
    file, for a structured report of each segment's volume and longest diameter.

    Every file is written, or none. ImageError if the labels do not fit the volume or a file cannot
    be written; UsageError as in `check_segmentation_target`.
    """
    path = Path(path)
    report = None if measurements is None else Path(measurements)
    if labels.dtype != np.uint8:
        raise ImageError(f"{path}: the labels have dtype {labels.dtype}; expected uint8")
    if labels.shape != volume.shape:
        raise ImageError(f"{path}: the labels have shape {labels.shape}, expected {volume.shape}")
    if names and labels.max() > len(names):
        raise ImageError(
            f"{path}: the labels go up to {labels.max()}, but there are {len(names)} names: "
            "give one for each"
        )
    _check_target(path, volume)
    check_report_target(report, path)
    details = details or SegmentationDetails()
    described = _described(path, labels, names, details)
    with ExitStack() as files:  # each gets its name once all are written
        if suffix(path) == ".dcm":
            _write_dicom(files, path, report, labels, volume, described, details)
            return
        if suffix(path) in (".nii", ".nii.gz"):
            for table, text in zip(
                table_paths(path), (snap_table(described), json_table(described)), strict=True
            ):
                files.enter_context(output_file(table)).write_text(text, encoding="utf-8")
        temporary = files.enter_context(output_file(path))
        _write_labels(temporary, labels, volume, described)


def check_report_target(report: Path | None, segmentation: Path) -> None:
    """UsageError unless measurements can be written to `report`, beside a DICOM segmentation."""
    if report is None:
        return
    if suffix(segmentation) != ".dcm":
        raise UsageError(
            f"{report}: measurements are a report on a DICOM segmentation, and {segmentation} is "
            "none: write the segmentation to a .dcm"
        )
    check_suffix(report, (".dcm",), "report of measurements")
    if report.resolve() == segmentation.resolve():
        raise UsageError("two outputs have the same name: give each its own")


def _described(
    path: Path, labels: np.ndarray, names: Sequence[str], details: SegmentationDetails
) -> tuple[Segment, ...]:
    """The segments of a format that has room for their names; none of another."""
    if suffix(path) in (".nii", ".nii.gz", ".seg.nrrd", ".dcm"):
        return segments(int(labels.max()), names, details.styles)
    return ()


def _write_dicom(
    files: ExitStack,
    path: Path,
    report: Path | None,
    labels: np.ndarray,
    volume: Volume,
    described: Sequence[Segment],
    details: SegmentationDetails,
) -> None:
    """Write a DICOM segmentation and the report of its measurements."""
    from .dicom_seg import save, segmentation

    dataset = segmentation(path, labels, volume, described, details)
    warn_of_unknown(described)
    if report is not None:
        from .dicom_sr import measurement_report

        content = measurement_report(report, dataset, labels, volume, described, details)
        save(content, files.enter_context(output_file(report)), report)
    save(dataset, files.enter_context(output_file(path)), path)


def _write_labels(
    path: Path, labels: np.ndarray, volume: Volume, described: Sequence[Segment]
) -> None:
    """Write labels in the format of `path`'s suffix; the library of each is imported here."""
    match suffix(path):
        case ".npy":
            np.save(path, np.ascontiguousarray(labels), allow_pickle=False)
        case ".tif" | ".tiff":
            write_tiff(path, np.stack([volume.plane(labels, k) for k in range(len(volume))]))
        case ".nrrd" | ".mha" | ".seg.nrrd":
            from .nrrd import write_nrrd_labels

            write_nrrd_labels(path, labels, volume, described)
        case _:
            from .nifti import write_nifti_labels

            write_nifti_labels(path, labels, volume)


def _check_target(path: Path, volume: Volume) -> None:
    """UsageError unless a segmentation of `volume` can be written to `path`."""
    check_segmentation_suffix(path)
    if path.exists() and any(file.exists() and path.samefile(file) for file in volume.files):
        raise UsageError(f"{path} is part of the volume itself: write to another file")
    if suffix(path) == ".dcm" and volume.kind != "dicom":
        raise UsageError(
            f"{path}: a DICOM segmentation refers to DICOM images, and {volume.path} is not "
            "DICOM; write .nii.gz or .npy"
        )
