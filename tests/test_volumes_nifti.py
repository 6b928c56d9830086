"""NIfTI volumes: lazily read, scaled, in stored order; segmentations of exactly their geometry."""

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
from affines import FIELDS, Geometry, assert_labels_of, geometries, rotation, voxels
from hypothesis import given, settings
from hypothesis import strategies as st

from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images import (
    Plane,
    check_segmentation_target,
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
FUNCTIONAL = Path(nibabel.__file__).parent / "tests/data/example4d.nii.gz"
VOXELS = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volumes")


def save(
    array: np.ndarray, path: Path, affine: np.ndarray | None = None, zooms: tuple[float, ...] = ()
) -> Path:
    image = nibabel.Nifti1Image(array, np.diag([*zooms, 1.0]) if zooms else affine)
    nibabel.save(image, path)
    return path


def rescale(path: Path, slope: float, intercept: float) -> None:
    """Set scl_slope and scl_inter; through nibabel they would be chosen anew from the data."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<ff", data, 112, slope, intercept)
    path.write_bytes(data)


def test_a_brain_is_the_one_another_library_reads() -> None:
    volume = read_volume(BRAIN)
    reference = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(BRAIN)))  # z, y, x
    assert (volume.kind, volume.shape, volume.axis) == ("nifti", (197, 233, 189), 2)
    assert (volume.spacing_mm, volume.dtype) == ((1, 1, 1), np.uint8)
    assert volume.intensity_range() == (reference.min(), reference.max())
    for index in (0, 95, 188):
        image = volume.slice(index)
        assert image.plane == Plane(axis=2, index=index, shape=(197, 233, 189))
        np.testing.assert_array_equal(image.pixels, reference[index].T)
    assert volume.affine is not None
    np.testing.assert_array_equal(volume.affine, nibabel.load(BRAIN).affine)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_those_read_image_reads(axis: int) -> None:
    volume = read_volume(BRAIN, axis=axis)
    for index in (0, 77):
        expected = read_image(BRAIN, axis=axis, index=77)
        if index:
            np.testing.assert_array_equal(volume.slice(index).pixels, expected.pixels)
        assert volume.slice(index).pixels.shape == volume.slice_size == expected.pixels.shape


@pytest.mark.parametrize(
    ("zooms", "axis"),
    [((1, 1, 5), 2), ((5, 1, 1), 0), ((1, 5, 1), 1), ((1, 1, 1), 2), ((2, 2, 1), 1)],
)
def test_the_default_axis_has_the_largest_spacing(
    folder: Path, zooms: tuple[float, ...], axis: int
) -> None:
    volume = read_volume(save(VOXELS, folder / "zooms.nii", zooms=zooms))
    assert (volume.axis, volume.spacing_mm) == (axis, zooms)
    assert len(volume) == VOXELS.shape[axis]


def test_an_axis_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ImageError, match="there is no axis 3"):
        read_volume(save(VOXELS, folder / "axis.nii"), axis=3)


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1000), ("mm", 1), ("micron", 0.001)])
def test_spacing_is_in_millimetres(folder: Path, unit: str, mm: float) -> None:
    image = nibabel.Nifti1Image(VOXELS, np.diag([2.0, 3.0, 4.0, 1.0]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, folder / "units.nii")
    volume = read_volume(folder / "units.nii")
    assert volume.spacing_mm == pytest.approx((2 * mm, 3 * mm, 4 * mm))
    np.testing.assert_allclose(volume.affine, np.diag([2 * mm, 3 * mm, 4 * mm, 1]))


def test_without_usable_spacing_it_is_one(folder: Path) -> None:
    path = save(VOXELS, folder / "zero.nii", zooms=(2, 3, 4))
    set_spacing(path, (0.0, float("nan"), -4.0))
    data = bytearray(path.read_bytes())
    struct.pack_into("<hh", data, 252, 0, 0)  # neither qform nor sform
    path.write_bytes(data)
    assert read_volume(path).spacing_mm == (1, 1, 4)


def set_spacing(path: Path, zooms: tuple[float, float, float]) -> None:
    """Write pixdim, and leave qform and sform as they are."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<fff", data, 80, *zooms)
    path.write_bytes(data)


def warnings_of(caplog: pytest.LogCaptureFixture, path: Path) -> list[str]:
    return [r.getMessage() for r in caplog.records if str(path) in r.getMessage()]


@pytest.mark.parametrize("form", ["sform", "qform"])
def test_the_affine_is_the_only_source_of_spacing(
    folder: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(VOXELS, folder / f"{form}.nii", zooms=(1, 1, 2.5))
    if form == "qform":
        source = nibabel.load(path)
        source.set_qform(source.affine, code=1)
        source.set_sform(None, code=0)
        path = folder / "qform-alone.nii"
        nibabel.save(source, path)
    set_spacing(path, (4, 1, 1))
    volume = read_volume(path)
    if form == "qform":  # whose columns are pixdim's lengths
        assert (volume.axis, volume.spacing_mm) == (0, (4, 1, 1))
        assert not warnings_of(caplog, path)
        return
    assert (volume.axis, volume.spacing_mm) == (2, (1, 1, 2.5))
    (warning,) = warnings_of(caplog, path)
    assert "1 × 1 × 2.5 mm by its affine, which is used, and 4 × 1 × 1 mm by its pixdim" in warning
    assert read_image(path, index=0).plane == Plane(axis=2, index=0, shape=VOXELS.shape)


@pytest.mark.parametrize(
    ("zooms", "count"), [((1, 1, 2.52), 0), ((1, 1, 2.53), 1), ((0, 1, 2.5), 0)]
)
def test_one_percent_is_rounding(
    folder: Path, zooms: tuple[float, ...], count: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(VOXELS, folder / f"rounded{zooms[2]}.nii", zooms=(1, 1, 2.5))
    set_spacing(path, (zooms[0], zooms[1], zooms[2]))
    assert read_volume(path).spacing_mm == (1, 1, 2.5)
    assert len(warnings_of(caplog, path)) == count


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_stored_values_are_mapped_or_held_once(folder: Path, suffix: str) -> None:
    volume = read_volume(save(VOXELS, folder / f"held{suffix}"))
    voxels = volume.slices.voxels  # type: ignore[attr-defined]
    assert voxels.dtype == np.int16
    assert isinstance(voxels, np.memmap) is (suffix == ".nii")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8"])
@pytest.mark.parametrize("slope", [0.5, -2])
def test_the_intensity_scaling_is_applied(
    folder: Path, suffix: str, dtype: str, slope: float
) -> None:
    plain = save(VOXELS.astype(dtype), folder / "scaled.nii")
    rescale(plain, slope, -100)
    path = folder / f"scaled{suffix}"
    if suffix == ".nii.gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    volume = read_volume(path, axis=1)
    assert volume.dtype == np.float32
    expected = VOXELS.astype(dtype).astype(float) * slope - 100
    assert volume.intensity_range() == (expected.min(), expected.max())
    for index in range(6):
        pixels = volume.slice(index).pixels
        assert pixels.dtype == np.float32
        np.testing.assert_allclose(pixels, expected[:, index])
        np.testing.assert_array_equal(pixels, read_image(path, axis=1, index=index).pixels)


def test_big_endian_files_come_out_native(folder: Path) -> None:
    image = nibabel.Nifti1Image(VOXELS, np.eye(4))
    swapped = nibabel.Nifti1Image(VOXELS, None, image.header.as_byteswapped(">"))
    nibabel.save(swapped, folder / "be.nii")
    volume = read_volume(folder / "be.nii")
    assert volume.dtype.isnative
    assert volume.slice(2).pixels.dtype == volume.dtype == np.int16
    np.testing.assert_array_equal(volume.slice(2).pixels, VOXELS[..., 2])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_axes_of_length_one_behind_the_volumes(folder: Path, suffix: str) -> None:
    values = np.random.default_rng(0).integers(0, 99, (5, 6, 7, 3, 1, 1)).astype(np.int16)
    path = folder / f"six{suffix}"
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    for number in range(3):
        volume = read_volume(path, volume=number)
        assert volume.shape == (5, 6, 7)
        np.testing.assert_array_equal(volume.slice(2).pixels, values[:, :, 2, number, 0, 0])
    with pytest.raises(ImageError, match=r"choose one of its volumes \(--volume\) 0…2; 3 was"):
        read_volume(path, volume=3)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_one_volume_of_several(folder: Path, suffix: str) -> None:
    path = folder / f"functional{suffix}"
    nibabel.save(nibabel.load(FUNCTIONAL), path)
    both = nibabel.load(path).get_fdata()
    for number in (0, 1):
        volume = read_volume(path, volume=number)
        assert (volume.shape, volume.axis) == ((128, 96, 24), 2)
        assert volume.spacing_mm == pytest.approx((2, 2, 2.2), rel=1e-4)
        np.testing.assert_allclose(volume.slice(9).pixels, both[:, :, 9, number], rtol=1e-6)
        assert volume.intensity_range() == (both[..., number].min(), both[..., number].max())
    labels = np.zeros(volume.shape, np.uint8)
    labels[3, 4, 5] = 2
    write_segmentation(folder / f"functional-seg{suffix}", labels, volume)
    written = nibabel.load(folder / f"functional-seg{suffix}")
    assert written.shape == (128, 96, 24)
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    for field in FIELDS[1:]:  # but for the shape
        np.testing.assert_array_equal(written.header[field], nibabel.load(path).header[field])
    image = volume.slice(5)
    write_mask(folder / f"functional-mask{suffix}", image.pixels > 500, image)
    mask = np.asarray(nibabel.load(folder / f"functional-mask{suffix}").dataobj)
    np.testing.assert_array_equal(mask[..., 5], both[..., 5, 1] > 500)


@pytest.mark.parametrize("volume", [None, 2, -1])
def test_a_volume_must_be_chosen(volume: int | None) -> None:
    with pytest.raises(ImageError, match=r"one of its volumes \(--volume\) 0…1; ") as caught:
        read_volume(FUNCTIONAL, volume=volume)
    assert str(caught.value).endswith("none was given" if volume is None else f"{volume} was given")


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1), (5, 6, 7, 1, 1)])
def test_a_lone_volume_needs_no_choice(folder: Path, shape: tuple[int, ...]) -> None:
    path = save(VOXELS.reshape(shape), folder / "lone.nii", np.diag([2.0, 3, 4, 1]))
    for volume in (read_volume(path), read_volume(path, volume=0)):
        np.testing.assert_array_equal(volume.slice(3).pixels, VOXELS[..., 3])
    write_segmentation(folder / "lone-seg.nii", VOXELS.astype(np.uint8), volume)
    assert nibabel.load(folder / "lone-seg.nii").shape == shape
    with pytest.raises(ImageError, match=r"0…0; 1 was given"):
        read_volume(path, volume=1)


def test_two_axes_of_volumes_are_refused(folder: Path) -> None:
    path = save(np.zeros((5, 6, 7, 2, 3), np.float32), folder / "5d.nii")
    with pytest.raises(ImageError, match=r"expected \(X, Y, Z\) or one axis of volumes"):
        read_volume(path)


def test_voxels_that_are_no_real_numbers_are_refused(folder: Path) -> None:
    path = save(np.ones((5, 6, 7), np.complex64), folder / "odd.nii")
    with pytest.raises(ImageError, match="expected real numbers"):
        read_volume(path)


def test_empty_volumes_are_refused(folder: Path) -> None:
    with pytest.raises(ImageError, match="every voxel is 3: nothing to segment"):
        read_volume(save(np.full((5, 6, 7), 3, np.int16), folder / "flat.nii.gz"))


def test_values_that_are_no_numbers_are_refused_with_their_slice(folder: Path) -> None:
    array = VOXELS.astype(np.float32)
    array[1, 2, 3] = np.nan
    volume = read_volume(save(array, folder / "nan.nii.gz"))
    assert volume.slice(2).pixels.shape == (5, 6)
    with pytest.raises(ImageError, match="slice 3 has 1 NaN or infinite values out of 30"):
        volume.slice(3)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 6, 7), True), ((5, 6, 7, 2), True), ((5, 6, 1, 2), True), ((5, 6, 7, 1), True),
        ((5, 6), False), ((5, 6, 1), False), ((1, 5, 6), False), ((5, 6, 1, 1), False),
    ],
)  # fmt: skip
def test_what_read_image_takes_is_no_volume(
    folder: Path, shape: tuple[int, ...], expected: bool
) -> None:
    assert is_volume(save(np.ones(shape, np.uint8), folder / "is.nii.gz")) is expected


def test_one_plane_is_a_volume_of_one_slice(folder: Path) -> None:
    path = save(VOXELS[:, :, :1], folder / "plane.nii", zooms=(3, 2, 1))
    volume = read_volume(path)
    assert (volume.shape, volume.axis, len(volume)) == ((5, 6, 1), 2, 1)
    np.testing.assert_array_equal(volume.slice(0).pixels, read_image(path).pixels)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@settings(max_examples=40, deadline=None)
@given(geometry=geometries(), axis=st.sampled_from([None, 0, 1, 2]), voxel=voxels(VOXELS.shape))
def test_a_marked_voxel_comes_back_in_the_same_geometry(
    folder: Path, suffix: str, geometry: Geometry, axis: int | None, voxel: tuple[int, ...]
) -> None:
    source = geometry.save(VOXELS, folder / f"in{suffix}")
    volume = read_volume(folder / f"in{suffix}", axis=axis)
    index, x, y = volume.locate(voxel)
    assert volume.slice(index).pixels[int(y), int(x)] == VOXELS[voxel]
    labels = np.zeros(volume.shape, np.uint8)
    volume.plane(labels, index)[int(y), int(x)] = 200
    write_segmentation(folder / f"out{suffix}", labels, volume, names=("a",) * 200)

    written = assert_labels_of(folder / f"out{suffix}", source)
    assert np.argwhere(written == 200).tolist() == [list(voxel)]
    assert np.count_nonzero(written) == 1
    np.testing.assert_array_equal(volume.affine, source.affine)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_another_library_finds_the_label_where_the_voxel_is(folder: Path, axis: int) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation((0.3, -0.2, 0.5)) * (-0.8, 1.2, 4)
    affine[:3, 3] = (30, -40, 12)
    volume = read_volume(save(VOXELS, folder / "itk.nii.gz", affine), axis=axis)
    labels = np.zeros(volume.shape, np.uint8)
    labels[3, 4, 2] = 9
    write_segmentation(folder / "itk-seg.nii.gz", labels, volume)
    before, after = (SimpleITK.ReadImage(str(folder / n)) for n in ("itk.nii.gz", "itk-seg.nii.gz"))
    z, y, x = (int(k) for k in np.argwhere(SimpleITK.GetArrayFromImage(after) == 9)[0])
    assert before[x, y, z] == VOXELS[3, 4, 2]
    position = before.TransformIndexToPhysicalPoint((x, y, z))
    assert position == after.TransformIndexToPhysicalPoint((x, y, z))
    assert volume.affine is not None
    np.testing.assert_allclose(
        np.array(position) * (-1, -1, 1), (volume.affine @ (3, 4, 2, 1))[:3], atol=1e-4
    )


def test_the_geometry_survives_its_file(folder: Path) -> None:
    path = save(VOXELS, folder / "gone.nii.gz", np.diag([2.0, 3, 4, 1]))
    volume = read_volume(path)
    path.unlink()
    write_segmentation(folder / "gone-seg.nii.gz", VOXELS.astype(np.uint8), volume)
    written = nibabel.load(folder / "gone-seg.nii.gz")
    np.testing.assert_array_equal(written.affine, np.diag([2, 3, 4, 1]))


def test_no_dicom_segmentation_of_a_nifti(folder: Path) -> None:
    volume = read_volume(save(VOXELS, folder / "n.nii"))
    with pytest.raises(UsageError, match=r"n\.nii is not DICOM; write \.nii\.gz or \.npy"):
        check_segmentation_target(folder / "n.dcm", volume)
    check_segmentation_target(folder / "n.nii.gz", volume)
    with pytest.raises(UsageError, match="part of the volume itself"):
        check_segmentation_target(folder / "n.nii", volume)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.98])
def test_truncated_files_are_refused(folder: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 1000, (20, 20, 20)).astype(np.int16)
    path = save(noise, folder / f"t{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match="cannot be read as NIfTI") as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)


def test_a_header_that_asks_for_too_much_is_refused_before_it_is_allocated(folder: Path) -> None:
    path = save(VOXELS, folder / "much.nii")
    data = bytearray(path.read_bytes())
    struct.pack_into("<hhh", data, 42, 32000, 32000, 32000)
    path.write_bytes(data)
    (folder / "much.nii.gz").write_bytes(gzip.compress(data))
    for name in ("much.nii", "much.nii.gz"):
        with pytest.raises(ImageError, match="announces 65536000000352 bytes, more than the file"):
            read_volume(folder / name)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_nothing_but_image_errors(folder: Path, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from([".nii", ".nii.gz"]))
    content = save(VOXELS, folder / "whole.nii").read_bytes()
    path = folder / f"damaged{suffix}"
    damaged = bytearray(content if suffix == ".nii" else gzip.compress(content, mtime=0))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(400, len(damaged)) - 1))] = data.draw(
            st.integers(0, 255)
        )
    path.write_bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    with contextlib.suppress(ImageError):
        volume = read_volume(path)
        volume.intensity_range()
        write_segmentation(folder / "damaged-seg.nii", np.zeros(volume.shape, np.uint8), volume)
    is_volume(path)
