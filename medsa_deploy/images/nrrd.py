"""A NRRD or MetaImage file → `Volume`, or one of its slices → `Image`, through SimpleITK.

What 3D Slicer and ITK tools save: .nrrd and .mha, or a header (.nhdr, .mhd) beside a data file.
Labels → .nrrd or .mha of the same geometry; a .seg.nrrd has segment names and colours, as Slicer
reads them.

Axes keep their stored order: voxel (x, y, z) is the fastest, middle and slowest axis of the data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medsa_deploy.errors import ImageError, MissingDependencyError

from .files import MOST_GZIP, reading
from .image import Image, choose_slice
from .limits import check_ratio, check_volume_size
from .npy import ArraySlices
from .segments import Segment
from .structure_codes import Code, StructureCodes
from .volume import Volume, default_axis, usable_affine

try:
    import SimpleITK
except ImportError as e:
    raise MissingDependencyError("SimpleITK", extra="nrrd", purpose="NRRD and MetaImage") from e

TO_NIFTI = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK's axes point to left and posterior, NIfTI's to right and anterior."""
BYTES = {
    kind: 1 if "8" in name else 2 if "16" in name else 4 if "32" in name else 8
    for name, kind in vars(SimpleITK).items()
    if name.startswith(("sitkInt", "sitkUInt", "sitkFloat", "sitkVector"))
}
"""Type of a voxel's component → its bytes."""
MOST_HEADER = 1 << 20
"""Bytes in which a header ends."""
DATA_FILE = re.compile(rb"^(?:data ?file:=?|ElementDataFile *=) *(.*?)\r?$", re.M | re.I)


def is_nrrd_volume(path: Path) -> bool:
    """Whether the header announces more than one plane."""
    shape = _header(path).GetSize()
    return len(shape) > 3 or (len(shape) == 3 and 1 not in shape)


def read_nrrd(path: Path, *, axis: int | None, index: int | None) -> Image:
    """Slice `index` along `axis`; rows are the first of the two axes that remain.

    A file of two dimensions, or with one plane, is a picture as viewers show it: its rows are the
    second stored axis.
    """
    voxels, _ = _read(path)
    shape = (voxels.shape[0], voxels.shape[1], voxels.shape[2])
    if axis is None and index is None and shape[2] == 1:
        return Image(pixels=np.array(voxels[:, :, 0].swapaxes(0, 1)), path=path)
    plane = choose_slice(path, shape, 2 if axis is None else axis, index)
    return ArraySlices(path=path, array=voxels, axis=plane.axis).read(plane.index)


def read_nrrd_volume(path: Path, *, axis: int | None) -> Volume:
    """The volume; the default axis is the axis of largest spacing, the last among equals.

    ImageError for more than three dimensions, or channels that are not colours.
    """
    voxels, affine = _read(path)
    shape = (voxels.shape[0], voxels.shape[1], voxels.shape[2])
    lengths = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    x, y, z = (length if 0 < length < math.inf else 1.0 for length in lengths)
    axis = default_axis(shape, (x, y, z)) if axis is None else axis
    choose_slice(path, shape, axis, 0)
    rows, columns = (k for k in range(3) if k != axis)
    return Volume(
        path=path,
        kind="nrrd",
        files=_files(path),
        shape=shape,
        axis=axis,
        plane_axes=(rows, columns),
        spacing_mm=(x, y, z),
        affine=usable_affine(path, affine),
        dtype=np.dtype(np.float32) if voxels.dtype.kind == "f" else voxels.dtype,
        colour=voxels.ndim == 4,
        slices=ArraySlices(path=path, array=voxels, axis=axis),
    )


def write_nrrd_labels(
    path: Path,
    labels: np.ndarray,
    volume: Volume,
    segments: Sequence[Segment],
) -> None:
    """Write `labels` (X, Y, Z) uint8 in the geometry of `volume`, compressed.

    `segments`: with their names, colours and codes, as 3D Slicer keeps segmentations.
    """
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(labels.T))
    affine = np.diag([*volume.spacing_mm, 1.0]) if volume.affine is None else volume.affine
    placed = TO_NIFTI @ affine if volume.affine is not None else affine
    spacing = np.linalg.norm(placed[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(placed[:3, 3].tolist())
    image.SetDirection((placed[:3, :3] / spacing).ravel().tolist())
    if segments:
        for key, text in _segments(labels, segments).items():
            image.SetMetaData(key, text)
    SimpleITK.WriteImage(image, str(path), True)


def _segments(labels: np.ndarray, segments: Sequence[Segment]) -> dict[str, str]:
    """Slicer's fields of a segmentation: each label is a segment in one shared layer."""
    fields = {
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for segment in segments:
        fields |= {
            f"Segment{segment.label - 1}_{field}": text
            for field, text in {
                "ID": f"Segment_{segment.label}",
                "Name": " ".join(segment.name.split()),
                "NameAutoGenerated": "0",
                "LabelValue": str(segment.label),
                "Layer": "0",
                "Color": " ".join(f"{channel / 255:.6f}" for channel in segment.colour),
                "ColorAutoGenerated": "0",
                "Extent": _extent(labels == segment.label),
                "Tags": f"TerminologyEntry:{_terminology(segment.codes)}|",
            }.items()
        }
    return fields


def _terminology(codes: StructureCodes) -> str:
    """Codes as Slicer writes them: category, type and its modifier, region and its modifier."""

    def text(code: Code | None) -> str:
        return "^^" if code is None else f"{code.scheme}^{code.value}^{code.meaning}"

    type_codes = "~".join(text(code) for code in (codes.category, codes.type, codes.modifier))
    region_codes = "~".join(text(code) for code in (codes.region, codes.region_modifier))
    return f"medsa-deploy~{type_codes}~Anatomic codes - DICOM master list~{region_codes}"


def _extent(mask: np.ndarray) -> str:
    """The first and last voxel along x, y and z that a mask holds; `0 -1` of an empty one."""
    if not mask.any():
        return "0 -1 0 -1 0 -1"
    bounds = []
    for axis in range(3):
        present = np.flatnonzero(mask.any(axis=tuple(k for k in range(3) if k != axis)))
        bounds += [int(present[0]), int(present[-1])]
    return " ".join(map(str, bounds))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) or (X, Y, Z, 3), and the affine (4, 4) from voxel to NIfTI's mm."""
    header = _header(path)
    shape, channels = header.GetSize(), header.GetNumberOfComponents()
    if len(shape) > 3 and any(size != 1 for size in shape[3:]):
        raise ImageError(
            f"{path} has {len(shape)} dimensions {tuple(shape)}, expected (X, Y, Z): extract one "
            "volume into a file of its own"
        )
    if channels not in (1, 3, 4):
        raise ImageError(
            f"{path} has {channels} values for each voxel, expected 1, or 3 of a colour: extract "
            "one into a file of its own"
        )
    with reading(path, "NRRD or MetaImage"):
        image = SimpleITK.ReadImage(str(path))
        stored = SimpleITK.GetArrayFromImage(image)
    if stored.dtype.kind not in "uif":
        raise ImageError(f"{path} holds {stored.dtype} voxels; expected real numbers")
    dimensions = len(shape)
    voxels = stored.transpose(*reversed(range(dimensions)), *range(dimensions, stored.ndim))
    voxels = voxels.reshape([*(*shape, 1, 1)[:3], *([channels] if channels > 1 else [])])
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(dimensions, dimensions)
    spatial = min(dimensions, 3)
    affine[:spatial, :spatial] = (direction * np.array(image.GetSpacing()))[:spatial, :spatial]
    affine[:spatial, 3] = image.GetOrigin()[:spatial]
    return voxels[..., :3] if channels == 4 else voxels, TO_NIFTI @ affine


def _header(path: Path) -> SimpleITK.ImageFileReader:
    """The file's header; ImageError if it announces more voxels than its files can hold."""
    with reading(path, "NRRD or MetaImage"):
        files = _files(path)
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
    shape = reader.GetSize()
    announced = math.prod(shape) * reader.GetNumberOfComponents()
    size = sum(file.stat().st_size for file in files)
    if announced > size * MOST_GZIP:  # a byte each, or more
        raise ImageError(
            f"{path} cannot be read as NRRD or MetaImage: its header announces {announced} voxels, "
            "more than the file can hold; it is damaged or cut off, copy or export it again"
        )
    depth = BYTES.get(reader.GetPixelID(), 8)
    check_ratio(path, announced * depth, size)
    plane = math.prod(sorted((1, *shape))[-2:])
    kind = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    check_volume_size(path, shape, kind, 2 * announced * depth, plane)  # ITK's, and numpy's
    return reader


def _files(path: Path) -> tuple[Path, ...]:
    """The file, and the data file that its header names: one of the same folder."""
    with path.open("rb") as f:
        head = f.read(MOST_HEADER)
    if (match := DATA_FILE.search(head.split(b"\n\n")[0])) is None:
        return (path,)
    name = match.group(1).decode("utf-8", "replace").strip()
    if name.upper() == "LOCAL":
        return (path,)
    data = path.with_name(name) if name == Path(name).name else None
    if data is None or not data.is_file():
        raise ImageError(
            f"{path} keeps its voxels in {name!r}; expected one data file in the same folder: save "
            "the volume as one .nrrd or .mha"
        )
    return path, data
