"""Label files of every format → whole numbers on one grid; what is no label file is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pydicom
import pytest
from dicom_series import AXIAL, OBLIQUE, SAGITTAL, label_sets, save, slices
from hypothesis import given
from hypothesis import strategies as st

from medsa_deploy.errors import ImageError
from medsa_deploy.images import Labels, read_labels, read_volume, write_segmentation
from medsa_deploy.images.labels import on_one_grid, on_volume, onto

VALUES = np.random.default_rng(0).integers(0, 4, (7, 9, 5)).astype(np.uint8)
AFFINE = np.array([[0.8, 0, 0, -10], [0, 0, 3.0, 20], [0, -1.2, 0, 5], [0, 0, 0, 1]])


def nifti(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def picture(path: Path, values: np.ndarray, mode: str | None = None) -> Path:
    image = PIL.Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path)
    return path


def palette(path: Path, values: np.ndarray) -> Path:
    image = PIL.Image.fromarray(values)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 90, 90, 90])
    image.save(path)
    return path


def test_every_format_gives_the_numbers(tmp_path: Path) -> None:
    plane = VALUES[..., 0]
    np.save(tmp_path / "a.npy", VALUES)
    np.save(tmp_path / "f.npy", plane.astype(np.float64))
    rgb = np.repeat(plane[..., None], 3, axis=2)
    for path, expected in (
        (nifti(tmp_path / "a.nii.gz", VALUES), VALUES),
        (nifti(tmp_path / "f.nii", VALUES.astype(np.float32)), VALUES),
        (tmp_path / "a.npy", VALUES),
        (tmp_path / "f.npy", plane),
        (picture(tmp_path / "a.png", plane), plane),
        (picture(tmp_path / "16.png", plane.astype(np.uint16) * 100), plane * np.uint16(100)),
        (picture(tmp_path / "rgb.png", rgb), plane),
        (picture(tmp_path / "a.tif", plane), plane),
        (palette(tmp_path / "p.png", plane), plane),
    ):
        numbers = read_labels(path)
        np.testing.assert_array_equal(numbers.values, expected, err_msg=path.name)
        assert numbers.values.dtype.kind == "u"
        assert (numbers.affine is not None) == (path.suffix in (".gz", ".nii"))


def test_black_and_white_is_a_mask(tmp_path: Path) -> None:
    mask = VALUES[..., 0] > 1
    np.save(tmp_path / "bool.npy", mask)
    for path in (
        picture(tmp_path / "8.png", mask.astype(np.uint8) * 255),
        picture(tmp_path / "1.png", mask.astype(np.uint8) * 255, "1"),
        picture(tmp_path / "16.png", mask.astype(np.uint16) * 65535),
        nifti(tmp_path / "a.nii", mask[..., None].astype(np.uint8) * 255),
        tmp_path / "bool.npy",
    ):
        np.testing.assert_array_equal(read_labels(path).values.squeeze(), mask, err_msg=path.name)
    three = np.where(mask, 255, VALUES[..., 0])
    assert read_labels(picture(tmp_path / "3.png", three.astype(np.uint8))).present() == [1, 255]


def test_what_holds_no_labels_is_refused(tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    np.save(tmp_path / "nan.npy", np.full((4, 4), np.nan))
    np.save(tmp_path / "4d.npy", np.zeros((2, 2, 2, 2), np.uint8))
    for path, message in (
        (nifti(tmp_path / "p.nii", VALUES / np.float32(8)), "whole numbers"),
        (nifti(tmp_path / "ct.nii", VALUES.astype(np.int16) - 1024), "from -1024"),
        (tmp_path / "nan.npy", "nan"),
        (tmp_path / "4d.npy", r"\(2, 2, 2, 2\)"),
        (picture(tmp_path / "grey.png", photo[..., 0]), "different values"),
        (picture(tmp_path / "photo.png", photo), "colour picture"),
        (picture(tmp_path / "a.jpg", photo[..., 0]), "JPEG"),
        (Path(pydicom.data.get_testdata_file("CT_small.dcm", download=False)), "CT Image Storage"),
        (tmp_path / "none.png", "does not exist"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            read_labels(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, OBLIQUE])
def test_a_segmentation_object_comes_back(tmp_path: Path, orientation: list[float]) -> None:
    """Its slices without labels are left out; they come back empty, wherever the order is kept."""
    volume = read_volume(save(slices(orientation=orientation), tmp_path / "s", "fbdace"))
    for name, labels in label_sets(volume.shape).items():
        write_segmentation(tmp_path / "seg.dcm", labels, volume, names=["a", "b", "c", "d"])
        write_segmentation(tmp_path / "seg.nii.gz", labels, volume)
        numbers = read_labels(tmp_path / "seg.dcm")
        assert numbers.names == {1: "a", 2: "b", 3: "c", 4: "d"}
        placed, spacing = on_volume(numbers, volume)
        np.testing.assert_array_equal(placed, labels, err_msg=name)
        assert spacing == pytest.approx((0.6, 0.8, 2.5), rel=1e-5)
        for pair in itertools.permutations((numbers, read_labels(tmp_path / "seg.nii.gz"))):
            first, other, _ = on_one_grid(*pair)
            np.testing.assert_array_equal(first, labels)
            np.testing.assert_array_equal(other, labels)


def test_two_segmentation_objects_share_a_grid(tmp_path: Path) -> None:
    volume = read_volume(save(slices(), tmp_path / "s"))
    first, other = np.zeros((2, *volume.shape), np.uint8)
    first[3:6, 2:5, 1], other[3:6, 2:5, 2:5] = 1, 1
    write_segmentation(tmp_path / "one.dcm", first, volume)
    write_segmentation(tmp_path / "other.dcm", other, volume)
    pair = [read_labels(tmp_path / f"{name}.dcm") for name in ("one", "other")]
    a, b, spacing = on_one_grid(*pair)
    np.testing.assert_array_equal(a, first[..., 1:5])
    np.testing.assert_array_equal(b, other[..., 1:5])
    assert spacing == pytest.approx((0.6, 0.8, 2.5))


def test_overlapping_segments_are_refused(tmp_path: Path) -> None:
    volume = read_volume(save(slices(), tmp_path / "s"))
    labels = np.zeros(volume.shape, np.uint8)
    labels[2:5, 2:5, 1], labels[6:8, 2:5, 1] = 1, 2
    write_segmentation(tmp_path / "seg.dcm", labels, volume)
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    frame = dataset.pixel_array[0]
    dataset.PixelData = np.packbits(np.stack([frame, frame]).ravel(), bitorder="little").tobytes()
    dataset.save_as(tmp_path / "seg.dcm")
    with pytest.raises(ImageError, match="segment 2 overlaps"):
        read_labels(tmp_path / "seg.dcm")


@given(st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
def test_stored_order_does_not_matter(order: list[int], flips: tuple[bool, ...]) -> None:
    """The same voxels with axes stored in any order and direction are the same labels."""
    turn = np.eye(4)[:, [*order, 3]]
    values = VALUES.transpose(order)
    for axis in (k for k in range(3) if flips[k]):
        turn[:, 3] += turn[:, axis] * (values.shape[axis] - 1)
        turn[:, axis] *= -1
        values = np.flip(values, axis)
    turned = Labels(path=Path("turned"), values=values, affine=AFFINE @ turn)
    np.testing.assert_array_equal(onto(turned, VALUES.shape, AFFINE, Path("image")), VALUES)


@pytest.mark.parametrize(
    "change",
    [
        np.diag([1, 1, 1.05, 1]),
        np.diag([2, 1, 1, 1]),
        np.eye(4) + np.eye(4, k=3) * 0.3,
        np.array([[0.8, 0.6, 0, 0], [-0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    ],
)
def test_other_grids_are_refused(change: np.ndarray) -> None:
    other = Labels(path=Path("other.nii"), values=VALUES, affine=AFFINE @ change)
    with pytest.raises(ImageError, match=r"other.nii and image.nii do not lie on one voxel grid"):
        onto(other, VALUES.shape, AFFINE, Path("image.nii"))


def test_rounded_affines_are_one_grid() -> None:
    other = Labels(path=Path("other"), values=VALUES, affine=AFFINE * (1 + 1e-4))
    np.testing.assert_array_equal(onto(other, VALUES.shape, AFFINE, Path("image")), VALUES)


def test_shapes_must_agree() -> None:
    labels = Labels(path=Path("labels"), values=VALUES[:-1], affine=AFFINE)
    with pytest.raises(ImageError, match=r"labels has shape \(6, 9, 5\), image \(7, 9, 5\)"):
        onto(labels, VALUES.shape, AFFINE, Path("image"))
    plain = Labels(path=Path("plain"), values=VALUES)
    with pytest.raises(ImageError, match="must be of one shape"):
        on_one_grid(plain, labels)
    first, other, spacing = on_one_grid(plain, Labels(path=Path("a"), values=VALUES, affine=AFFINE))
    assert (first == other).all()
    assert spacing == pytest.approx((0.8, 1.2, 3.0))
