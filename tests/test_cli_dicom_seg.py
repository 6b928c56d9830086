"""Colours, codes and measurements on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import highdicom
import pydicom
import pytest
from command_line import call
from dicom_network import ct_series

PROMPTS = {
    "structures": [
        {"name": "liver", "boxes": [[10, 10, 0, 60, 60, 1]], "colour": "#010203"},
        {
            "name": "gadget",
            "boxes": [[60, 60, 0, 110, 110, 1]],
            "codes": {"category": "260787004:Physical object", "type": "65818007:Stent"},
        },
        {"name": "spleen", "points": [[30, 80, 1]]},
    ]
}


@pytest.fixture
def series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "series"
    folder.mkdir()
    for k, dataset in enumerate(ct_series(2)):
        dataset.save_as(folder / f"{k}.dcm")
    return folder


def test_styles_come_from_codes_prompts_and_colours(bundle: Path, series: Path) -> None:
    Path("prompts.json").write_text(json.dumps(PROMPTS))
    Path("codes.csv").write_text(
        "name,category,type,colour\n"
        "liver,,,#aaaaaa\n"
        "spleen,91723000:Anatomical Structure,78961009:Spleen,#bbbbbb\n"
    )
    options = ["--class-codes", "codes.csv", "--colors", "spleen=#102030, gadget=#405060"]
    done = call(
        *("run", bundle, series, "--prompts", "prompts.json", "-o", "seg.dcm"),
        *("--measurements", "sr.dcm", *options, "--json"),
    )
    assert done.code == 0, done.err
    assert done.json["measurements"] == "sr.dcm"
    liver, gadget, spleen = pydicom.dcmread("seg.dcm").SegmentSequence
    for segment, rgb in ((liver, (1, 2, 3)), (gadget, (64, 80, 96)), (spleen, (16, 32, 48))):
        colour = highdicom.color.CIELabColor.from_rgb(*rgb)
        assert tuple(segment.RecommendedDisplayCIELabValue) == tuple(colour.value)
    assert gadget.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Stent"
    (algorithm,) = liver.SegmentationAlgorithmIdentificationSequence
    assert bundle.name in "".join(algorithm.AlgorithmParameters)
    assert pydicom.dcmread("sr.dcm").Modality == "SR"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--colors", "liver"], "--colors 'liver': expected NAME=RRGGBB"),
        (["--colors", "liver=red"], "--colors liver: 'red' is not a colour"),
        (["--class-codes", "no.csv"], "no.csv cannot be read as codes of classes"),
        (["--measurements", "sr.dcm", "-o", "a.nii.gz"], "report on a DICOM segmentation"),
        (["--to-web", "http://x", "-o", "a.nii.gz"], "--to-web takes a DICOM segmentation"),
        (["--study", "1.2"], "--from-web URL and --study UID belong together"),
        (["--from-web", "http://x", "--study", "1.2"], "give an image, or --from-web URL"),
    ],
)
def test_wrong_options_are_named(
    bundle: Path, series: Path, options: list[str], message: str
) -> None:
    done = call("run", bundle, series, "--box", "9,9,0,60,60,1", *options)
    assert done.code == 2
    assert message in done.error
    assert not [path for path in Path().iterdir() if path.is_file()]


def test_a_run_needs_something_to_segment(bundle: Path) -> None:
    done = call("run", bundle, "--box", "9,9,60,60")
    assert done.code == 2
    assert "give an image, or --from-web URL" in done.error


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"boxes": [[0, 0, 0, 9, 9, 1]], "colour": "#010203"}, "belong to a name or a class"),
        ({"name": "a", "boxes": [[0, 0, 0, 9, 9, 1]], "colour": 3}, "its colour is no text"),
        ({"name": "a", "boxes": [[0, 0, 0, 9, 9, 1]], "codes": "x"}, "belong to a name"),
    ],
)
def test_wrong_styles_of_prompts_are_named(
    bundle: Path, series: Path, entry: dict[str, object], message: str
) -> None:
    Path("prompts.json").write_text(json.dumps({"structures": [entry]}))
    done = call("run", bundle, series, "--prompts", "prompts.json", "-o", "seg.dcm")
    assert done.code == 2
    assert message in done.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rules", "no.json"], "no.json cannot be read"),
        (["--rules", "rules.json"], "segmentations go nowhere: give --send HOST:PORT:AET"),
        (["--rules", "rules.json", "--send", "pacs"], "expected HOST:PORT:AET"),
        (["--rules", "other.json", "--send", "a:1:B"], "no.medsa"),
        (
            ["--rules", "rules.json", "--send", "a:1:B", "--tls-cert", "x.pem"],
            "--tls-cert and --tls-key belong together",
        ),
    ],
)
def test_a_node_that_cannot_start_says_why(
    bundle: Path, series: Path, options: list[str], message: str
) -> None:
    Path("rules.json").write_text('{"rules": [{"prompts": {"template": "whole"}}]}')
    Path("other.json").write_text(
        '{"rules": [{"bundle": "no.medsa", "prompts": {"template": "whole"}}]}'
    )
    done = call("dicom-node", bundle, *options, "--http-port", "0")
    assert done.code == 2
    assert message in done.err
