"""Slices come out of NIfTI in stored order, and masks go back to the very same voxels."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from affines import Geometry, assert_labels_of, geometries, rotation, voxels
from hypothesis import given, settings
from hypothesis import strategies as st

from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images import (
    Plane,
    is_volume,
    read_image,
    read_volume,
    write_mask,
    write_segmentation,
)

NILEARN = importlib.util.find_spec("nilearn")  # for its data: importing it takes seconds
assert NILEARN is not None
assert NILEARN.origin is not None
BRAIN = (
    Path(NILEARN.origin).parent / "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
)
VOLUME = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nifti")


def save(
    array: np.ndarray, path: Path, affine: np.ndarray | None = None, zooms: tuple[float, ...] = ()
) -> Path:
    image = nibabel.Nifti1Image(array, np.diag([*zooms, 1.0]) if zooms else affine)
    nibabel.save(image, path)
    return path


def test_a_brain_slice_is_the_one_another_library_reads() -> None:
    image = read_image(BRAIN, axis=2, index=95)
    assert image.plane == Plane(axis=2, index=95, shape=(197, 233, 189))
    volume = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(BRAIN)))  # z, y, x
    assert image.pixels.dtype == np.uint8
    np.testing.assert_array_equal(image.pixels, volume[95].T)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII", ".nii.GZ"])
def test_rows_and_columns_are_the_remaining_axes_in_order(
    folder: Path, axis: int, suffix: str
) -> None:
    path = save(VOLUME, folder / "a.nii.gz" if suffix.lower().endswith("gz") else folder / "a.nii")
    path = path.rename(folder / f"renamed{suffix}")
    image = read_image(path, axis=axis, index=3)
    assert image.pixels.dtype == np.int16
    assert image.plane == Plane(axis=axis, index=3, shape=(5, 6, 7))
    np.testing.assert_array_equal(image.pixels, VOLUME.take(3, axis))


@pytest.mark.parametrize(
    ("zooms", "axis"),
    [
        ((1, 1, 5), 2), ((5, 1, 1), 0), ((1, 5, 1), 1), ((1, 1, 1), 2), ((2, 2, 1), 1),
        ((2, 1, 2.00001), 2), ((2.00001, 1, 2), 2),
    ],
)  # fmt: skip
def test_the_default_axis_runs_across_the_slices(
    folder: Path, zooms: tuple[float, ...], axis: int
) -> None:
    path = save(VOLUME, folder / "zooms.nii", zooms=zooms)
    image = read_image(path, index=1)
    assert image.plane is not None
    assert image.plane.axis == axis
    with pytest.raises(ImageError, match=f"along axis {axis}; none was given") as caught:
        read_image(path)
    assert f"0…{VOLUME.shape[axis] - 1}" in str(caught.value)


@pytest.mark.parametrize(
    ("axis", "index", "message"),
    [
        (2, 7, r"0…6 along axis 2; 7 was given"),
        (0, -1, r"0…4 along axis 0; -1 was given"),
        (3, 0, "there is no axis 3"),
    ],
)
def test_a_slice_that_is_not_there_is_refused(
    folder: Path, axis: int, index: int, message: str
) -> None:
    path = save(VOLUME, folder / "v.nii")
    with pytest.raises(ImageError, match=message):
        read_image(path, axis=axis, index=index)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5, 6), 2),
        ((5, 6, 1), 2),
        ((1, 5, 6), 0),
        ((5, 1, 6), 1),
        ((5, 6, 1, 1), 2),
        ((5, 6, 1, 1, 1), 2),
    ],
)
def test_one_plane_needs_no_index(folder: Path, shape: tuple[int, ...], axis: int) -> None:
    array = np.arange(30, dtype=np.int16).reshape(shape)
    # Spacing says otherwise, and is not asked: there is but one way to see a plane.
    path = save(array, folder / "plane.nii", affine=np.diag([3.0, 2, 1, 1]))
    image = read_image(path)
    assert image.plane is not None
    assert image.plane.axis == axis
    np.testing.assert_array_equal(image.pixels, array.reshape(5, 6))


def test_several_volumes_are_refused(folder: Path) -> None:
    path = save(np.zeros((5, 6, 7, 3), np.int16), folder / "4d.nii")
    with pytest.raises(ImageError, match=r"\(5, 6, 7, 3\): 3 volumes, not one; extract one"):
        read_image(path, index=0)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.gz", "a", "a.dat"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_the_content_decides(tmp_path: Path, kind: type, name: str, compressed: bool) -> None:
    plain = kind(VOLUME, np.diag([1.0, 2.0, 3.0, 1.0])).to_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(plain) if compressed else plain)
    assert is_volume(path)
    volume = read_volume(path)
    assert (volume.shape, volume.spacing_mm) == (VOLUME.shape, (1, 2, 3))
    np.testing.assert_array_equal(volume.slice(2).pixels, VOLUME[:, :, 2])
    image = read_image(path, axis=1, index=2)
    np.testing.assert_array_equal(image.pixels, VOLUME[:, 2])
    write_mask(tmp_path / "mask.nii.gz", image.pixels > 9, image)
    written = nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj)[:, 2], image.pixels > 9)


@pytest.mark.parametrize("suffix", [".hdr", ".img"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair, nibabel.AnalyzeImage])
def test_a_pair_is_one_volume(
    tmp_path: Path, kind: type, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    nibabel.save(kind(VOLUME, np.diag([-1.0, 2.0, 3.0, 1.0])), tmp_path / "a.img")
    volume = read_volume(tmp_path / f"a{suffix}")
    assert set(volume.files) == {tmp_path / "a.hdr", tmp_path / "a.img"}
    assert volume.spacing_mm == (1, 2, 3)
    np.testing.assert_array_equal(volume.slice(1).pixels, VOLUME[:, :, 1])
    assert ("which does not say where left and right are" in caplog.text) is (
        kind is nibabel.AnalyzeImage
    )
    labels = (VOLUME % 2).astype(np.uint8)
    write_segmentation(tmp_path / "seg.nii.gz", labels, volume)
    written = nibabel.load(tmp_path / "seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    assert volume.affine is not None
    np.testing.assert_allclose(written.affine, volume.affine)
    (tmp_path / "a.nii").symlink_to("a.img")
    with pytest.raises(UsageError, match="part of the volume itself"):
        write_segmentation(tmp_path / "a.nii", labels, volume)


def test_colours_are_slices_of_three_channels(tmp_path: Path) -> None:
    dtype = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    stored = np.zeros((5, 6, 7), dtype)
    for weight, channel in enumerate("RGB", 1):
        stored[channel] = np.arange(210).reshape(5, 6, 7) // weight
    path = save(stored, tmp_path / "colour.nii.gz")
    volume = read_volume(path, axis=2)
    assert (volume.colour, volume.dtype) == (True, np.uint8)
    expected = np.stack([stored[channel][:, :, 3] for channel in "RGB"], axis=-1)
    np.testing.assert_array_equal(volume.slice(3).pixels, expected)
    np.testing.assert_array_equal(read_image(path, axis=2, index=3).pixels, expected)


@pytest.mark.parametrize(
    "shape", [(5, 6, 7, 1, 4), (5, 6, 7, 4), (5, 6, 7, 4, 1), (5, 6, 7, 1, 1, 4)]
)
def test_volumes_lie_along_any_one_axis(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    path = save(stored, tmp_path / "series.nii")
    with pytest.raises(ImageError, match=r"choose one of its volumes \(--volume\) 0…3"):
        read_volume(path)
    volume = read_volume(path, volume=2)
    np.testing.assert_array_equal(volume.slice(1).pixels, stored.reshape(5, 6, 7, 4)[:, :, 1, 2])


def test_voxels_that_are_no_real_numbers_are_refused(folder: Path) -> None:
    path = save(np.ones((5, 6, 7), np.complex64), folder / "odd.nii")
    with pytest.raises(ImageError, match="expected real numbers or RGB"):
        read_image(path, index=0)


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4"])
def test_the_intensity_scaling_is_applied(folder: Path, dtype: str) -> None:
    array = np.arange(30, dtype=dtype).reshape(5, 6, 1)
    path = save(array, folder / "s.nii")
    data = bytearray(path.read_bytes())
    # scl_slope and scl_inter; through nibabel they would be chosen anew from the data.
    struct.pack_into("<ff", data, 112, 0.5, -100)
    path.write_bytes(data)
    pixels = read_image(folder / "s.nii").pixels
    assert pixels.dtype == np.float32
    reference = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "s.nii")))[0].T
    np.testing.assert_allclose(pixels, array[..., 0] * 0.5 - 100, atol=1e-3)
    np.testing.assert_allclose(pixels, reference, atol=1e-3)


def test_big_endian_files_come_out_native(folder: Path) -> None:
    image = nibabel.Nifti1Image(VOLUME, np.eye(4))
    swapped = nibabel.Nifti1Image(VOLUME, None, image.header.as_byteswapped(">"))
    nibabel.save(swapped, folder / "be.nii")
    pixels = read_image(folder / "be.nii", index=2).pixels
    assert pixels.dtype == np.int16
    assert pixels.dtype.isnative
    np.testing.assert_array_equal(pixels, VOLUME[..., 2])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@settings(max_examples=40, deadline=None)
@given(geometry=geometries(), axis=st.sampled_from([0, 1, 2]), voxel=voxels(VOLUME.shape))
def test_a_mask_goes_back_to_its_voxels(
    folder: Path, suffix: str, geometry: Geometry, axis: int, voxel: tuple[int, ...]
) -> None:
    source = geometry.save(VOLUME, folder / f"in{suffix}")
    image = read_image(folder / f"in{suffix}", axis=axis, index=voxel[axis])
    row, column = (voxel[k] for k in range(3) if k != axis)
    mask = np.zeros(image.pixels.shape, bool)
    mask[row, column] = True
    write_mask(folder / f"out{suffix}", mask, image)

    volume = assert_labels_of(folder / f"out{suffix}", source)
    assert np.argwhere(volume).tolist() == [list(voxel)]
    assert volume.max() == 1
    again = read_image(folder / f"out{suffix}", axis=axis, index=voxel[axis])
    np.testing.assert_array_equal(again.pixels, mask)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_another_library_finds_the_mask_where_the_voxel_is(folder: Path, axis: int) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation((0.3, -0.2, 0.5)) * (-0.8, 1.2, 4)
    affine[:3, 3] = (30, -40, 12)
    path = save(VOLUME, folder / "itk.nii.gz", affine)
    image = read_image(path, axis=axis, index=2)
    mask = np.zeros(image.pixels.shape, np.uint8)
    mask[3, 4] = 9
    write_mask(folder / "itk-mask.nii.gz", mask, image)
    before, after = (
        SimpleITK.ReadImage(str(folder / n)) for n in ("itk.nii.gz", "itk-mask.nii.gz")
    )
    z, y, x = (int(k) for k in np.argwhere(SimpleITK.GetArrayFromImage(after) == 9)[0])
    assert before[x, y, z] == image.pixels[3, 4]
    position = before.TransformIndexToPhysicalPoint((x, y, z))
    assert position == after.TransformIndexToPhysicalPoint((x, y, z))
    np.testing.assert_allclose(
        np.array(position) * (-1, -1, 1), (affine @ (x, y, z, 1))[:3], atol=1e-4
    )


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (1, 5, 6), (5, 6, 1, 1)])
def test_the_mask_of_a_plane_has_the_shape_of_its_file(
    folder: Path, shape: tuple[int, ...]
) -> None:
    path = save(
        np.arange(30, dtype=np.int16).reshape(shape), folder / "p.nii", np.diag([2.0, 3, 4, 1])
    )
    mask = np.arange(30).reshape(5, 6) % 3 == 0
    write_mask(folder / "p-mask.nii", mask, read_image(path))
    written = nibabel.load(folder / "p-mask.nii")
    assert written.shape == shape
    assert written.header.get_zooms() == nibabel.load(path).header.get_zooms()
    np.testing.assert_array_equal(np.asarray(written.dataobj).reshape(5, 6), mask)


def test_a_mask_needs_the_volume_its_image_came_from(folder: Path) -> None:
    path = save(VOLUME, folder / "gone.nii")
    image = read_image(path, index=0)
    mask = np.ones(image.pixels.shape, bool)
    save(VOLUME[:, :, :4], path)
    with pytest.raises(ImageError, match="has changed since it was read"):
        write_mask(folder / "gone-mask.nii", mask, image)
    path.unlink()
    with pytest.raises(ImageError, match="cannot be read as NIfTI"):
        write_mask(folder / "gone-mask.nii", mask, image)
    assert not list(folder.glob("*gone-mask*"))
    assert not list(folder.glob(".medsa*"))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.98])
def test_truncated_files_are_refused(folder: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 1000, (20, 20, 20)).astype(np.int16)
    path = save(noise, folder / f"t{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match="cannot be read as NIfTI") as caught:
        read_image(path, axis=2, index=19)
    assert "\n" not in str(caught.value)


def test_another_format_under_this_name_is_refused(folder: Path) -> None:
    (folder / "text.nii").write_text("not a volume " * 100)
    with pytest.raises(ImageError, match="cannot be read as NIfTI"):
        read_image(folder / "text.nii")
    with gzip.open(folder / "text.nii.gz", "wb") as f:
        f.write(b"not a volume " * 100)
    with pytest.raises(ImageError, match="cannot be read as NIfTI"):
        read_image(folder / "text.nii.gz")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_nothing_but_image_errors(folder: Path, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from([".nii", ".nii.gz"]))
    content = save(VOLUME, folder / "whole.nii").read_bytes()
    path = folder / f"damaged{suffix}"
    damaged = bytearray(content if suffix == ".nii" else gzip.compress(content, mtime=0))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(400, len(damaged)) - 1))] = data.draw(
            st.integers(0, 255)
        )
    path.write_bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    with contextlib.suppress(ImageError):
        read_image(path, axis=1, index=2)
