"""Padding and NaN are no tissue: they leave the range of intensities alone, and are black."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_images import dicom, read
from dicom_series import save, slices
from fake_network import bright_pixels
from hypothesis import given
from hypothesis import strategies as st

from medsa_deploy.bundle.manifest import Conventions
from medsa_deploy.errors import ImageError
from medsa_deploy.images import Image, read_image, read_volume
from medsa_deploy.images.tissue import robust_window, tissue_range
from medsa_deploy.runtime.volumes.chunk_encoder import volume_window
from medsa_deploy.transforms.intensities import intensities

SAM = Conventions(preprocess="sam")
CT = np.linspace(-1024, 1500, 24 * 30).astype(np.int16).reshape(24, 30)


def padded(value: float) -> np.ndarray:
    """A CT whose corner is padding."""
    pixels = CT.astype(np.float32)
    pixels[:6, :6] = value
    return pixels


def image_of(pixels: np.ndarray, **fields: Any) -> Image:
    return Image(pixels=pixels, path=Path("a"), **fields)


@pytest.mark.parametrize("value", [-2000, -2048, -3024, -32768])
def test_a_filler_leaves_the_range_as_it_was(value: int) -> None:
    tissue = tissue_range([image_of(padded(value))])
    without = np.delete(padded(value).ravel(), np.flatnonzero(padded(value) == value))
    assert (tissue.low, tissue.high) == (without.min(), without.max())
    assert tissue.filler == value
    assert f"padding of {value} is left out and shown black" in tissue.remark
    assert tissue.looks_like_ct


@pytest.mark.parametrize("value", [-1100, -1024, -1400, 0, 5000])
def test_values_that_air_and_metal_have_are_kept(value: int) -> None:
    tissue = tissue_range([image_of(padded(value))])
    assert (tissue.low, tissue.high) == (padded(value).min(), padded(value).max())
    assert (tissue.filler, tissue.remark) == (None, "")


def test_negative_intensities_without_a_gap_are_no_filler() -> None:
    """A phase image of MR, or a CT of metal with streaks."""
    pixels = np.linspace(-4096, 4095, 900).reshape(30, 30)
    assert tissue_range([image_of(pixels)]).filler is None


@given(st.lists(st.sampled_from([-3024, -1000, -500, 40, 900]), min_size=1, max_size=6))
def test_a_volume_is_judged_as_one(values: list[int]) -> None:
    """Whatever slice holds the filler, and also if one holds nothing else."""
    images = [image_of(np.full((3, 4), value, np.int16)) for value in values]
    together = image_of(np.stack([image.pixels for image in images]).reshape(-1, 4))
    assert tissue_range(images) == tissue_range([together])


@pytest.mark.parametrize("preprocess", ["sam", "medsa"])
def test_an_image_is_stretched_without_its_padding(
    preprocess: str, caplog: pytest.LogCaptureFixture
) -> None:
    conventions = dataclasses.replace(SAM, preprocess=preprocess)
    shown, window = intensities(image_of(padded(-3024)), conventions, None)
    assert window is not None
    assert window[0] > -1100
    assert (shown[:6, :6] == 0).all()
    expected, _ = intensities(image_of(padded(-1024)), conventions, window)
    np.testing.assert_array_equal(shown[6:], expected[6:])
    if caplog.records:
        assert "padding of -3024 is left out" in caplog.text
        assert "--intensity-window -160,240 shows the abdomen" in caplog.text


def test_percentiles_leave_out_padding_and_outliers() -> None:
    pixels = padded(-3024)
    pixels[20, 20] = 30000
    image = image_of(pixels)
    low, high = robust_window([image], tissue_range([image]))
    tissue = np.delete(pixels.ravel(), np.flatnonzero(pixels == -3024))
    assert (low, high) == pytest.approx(tuple(np.percentile(tissue, (0.5, 99.5))))
    shown, window = intensities(image, SAM, "auto")
    assert window == (low, high)
    assert (shown[:6, :6] == 0).all()


def test_a_flat_image_has_no_automatic_window() -> None:
    shown, window = intensities(image_of(np.full((5, 6), 7, np.int16)), SAM, "auto")
    assert (window, shown.max()) == (None, 0)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_that_a_dicom_marks_is_black(tmp_path: Path, photometric: str) -> None:
    stored = (np.arange(900) + 100).astype(np.int16).reshape(30, 30)
    stored[:4], stored[4:8] = -30000, -29000
    dataset = dicom(stored, PhotometricInterpretation=photometric)
    dataset.PixelPaddingValue, dataset.PixelPaddingRangeLimit = -30000, -29000
    image = read(dataset, tmp_path)
    assert image.background is not None
    assert image.background[:8].all()
    assert not image.background[8:].any()
    tissue = tissue_range([image])
    assert (tissue.low, tissue.high, tissue.filler) == (340, 999, None)
    assert "marked background is left out" in tissue.remark
    shown, _ = intensities(image, SAM, None)
    assert (shown[:8] == 0).all()
    assert sorted((float(shown[8, 0]), float(shown[29, 29]))) == [0, 255]


def test_padding_of_a_series_leaves_its_window_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = slices(PixelPaddingValue=-2000)
    for dataset in datasets:
        for name in ("WindowCenter", "WindowWidth"):
            if name in dataset:
                del dataset[name]
    volume = read_volume(save(datasets, tmp_path / "plain"))
    plain = volume.tissue
    for dataset in datasets:
        pixels = dataset.pixel_array.copy()
        pixels[-3:] = -2000
        dataset.PixelData = pixels.tobytes()
    marked = read_volume(save(datasets, tmp_path / "padded"))
    assert marked.tissue.low >= plain.low
    assert marked.tissue.marked


@pytest.mark.parametrize("suffix", ["npy", "nii"])
def test_nan_is_refused_or_background(tmp_path: Path, suffix: str) -> None:
    voxels = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6) + 50
    voxels[:, 0] = np.nan
    voxels[3] = np.nan  # a slice without anything
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, voxels)
    else:
        import nibabel

        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    with pytest.raises(ImageError, match=r"call NaN background \(--nan background\)"):
        read_volume(path, axis=0).intensity_range()
    volume = read_volume(path, axis=0, nan="background")
    tissue = volume.tissue
    assert (tissue.low, tissue.high) == (np.nanmin(voxels), np.nanmax(voxels))
    image = read_image(path, axis=0, index=1, nan="background")
    assert image.background is not None
    np.testing.assert_array_equal(image.background, np.isnan(voxels[1]))
    shown, _ = intensities(image, SAM, (0.0, 200.0))
    assert (shown[0] == 0).all()
    np.testing.assert_allclose(shown[1:], voxels[1, 1:] / 200 * 255, rtol=1e-5)


def test_infinity_is_never_background(tmp_path: Path) -> None:
    voxels = np.arange(120, dtype=np.float32).reshape(4, 5, 6)
    voxels[1, 2, 3] = np.inf
    np.save(tmp_path / "a.npy", voxels)
    with pytest.raises(ImageError, match="1 NaN or infinite values"):
        read_volume(tmp_path / "a.npy", nan="background").intensity_range()


def test_a_volumes_window_is_measured_without_padding(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).normal(300, 60, (6, 40, 40))
    voxels[:, :10], voxels[3, 20, 20] = -2048, 9000
    np.save(tmp_path / "a.npy", voxels)
    volume = read_volume(tmp_path / "a.npy")
    window = volume_window(bright_pixels(), volume, "auto")
    assert window is not None
    tissue = voxels[voxels != -2048]
    np.testing.assert_allclose(window, np.percentile(tissue, (0.5, 99.5)), rtol=1e-3)
