"""NRRD and MetaImage, against SimpleITK's own reading, and what 3D Slicer takes."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images import (
    is_volume,
    read_image,
    read_labels,
    read_volume,
    write_segmentation,
)

X, Y, Z = 5, 6, 7
VOXELS = np.arange(X * Y * Z, dtype=np.int16).reshape(Z, Y, X)
DIRECTION = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def save(path: Path, voxels: np.ndarray = VOXELS, *, vector: bool = False, **fields: str) -> Path:
    """An array [z, y, x] as a turned volume of 1 × 2 × 3 mm."""
    image = SimpleITK.GetImageFromArray(voxels, isVector=vector)
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection(DIRECTION)
    for name, text in fields.items():
        image.SetMetaData(name, text)
    SimpleITK.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.nhdr", "a.mhd"])
def test_the_voxels_and_their_place_are_those_itk_reads(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name)
    assert is_volume(path)
    volume = read_volume(path)
    reference = SimpleITK.ReadImage(str(path))
    assert (volume.kind, volume.shape, volume.axis) == ("nrrd", (X, Y, Z), 2)
    assert volume.spacing_mm == pytest.approx((1, 2, 3))
    for index in range(Z):
        np.testing.assert_array_equal(volume.slice(index).pixels, VOXELS[index].T)
    for voxel in ((0, 0, 0), (4, 0, 2), (1, 5, 6)):
        left, posterior, superior = reference.TransformIndexToPhysicalPoint(voxel)
        assert volume.affine is not None
        placed = volume.affine @ [*voxel, 1]
        np.testing.assert_allclose(placed[:3], (-left, -posterior, superior), atol=1e-9)
    assert set(volume.files) == {path, *tmp_path.glob("*.raw*"), *tmp_path.glob("*.zraw")}


def test_the_content_decides(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nrrd").rename(tmp_path / "volume.bin")
    with pytest.raises(ImageError, match="cannot be read as NRRD"):
        read_volume(path)  # ITK itself goes by the name
    path = path.rename(tmp_path / "volume.nrrd")
    assert read_volume(path).shape == (X, Y, Z)


@pytest.mark.parametrize(
    ("space", "signs"),
    [("right-anterior-superior", (1, 1, 1)), ("left-posterior-superior", (-1, -1, 1))],
)
def test_the_space_of_a_nrrd_is_kept(
    tmp_path: Path, space: str, signs: tuple[int, int, int]
) -> None:
    header = (
        f"NRRD0004\ntype: short\ndimension: 3\nspace: {space}\nsizes: {X} {Y} {Z}\n"
        "space directions: (1,0,0) (0,2,0) (0,0,3)\nkinds: domain domain domain\n"
        "endian: little\nencoding: gzip\nspace origin: (5,6,7)\n\n"
    )
    path = tmp_path / "a.nrrd"
    path.write_bytes(header.encode() + gzip.compress(VOXELS.tobytes()))
    affine = read_volume(path).affine
    assert affine is not None
    np.testing.assert_allclose(affine[:3, 3], np.multiply((5, 6, 7), signs))
    np.testing.assert_allclose(np.diag(affine)[:3], np.multiply((1, 2, 3), signs))


def test_a_slice_is_chosen_as_in_a_nifti(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(read_image(path, axis=2, index=3).pixels, VOXELS[3].T)
    np.testing.assert_array_equal(read_image(path, axis=0, index=4).pixels, VOXELS[:, :, 4].T)
    with pytest.raises(ImageError, match="choose a slice"):
        read_image(path)


def test_one_plane_is_a_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mha", VOXELS[:1])
    assert not is_volume(path)
    np.testing.assert_array_equal(read_image(path).pixels, VOXELS[0])


def test_colours(tmp_path: Path) -> None:
    colours = np.arange(Z * Y * X * 3, dtype=np.uint8).reshape(Z, Y, X, 3)
    volume = read_volume(save(tmp_path / "a.mha", colours, vector=True))
    assert (volume.colour, volume.dtype) == (True, np.uint8)
    np.testing.assert_array_equal(volume.slice(2).pixels, colours[2].transpose(1, 0, 2))


def test_vectors_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nrrd", np.zeros((Z, Y, X, 2), np.float32), vector=True)
    with pytest.raises(ImageError, match="2 values for each voxel"):
        read_volume(path)


def test_damage_is_one_line(tmp_path: Path) -> None:
    content = save(tmp_path / "a.nrrd").read_bytes()
    path = tmp_path / "cut.nrrd"
    for size in (0, 9, 60, 200, len(content) - 50):
        path.write_bytes(content[:size])
        with pytest.raises(ImageError) as caught:
            read_volume(path)
        assert "\n" not in str(caught.value)


def test_a_header_that_announces_more_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.nrrd"
    path.write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nsizes: 90000 90000 900\nencoding: raw\n"
        b"endian: little\n\n12"
    )
    with pytest.raises(ImageError, match="announces 7290000000000 voxels"):
        read_volume(path)


@pytest.mark.parametrize("data", ["/etc/passwd", "../a.raw", "LIST", "gone.raw"])
def test_a_header_names_no_file_elsewhere(tmp_path: Path, data: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    path = save(folder / "a.mhd")
    (folder / "a.raw").rename(tmp_path / "a.raw")
    path.write_text(path.read_text().replace("a.raw", data))
    with pytest.raises(ImageError, match="expected one data file in the same folder"):
        read_volume(path)


@pytest.mark.parametrize("source", ["a.nrrd", "a.mha", "a.nii.gz", "a.npy"])
@pytest.mark.parametrize("target", ["m.nrrd", "m.mha", "m.seg.nrrd", "m.nii.gz"])
def test_labels_lie_on_the_voxels_they_were_made_from(
    tmp_path: Path, source: str, target: str
) -> None:
    path = tmp_path / source
    if source.endswith(".npy"):
        np.save(path, VOXELS.T)
    else:
        save(path)
    volume = read_volume(path)
    labels = (np.arange(X * Y * Z, dtype=np.uint8) % 3).reshape(X, Y, Z)
    write_segmentation(tmp_path / target, labels, volume, names=["liver", "left kidney"])
    written = read_labels(tmp_path / target)
    np.testing.assert_array_equal(written.values, labels)
    if volume.affine is not None:
        assert written.affine is not None
        np.testing.assert_allclose(written.affine, volume.affine, atol=1e-4)
    if source.endswith(".npy"):
        return
    mask, image = (SimpleITK.ReadImage(str(p)) for p in (tmp_path / target, path))
    assert mask.GetSize() == image.GetSize()
    for field in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, field)(), getattr(image, field)(), atol=1e-4)


def test_segments_have_names_values_and_colours(tmp_path: Path) -> None:
    volume = read_volume(save(tmp_path / "a.nrrd"))
    labels = np.zeros((X, Y, Z), np.uint8)
    labels[1:3, 2:5, 4] = 2
    path = tmp_path / "m.seg.nrrd"
    write_segmentation(path, labels, volume, names=["liver", "left kidney", "spleen"])
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    fields = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
    assert [fields[f"Segment{k}_Name"] for k in range(3)] == ["liver", "left kidney", "spleen"]
    assert [fields[f"Segment{k}_LabelValue"] for k in range(3)] == ["1", "2", "3"]
    assert fields["Segment1_Extent"] == "1 2 2 4 4 4"
    assert fields["Segment0_Extent"] == "0 -1 0 -1 0 -1"
    colours = {fields[f"Segment{k}_Color"] for k in range(3)}
    assert len(colours) == 3
    assert all(0 <= float(part) <= 1 for colour in colours for part in colour.split())
    assert path.stat().st_size < 2000  # compressed


def test_the_volume_itself_is_not_overwritten(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nrrd")
    with pytest.raises(UsageError, match="part of the volume itself"):
        write_segmentation(path, np.zeros((X, Y, Z), np.uint8), read_volume(path))


def test_spacing_from_the_affine_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_volume(save(tmp_path / "a.mha")).axis == 2
    assert not caplog.records
