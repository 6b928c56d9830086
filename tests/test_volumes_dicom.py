"""DICOM series in their true order, or refused by name; segmentations that refer to them."""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import PIL.Image
import pydicom
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import RLELossless, generate_uid

from medsa_deploy.errors import ImageError, MissingDependencyError, UsageError
from medsa_deploy.images import (
    SegmentationDetails,
    Volume,
    check_segmentation_target,
    is_volume,
    read_image,
    read_volume,
    write_segmentation,
)

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
    series, made = generate_uid(), []
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
        made.append(dataset)
    return made


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


def refused(folder: Path, match: str) -> str:
    with pytest.raises(ImageError, match=match) as caught:
        read_volume(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert "series 4 'Thorax lung' (CT, 6 images, such as a.dcm, UID " in message
    assert "series ? 'no description' (CT, 2 images, such as x.dcm, UID " in message
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
    whole = (folder / "f.dcm").read_bytes()
    (folder / "f.dcm").write_bytes(whole[:-200])
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


def enhanced(folder: Path, datasets: list[Dataset]) -> Path:
    """The slices as one multi-frame CT, through highdicom (which sorts them its own way)."""
    combined = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        datasets, generate_uid(), 1, generate_uid(), 1
    )
    combined.save_as(folder / "enhanced.dcm")
    return folder / "enhanced.dcm"


def test_a_series_is_chosen_by_its_uid(tmp_path: Path) -> None:
    first, second = slices(), slices(4)
    folder = save(first, tmp_path / "s", "abcdef")
    save(second, folder, "ghij")
    uid = second[0].SeriesInstanceUID
    message = refused(folder, "holds 2 series: ")
    assert f"UID {uid}" in message
    assert message.endswith("choose one by its UID (--series); none was given")
    assert len(read_volume(folder, series=uid)) == 4
    assert len(read_volume(folder, series=first[0].SeriesInstanceUID)) == SLICES
    with pytest.raises(ImageError, match=r"\(--series\); 1\.2\.3 was given"):
        read_volume(folder, series="1.2.3")


@pytest.mark.parametrize("field", ["TriggerTime", "EchoTime", "AcquisitionNumber"])
def test_a_phase_is_one_image_of_each_place(tmp_path: Path, field: str) -> None:
    phases = []
    for phase, late in enumerate((10, 30, 20)):
        datasets = slices(4, SeriesInstanceUID="1.2.3")
        for index, dataset in enumerate(datasets):
            setattr(dataset, field, str(late))
            dataset.InstanceNumber = str(100 - 10 * phase - index)
        phases.append(datasets)
    marks = []
    for datasets, mark in zip(phases, (111, 333, 222), strict=True):
        for dataset in datasets:
            pixels = dataset.pixel_array.copy()
            pixels[0, 1] = mark
            dataset.PixelData = pixels.tobytes()
        marks += datasets
    folder = save(marks, tmp_path / "s", "abcdefghijkl")
    refused(
        folder, r"3 images at each of 4 places, .*choose a phase \(--phase\) 0…2; none was given"
    )
    for phase, mark in enumerate((111, 222, 333)):
        volume = read_volume(folder, phase=phase)
        assert volume.shape == (COLUMNS, ROWS, 4)
        stored = [pydicom.dcmread(h.path).pixel_array for h in volume.slices.headers]  # type: ignore[attr-defined]
        assert [int(pixels[0, 1]) for pixels in stored] == [mark] * 4
        assert [int(pixels[0, 0]) for pixels in stored] == [0, 1, 2, 3]
    with pytest.raises(ImageError, match="0…2; 3 was given"):
        read_volume(folder, phase=3)


def test_a_phase_of_a_plain_series_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="has one image at each place: leave the phase out"):
        read_volume(save(slices(), tmp_path / "s"), phase=0)


def test_a_series_and_a_phase_are_for_dicom(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(60).reshape(3, 4, 5))
    for choice in ({"series": "1"}, {"phase": 0}):
        with pytest.raises(ImageError, match="is not DICOM"):
            read_volume(tmp_path / "a.npy", **choice)  # type: ignore[arg-type]


def test_positions_place_slices_whatever_the_headers_declare(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SliceThickness is no spacing: slices overlap or leave gaps."""
    datasets = slices(spacing=2.5, SliceThickness=5, SpacingBetweenSlices=2.51)
    assert read_volume(save(datasets, tmp_path / "near")).spacing_mm[2] == pytest.approx(2.5)
    assert "SpacingBetweenSlices" not in caplog.text
    datasets = slices(spacing=2.5, SliceThickness=5, SpacingBetweenSlices=-4)
    assert read_volume(save(datasets, tmp_path / "far")).spacing_mm[2] == pytest.approx(2.5)
    assert (
        "is 2.5 mm by its positions, which is used, and 4 mm by its SpacingBetweenS" in caplog.text
    )


def test_one_slice_has_the_declared_distance(tmp_path: Path) -> None:
    (dataset,) = slices(1, SliceThickness=5, SpacingBetweenSlices=3)
    assert read_volume(save([dataset], tmp_path / "s")).spacing_mm == (0.6, 0.8, 3)


def test_the_innermost_pixel_spacing_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = enhanced(tmp_path, slices())
    dataset = pydicom.dcmread(path)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    dataset.PixelSpacing = [2, 2]
    dataset.save_as(path)
    assert read_volume(path).spacing_mm[:2] == pytest.approx((0.6, 0.8))
    assert "and 2 × 2 mm by its outer PixelSpacing" in caplog.text
    # a frame's own group that holds the thickness alone leaves the shared spacing as it is
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        measures = Dataset()
        measures.SliceThickness = "1"
        frame.PixelMeasuresSequence = [measures]
    del dataset.PixelSpacing
    assert shared.PixelMeasuresSequence[0].PixelSpacing == [0.8, 0.6]
    dataset.save_as(path)
    assert read_volume(path).spacing_mm == pytest.approx((0.6, 0.8, 2.5), abs=1e-5)


def test_an_enhanced_multiframe_is_the_series_it_was_made_from(tmp_path: Path) -> None:
    datasets = slices(orientation=OBLIQUE)
    for k, dataset in enumerate(datasets):
        dataset.RescaleSlope, dataset.WindowCenter, dataset.WindowWidth = 1 + k, k, 900
    series = read_volume(save(datasets, tmp_path / "s"))
    path = enhanced(tmp_path, [datasets[k] for k in (3, 0, 5, 1, 4, 2)])
    volume = read_volume(path)
    assert is_volume(path)
    assert is_volume(save([], tmp_path / "none")) is False
    assert (volume.shape, volume.files) == (series.shape, (path,))
    np.testing.assert_allclose(volume.affine, series.affine, atol=1e-6)
    for index in range(SLICES):
        image, expected = volume.slice(index), series.slice(index)
        np.testing.assert_array_equal(image.pixels, expected.pixels)
        np.testing.assert_array_equal(image.display, expected.display)
    labels = label_sets(volume.shape)["three"]
    write_segmentation(tmp_path / "seg.dcm", labels, volume)
    np.testing.assert_array_equal(back(tmp_path / "seg.dcm", volume), labels)
    write_segmentation(tmp_path / "seg2.dcm", labels, series)
    assert placed(tmp_path / "seg.dcm") == placed(tmp_path / "seg2.dcm")


def test_frames_of_several_phases_are_refused(tmp_path: Path) -> None:
    path = enhanced(tmp_path, slices())
    dataset = pydicom.dcmread(path)
    frames = dataset.PerFrameFunctionalGroupsSequence
    frames[4].PlanePositionSequence = frames[1].PlanePositionSequence
    dataset.save_as(path)
    refused(path, "frame 2 and frame 5 lie at the same place")
    del frames[4].PlanePositionSequence
    dataset.save_as(path)
    refused(path, "ImageOrientationPatient is missing in frame 5; their place")
    dataset.NumberOfFrames = 10**9
    dataset.save_as(path)
    refused(path, "announces 1000000000 frames, more than its size can hold")


def test_a_cine_clip_is_a_volume_of_frames(tmp_path: Path) -> None:
    path = sample("examples_ybr_color.dcm")
    volume = read_volume(path)
    assert is_volume(path)
    assert (volume.shape, volume.spacing_mm, volume.affine) == ((320, 240, 30), (1, 1, 1), None)
    assert (volume.colour, volume.dtype, volume.rendered) == (True, np.uint8, False)
    expected = pydicom.pixels.pixel_array(path, index=17)
    np.testing.assert_array_equal(volume.slice(17).pixels, expected)
    labels = np.zeros(volume.shape, np.uint8)
    volume.plane(labels, 17)[100:110, 200:230] = 1
    for call in (
        lambda: check_segmentation_target(tmp_path / "seg.dcm", volume),
        lambda: write_segmentation(tmp_path / "seg.dcm", labels, volume),
    ):
        with pytest.raises(ImageError, match=r"seg\.dcm: .* slices with a place in the patient"):
            call()
    write_segmentation(tmp_path / "seg.npy", labels, volume)
    assert np.load(tmp_path / "seg.npy")[200:230, 100:110, 17].all()
    write_segmentation(tmp_path / "seg.nii", labels, volume)
    assert nibabel.load(tmp_path / "seg.nii").shape == (320, 240, 30)


@pytest.mark.parametrize(
    ("name", "what"),
    [("liver_1frame.dcm", "a segmentation"), ("rtdose.dcm", "a dose distribution")],
)
def test_what_was_made_from_images_is_no_volume(name: str, what: str) -> None:
    assert not is_volume(sample(name))
    with pytest.raises(ImageError, match=f"is {what}, not an image"):
        read_volume(sample(name))


def back(path: Path, volume: Volume) -> np.ndarray:
    """The labels in a DICOM SEG, matched to `volume` by the instances (frames) it refers to."""
    segmentation = highdicom.seg.segread(path)
    frames = volume.slices.headers  # type: ignore[attr-defined]
    options = {"combine_segments": True, "assert_missing_frames_are_empty": True}
    if len(volume.files) == len(volume):
        found = segmentation.get_pixels_by_source_instance([f.uid for f in frames], **options)
    else:
        numbers = [f.number + 1 for f in frames]
        found = segmentation.get_pixels_by_source_frame(frames[0].uid, numbers, **options)
    return np.asarray(found).transpose(2, 1, 0)


def placed(path: Path) -> set[tuple[Any, ...]]:
    """(segment, position of the frame, row, column) of every voxel, through pydicom alone."""
    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    found = set()
    for group, frame in zip(dataset.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        holder = group if "SegmentIdentificationSequence" in group else shared
        segment = holder.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        position = tuple(map(float, group.PlanePositionSequence[0].ImagePositionPatient))
        found |= {(int(segment), position, *map(int, at)) for at in np.argwhere(frame)}
    return found


def label_sets(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    one = np.zeros(shape, np.uint8)
    one[3, 5, 2] = 1
    three = np.zeros(shape, np.uint8)
    three[2:9, 1:7, 0:4], three[4:6, 3:5, 1:3], three[15, 11, 5] = 1, 2, 3
    noise = np.random.default_rng(0).integers(0, 5, shape).astype(np.uint8)
    return {
        "one": one,
        "three": three,
        "noise": noise,
        "only the third": (one * 3).astype(np.uint8),
        "full": np.ones(shape, np.uint8),
        "empty": np.zeros(shape, np.uint8),
    }


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
        ({"PatientSex": "X"}, "cannot be written as a DICOM segmentation: 'X' is not a valid"),
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
