"""Segmentations that refer to the slices of a series, whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_series import AXIAL, OBLIQUE, SAGITTAL, SLICES, back, label_sets, placed, save, slices
from pydicom.dataset import Dataset

from medsa_deploy.errors import ImageError, MissingDependencyError, UsageError
from medsa_deploy.images import (
    SegmentationDetails,
    Volume,
    check_segmentation_target,
    is_volume,
    read_volume,
    write_segmentation,
)


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, OBLIQUE])
@pytest.mark.parametrize("name", list(label_sets((16, 12, 6))))
def test_a_segmentation_reads_back(tmp_path: Path, name: str, orientation: list[float]) -> None:
    datasets = slices(orientation=orientation)
    volume = read_volume(save(datasets, tmp_path / "s", "fbdace"))
    labels = label_sets(volume.shape)[name]
    check_segmentation_target(tmp_path / "seg.dcm", volume)
    write_segmentation(tmp_path / "seg.dcm", labels, volume)
    np.testing.assert_array_equal(back(tmp_path / "seg.dcm", volume), labels)
    positions = [tuple(map(float, d.ImagePositionPatient)) for d in datasets]
    assert placed(tmp_path / "seg.dcm") == {
        (int(labels[x, y, z]), positions[z], int(y), int(x)) for x, y, z in np.argwhere(labels)
    }


def test_what_a_segmentation_says(tmp_path: Path) -> None:
    datasets = slices()
    volume = read_volume(save(datasets, tmp_path / "s"))
    names = ("liver", "Läsion 肿瘤", "a\\b\n" + "c" * 70, "absent")
    labels = label_sets(volume.shape)["three"]
    details = SegmentationDetails(tool="a tool")
    write_segmentation(tmp_path / "seg.dcm", labels, volume, names=names, details=details)
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert dataset.SOPClassUID == pydicom.uid.SegmentationStorage
    assert (dataset.Modality, dataset.SegmentationType) == ("SEG", "BINARY")
    described = dataset.SegmentSequence
    assert [s.SegmentNumber for s in described] == [1, 2, 3, 4]
    assert [s.SegmentLabel for s in described[:2]] == ["liver", "Läsion 肿瘤"]
    assert described[2].SegmentLabel == f"a/b {'c' * 60}"
    for segment in described:
        assert segment.SegmentAlgorithmType == "SEMIAUTOMATIC"
        assert segment.SegmentAlgorithmName == "a tool"
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("a tool", "0.1.0")
    (referenced,) = dataset.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == datasets[0].SeriesInstanceUID
    assert {i.ReferencedSOPInstanceUID for i in referenced.ReferencedInstanceSequence} == {
        d.SOPInstanceUID for d in datasets
    }
    assert dataset.FrameOfReferenceUID == datasets[0].FrameOfReferenceUID
    assert dataset.StudyInstanceUID == datasets[0].StudyInstanceUID
    assert dataset.SeriesInstanceUID != datasets[0].SeriesInstanceUID
    assert dataset.PatientID == datasets[0].PatientID
    assert dataset.NumberOfFrames == 7  # 4 slices of the first, 2, 1; those without voxels are not


def test_an_empty_segmentation_holds_every_frame(tmp_path: Path) -> None:
    volume = read_volume(save(slices(), tmp_path / "s"))
    empty = np.zeros(volume.shape, np.uint8)
    write_segmentation(tmp_path / "seg.dcm", empty, volume, names=("a", "b"))
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert dataset.NumberOfFrames == 2 * SLICES
    assert not dataset.pixel_array.any()


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        (["GB18030"], "Zhang^XiaoDong=张^小东"),
    ],
)
def test_names_of_every_script_come_through(tmp_path: Path, charset: list[str], name: str) -> None:
    """The first character set of most Asian series is empty: the default repertoire."""
    datasets = slices()
    for dataset in datasets:
        dataset.SpecificCharacterSet = charset
        dataset.PatientName = name
    volume = read_volume(save(datasets, tmp_path / "s"))
    write_segmentation(tmp_path / "seg.dcm", np.ones(volume.shape, np.uint8), volume, names=("肝",))
    written = pydicom.dcmread(tmp_path / "seg.dcm")
    assert str(written.PatientName) == name
    assert written.SegmentSequence[0].SegmentLabel == "肝"


def test_the_patients_name_keeps_its_letters(tmp_path: Path) -> None:
    latin = slices(
        SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jörg", StudyDescription="Schädel"
    )
    volume = read_volume(save(latin, tmp_path / "s"))
    write_segmentation(tmp_path / "seg.dcm", np.ones(volume.shape, np.uint8), volume, names=("脑",))
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert (dataset.PatientName, dataset.StudyDescription) == ("Müller^Jörg", "Schädel")
    assert dataset.SegmentSequence[0].SegmentLabel == "脑"


def test_what_anonymisers_remove_is_left_empty(tmp_path: Path) -> None:
    datasets = slices()
    for dataset in datasets:
        for name in (
            "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber",
            "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName", "SliceThickness",
            "SeriesNumber", "PositionReferenceIndicator", "Manufacturer",
        ):  # fmt: skip
            delattr(dataset, name)
    volume = read_volume(save(datasets, tmp_path / "s"))
    labels = label_sets(volume.shape)["three"]
    check_segmentation_target(tmp_path / "seg.dcm", volume)
    write_segmentation(tmp_path / "seg.dcm", labels, volume)
    np.testing.assert_array_equal(back(tmp_path / "seg.dcm", volume), labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FrameOfReferenceUID": ""}, r"needs FrameOfReferenceUID of its source, which .*a\.dcm"),
        ({"StudyInstanceUID": ""}, r"needs StudyInstanceUID of its source"),
        ({"PixelSpacing": None}, "needs the PixelSpacing of its source"),
        ({"PatientSex": "X"}, "cannot be written as a DICOM segmentation: … is not a valid"),
    ],
)
def test_what_a_segmentation_needs_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    volume = read_volume(save(slices(**change), tmp_path / "s"))
    labels = np.ones(volume.shape, np.uint8)
    for call in (
        lambda: check_segmentation_target(tmp_path / "seg.dcm", volume),
        lambda: write_segmentation(tmp_path / "seg.dcm", labels, volume),
    ):
        with pytest.raises(ImageError, match=rf"seg\.dcm.*{message}") as caught:
            call()
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith("write .npy or .nii.gz")
    write_segmentation(tmp_path / "seg.nii.gz", labels, volume)
    tables = {"seg.labels.txt", "seg.labels.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"s", "seg.nii.gz", *tables}


def test_a_slice_is_never_overwritten(tmp_path: Path) -> None:
    folder = save(slices(), tmp_path / "s")
    volume = read_volume(folder)
    before = (folder / "c.dcm").read_bytes()
    with pytest.raises(UsageError, match=r"c\.dcm is part of the volume itself"):
        write_segmentation(folder / "c.dcm", np.ones(volume.shape, np.uint8), volume)
    assert (folder / "c.dcm").read_bytes() == before


def test_an_interrupted_segmentation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = read_volume(save(slices(), tmp_path / "s"))

    def interrupt(self: Dataset, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(highdicom.seg.Segmentation, "save_as", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_segmentation(tmp_path / "seg.dcm", np.ones(volume.shape, np.uint8), volume)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("library", "modules", "call"),
    [
        ("pydicom", ("dicom", "series"), lambda folder, _: read_volume(folder)),
        ("pydicom", ("dicom", "series"), lambda folder, _: is_volume(folder)),
        (
            "highdicom",
            (),
            lambda folder, volume: check_segmentation_target(folder / "seg.dcm", volume),
        ),
    ],
)
def test_without_the_library_the_extra_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    modules: tuple[str, ...],
    call: Callable[[Path, Volume], object],
) -> None:
    folder = save(slices(), tmp_path / "s")
    volume = read_volume(folder)
    monkeypatch.setitem(sys.modules, library, None)
    for module in modules:
        monkeypatch.delitem(sys.modules, f"medsa_deploy.images.{module}", raising=False)
        monkeypatch.delattr(f"medsa_deploy.images.{module}", raising=False)
    with pytest.raises(MissingDependencyError, match=rf"{library}.*'medsa-deploy\[dicom\]'"):
        call(folder, volume)
