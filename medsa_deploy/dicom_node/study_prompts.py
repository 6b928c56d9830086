"""Prompts that a viewer stored for a series, as RTSTRUCT or SR → structures in its voxels.

Each region of interest is a structure of its name. A POINT contour is a click on the nearest slice.
A CLOSED_PLANAR contour becomes the box around it on its slice. A region called "NAME background"
or "NAME -" holds the background clicks of NAME. Other contours are left out, with a warning. The
regions of a structured report are read alike; see `report_prompts`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.errors import PromptError
from medsa_deploy.images import Volume
from medsa_deploy.images.dicom_files import load_header
from medsa_deploy.images.files import reading
from medsa_deploy.images.stacking import TO_NIFTI
from medsa_deploy.images.volume import VolumeBox
from medsa_deploy.runtime.volumes.structures import Structure

from .report_prompts import REPORTS, report_contours, report_series

logger = logging.getLogger(__name__)

RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
"""SOP class of an RT Structure Set."""
PROMPT_CLASSES = (RTSTRUCT, *REPORTS)
"""SOP classes of objects that prompts may come in."""
BACKGROUND = re.compile(r"^(?P<name>.+?)[\s_]*(?:background|-)\s*$", re.IGNORECASE)
BETWEEN_SLICES = 0.5
"""A point this many slices beyond the first or last one belongs to no slice."""


@dataclass
class _Prompts:
    """The prompts of one structure, as they are collected."""

    points: list[tuple[float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    boxes: dict[int, VolumeBox] = field(default_factory=dict)
    """Slice → its box."""


def referenced_series(dataset: Any) -> list[str]:
    """UIDs of the series that an object's prompts are for."""
    if str(dataset.SOPClassUID) in REPORTS:
        return report_series(dataset)
    uids = [
        str(series.SeriesInstanceUID)
        for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ()
        for study in frame.get("RTReferencedStudySequence") or ()
        for series in study.get("RTReferencedSeriesSequence") or ()
    ]
    return list(dict.fromkeys(uids))


def study_structures(paths: Sequence[Path], volume: Volume) -> list[Structure]:
    """The structures of stored prompts on a volume's slices; PromptError if there are none."""
    if volume.affine is None:
        raise PromptError(f"{volume.path} has no place in the patient, and so no contours")
    prompts: dict[str, _Prompts] = {}
    for path in paths:
        dataset = load_header(path)
        with reading(path, "DICOM"):
            report = str(dataset.SOPClassUID) in REPORTS
            contours = report_contours(dataset, volume) if report else _contours(dataset, volume)
            for name, kind, voxels in contours:
                _add(prompts, name, kind, voxels, volume)
    structures = [
        Structure(
            name=name,
            points=tuple(each.points),
            labels=tuple(each.labels),
            boxes=tuple(each.boxes.values()),
        )
        for name, each in prompts.items()
        if each.points or each.boxes
    ]
    if not structures:
        raise PromptError(
            f"{', '.join(path.name for path in paths)}: no point or closed contour lies on a slice "
            f"of {volume.path}: store points or boxes for this series"
        )
    return structures


def _contours(dataset: Any, volume: Volume) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, geometric type and voxels (N, 3) of each contour of an RTSTRUCT."""
    assert volume.affine is not None
    to_voxel = np.linalg.inv(volume.affine)
    names = {
        int(roi.ROINumber): str(roi.get("ROIName") or f"region {roi.ROINumber}")
        for roi in dataset.get("StructureSetROISequence") or ()
    }
    for roi in dataset.get("ROIContourSequence") or ():
        number = int(roi.ReferencedROINumber)
        for contour in roi.get("ContourSequence") or ():
            points = np.array(contour.ContourData, np.float64).reshape(-1, 3)
            voxels = (points @ TO_NIFTI) @ to_voxel[:3, :3].T + to_voxel[:3, 3]
            yield names.get(number, f"region {number}"), str(contour.ContourGeometricType), voxels


def _add(
    prompts: dict[str, _Prompts], name: str, kind: str, voxels: np.ndarray, volume: Volume
) -> None:
    """Add a contour, in voxels (N, 3), to the prompts of its structure."""
    background = BACKGROUND.match(name)
    structure = " ".join((background["name"] if background else name).split())
    each = prompts.setdefault(structure, _Prompts())
    size = np.array(volume.shape)
    index = int(np.rint(voxels[:, volume.axis].mean()))
    beyond = voxels[:, volume.axis].mean() - np.clip(index, 0, len(volume) - 1)
    if abs(beyond) > BETWEEN_SLICES + 1e-6:
        logger.warning("a contour lies on no slice of the series and is left out")
        return
    index = int(np.clip(index, 0, len(volume) - 1))
    if kind == "POINT":
        for voxel in np.atleast_2d(voxels):
            if not (np.rint(voxel) >= 0).all() or not (np.rint(voxel) < size).all():
                logger.warning("a point lies outside of the series and is left out")
                continue
            x, y, z = np.clip(voxel, 0, size - 1).tolist()
            place = [x, y, z]
            place[volume.axis] = float(index)
            each.points.append((place[0], place[1], place[2]))
            each.labels.append(0 if background else 1)
    elif kind.startswith("CLOSED_PLANAR") and not background:
        each.boxes[index] = _around(voxels, index, volume, each.boxes.get(index))
    else:
        logger.warning("a contour of type %s is left out: store points or closed contours", kind)


def _around(voxels: np.ndarray, index: int, volume: Volume, earlier: VolumeBox | None) -> VolumeBox:
    """The smallest box on slice `index` around contour points and an earlier box.

    A contour runs through the centres of pixels, a box along their edges.
    """
    size = np.array(volume.shape, np.float64)
    low = np.clip(voxels.min(axis=0), 0, size - 1)
    high = np.clip(voxels.max(axis=0) + 1, low + 1, size)
    if earlier is not None:
        low, high = np.minimum(low, earlier[:3]), np.maximum(high, earlier[3:])
    low[volume.axis], high[volume.axis] = index, index + 1
    x0, y0, z0, x1, y1, z1 = (float(value) for value in (*low, *high))
    return x0, y0, z0, x1, y1, z1
