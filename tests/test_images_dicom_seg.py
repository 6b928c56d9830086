"""Segmentations as viewers want them: codes, colours, tracking, tables, reports of measurements."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_series import save, slices
from dicom_tools import check_iod
from pydicom.sr._concepts_dict import concepts

from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images import SegmentationDetails, Volume, read_volume, write_segmentation
from medsa_deploy.images.class_codes import SegmentStyle, read_class_codes
from medsa_deploy.images.dicom_seg import segmentation_uid
from medsa_deploy.images.label_colours import cielab, label_colour
from medsa_deploy.images.measurements import longest_diameter, measure
from medsa_deploy.images.structure_codes import CATEGORIES, structure_codes, table_rows

NAMES = ("liver", "left kidney", "liver tumours", "thingamajig")
DETAILS = SegmentationDetails(bundle="liver.medsa", bundle_sha256="ab" * 32)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    return read_volume(save(slices(6), tmp_path_factory.mktemp("series")))


@pytest.fixture(scope="module")
def labels(volume: Volume) -> np.ndarray:
    labels = np.zeros(volume.shape, np.uint8)
    labels[2:6, 3:8, 1:4], labels[9:12, 2:5, 2:5], labels[0, 0, 5] = 1, 2, 3
    return labels


def test_every_code_of_the_table_is_the_standards() -> None:
    rows = list(table_rows())
    assert len(rows) > 200
    for row in rows:
        meanings = [
            known[row["code"]] for known in concepts["SCT"].values() if row["code"] in known
        ]
        assert row["meaning"] in {meaning for meaning, _ in meanings}, row
        value_sets = {cid for _, cids in meanings for cid in cids}
        assert value_sets & {7151, 7192, 7194, 7166}, row
    for category in CATEGORIES.values():
        assert any(
            7150 in known.get(category.value, ("", []))[1] for known in concepts["SCT"].values()
        )


def test_no_name_of_the_table_means_two_structures() -> None:
    names = [name for row in table_rows() for name in row["names"].split("|")]
    assert len(names) == len(set(names))
    for row in table_rows():
        for name in row["names"].split("|"):
            codes = structure_codes(name)
            assert codes is not None
            assert codes.type.value == row["code"], name


@pytest.mark.parametrize(
    ("name", "type_", "modifier", "region", "side"),
    [
        ("liver", "Liver", None, None, None),
        ("Kidney_LEFT", "Kidney", "Left", None, None),
        ("right kidneys", "Kidney", "Right", None, None),
        ("lung_upper_lobe_left", "Upper lobe of lung", "Left", None, None),
        ("lobe of the lung, upper", "Upper lobe of lung", None, None, None),
        ("heart_atrium_left", "Left atrium", None, None, None),
        ("left atrium", "Left atrium", None, None, None),
        ("vertebrae_L3", "L3 vertebra", None, None, None),
        ("tumour of the liver", "Neoplasm", None, "Liver", None),
        ("right lung nodule", "Nodule", None, "Lung", "Right"),
        ("tumor", "Neoplasm", None, None, None),
    ],
)
def test_names_become_codes(
    name: str, type_: str, modifier: str | None, region: str | None, side: str | None
) -> None:
    codes = structure_codes(name)
    assert codes is not None
    read = [codes.type, codes.modifier, codes.region, codes.region_modifier]
    assert [code and code.meaning for code in read] == [type_, modifier, region, side]


@pytest.mark.parametrize("name", ["mask", "class 1", "structure 2", "segment 3", "", "t1", "left"])
def test_other_names_have_no_codes(name: str) -> None:
    assert structure_codes(name) is None


def test_colours_of_labels_are_far_apart() -> None:
    colours = [label_colour(label) for label in range(1, 256)]
    lab = cielab(np.array(colours))
    for count, least in ((32, 20), (255, 8)):
        apart = np.linalg.norm(lab[:count, None] - lab[None, :count], axis=2)
        assert apart[~np.eye(count, dtype=bool)].min() > least
    reference = [highdicom.color.CIELabColor.from_rgb(*colour).lab for colour in colours[:20]]
    np.testing.assert_allclose(lab[:20], np.array(reference), atol=1.0)


def test_a_segmentation_says_what_viewers_show(
    volume: Volume, labels: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "seg.dcm"
    with caplog.at_level(logging.WARNING):
        write_segmentation(path, labels, volume, names=NAMES, details=DETAILS)
    assert [r.getMessage() for r in caplog.records if "no codes" in r.getMessage()] == [
        "no codes are known for 'thingamajig': viewers will call it tissue; give codes with "
        "--class-codes, or in the prompts file"
    ]
    check_iod(path)
    liver, kidney, tumour, unknown = pydicom.dcmread(path).SegmentSequence
    assert [
        segment.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning
        for segment in (liver, kidney, tumour, unknown)
    ] == [
        "Anatomical Structure",
        "Anatomical Structure",
        "Morphologically Abnormal Structure",
        "Tissue",
    ]
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    (kind,) = kidney.SegmentedPropertyTypeCodeSequence
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert tumour.AnatomicRegionSequence[0].CodeValue == "10200004"
    assert "AnatomicRegionSequence" not in liver
    for number, segment in enumerate((liver, kidney, tumour, unknown), 1):
        colour = highdicom.color.CIELabColor.from_rgb(*label_colour(number))
        assert tuple(segment.RecommendedDisplayCIELabValue) == tuple(colour.value)
        assert segment.TrackingID == NAMES[number - 1]
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        parameters = "".join(algorithm.AlgorithmParameters)
        assert "bundle=liver.medsa" in parameters.replace(" ", "").replace(":", "=")
        assert DETAILS.bundle_sha256 is not None
        assert DETAILS.bundle_sha256 in parameters
    assert len({segment.TrackingUID for segment in (liver, kidney, tumour, unknown)}) == 4


def test_uids_derive_from_source_bundle_and_identity(
    volume: Volume, labels: np.ndarray, tmp_path: Path
) -> None:
    def uids(name: str, details: SegmentationDetails) -> tuple[str, str, str]:
        path = tmp_path / name
        write_segmentation(path, labels, volume, names=NAMES, details=details)
        dataset = pydicom.dcmread(path)
        tracking = dataset.SegmentSequence[0].TrackingUID
        return dataset.SOPInstanceUID, dataset.SeriesInstanceUID, tracking

    details = SegmentationDetails(bundle_sha256="1", identity="rule")
    first = uids("a.dcm", details)
    assert first == uids("b.dcm", details)
    assert first[0] == segmentation_uid(tmp_path / "a.dcm", volume, details)
    variants = [
        uids("c.dcm", SegmentationDetails(bundle_sha256=bundle, identity=identity))
        for bundle, identity in (("2", "rule"), ("1", "other"), ("1", None), ("1", None))
    ]
    assert len({uid for pair in [first, *variants] for uid in pair[:2]}) == 10
    assert [first[2] == other[2] for other in variants] == [False, True, True, True]
    assert all(pydicom.uid.UID(uid).is_valid for uid in first)


def test_a_report_measures_every_segment(
    volume: Volume, labels: np.ndarray, tmp_path: Path
) -> None:
    seg, report = tmp_path / "seg.dcm", tmp_path / "report.dcm"
    write_segmentation(seg, labels, volume, names=NAMES, details=DETAILS, measurements=report)
    check_iod(report)
    dataset, segments = pydicom.dcmread(report), pydicom.dcmread(seg)
    assert dataset.StudyInstanceUID == segments.StudyInstanceUID
    content = highdicom.sr.srread(report).content
    groups = content.get_volumetric_roi_measurement_groups()
    assert [group.tracking_identifier for group in groups] == list(NAMES)
    assert [group.tracking_uid for group in groups] == [
        segment.TrackingUID for segment in segments.SegmentSequence
    ]
    voxel = 0.8 * 0.6 * 2.5 / 1000
    # 4 × 5 and 3 × 3 pixels of 0.6 × 0.8 mm: through the middles of the outermost edges
    expected = {1: np.hypot(3 * 0.6, 5 * 0.8), 2: np.hypot(2 * 0.6, 3 * 0.8), 3: 0.8}
    for number, group in enumerate(groups[:3], 1):
        sizes = {m.name.meaning: (m.value, m.unit.value) for m in group.get_measurements()}
        count = int((labels == number).sum())
        assert sizes["Volume"] == (pytest.approx(count * voxel), "ml")
        assert sizes["Long axis"] == (pytest.approx(expected[number], rel=0.05), "mm")
        segment = group.referenced_segment
        assert segment.referenced_sop_instance_uid == segments.SOPInstanceUID
        assert list(np.atleast_1d(segment.referenced_segment_numbers)) == [number]
    (absent,) = groups[3].get_measurements()
    assert (absent.name.meaning, absent.value) == ("Volume", 0)
    assert groups[2].finding_sites[0].value.meaning == "Liver"


def test_an_empty_segmentation_has_a_report(volume: Volume, tmp_path: Path) -> None:
    labels = np.zeros(volume.shape, np.uint8)
    seg, report = tmp_path / "seg.dcm", tmp_path / "report.dcm"
    write_segmentation(seg, labels, volume, names=["liver"], measurements=report)
    for path in (seg, report):
        check_iod(path)


def test_measurements_need_a_dicom_segmentation(
    volume: Volume, labels: np.ndarray, tmp_path: Path
) -> None:
    for target, report, message in (
        ("seg.nii.gz", "report.dcm", "report on a DICOM segmentation"),
        ("seg.dcm", "report.json", "use one of: .dcm"),
        ("seg.dcm", "seg.dcm", "two outputs have the same name"),
    ):
        with pytest.raises(UsageError, match=message):
            write_segmentation(tmp_path / target, labels, volume, measurements=tmp_path / report)
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_written_leaves_no_segmentation(
    volume: Volume, labels: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        write_segmentation(
            tmp_path / "seg.dcm", labels, volume, measurements=tmp_path / "no" / "report.dcm"
        )
    assert not list(tmp_path.iterdir())


def test_diameters_of_a_disc_and_of_lines() -> None:
    rows, columns = np.mgrid[:101, :101]
    for radius in (5, 17.5, 40):
        disc = (rows - 50) ** 2 + (columns - 50) ** 2 <= radius**2
        assert longest_diameter(disc, np.array([1.0, 1.0])) == pytest.approx(2 * radius, abs=1.1)
    line = np.zeros((9, 9), bool)
    line[4, 2:7] = True
    assert longest_diameter(line, np.array([0.5, 0.1])) == 2.5
    assert longest_diameter(line.T, np.array([0.5, 2.0])) == 10.0
    assert longest_diameter(np.zeros((3, 3), bool), np.array([1.0, 1.0])) == 0


def test_the_longest_diameter_is_that_of_one_slice(volume: Volume) -> None:
    labels = np.zeros(volume.shape, np.uint8)
    labels[2:4, 2, 1], labels[2:9, 2, 3] = 1, 1
    size = measure(labels, volume, 1)
    assert (size.diameter_slice, size.diameter_mm) == (3, pytest.approx(7 * 0.6))
    empty = measure(labels, volume, 2)
    assert (empty.millilitres, empty.diameter_mm, empty.diameter_slice) == (0, 0, None)


def test_a_nifti_has_tables_beside_it(volume: Volume, labels: np.ndarray, tmp_path: Path) -> None:
    styles = {"liver": SegmentStyle(colour=(1, 2, 3))}
    details = SegmentationDetails(styles=styles)
    write_segmentation(tmp_path / "a.nii.gz", labels, volume, names=NAMES, details=details)
    lines = (tmp_path / "a.labels.txt").read_text().splitlines()
    rows = [line.split(maxsplit=7) for line in lines if not line.startswith("#")]
    assert [row[7] for row in rows] == ['"Clear Label"', *(f'"{name}"' for name in NAMES)]
    assert rows[1][:4] == ["1", "1", "2", "3"]
    table = json.loads((tmp_path / "a.labels.json").read_text())["labels"]
    assert [entry["name"] for entry in table] == list(NAMES)
    assert table[0]["colour"] == [1, 2, 3]
    assert table[1]["codes"]["modifier"]["meaning"] == "Left"


DCMQI = {
    "segmentAttributes": [
        [
            {
                "labelID": 1,
                "SegmentLabel": "thingamajig",
                "SegmentedPropertyCategoryCodeSequence": {
                    "CodeValue": "49755003",
                    "CodingSchemeDesignator": "SCT",
                    "CodeMeaning": "Morphologically Altered Structure",
                },
                "SegmentedPropertyTypeCodeSequence": {
                    "CodeValue": "4147007",
                    "CodingSchemeDesignator": "SCT",
                    "CodeMeaning": "Mass",
                },
                "recommendedDisplayRGBValue": [177, 122, 101],
            }
        ]
    ]
}


def test_codes_of_classes_come_from_csv_and_from_dcmqi(
    volume: Volume, labels: np.ndarray, tmp_path: Path
) -> None:
    table, meta = tmp_path / "codes.csv", tmp_path / "meta.json"
    with table.open("w", newline="") as f:
        csv.writer(f).writerows(
            [
                ("name", "category", "type", "region", "colour"),
                ("thingamajig", "49755003:Abnormal", "SCT:4147007:Mass", "12738006:Brain", ""),
                ("liver", "", "", "", "#b17a65"),
            ]
        )
    meta.write_text(json.dumps(DCMQI))
    from_csv, from_dcmqi = read_class_codes(table), read_class_codes(meta)
    assert from_csv["liver"] == SegmentStyle(colour=(177, 122, 101))
    assert from_dcmqi["thingamajig"].colour == (177, 122, 101)
    for styles in (from_csv, from_dcmqi):
        codes = styles["thingamajig"].codes
        assert codes is not None
        assert (codes.type.value, codes.type.meaning) == ("4147007", "Mass")
    path = tmp_path / "seg.dcm"
    details = SegmentationDetails(styles=from_csv)
    write_segmentation(path, labels, volume, names=NAMES, details=details)
    check_iod(path)
    segments = pydicom.dcmread(path).SegmentSequence
    assert segments[3].AnatomicRegionSequence[0].CodeMeaning == "Brain"
    colour = highdicom.color.CIELabColor.from_rgb(177, 122, 101)
    assert tuple(segments[0].RecommendedDisplayCIELabValue) == tuple(colour.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,colour\na,#ffffff\n", "has the columns colour, label; expected name and some of"),
        ("name,colour\nliver,red\n", "line 2: 'red' is not a colour, expected #rrggbb"),
        ("name,type\nliver,10200004\n", "line 2: its type is '10200004', expected VALUE:MEANING"),
        ("name,type\nliver,1:Liver\n", "line 2 has a category without a type, or the reverse"),
        ("name,colour\nliver,#ffffff,3\n", "line 2 has no name, or more values"),
        (f"name,type\nliver,{'1' * 17}:Liver\n", "expected 1 to 16 characters"),
        ('{"a": 1}', "has no list `segmentAttributes`"),
        ("{", "is not JSON"),
        ('{"segmentAttributes": [[3]]}', "segment 1 is 3, expected an object"),
        ('{"segmentAttributes": [[{}]]}', "segment 1 has no name"),
        (
            '{"segmentAttributes": [[{"SegmentLabel": "a", "recommendedDisplayRGBValue": 1}]]}',
            "its colour is",
        ),
        (
            '{"segmentAttributes": [[{"SegmentLabel": "a", "AnatomicRegionSequence": {}, '
            '"SegmentedPropertyTypeCodeSequence": "Liver"}]]}',
            "should be an object with CodingSchemeDesignator",
        ),
    ],
)
def test_a_wrong_file_of_codes_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "codes"
    path.write_text(text)
    with pytest.raises(ImageError, match="codes") as caught:
        read_class_codes(path)
    assert message in str(caught.value)


def test_a_missing_file_of_codes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read as codes of classes"):
        read_class_codes(tmp_path / "no.csv")
