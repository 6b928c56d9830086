"""DICOM series in their true order, or refused by name."""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import PIL.Image
import pytest
import SimpleITK
from dicom_series import (
    AXIAL,
    COLUMNS,
    OBLIQUE,
    ROWS,
    SAGITTAL,
    SLICES,
    back,
    refused,
    rename,
    sample,
    save,
    slices,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import RLELossless

from medsa_deploy.errors import ImageError
from medsa_deploy.images import (
    is_volume,
    read_image,
    read_volume,
    write_segmentation,
)


def itk(folder: Path) -> Any:
    """The series as SimpleITK sorts and reads it."""
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def test_a_real_series_is_the_one_another_library_reads(tmp_path: Path) -> None:
    for path in sample("dicomdirtests/98892001/CT5N/2392").parent.iterdir():
        shutil.copy(path, tmp_path)
    volume = read_volume(tmp_path)
    reference = itk(tmp_path)
    assert (volume.kind, volume.shape, volume.axis, len(volume)) == ("dicom", (16, 16, 5), 2, 5)
    assert [path.name for path in volume.files] == ["3353", "3023", "2693", "2392", "2062"]
    assert volume.spacing_mm == pytest.approx(reference.GetSpacing())
    for index, expected in enumerate(SimpleITK.GetArrayFromImage(reference)):
        np.testing.assert_array_equal(volume.slice(index).pixels, expected)
    assert is_volume(tmp_path)


@settings(max_examples=25, deadline=None)
@given(
    names=st.permutations("abcdef"),
    reverse=st.booleans(),
    orientation=st.sampled_from([AXIAL, SAGITTAL, OBLIQUE, [-1, 0, 0, 0, -1, 0]]),
    voxel=st.tuples(*(st.integers(0, n - 1) for n in (COLUMNS, ROWS, SLICES))),
)
def test_order_comes_from_positions_and_labels_go_back(
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    reverse: bool,
    orientation: list[float],
    voxel: tuple[int, int, int],
) -> None:
    folder = tmp_path_factory.mktemp("order")
    datasets = slices(orientation=orientation)
    for number, dataset in enumerate(reversed(datasets) if reverse else datasets):
        dataset.InstanceNumber = number
    save(datasets, folder, "".join(names))
    volume = read_volume(folder)
    assert [path.stem for path in volume.files] == names
    assert volume.shape == (COLUMNS, ROWS, SLICES)
    assert volume.spacing_mm == pytest.approx((0.6, 0.8, 2.5), abs=1e-5)
    assert [volume.slice(k).pixels[0, 0] for k in range(SLICES)] == [k - 1024 for k in range(6)]

    reference = itk(folder)  # x, y, z are ITK's index, too
    assert volume.affine is not None
    np.testing.assert_allclose(
        (volume.affine @ (*voxel, 1))[:3] * (-1, -1, 1),
        reference.TransformIndexToPhysicalPoint(voxel),
        atol=1e-4,
    )
    index, x, y = volume.locate(voxel)
    assert (x, y, index) == voxel
    assert volume.slice(index).pixels[int(y), int(x)] == reference[voxel]

    labels = np.zeros(volume.shape, np.uint8)
    volume.plane(labels, index)[int(y), int(x)] = 5
    assert np.argwhere(labels).tolist() == [list(voxel)]
    write_segmentation(folder / "out.nii.gz", labels, volume)
    written = SimpleITK.ReadImage(str(folder / "out.nii.gz"))
    assert written[voxel] == 5
    np.testing.assert_allclose(
        written.TransformIndexToPhysicalPoint(voxel),
        reference.TransformIndexToPhysicalPoint(voxel),
        atol=1e-3,
    )


def test_slices_are_upright_pictures(tmp_path: Path) -> None:
    volume = read_volume(save(slices(), tmp_path / "s"))
    for index, path in enumerate(volume.files):
        expected = read_image(path)
        np.testing.assert_array_equal(volume.slice(index).pixels, expected.pixels)
    assert volume.slice_size == (ROWS, COLUMNS)
    assert volume.dtype == np.float32
    assert volume.intensity_range() == (
        min(volume.slice(k).pixels.min() for k in range(SLICES)),
        max(volume.slice(k).pixels.max() for k in range(SLICES)),
    )
    assert read_volume(tmp_path / "s", axis=2).axis == 2
    with pytest.raises(
        ImageError, match="axis 0 was given, expected 2: DICOM slices are used as they were"
    ):
        read_volume(tmp_path / "s", axis=0)


def test_a_tilted_gantry_is_kept(tmp_path: Path) -> None:
    folder = save(slices(step=np.array([0, 1.5, 2.5])), tmp_path / "s")
    volume = read_volume(folder)
    assert volume.affine is not None
    np.testing.assert_allclose(volume.affine @ (0, 0, 2, 1), (-10, 17, 35, 1), atol=1e-9)
    labels = np.zeros(volume.shape, np.uint8)
    labels[1, 2, 3] = 1
    write_segmentation(tmp_path / "s.nii", labels, volume)
    np.testing.assert_allclose(nibabel.load(tmp_path / "s.nii").affine, volume.affine, atol=1e-5)
    write_segmentation(tmp_path / "s.dcm", labels, volume)
    np.testing.assert_array_equal(back(tmp_path / "s.dcm", volume), labels)


def test_pixels_of_unknown_size_are_not_placed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    series = slices()
    for dataset in series:
        del dataset.PixelSpacing
    volume = read_volume(save(series[::-1], tmp_path / "s"))
    assert volume.affine is None
    assert [int(volume.slice(k).pixels[0, 0] + 1024) for k in range(SLICES)] == list(range(SLICES))
    assert "but no size of a pixel (PixelSpacing)" in caplog.text
    write_segmentation(tmp_path / "s.nii", np.ones(volume.shape, np.uint8), volume)
    header = nibabel.load(tmp_path / "s.nii").header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (0, 0)


def test_other_files_are_passed_over(tmp_path: Path) -> None:
    folder = save(slices(), tmp_path / "s")
    (folder / "notes.txt").write_text("scanned on Monday")
    (folder / ".hidden.dcm").write_text("nothing")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    for name in ("rtplan.dcm", "rtstruct.dcm", "rtdose.dcm", "test-SR.dcm", "liver_1frame.dcm"):
        shutil.copy(sample(name), folder)
    volume = read_volume(folder)
    assert [path.stem for path in volume.files] == list("abcdef")
    assert is_volume(folder)
    write_segmentation(folder / "seg.dcm", np.ones(volume.shape, np.uint8), volume)
    assert len(read_volume(folder)) == SLICES
    PIL.Image.new("L", (4, 4)).save(folder / "overlay.png")
    write_segmentation(folder / "s.seg.nii.gz", np.ones(volume.shape, np.uint8), volume)
    assert is_volume(folder)
    assert len(read_volume(folder)) == SLICES


def test_a_damaged_file_is_not_passed_over(tmp_path: Path) -> None:
    folder = save(slices(), tmp_path / "s")
    (folder / "text.dcm").write_text("no DICOM at all " * 50)
    assert is_volume(folder)
    refused(folder, r"text\.dcm")
    (folder / "text.dcm").write_bytes(b"")
    refused(folder, r"text\.dcm (does not look like|cannot be read as) DICOM")


def test_two_series_are_listed(tmp_path: Path) -> None:
    folder = save(slices(SeriesDescription="Thorax  lung", SeriesNumber=4), tmp_path / "s")
    save(slices(2, SeriesDescription="", SeriesNumber=None), folder, "xy")
    assert is_volume(folder)
    message = refused(folder, "holds 2 series: ")
    assert "series 4 (CT, 6 images of 16×12 pixels, such as a.dcm, UID " in message
    assert "series ? (CT, 2 images of 16×12 pixels, such as x.dcm, UID " in message
    assert "Thorax" not in message  # free text, in which names of patients occur
    assert message.endswith("choose one by its UID (--series); none was given")


def test_a_localizer_of_the_same_series_is_named(tmp_path: Path) -> None:
    datasets = slices(5)
    scout = slices(1, orientation=SAGITTAL, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])[0]
    scout.SeriesInstanceUID = datasets[0].SeriesInstanceUID
    folder = save([*datasets, scout], tmp_path / "s")
    refused(
        folder,
        r"mixes orientations: 1\\0\\0\\0\\1\\0 in 5 images, 0\\1\\0\\0\\0\\-1 in f\.dcm; keep .* "
        r"or choose an orientation \(--orientation\) 0…1; none was given",
    )
    chosen = read_volume(folder, orientation=0)
    assert [path.name for path in chosen.files] == [f"{n}.dcm" for n in "abcde"]
    assert [path.name for path in read_volume(folder, orientation=1).files] == ["f.dcm"]
    with pytest.raises(ImageError, match=r"0…1; 2 was given"):
        read_volume(folder, orientation=2)
    with pytest.raises(ImageError, match="one orientation: leave the orientation out"):
        read_volume(save(slices(3), tmp_path / "one"), orientation=0)


def test_a_real_fan_of_slices_is_refused(tmp_path: Path) -> None:
    for path in sample("dicomdirtests/98892003/MR700/4648").parent.iterdir():
        shutil.copy(path, tmp_path)
    refused(tmp_path, r"mixes orientations: .* in 1 images, .* and 3 more; keep the slices of one")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"Rows": 6, "Columns": 32}, r"mixes image sizes: 16×12 in 5 images, 32×6 in c\.dcm"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, r"kinds of pixels: .*MONOCHROME1 in c\.dcm"),
        ({"PixelSpacing": [0.8, 0.7]}, r"mixes pixel spacings: 0.8\\0.6 .* 0.8\\0.7 in c\.dcm"),
        ({"PixelSpacing": None}, r"mixes pixel spacings: 0.8\\0.6 in 5 images, none in c\.dcm"),
        ({"FrameOfReferenceUID": "1.2.3"}, r"mixes frames of reference: .* 1\.2\.3 in c\.dcm"),
        ({"ImagePositionPatient": None}, r"Orientation\w+ is missing in c\.dcm; their place"),
        ({"ImageOrientationPatient": None}, r"Orientation\w+ is missing in c\.dcm; their place"),
        ({"NumberOfFrames": 2}, r"c\.dcm is one of 6 files of a series and holds several frames"),
        ({"ImagePositionPatient": [10, -20, 99]}, r"between b\.dcm and d\.dcm there are 5 mm"),
        ({"ImagePositionPatient": [11, -20, 35]}, r"b\.dcm and c\.dcm the slices are shifted side"),
    ],
)
def test_a_slice_that_does_not_belong_is_named(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    datasets = slices()
    for name, value in change.items():
        setattr(datasets[2], name, value)
    refused(save(datasets, tmp_path / "s"), match)


@pytest.mark.parametrize("orientation", [[0.0] * 6, [1, 0, 0, 1, 0, 0], [2, 0, 0, 0, 1, 0]])
def test_an_impossible_orientation_is_refused(tmp_path: Path, orientation: list[float]) -> None:
    folder = save(slices(step=np.array([0, 0, 1]), orientation=orientation), tmp_path / "s")
    refused(folder, r"a\.dcm has ImageOrientationPatient .*, expected two perpendicular")


@pytest.mark.parametrize(("gone", "count"), [([2], "1 missing"), ([2, 3], "2 missing")])
def test_missing_slices_are_counted(tmp_path: Path, gone: list[int], count: str) -> None:
    folder = save(slices(), tmp_path / "s")
    for k in gone:
        (folder / f"{'abcdef'[k]}.dcm").unlink()
    after = "abcdef"[gone[-1] + 1]
    refused(folder, rf"between b\.dcm and {after}\.dcm there are .* elsewhere 2.5 mm \({count}\)")


def test_several_gaps_are_counted(tmp_path: Path) -> None:
    folder = save(slices(10), tmp_path / "s")
    for name in "cf":
        (folder / f"{name}.dcm").unlink()
    refused(folder, r"5 mm, elsewhere 2\.5 mm \(1 missing\); 1 more such places; complete")


def test_two_slices_at_one_place_are_refused(tmp_path: Path) -> None:
    datasets = slices()
    folder = save([*datasets, rename(copy.deepcopy(datasets[3]))], tmp_path / "s")
    refused(folder, r"d\.dcm and g\.dcm lie at the same place .pairs of this kind: 1.; keep")
    save([datasets[3]], folder, "g")
    refused(folder, r"d\.dcm and g\.dcm are copies of one image")


@pytest.mark.parametrize(("offset", "fits"), [(0.02, True), (0.035, False)])
def test_the_tolerance_of_positions(tmp_path: Path, offset: float, fits: bool) -> None:
    datasets = slices(spacing=1.0)
    datasets[5].ImagePositionPatient = [10, -20, 35 + offset]
    save(datasets, tmp_path / "s")
    if fits:
        assert read_volume(tmp_path / "s").spacing_mm[2] == pytest.approx(1 + offset / 5)
    else:
        refused(tmp_path / "s", r"between e\.dcm and f\.dcm there are 1\.035 mm, elsewhere 1 mm")


def test_stills_without_position_are_no_series(tmp_path: Path) -> None:
    datasets = slices()
    for dataset in datasets:
        del dataset.ImagePositionPatient
    folder = save(datasets, tmp_path / "s")
    assert not is_volume(folder)
    refused(folder, "a.dcm and 5 more have no ImagePositionPatient")


def test_one_image_is_a_volume_of_one_slice(tmp_path: Path) -> None:
    folder = save(slices(1), tmp_path / "s")
    assert not is_volume(folder)
    assert not is_volume(folder / "a.dcm")
    for path in (folder, folder / "a.dcm"):
        volume = read_volume(path)
        assert (volume.shape, volume.spacing_mm) == ((16, 12, 1), (0.6, 0.8, 5))
        labels = np.ones(volume.shape, np.uint8)
        write_segmentation(tmp_path / "one.dcm", labels, volume)
        np.testing.assert_array_equal(back(tmp_path / "one.dcm", volume), labels)


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:
    datasets = slices()
    for k, dataset in enumerate(datasets):
        dataset.RescaleSlope, dataset.RescaleIntercept = 1 + k / 2, -k
    volume = read_volume(save(datasets, tmp_path / "s"))
    assert volume.dtype == np.float32  # though the first slice needs none
    for k, dataset in enumerate(datasets):
        pixels = volume.slice(k).pixels
        assert pixels.dtype == np.float32
        np.testing.assert_allclose(pixels, dataset.pixel_array * (1 + k / 2) - k)
    assert is_volume(tmp_path / "s")


def test_one_window_holds_for_all_slices(tmp_path: Path) -> None:
    datasets = slices()
    for k, dataset in enumerate(datasets):
        dataset.WindowCenter, dataset.WindowWidth = -800 + 100 * k, 400
    folder = save(datasets, tmp_path / "s")
    volume = read_volume(folder)
    assert volume.rendered
    assert not volume.inverted
    for k in range(SLICES):
        image = volume.slice(k)
        assert image.display is not None
        expected = np.clip((image.pixels + 500 + 0.5) / 399 + 0.5, 0, 1) * 255
        np.testing.assert_allclose(image.display, expected, atol=1e-3)
    del datasets[3].WindowCenter
    volume = read_volume(save(datasets, folder))
    assert not volume.rendered
    assert volume.slice(1).display is None


@pytest.mark.parametrize("bits", [8, 16])
def test_monochrome1_is_inverted_as_in_an_image(tmp_path: Path, bits: int) -> None:
    datasets = slices(PhotometricInterpretation="MONOCHROME1", RescaleIntercept=0)
    if bits == 8:
        for dataset in datasets:
            pixels = (dataset.pixel_array // 16).astype(np.uint8)
            dataset.BitsAllocated = dataset.BitsStored = 8
            dataset.HighBit, dataset.PixelRepresentation = 7, 0
            dataset.PixelData = pixels.tobytes()
            dataset["PixelData"].VR = "OB"
    volume = read_volume(save(datasets, tmp_path / "s"))
    assert volume.inverted
    assert volume.rendered is (bits == 8)
    assert volume.dtype == (np.uint8 if bits == 8 else np.int16)
    for index, path in enumerate(volume.files):
        image, expected = volume.slice(index), read_image(path)
        assert image.inverted
        np.testing.assert_array_equal(image.pixels, expected.pixels)
        np.testing.assert_equal(image.display, expected.display)


def test_compressed_slices(tmp_path: Path) -> None:
    plain = read_volume(save(slices(), tmp_path / "s"))
    datasets = slices()
    for dataset in datasets:
        dataset.compress(RLELossless, generate_instance_uid=False)
    packed = read_volume(save(datasets, tmp_path / "p"))
    for index in range(SLICES):
        np.testing.assert_array_equal(packed.slice(index).pixels, plain.slice(index).pixels)


def test_empty_and_truncated_series_are_refused(tmp_path: Path) -> None:
    empty = slices(PixelData=bytes(ROWS * COLUMNS * 2))
    refused(save(empty, tmp_path / "e"), r"every voxel is -1024.0: nothing to segment")
    folder = save(slices(), tmp_path / "s")
    content = (folder / "f.dcm").read_bytes()
    (folder / "f.dcm").write_bytes(content[:-200])
    volume = read_volume(folder)
    with pytest.raises(ImageError, match=r"f\.dcm cannot be read as DICOM"):
        volume.slice(5)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    folder = save(slices(), tmp_path / "s")
    volume = read_volume(folder)
    labels = np.ones(volume.shape, np.uint8)
    save([rename(slices(1)[0])], folder)
    with pytest.raises(ImageError, match=r"a\.dcm has changed since it was read"):
        write_segmentation(tmp_path / "seg.dcm", labels, volume)
    (folder / "a.dcm").unlink()
    with pytest.raises(ImageError, match=r"a\.dcm"):
        write_segmentation(tmp_path / "seg.dcm", labels, volume)
    assert not (tmp_path / "seg.dcm").exists()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_nothing_but_image_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    datasets = DAMAGED
    save(datasets, folder)
    buffer = io.BytesIO()
    datasets[1].save_as(buffer, enforce_file_format=True)
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (folder / "b.dcm").write_bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    with contextlib.suppress(ImageError):
        volume = read_volume(folder)
        volume.intensity_range()
        write_segmentation(folder / "seg.dcm", np.zeros(volume.shape, np.uint8), volume)
    is_volume(folder)


def _small(dataset: Dataset) -> Dataset:
    """Only the attributes that matter, so that damage often meets them."""
    small = Dataset()
    small.file_meta = dataset.file_meta
    for name in (
        "SOPClassUID", "SOPInstanceUID", "Modality", "PatientName", "StudyInstanceUID",
        "SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient",
        "FrameOfReferenceUID", "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns",
        "PixelSpacing", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
        "RescaleIntercept", "RescaleSlope", "PixelData",
    ):  # fmt: skip
        small[name] = dataset[name]
    small.VOILUTSequence = Sequence([Dataset()])
    small.VOILUTSequence[0].LUTDescriptor = [4, 0, 8]
    small.VOILUTSequence[0].add_new("LUTData", "OW", np.arange(4, dtype="<u2").tobytes())
    return small


DAMAGED = [_small(dataset) for dataset in slices(3)]
