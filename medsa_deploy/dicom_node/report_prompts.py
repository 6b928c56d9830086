"""Regions of a structured report (TID 1500) → named contours in the voxels of a volume.

A region belongs to the measurement group around it, whose name is its tracking identifier or else
its finding. The tree is read item by item and not as the template demands: viewers write it freely.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from medsa_deploy.images import Volume
from medsa_deploy.images.series import DicomSlices
from medsa_deploy.images.stacking import TO_NIFTI

REPORTS = (
    "1.2.840.10008.5.1.4.1.1.88.22",
    "1.2.840.10008.5.1.4.1.1.88.33",
    "1.2.840.10008.5.1.4.1.1.88.34",
)
"""SOP classes: Enhanced SR, Comprehensive SR, Comprehensive 3D SR."""
GROUP, TRACKING, FINDING = "125007", "112039", "121071"
"""DCM codes: Measurement Group, Tracking Identifier, Finding."""
CLICKS = ("POINT", "MULTIPOINT")
REGIONS = ("SCOORD", "SCOORD3D")


def report_series(dataset: Any) -> list[str]:
    """UIDs of the series that a report with regions refers to; none of a report without."""
    if not any(item.get("ValueType") in REGIONS for item in _items(dataset)):
        return []
    return [
        str(series.SeriesInstanceUID)
        for study in dataset.get("CurrentRequestedProcedureEvidenceSequence") or ()
        for series in study.get("ReferencedSeriesSequence") or ()
    ]


def report_contours(dataset: Any, volume: Volume) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, RTSTRUCT's geometric type and voxels (N, 3) of each region on a slice of the volume."""
    assert volume.affine is not None
    to_voxel = np.linalg.inv(volume.affine)
    groups = [item for item in _items(dataset) if _concept(item) == GROUP]
    for number, group in enumerate(groups, 1):
        name = _name(group) or f"region {number}"
        for item in _items(group):
            if item.get("ValueType") == "SCOORD3D":
                points = np.array(item.GraphicData, np.float64).reshape(-1, 3)
                voxels = (points @ TO_NIFTI) @ to_voxel[:3, :3].T + to_voxel[:3, 3]
            elif item.get("ValueType") == "SCOORD":
                placed = _on_slice(item, volume)
                if placed is None:
                    continue
                voxels = placed
            else:
                continue
            yield name, *_outline(str(item.GraphicType), voxels)


def _items(item: Any) -> Iterator[Any]:
    """All content items below an item."""
    for child in item.get("ContentSequence") or ():
        yield child
        yield from _items(child)


def _concept(item: Any) -> str:
    """The code value of an item's name."""
    names = item.get("ConceptNameCodeSequence") or ()
    return str(names[0].get("CodeValue", "")) if names else ""


def _name(group: Any) -> str:
    """What a measurement group is called."""
    children = {_concept(child): child for child in group.get("ContentSequence") or ()}
    if TRACKING in children and children[TRACKING].get("TextValue"):
        return str(children[TRACKING].TextValue)
    codes = children[FINDING].get("ConceptCodeSequence") if FINDING in children else None
    return str(codes[0].get("CodeMeaning", "")) if codes else ""


def _on_slice(item: Any, volume: Volume) -> np.ndarray | None:
    """A region of an image as voxels (N, 3); None if the image is none of the volume's.

    The centre of the first pixel is (0.5, 0.5) in the report (PS3.3 C.18.6.1), and voxel (0, 0).
    """
    assert isinstance(volume.slices, DicomSlices)
    images = [
        reference
        for child in item.get("ContentSequence") or ()
        for reference in child.get("ReferencedSOPSequence") or ()
    ]
    for reference in images:
        frame = np.atleast_1d(reference.get("ReferencedFrameNumber") or 1)[0]
        for index, header in enumerate(volume.slices.headers):
            if header.uid == str(reference.ReferencedSOPInstanceUID) and (
                header.number is None or header.number + 1 == int(frame)
            ):
                pixels = np.array(item.GraphicData, np.float64).reshape(-1, 2) - 0.5
                return np.column_stack([pixels, np.full(len(pixels), float(index))])
    return None


def _outline(graphic: str, voxels: np.ndarray) -> tuple[str, np.ndarray]:
    """A region's type as in an RTSTRUCT, and the points that it reaches to."""
    if graphic in CLICKS:
        return "POINT", voxels
    if graphic == "CIRCLE" and len(voxels) == 2:  # its centre, and a point on it
        radius = np.linalg.norm(voxels[1] - voxels[0]) * np.array([1.0, 1.0, 0.0])
        return "CLOSED_PLANAR", np.stack([voxels[0] - radius, voxels[0] + radius])
    return ("CLOSED_PLANAR" if len(voxels) > 2 else "OPEN_PLANAR"), voxels
