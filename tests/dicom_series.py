"""DICOM series cut from a real CT, and segmentations read back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from medsa_deploy.errors import ImageError
from medsa_deploy.images import Volume, read_volume

ROWS, COLUMNS, SLICES = 12, 16, 6
OBLIQUE = [0.9, 0.3, -0.316228, -0.316228, 0.948683, 0.0]
AXIAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]


def sample(name: str) -> Path:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    return Path(path)


CT = pydicom.dcmread(sample("CT_small.dcm"))
CT.decode()


def slices(
    count: int = SLICES,
    *,
    orientation: list[float] = AXIAL,
    step: np.ndarray | None = None,
    spacing: float = 2.5,
    **attributes: Any,
) -> list[Dataset]:
    """A CT cut to 12 rows × 16 columns, repeated along the normal; slice k has k at [0, 0]."""
    normal = np.cross(orientation[:3], orientation[3:])
    step = normal * spacing if step is None else step
    series, datasets = generate_uid(), []
    for k in range(count):
        dataset = copy.deepcopy(CT)
        pixels = CT.pixel_array[40 : 40 + ROWS, 40 : 40 + COLUMNS].copy()
        pixels[0, 0] = k
        dataset.Rows, dataset.Columns, dataset.PixelData = ROWS, COLUMNS, pixels.tobytes()
        dataset.SeriesInstanceUID, dataset.PixelSpacing = series, [0.8, 0.6]
        rename(dataset)
        dataset.ImageOrientationPatient = orientation
        dataset.ImagePositionPatient = [f"{v:.6f}" for v in (np.array([10, -20, 30]) + k * step)]
        for name, value in attributes.items():
            setattr(dataset, name, value)
        datasets.append(dataset)
    return datasets


def rename(dataset: Dataset) -> Dataset:
    """Give it a SOP Instance UID of its own."""
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    return dataset


def save(datasets: list[Dataset], folder: Path, names: str | None = None) -> Path:
    """Files a.dcm, b.dcm, … in the order given, or with these names."""
    folder.mkdir(exist_ok=True)
    for dataset, name in zip(datasets, names or "abcdefghijklmnop", strict=False):
        dataset.save_as(folder / f"{name}.dcm", enforce_file_format=True)
    return folder


def enhanced(folder: Path, datasets: list[Dataset]) -> Path:
    """The slices as one multi-frame CT, through highdicom (which sorts them its own way)."""
    combined = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        datasets, generate_uid(), 1, generate_uid(), 1
    )
    combined.save_as(folder / "enhanced.dcm")
    return folder / "enhanced.dcm"


def back(path: Path, volume: Volume) -> np.ndarray:
    """The labels in a DICOM SEG, matched to `volume` by the instances (frames) it refers to."""
    segmentation = highdicom.seg.segread(path)
    frames = volume.slices.headers  # type: ignore[attr-defined]
    options = {"combine_segments": True, "assert_missing_frames_are_empty": True}
    if len(volume.files) == len(volume):
        pixels = segmentation.get_pixels_by_source_instance([f.uid for f in frames], **options)
    else:
        numbers = [f.number + 1 for f in frames]
        pixels = segmentation.get_pixels_by_source_frame(frames[0].uid, numbers, **options)
    return np.asarray(pixels).transpose(2, 1, 0)


def placed(path: Path) -> set[tuple[Any, ...]]:
    """(segment, position of the frame, row, column) of every voxel, through pydicom alone."""
    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    voxels = set()
    for group, frame in zip(dataset.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        holder = group if "SegmentIdentificationSequence" in group else shared
        segment = holder.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        position = tuple(map(float, group.PlanePositionSequence[0].ImagePositionPatient))
        voxels |= {(int(segment), position, *map(int, at)) for at in np.argwhere(frame)}
    return voxels


def label_sets(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    segment = np.zeros(shape, np.uint8)
    segment[3, 5, 2] = 1
    three = np.zeros(shape, np.uint8)
    three[2:9, 1:7, 0:4], three[4:6, 3:5, 1:3], three[15, 11, 5] = 1, 2, 3
    noise = np.random.default_rng(0).integers(0, 5, shape).astype(np.uint8)
    return {
        "one": segment,
        "three": three,
        "noise": noise,
        "only the third": (segment * 3).astype(np.uint8),
        "full": np.ones(shape, np.uint8),
        "empty": np.zeros(shape, np.uint8),
    }


def refused(folder: Path, match: str) -> str:
    with pytest.raises(ImageError, match=match) as caught:
        read_volume(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)
