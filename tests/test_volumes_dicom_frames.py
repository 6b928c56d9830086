"""One series, phase or multi-frame object of several; where its slices lie."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_series import (
    COLUMNS,
    OBLIQUE,
    ROWS,
    SLICES,
    back,
    enhanced,
    label_sets,
    placed,
    refused,
    sample,
    save,
    slices,
)
from pydicom.dataset import Dataset

from medsa_deploy.errors import ImageError
from medsa_deploy.images import (
    check_segmentation_target,
    is_volume,
    read_volume,
    write_segmentation,
)


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
    ("name", "noun"),
    [("liver_1frame.dcm", "a segmentation"), ("rtdose.dcm", "a dose distribution")],
)
def test_what_was_made_from_images_is_no_volume(name: str, noun: str) -> None:
    assert not is_volume(sample(name))
    with pytest.raises(ImageError, match=f"is {noun}, not an image"):
        read_volume(sample(name))
