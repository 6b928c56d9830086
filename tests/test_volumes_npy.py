"""Volumes out of .npy, and what every volume shares: slices, voxels, boxes, outputs."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsa_deploy.errors import ImageError, PromptError, UsageError
from medsa_deploy.images import (
    Volume,
    check_segmentation_suffix,
    check_segmentation_target,
    is_volume,
    read_image,
    read_volume,
    write_segmentation,
)

VOXELS = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)


def save(folder: Path, array: np.ndarray, name: str = "v.npy") -> Path:
    np.save(folder / name, array)
    return folder / name


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> list[Volume]:
    """The same voxels sliced along each axis."""
    path = save(tmp_path_factory.mktemp("npy"), VOXELS)
    return [read_volume(path, axis=axis) for axis in range(3)]


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_slices_are_those_read_image_reads(tmp_path: Path, axis: int | None) -> None:
    path = save(tmp_path, VOXELS)
    volume = read_volume(path, axis=axis)
    along = axis or 0
    assert (volume.kind, volume.shape, volume.axis) == ("npy", (5, 6, 7), along)
    assert (volume.spacing_mm, volume.affine, volume.files) == ((1, 1, 1), None, (path,))
    assert (volume.dtype, volume.colour, volume.inverted, volume.rendered) == (
        np.int16, False, False, False,
    )  # fmt: skip
    assert len(volume) == VOXELS.shape[along]
    for index in range(len(volume)):
        image = volume.slice(index)
        assert image.pixels.shape == volume.slice_size
        assert image.pixels.dtype == volume.dtype
        expected = read_image(path, axis=axis, index=index)
        np.testing.assert_array_equal(image.pixels, expected.pixels)
        np.testing.assert_array_equal(image.pixels, volume.plane(VOXELS, index))
    assert volume.intensity_range() == (0, VOXELS.size - 1)


@pytest.mark.parametrize("index", [-1, 5])
def test_a_slice_that_is_not_there_is_refused(volumes: list[Volume], index: int) -> None:
    with pytest.raises(ImageError, match=rf"has no slice {index} along axis 0: give 0…4"):
        volumes[0].slice(index)


def test_an_axis_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is no axis 3"):
        read_volume(save(tmp_path, VOXELS), axis=3)


@pytest.mark.parametrize(
    ("dtype", "stored"), [("?", "u1"), (">i2", "i2"), ("f8", "f4"), ("f2", "f4"), ("u4", "u4")]
)
def test_dtypes(tmp_path: Path, dtype: str, stored: str) -> None:
    array = (VOXELS % 2).astype(dtype)
    volume = read_volume(save(tmp_path, array))
    pixels = volume.slice(1).pixels
    assert volume.dtype == pixels.dtype == np.dtype(stored)
    assert pixels.dtype.isnative
    np.testing.assert_array_equal(pixels, (VOXELS[1] % 2) * (255 if dtype == "?" else 1))


def test_an_array_is_mapped_not_loaded(tmp_path: Path) -> None:
    volume = read_volume(save(tmp_path, VOXELS))
    assert isinstance(volume.slices.array, np.memmap)  # type: ignore[attr-defined]


def test_empty_slices_are_normal_and_empty_volumes_are_not(tmp_path: Path) -> None:
    array = np.zeros((4, 5, 6), np.float32)
    with pytest.raises(ImageError, match=r"every voxel is 0\.0: nothing to segment"):
        read_volume(save(tmp_path, array))
    array[3, 4, 5] = 2.5
    volume = read_volume(save(tmp_path, array))
    assert not volume.slice(0).pixels.any()
    assert volume.intensity_range() == (0, 2.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_no_numbers_are_refused_with_their_slice(
    tmp_path: Path, value: float
) -> None:
    array = VOXELS.astype(np.float64)
    array[2, 3, 4] = value
    volume = read_volume(save(tmp_path, array))
    assert volume.slice(1).pixels.dtype == np.float32
    for call in (lambda: volume.slice(2), volume.intensity_range):
        with pytest.raises(ImageError, match="slice 2 has 1 NaN or infinite values out of 42"):
            call()


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4, 3), (2, 3, 4, 5), (0, 4, 5)])
def test_arrays_of_other_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=r"expected a volume \(X, Y, Z\) of one number a voxel"):
        read_volume(save(tmp_path, np.ones(shape)))


def test_arrays_of_no_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="expected real numbers"):
        read_volume(save(tmp_path, np.ones((4, 5, 6), complex)))


def test_only_a_nifti_holds_several_volumes(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="volume 0 was given; only a 4-D NIfTI holds several"):
        read_volume(save(tmp_path, VOXELS), volume=0)


def test_what_is_no_volume_is_refused(tmp_path: Path) -> None:
    PIL.Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(
        ImageError, match="is a picture; expected a volume: NIfTI, NRRD, DICOM series"
    ):
        read_volume(tmp_path / "a.png")
    with pytest.raises(ImageError, match="holds no DICOM images"):
        read_volume(tmp_path)
    with pytest.raises(ImageError, match="does not exist"):
        read_volume(tmp_path / "none.nii.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no images"):
        read_volume(tmp_path / "empty")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 6, 7), True), ((2, 3, 4, 5), True), ((2, 2, 2, 3), True), ((5, 6), False),
        ((5, 6, 3), False), ((5, 6, 1), False), ((5, 6, 4), False),
    ],
)  # fmt: skip
def test_what_read_image_takes_is_no_volume(
    tmp_path: Path, shape: tuple[int, ...], expected: bool
) -> None:
    assert is_volume(save(tmp_path, np.ones(shape, np.uint8))) is expected


def test_what_cannot_be_read_is_no_volume(tmp_path: Path) -> None:
    assert not is_volume(tmp_path)
    assert not is_volume(tmp_path / "none.npy")
    (tmp_path / "text.npy").write_text("no array")
    assert not is_volume(tmp_path / "text.npy")
    PIL.Image.new("L", (4, 4)).save(tmp_path / "a.png")
    assert not is_volume(tmp_path / "a.png")
    assert not is_volume(tmp_path)


@given(
    axis=st.sampled_from([0, 1, 2]), voxel=st.tuples(*(st.integers(0, s - 1) for s in (5, 6, 7)))
)
def test_a_point_is_a_voxel_of_the_array(
    volumes: list[Volume], axis: int, voxel: tuple[int, int, int]
) -> None:
    volume = volumes[axis]
    index, x, y = volume.locate(voxel)
    assert volume.slice(index).pixels[int(y), int(x)] == VOXELS[voxel]
    assert volume.voxel(index, x, y) == voxel
    in_plane = [value + 0.25 * (k != axis) for k, value in enumerate(voxel)]
    assert volume.voxel(*volume.locate(in_plane)) == tuple(in_plane)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, ...]:
    low = [draw(st.integers(0, size - 1)) for size in (5, 6, 7)]
    high = [draw(st.integers(a + 1, size)) for a, size in zip(low, (5, 6, 7), strict=True)]
    return (*low, *high)


@given(axis=st.sampled_from([0, 1, 2]), box=boxes())
def test_a_box_holds_the_voxels_of_its_range(
    volumes: list[Volume], axis: int, box: tuple[int, ...]
) -> None:
    volume = volumes[axis]
    slices, (x0, y0, x1, y1) = volume.locate_box(box)
    inside = np.zeros(volume.shape, bool)
    for index in slices:
        volume.plane(inside, index)[int(y0) : int(y1), int(x0) : int(x1)] = True
    expected = np.zeros(volume.shape, bool)
    expected[box[0] : box[3], box[1] : box[4], box[2] : box[5]] = True
    np.testing.assert_array_equal(inside, expected)
    assert volume.voxel_box(slices, (x0, y0, x1, y1)) == box


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ((5, 0, 0), "outside the volume: x 0…4, y 0…5, z 0…6"),
        ((0, -1, 0), "outside the volume"),
        ((0, 0, float("nan")), "outside the volume"),
        ((1.5, 0, 0), "between two slices: give a whole x, 0…4"),
        ((1, 2), "should be x,y,z in voxels"),
    ],
)
def test_points_outside_are_refused(
    volumes: list[Volume], point: tuple[float, ...], message: str
) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        volumes[0].locate(point)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, 0, 0, 6, 6, 7), "outside the volume: x 0…5, y 0…6, z 0…7"),
        ((0, 0, -1, 5, 6, 7), "outside the volume"),
        ((3, 0, 0, 3, 6, 7), "empty or inverted"),
        ((0, 4, 0, 3, 2, 7), "empty or inverted"),
        ((1.2, 0, 0, 1.8, 6, 7), "between two slices"),
        ((0, 0, 3, 3), "should be x0,y0,z0,x1,y1,z1"),
    ],
)
def test_boxes_outside_are_refused(
    volumes: list[Volume], box: tuple[float, ...], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        volumes[0].locate_box(box)


@settings(max_examples=20, deadline=None)
@given(
    axis=st.sampled_from([0, 1, 2]), voxel=st.tuples(*(st.integers(0, s - 1) for s in (5, 6, 7)))
)
@pytest.mark.parametrize("suffix", [".npy", ".nii", ".nii.gz"])
def test_a_marked_voxel_comes_back(
    volumes: list[Volume], suffix: str, axis: int, voxel: tuple[int, int, int]
) -> None:
    volume = volumes[axis]
    labels = np.zeros(volume.shape, np.uint8)
    index, x, y = volume.locate(voxel)
    volume.plane(labels, index)[int(y), int(x)] = 7
    target = volume.path.with_name(f"seg{suffix}")
    write_segmentation(target, labels, volume)
    written = np.load(target) if suffix == ".npy" else np.asarray(nibabel.load(target).dataobj)
    assert written.dtype == np.uint8
    assert written.shape == volume.shape
    assert np.argwhere(written == 7).tolist() == [list(voxel)]
    if suffix != ".npy":
        header = nibabel.load(target).header
        assert (int(header["qform_code"]), int(header["sform_code"])) == (0, 0)
        assert header.get_zooms() == (1, 1, 1)


@pytest.mark.parametrize("name", ["seg.png", "seg.jpg", "seg", "seg.dcm.gz", "seg.gz"])
def test_other_formats_are_refused(volumes: list[Volume], tmp_path: Path, name: str) -> None:
    for check in (
        lambda: check_segmentation_suffix(name),
        lambda: check_segmentation_target(name, volumes[0]),
        lambda: write_segmentation(tmp_path / name, np.zeros((5, 6, 7), np.uint8), volumes[0]),
    ):
        with pytest.raises(UsageError, match=r"use one of: \.nii, \.nii\.gz, \.nrrd, "):
            check()
    check_segmentation_suffix("a.NII.gz")
    assert not list(tmp_path.iterdir())


def test_a_dicom_segmentation_needs_a_dicom(volumes: list[Volume], tmp_path: Path) -> None:
    for check in (
        lambda: check_segmentation_target(tmp_path / "a.dcm", volumes[0]),
        lambda: write_segmentation(tmp_path / "a.dcm", VOXELS.astype(np.uint8), volumes[0]),
    ):
        with pytest.raises(UsageError, match=r"v\.npy is not DICOM; write \.nii\.gz or \.npy"):
            check()


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (np.zeros((5, 6, 7), np.int64), (), "dtype int64; expected uint8"),
        (np.zeros((5, 6, 7), bool), (), "dtype bool; expected uint8"),
        (np.zeros((7, 6, 5), np.uint8), (), r"shape \(7, 6, 5\), expected \(5, 6, 7\)"),
        (np.full((5, 6, 7), 3, np.uint8), ("a", "b"), "go up to 3, but there are 2 names"),
    ],
)
def test_labels_of_another_kind_are_refused(
    volumes: list[Volume], tmp_path: Path, labels: np.ndarray, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        write_segmentation(tmp_path / "seg.npy", labels, volumes[0], names=names)
    with pytest.raises(ImageError, match="the labels"):
        volumes[0].plane(np.zeros((5, 6), np.uint8), 0)
    assert not list(tmp_path.iterdir())


def test_the_volume_is_never_overwritten(tmp_path: Path) -> None:
    path = save(tmp_path, VOXELS)
    volume = read_volume(path)
    (tmp_path / "link.npy").hardlink_to(path)
    for target in (path, tmp_path / "link.npy"):
        with pytest.raises(UsageError, match="is part of the volume itself"):
            write_segmentation(target, VOXELS.astype(np.uint8), volume)
    np.testing.assert_array_equal(np.load(path), VOXELS)


@pytest.mark.parametrize("suffix", [".npy", ".nii.gz"])
def test_an_interrupted_write_leaves_nothing(
    volumes: list[Volume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", interrupt)
    monkeypatch.setattr(nibabel, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_segmentation(tmp_path / f"s{suffix}", np.zeros((5, 6, 7), np.uint8), volumes[0])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ImageError, match="does not exist"):
        write_segmentation(tmp_path / "no/s.npy", np.zeros((5, 6, 7), np.uint8), volumes[0])
