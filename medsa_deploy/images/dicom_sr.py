"""Labels of a DICOM volume and their segmentation → a structured report of measurements (TID 1500).

The report holds the volume of each segment, and the longest diameter in a slice of those that have
a voxel. It refers to the segments and to their source images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.errors import MissingDependencyError

from .dicom_seg import (
    UTF_8,
    algorithm_parameters,
    concept,
    one_line_label,
    package_version,
    source_headers,
    tracking_uid,
    uid_origin,
    writing,
)
from .dicom_uids import derived_uid
from .measurements import StructureMeasurements, measure
from .segments import Segment, SegmentationDetails
from .structure_codes import Code
from .volume import Volume

try:
    import highdicom
    from highdicom import sr
    from pydicom.sr.codedict import codes
except ImportError as e:
    raise MissingDependencyError(
        "highdicom", extra="dicom", purpose="writing DICOM structured reports"
    ) from e

DEVICE_UID = derived_uid("medsa-deploy", "observer")
"""Of the observer: this program."""


def measurement_report(
    path: Path,
    segmentation: Any,
    labels: np.ndarray,
    volume: Volume,
    segments: Sequence[Segment],
    details: SegmentationDetails,
) -> Any:
    """The report of a segmentation dataset of `labels`, (columns, rows, slices) uint8.

    `path` only appears in messages.
    """
    sources = source_headers(path, volume)
    origin = uid_origin(sources, details)
    with writing(path):
        sizes = [measure(labels, volume, segment.label) for segment in segments]
        groups = [
            _group(segment, segmentation, sources, details, size)
            for segment, size in zip(segments, sizes, strict=True)
        ]
        content = sr.MeasurementReport(
            observation_context=_observer(details),
            procedure_reported=_procedure(sources[0].get("Modality", "")),
            imaging_measurements=groups,
            title=codes.DCM.ImagingMeasurementReport,
        )
        new = details.identity is None
        report = sr.Comprehensive3DSR(
            evidence=[segmentation, *sources],
            content=content[0],
            series_instance_uid=highdicom.UID() if new else derived_uid(*origin, "report series"),
            series_number=int(segmentation.SeriesNumber) + 1,
            sop_instance_uid=highdicom.UID() if new else derived_uid(*origin, "report"),
            instance_number=1,
            manufacturer=details.tool,
            is_complete=True,
        )
        report.SeriesDescription = f"Measurements by {details.tool}"
        report.SpecificCharacterSet = UTF_8
    return report


def _procedure(modality: str) -> Any:
    """What was examined, as far as the modality tells (CID 100)."""
    return {
        "CT": codes.cid100.CTUnspecifiedBodyRegion,
        "MR": codes.cid100.MRIUnspecifiedBodyRegion,
        "PT": codes.cid100.PETUnspecifiedBodyRegion,
    }.get(modality, codes.cid100.ImagingProcedure)


def _observer(details: SegmentationDetails) -> Any:
    """This program, as the device that observed."""
    attributes = sr.DeviceObserverIdentifyingAttributes(
        uid=DEVICE_UID,
        name=details.tool,
        manufacturer_name=details.tool,
        model_name=details.bundle or details.tool,
    )
    device = sr.ObserverContext(
        observer_type=codes.DCM.Device, observer_identifying_attributes=attributes
    )
    return sr.ObservationContext(observer_device_context=device)


def _group(
    segment: Segment,
    segmentation: Any,
    sources: Sequence[Any],
    details: SegmentationDetails,
    size: StructureMeasurements,
) -> Any:
    """The measurements of one segment."""
    series = str(sources[0].SeriesInstanceUID)
    site = segment.codes.region
    side = segment.codes.region_modifier or segment.codes.modifier
    measured = [
        sr.Measurement(
            name=codes.SCT.Volume,
            value=float(f"{size.millilitres:.6g}"),
            unit=sr.CodedConcept("ml", "UCUM", "milliliter"),
        ),
        sr.Measurement(
            name=codes.SCT.LongAxis,
            value=float(f"{size.diameter_mm:.6g}"),
            unit=codes.UCUM.Millimeter,
        ),
    ]
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=tracking_uid(series, segment, details), identifier=one_line_label(segment.name)
        ),
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=segmentation.SOPClassUID,
            sop_instance_uid=segmentation.SOPInstanceUID,
            segment_number=segment.label,
            source_series=sr.SourceSeriesForSegmentation(series),
        ),
        finding_type=concept(highdicom, segment.codes.type),
        finding_category=concept(highdicom, segment.codes.category),
        finding_sites=None if site is None else [_site(site, side)],
        algorithm_id=sr.AlgorithmIdentification(
            name=details.tool,
            version=package_version(),
            parameters=[f"{k}={v}" for k, v in algorithm_parameters(details).items()] or None,
        ),
        measurements=measured if size.diameter_slice is not None else measured[:1],
    )


def _site(region: Code, side: Code | None) -> Any:
    """Where a finding is."""
    laterality = None if side is None else concept(highdicom, side)
    return sr.FindingSite(concept(highdicom, region), laterality=laterality)
