"""Rules of the DICOM node, and where prompts come from: templates, and RTSTRUCT."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_series import AXIAL, OBLIQUE, SAGITTAL, save, slices
from highdicom import sr
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medsa_deploy.dicom_node.rules import matching_rule, read_rules
from medsa_deploy.dicom_node.sender import parse_destination
from medsa_deploy.dicom_node.study_prompts import RTSTRUCT, referenced_series, study_structures
from medsa_deploy.dicom_node.templates import (
    body_middle,
    in_voxels,
    otsu_threshold,
    parse_template,
    template_structures,
)
from medsa_deploy.errors import PromptError, UsageError
from medsa_deploy.images import Volume, read_volume
from medsa_deploy.images.stacking import TO_NIFTI
from medsa_deploy.runtime import Structure

LIVER = {"structures": [{"name": "liver", "boxes": [[0.2, 0.2, 0.3, 0.8, 0.8, 0.7]]}]}
WHOLE_TEMPLATE = {"template": "whole"}


def rules_of(folder: Path, *rules: Any) -> Any:
    path = folder / "rules.json"
    path.write_text(json.dumps({"rules": list(rules)}))
    return read_rules(path, Path("default.medsa"))


def test_the_first_rule_that_matches_counts(tmp_path: Path) -> None:
    rules = rules_of(
        tmp_path,
        {"match": {"modality": "CT", "series_description": "*portal*"}, "bundle": "a.medsa",
         "prompts": {"relative": True, **LIVER}, "propagate": True, "margin": 4,
         "intensity_window": [-175, 250], "threshold": 0.4},
        {"match": {"modality": "CT", "body_part": "*", "calling_aet": "SCAN?"},
         "prompts": WHOLE_TEMPLATE},
        {"match": {"study_description": "knee"}, "prompts": {"template": "none"}},
    )  # fmt: skip
    for facts, number in (
        ({"modality": "CT", "series_description": "Abdomen PORTAL venous"}, 0),
        ({"modality": "ct", "series_description": "portal"}, 0),
        ({"modality": "CT", "calling_aet": "SCAN1"}, 1),
        ({"modality": "CT", "calling_aet": "SCANNER"}, None),
        ({"modality": "MR", "study_description": "Knee"}, 2),
        ({"modality": "MR"}, None),
        ({}, None),
    ):
        assert matching_rule(rules, facts) == number, facts
    first = rules[0]
    assert first.bundle == tmp_path / "a.medsa"
    assert rules[1].bundle == Path("default.medsa")
    assert first.options.propagate
    assert first.options.intensity_window == (-175, 250)
    assert (first.options.margin, first.options.threshold) == (4, 0.4)
    assert len({rule.identity for rule in rules}) == 3


def test_a_rules_identity_is_how_it_segments(tmp_path: Path) -> None:
    (first,) = rules_of(tmp_path, {"match": {"modality": "CT"}, "prompts": WHOLE_TEMPLATE})
    (same,) = rules_of(tmp_path, {"prompts": WHOLE_TEMPLATE})
    (other,) = rules_of(tmp_path, {"prompts": WHOLE_TEMPLATE, "propagate": True})
    assert first.identity == same.identity != other.identity


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (3, "rule 1 should be an object with some of"),
        ({"prompts": WHOLE_TEMPLATE, "bundel": "a"}, "rule 1 should be an object with some of"),
        ({"match": {"modalty": "CT"}, "prompts": WHOLE_TEMPLATE}, "its match should be an object"),
        ({"match": {"modality": 3}, "prompts": WHOLE_TEMPLATE}, "a match is text"),
        ({"prompts": WHOLE_TEMPLATE, "bundle": 3}, "its bundle is 3, expected a path"),
        ({"prompts": WHOLE_TEMPLATE, "propagate": 1}, "its propagate is 1, expected true or false"),
        ({"prompts": WHOLE_TEMPLATE, "margin": "3"}, "its margin is '3', expected a number"),
        ({"prompts": WHOLE_TEMPLATE, "intensity_window": [1]}, "its intensity_window should be"),
        ({}, "its prompts should be an object, found None"),
        ({"prompts": {"template": "magic"}}, "its template is 'magic', expected one of"),
        ({"prompts": {"template": "whole", "name": ""}}, "its name should be one line of text"),
        ({"prompts": {"structures": []}}, 'its prompts should hold "structures"'),
        ({"prompts": {"relative": 1, **LIVER}}, "relative is 1, expected true or false"),
        (
            {"prompts": {"relative": True, "structures": [{"points": [[0.5, 0.5, 1.5]]}]}},
            "structure 1: relative coordinates are fractions of the volume",
        ),
        (
            {"prompts": {"relative": True, "structures": [{"boxes": [[0, 0, 0.5, 1, 1, 0.5]]}]}},
            "structure 1: a box should be",
        ),
        ({"prompts": {"structures": [{"boxes": [[1, 2]]}]}}, "a box in a volume should be"),
    ],
)
def test_a_wrong_rule_is_named(tmp_path: Path, rule: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        rules_of(tmp_path, rule)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rules": []}', '{"rules": 1, "x": 2}'])
def test_a_file_without_rules_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rules.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"rules\.json"):
        read_rules(path, tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_rules(tmp_path / "no.json", tmp_path)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return read_volume(save(slices(6), tmp_path / "series"))  # (16, 12, 6)


def test_fractions_become_voxels(volume: Volume) -> None:
    box = in_voxels(Structure(boxes=((0.25, 0.5, 1 / 3, 0.75, 1, 2 / 3),)), volume).boxes[0]
    assert box == (4, 6, 2, 12, 12, 4)
    thin = in_voxels(Structure(boxes=((0, 0, 0.99, 1, 1, 1),)), volume).boxes[0]
    assert thin == (0, 0, 5, 16, 12, 6)
    corners = Structure(points=((0, 0, 0), (0.5, 0.5, 0.5), (1, 1, 1)), labels=(1, 1, 0))
    placed = in_voxels(corners, volume)
    assert placed.points == ((0, 0, 0), (7.5, 5.5, 2), (15, 11, 5))
    assert placed.labels == (1, 1, 0)
    for point in placed.points:
        volume.locate(point)


def test_templates_without_structures(volume: Volume) -> None:
    def structures(**template: Any) -> list[Structure]:
        return template_structures(parse_template(template, "rule 1"), volume)

    assert structures(template="none") == []
    (structure,) = structures(template="whole", name="brain")
    assert structure == Structure(boxes=((0, 0, 0, 16, 12, 6),), name="brain")
    (body,) = structures(template="body", **{"class": "liver"})
    assert body.class_name == "liver"
    assert body.points == (body_middle(volume),)


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
@pytest.mark.parametrize("inverted", [False, True])
def test_the_middle_of_the_body_is_found(
    tmp_path: Path, orientation: list[float], inverted: bool
) -> None:
    """A bright disc on dark, in the slices 2 to 5 of 8, off the centre."""
    datasets = slices(8, orientation=orientation)
    rows, columns = np.mgrid[:12, :16]
    disc = (rows - 4) ** 2 + (columns - 10) ** 2 <= 9
    for k, dataset in enumerate(datasets):
        bright = disc if 2 <= k <= 5 else np.zeros_like(disc)
        if inverted:
            dataset.PhotometricInterpretation, bright = "MONOCHROME1", ~bright
        dataset.PixelData = np.where(bright, 1100, 20).astype(np.int16).tobytes()
    x, y, z = body_middle(read_volume(save(datasets, tmp_path / "s")))
    assert (x, y) == (10, 4)
    assert 3 <= z <= 4


def test_an_empty_volume_has_no_body(tmp_path: Path) -> None:
    datasets = slices(3)
    pixels = np.zeros((12, 16), np.int16)
    pixels[0, 0] = 9
    for dataset in datasets:
        dataset.PixelData = pixels.tobytes()
    with pytest.raises(PromptError, match="no body was found"):
        body_middle(read_volume(save(datasets, tmp_path / "s")))


def test_otsu_agrees_with_another_library() -> None:
    from skimage.filters import threshold_otsu

    rng = np.random.default_rng(3)
    values = np.concatenate([rng.normal(-900, 60, 3000), rng.normal(40, 80, 1000)])
    assert otsu_threshold(values) == pytest.approx(threshold_otsu(values), abs=400)
    parted = values > otsu_threshold(values)
    assert parted[:3000].sum() + (~parted[3000:]).sum() <= 2


def structure_set(
    folder: Path, volume: Volume, series: Dataset, contours: Sequence[tuple[str, str, Any]]
) -> Path:
    """A file with contours (name, type, voxels)."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTSTRUCT, generate_uid()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = RTSTRUCT
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    referenced, study, frame = Dataset(), Dataset(), Dataset()
    referenced.SeriesInstanceUID = series.SeriesInstanceUID
    study.RTReferencedSeriesSequence = [referenced]
    frame.RTReferencedStudySequence = [study]
    dataset.ReferencedFrameOfReferenceSequence = [frame]
    numbers = {name: k for k, name in enumerate(dict.fromkeys(c[0] for c in contours), 1)}
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    assert volume.affine is not None
    for name, number in numbers.items():
        roi, item = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, item.ReferencedROINumber = number, name, number
        item.ContourSequence = []
        for _, kind, voxels in (c for c in contours if c[0] == name):
            contour = Dataset()
            points = np.atleast_2d(voxels) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
            contour.ContourGeometricType = kind
            contour.ContourData = [f"{v:.5f}" for v in (points @ TO_NIFTI).ravel()]
            item.ContourSequence.append(contour)
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(item)
    assert referenced_series(dataset) == [series.SeriesInstanceUID]
    path = folder / "rtstruct.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return path


RECTANGLE = np.array([[3, 2, 4], [9, 2, 4], [9, 7, 4], [3, 7, 4]])


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, OBLIQUE])
def test_contours_of_the_study_become_prompts(tmp_path: Path, orientation: list[float]) -> None:
    datasets = slices(6, orientation=orientation)
    volume = read_volume(save(datasets, tmp_path / "s"))
    path = structure_set(
        tmp_path,
        volume,
        datasets[0],
        [
            ("liver", "CLOSED_PLANAR", RECTANGLE),
            ("liver", "CLOSED_PLANAR", RECTANGLE - [1, 0, 1]),
            ("liver", "CLOSED_PLANAR", RECTANGLE - [0, -2, 0]),
            ("vessel", "POINT", [5, 6, 2.3]),
            ("vessel background", "POINT", [14, 1, 2]),
            ("vessel", "OPEN_PLANAR", RECTANGLE[:2]),
            ("vessel", "POINT", [50, 6, 2]),
            ("vessel", "POINT", [5, 6, 9]),
        ],
    )
    liver, vessel = study_structures([path], volume)
    assert liver.name == "liver"
    assert [np.round(box, 3).tolist() for box in liver.boxes] == [
        [3, 2, 4, 10, 10, 5],
        [2, 2, 3, 9, 8, 4],
    ]
    assert (vessel.name, vessel.labels) == ("vessel", (1, 0))
    np.testing.assert_allclose(vessel.points, [[5, 6, 2], [14, 1, 2]], atol=1e-3)
    for point in vessel.points:
        volume.locate(point)
    for box in liver.boxes:
        volume.locate_box(box)


def test_a_structure_set_beside_the_series_is_refused(tmp_path: Path) -> None:
    datasets = slices(6)
    volume = read_volume(save(datasets, tmp_path / "s"))
    path = structure_set(tmp_path, volume, datasets[0], [("a", "POINT", [5, 6, 30])])
    with pytest.raises(PromptError, match="no point or closed contour lies on a slice"):
        study_structures([path], volume)


def report(folder: Path, series: list[Dataset], regions: Sequence[tuple[str, Any]]) -> Path:
    """A report that highdicom writes, with regions by name."""
    images = [sr.SourceImageForRegion(d.SOPClassUID, d.SOPInstanceUID) for d in series]
    groups = [
        sr.PlanarROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(uid=generate_uid(), identifier=name),
            referenced_region=(
                sr.ImageRegion(region[0], np.array(region[1]), images[region[2]])
                if len(region) == 3
                else sr.ImageRegion3D(region[0], np.array(region[1]), series[0].FrameOfReferenceUID)
            ),
            finding_type=codes.SCT.Neoplasm,
        )
        for name, region in regions
    ]
    person = sr.PersonObserverIdentifyingAttributes(name="Reader^A")
    observer = sr.ObserverContext(codes.DCM.Person, person)
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_person_context=observer),
        procedure_reported=codes.cid100.ImagingProcedure,
        imaging_measurements=groups,
    )
    dataset = sr.Comprehensive3DSR(
        evidence=series,
        content=content[0],
        series_instance_uid=generate_uid(),
        series_number=9,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="a viewer",
    )
    assert referenced_series(dataset) == [series[0].SeriesInstanceUID]
    path = folder / "report.dcm"
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
def test_regions_of_a_report_become_prompts(tmp_path: Path, orientation: list[float]) -> None:
    datasets = slices(6, orientation=orientation)
    for dataset in datasets:
        dataset.FrameOfReferenceUID = "1.2.3"
    volume = read_volume(save(datasets, tmp_path / "s"))
    assert volume.affine is not None
    place = (np.array([[5, 6, 4]]) @ volume.affine[:3, :3].T + volume.affine[:3, 3]) @ TO_NIFTI
    path = report(
        tmp_path,
        datasets,
        [
            ("tumour", ("POLYLINE", [[3.5, 2.5], [9.5, 2.5], [9.5, 7.5], [3.5, 7.5]], 4)),
            ("tumour", ("CIRCLE", [[8.5, 6.5], [10.5, 6.5]], 2)),
            ("vessel", ("POINT", [[5.5, 6.5]], 1)),
            ("vessel", ("POINT", place)),
            ("vessel -", ("POINT", [[1.5, 2.5]], 1)),
            ("vessel -", ("POINT", [[3.5, 4.5]], 1)),
            ("vessel", ("POLYLINE", [[1.5, 2.5], [3.5, 4.5]], 1)),
        ],
    )
    tumour, vessel = study_structures([path], volume)
    assert [np.round(box, 3).tolist() for box in tumour.boxes] == [
        [3, 2, 4, 10, 8, 5],
        [6, 4, 2, 11, 9, 3],
    ]
    np.testing.assert_allclose(
        vessel.points, [[5, 6, 1], [5, 6, 4], [1, 2, 1], [3, 4, 1]], atol=1e-3
    )
    assert vessel.labels == (1, 1, 0, 0)


def test_a_report_without_regions_is_for_no_series(tmp_path: Path) -> None:
    path = report(tmp_path, slices(2), [("a", ("POINT", [[5.5, 6.5]], 1))])
    dataset = pydicom.dcmread(path)
    assert referenced_series(dataset)
    dataset.ContentSequence = []
    assert referenced_series(dataset) == []


@pytest.mark.parametrize(
    "text", ["pacs", "pacs:104", "pacs:x:AET", ":1:A", "a:0:B", "a:1:" + "B" * 17]
)
def test_destinations_are_host_port_title(text: str) -> None:
    with pytest.raises(UsageError, match="expected HOST:PORT:AET"):
        parse_destination(text, calling_aet="MEDSA", tls=None)
    pacs = parse_destination("[::1]:104:ORTHANC", calling_aet="MEDSA", tls=None)
    assert (pacs.host, pacs.port, pacs.aet) == ("::1", 104, "ORTHANC")
