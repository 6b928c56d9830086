"""Files in, files out: the voxel that is bright is the voxel that is labelled, in any geometry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import PIL.Image
import pydicom
import pytest
import SimpleITK
from affines import Geometry, assert_labels_of, geometries, rotation, voxels
from dicom_series import AXIAL, OBLIQUE, SAGITTAL, back, placed, save, slices
from fake_network import SHAPE, bright_pixels
from hypothesis import given, settings
from hypothesis import strategies as st

from medsa_deploy import stages
from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images import read_volume
from medsa_deploy.runtime import Session, Structure, VolumeOptions
from medsa_deploy.stages import VolumeSegmentation

ROWS, COLUMNS, SLICES = 12, 20, 5
CT = VolumeOptions(intensity_window=(-1024, 1024))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end-to-end")


def box_of(shape: tuple[int, ...]) -> Structure:
    """A box around everything."""
    x, y, z = shape
    return Structure(boxes=((0, 0, 0, x, y, z),), name="all")


def segmented(
    session: Session,
    path: Path,
    *structures: Structure,
    options: VolumeOptions,
    mask: Path | None = None,
    overlay: Path | None = None,
    **selection: Any,
) -> VolumeSegmentation:
    chosen = stages.VolumeSelection(**selection)
    return stages.segment_volume_file(
        session, path, structures, options, mask=mask, overlay=overlay, selection=chosen
    )


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@settings(max_examples=25, deadline=None)
@given(
    geometry=geometries(),
    axis=st.sampled_from([None, 0, 1, 2]),
    chunk=st.sampled_from([1, 3]),
    dtype=st.sampled_from(["i2", "u1", "f4", ">i4"]),
    marked=st.lists(voxels(SHAPE), min_size=1, max_size=3),
)
def test_bright_voxels_are_labelled_in_the_very_same_geometry(
    folder: Path,
    suffix: str,
    geometry: Geometry,
    axis: int | None,
    chunk: int,
    dtype: str,
    marked: list[tuple[int, ...]],
) -> None:
    array = np.zeros(SHAPE, dtype)
    array[tuple(np.transpose(marked))] = 200
    source = geometry.save(array, folder / f"in{suffix}")
    session = bright_pixels(chunk=chunk, intensity_window=(0, 200))
    out = folder / f"out{suffix}"
    segmentation = segmented(
        session, folder / f"in{suffix}", box_of(SHAPE), options=VolumeOptions(), mask=out, axis=axis
    )
    np.testing.assert_array_equal(assert_labels_of(out, source), array > 100)
    assert axis in (None, segmentation.axis)
    assert segmentation.slices == tuple(range(SHAPE[segmentation.axis]))
    assert segmentation.labels[0].voxels == len(set(marked))
    voxel = abs(np.linalg.det(source.affine[:3, :3]))
    assert segmentation.labels[0].millilitres == pytest.approx(
        len(set(marked)) * voxel / 1000, rel=1e-3
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_click_marks_the_voxel_it_names(folder: Path, axis: int) -> None:
    """And the mask lies in space where its volume does, as another library places both."""
    affine = np.eye(4)
    affine[:3, :3] = rotation((0.3, -0.2, 0.5)) * (-0.8, 1.2, 4)
    array = np.full(SHAPE, 90, np.uint8)
    array[0, 0, 0] = 0
    nibabel.save(nibabel.Nifti1Image(array, affine), folder / "click.nii.gz")
    session = bright_pixels(clicks=0.2)
    voxel = (9.0, 16.0, 1.0)
    segmentation = segmented(
        session,
        folder / "click.nii.gz",
        Structure(points=(voxel,), labels=(1,)),
        options=VolumeOptions(),
        mask=folder / "click-seg.nii.gz",
        axis=axis,
    )
    labels = np.asarray(nibabel.load(folder / "click-seg.nii.gz").dataobj)
    marked = np.argwhere(labels)
    assert segmentation.slices == (voxel[axis],)
    assert set(marked[:, axis]) == {voxel[axis]}
    assert (np.abs((marked.min(axis=0) + marked.max(axis=0)) / 2 - voxel) <= 0.5).all()
    before, after = (
        SimpleITK.ReadImage(str(folder / n)) for n in ("click.nii.gz", "click-seg.nii.gz")
    )
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(after).T, labels)
    assert before.GetDirection() == after.GetDirection()
    assert before.GetOrigin() == after.GetOrigin()
    assert before.GetSpacing() == after.GetSpacing()


def test_one_of_several_volumes(folder: Path) -> None:
    array = np.zeros((*SHAPE, 3), np.int16)
    array[3, 4, 2, 1] = 100
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / "4d.nii.gz")
    options = VolumeOptions(intensity_window=(0, 100))
    out = folder / "4d-seg.nii.gz"
    session = bright_pixels()
    with pytest.raises(ImageError, match=r"choose one of its volumes \(--volume\) 0…2"):
        segmented(session, folder / "4d.nii.gz", box_of(SHAPE), options=options, mask=out)
    assert not out.exists()
    segmented(session, folder / "4d.nii.gz", box_of(SHAPE), options=options, mask=out, volume=1)
    np.testing.assert_array_equal(np.asarray(nibabel.load(out).dataobj), array[..., 1] > 0)


def test_npy_in_npy_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(0).random((5, 12, 20)) < 0.2
    np.save("mask.npy", array)  # bool becomes 0 and 255
    session = bright_pixels(chunk=2)
    segmentation = segmented(
        session, Path("mask.npy"), box_of(array.shape), options=VolumeOptions()
    )
    assert segmentation.mask == Path("mask.npy.seg.npy")
    written = np.load("mask.npy.seg.npy")
    assert written.dtype == np.uint8
    np.testing.assert_array_equal(written, array)
    assert segmentation.labels[0].millilitres is None
    out = Path("out.nii.gz")
    segmented(session, Path("mask.npy"), box_of(array.shape), options=VolumeOptions(), mask=out)
    np.testing.assert_array_equal(np.asarray(nibabel.load(out).dataobj), array)


def series(folder: Path, array: np.ndarray, names: str = "dbeac", **options: Any) -> Path:
    """A CT series of (columns, rows, slices), its files not in order; −1024 is stored as 0."""
    datasets = slices(array.shape[2], **options)
    for dataset, pixels in zip(datasets, array.transpose(2, 1, 0), strict=True):
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.PixelData = (pixels + 1024).astype("<i2").tobytes()
    return save(datasets, folder, names)


def ct(*voxels: tuple[int, int, int], value: int = 1000) -> np.ndarray:
    """(columns, rows, slices) of air with bright voxels."""
    array = np.full((COLUMNS, ROWS, SLICES), -1024)
    array[tuple(np.transpose(voxels))] = value
    return array


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, OBLIQUE])
def test_a_series_and_its_segmentation(tmp_path: Path, orientation: list[float]) -> None:
    voxels = [(3, 4, 0), (19, 11, 4), (0, 7, 2)]
    array = ct(*voxels[:2])
    array[voxels[2]] = 100
    path = series(tmp_path / "s", array, orientation=orientation)
    session = bright_pixels(chunk=2, classes=2, names=("fat", "bone"))
    structure = Structure(boxes=((0, 0, 0, COLUMNS, ROWS, SLICES),))
    segmentation = segmented(session, path, structure, options=CT, mask=tmp_path / "seg.dcm")
    assert [(label.name, label.voxels) for label in segmentation.labels] == [
        ("fat", 1),
        ("bone", 2),
    ]
    labels = (array > 0).astype(np.uint8) + (array > 500)
    volume = read_volume(path)
    np.testing.assert_array_equal(back(tmp_path / "seg.dcm", volume), labels)  # highdicom's reader
    by_file = {file.stem: pydicom.dcmread(file) for file in path.iterdir()}
    positions = [tuple(map(float, by_file[n].ImagePositionPatient)) for n in "dbeac"]
    assert placed(tmp_path / "seg.dcm") == {  # pydicom's
        (int(labels[x, y, z]), positions[z], y, x) for x, y, z in voxels
    }
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert [s.SegmentLabel for s in dataset.SegmentSequence] == ["fat", "bone"]
    (referenced,) = dataset.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == by_file["a"].SeriesInstanceUID
    assert dataset.StudyInstanceUID == by_file["a"].StudyInstanceUID
    assert dataset.FrameOfReferenceUID == by_file["a"].FrameOfReferenceUID
    assert highdicom.seg.segread(tmp_path / "seg.dcm").number_of_segments == 2
    segmented(session, path, structure, options=CT, mask=tmp_path / "seg.nii.gz")
    written = nibabel.load(tmp_path / "seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    np.testing.assert_allclose(written.affine, volume.affine, atol=1e-5)


def test_structures_become_segments_of_their_names(tmp_path: Path) -> None:
    array = ct(*((x, y, z) for x in range(3, 9) for y in range(2, 8) for z in range(5)))
    path = series(tmp_path / "s", array)
    prompts = {
        "structures": [
            {"name": "Leber links", "boxes": [[3, 2, 1, 6, 8, 2]]},
            {"name": "absent", "boxes": [[12, 9, 0, 14, 11, 5]]},
            {"name": "肿瘤", "points": [[7, 5, 3], [15, 5, 3, 0]], "boxes": [[6, 2, 3, 9, 8, 4]]},
        ]
    }
    (tmp_path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    structures = stages.structures_of([], [], tmp_path / "prompts.json")
    session = bright_pixels()
    options = VolumeOptions(intensity_window=(-1024, 1024), propagate=True, margin=0)
    out = tmp_path / "seg.dcm"
    segmentation = segmented(session, path, *structures, options=options, mask=out)
    expected = (array > 0).astype(np.uint8)
    expected[6:] *= 3
    np.testing.assert_array_equal(back(out, read_volume(path)), expected)
    dataset = pydicom.dcmread(out)
    assert [s.SegmentLabel for s in dataset.SegmentSequence] == ["Leber links", "absent", "肿瘤"]
    assert [label.voxels for label in segmentation.labels] == [90, 0, 90]


def test_a_mask_of_nothing_is_written_too(tmp_path: Path) -> None:
    path = series(tmp_path / "s", ct((0, 0, 0)))
    structure = Structure(boxes=((5, 5, 1, 9, 9, 3),))
    for name in ("seg.dcm", "seg.nii.gz", "seg.npy"):
        segmentation = segmented(bright_pixels(), path, structure, options=CT, mask=tmp_path / name)
        assert segmentation.labels[0].voxels == 0
    assert not back(tmp_path / "seg.dcm", read_volume(path)).any()
    assert not np.load(tmp_path / "seg.npy").any()


def test_a_window_of_the_file_holds_for_all_slices(tmp_path: Path) -> None:
    array = ct((1, 1, 0), (2, 2, 4), value=300)
    path = series(tmp_path / "s", array, WindowCenter=302, WindowWidth=1000)
    segmentation = segmented(
        bright_pixels(), path, box_of(array.shape), options=VolumeOptions(), mask=tmp_path / "a.npy"
    )
    assert segmentation.intensity_window is None
    assert not np.load(tmp_path / "a.npy").any()  # 300 is not half-way
    path = series(tmp_path / "s", array, WindowCenter=250, WindowWidth=1000)
    segmented(
        bright_pixels(), path, box_of(array.shape), options=VolumeOptions(), mask=tmp_path / "a.npy"
    )
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array > 0)


def test_monochrome1_is_seen_as_it_is_shown(tmp_path: Path) -> None:
    array = -ct((1, 1, 0), (2, 2, 4)) - 24  # bright is low, now
    path = series(tmp_path / "s", array, PhotometricInterpretation="MONOCHROME1")
    segmented(bright_pixels(), path, box_of(array.shape), options=CT, mask=tmp_path / "a.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array < 0)


# Montage


def test_a_montage_shows_labels_and_prompts(tmp_path: Path) -> None:
    array = np.zeros((20, 20, 12), np.uint8)
    array[5:15, 5:15, 3:8] = 255
    nibabel.save(
        nibabel.Nifti1Image(array.transpose(0, 2, 1), np.diag([1, 5, 1, 1])), tmp_path / "v.nii"
    )
    structure = Structure(points=((9, 5, 9),), labels=(1,), boxes=((4, 5, 4, 16, 6, 16),), name="a")
    segmented(
        bright_pixels(),
        tmp_path / "v.nii",
        structure,
        options=VolumeOptions(propagate=True),
        mask=tmp_path / "seg.nii",
        overlay=tmp_path / "montage.png",
    )
    picture = np.asarray(PIL.Image.open(tmp_path / "montage.png").convert("RGB"), int)
    tile = 512 + 28  # 20×20 slices are enlarged 26 times, then fitted; four in a row, two rows
    assert picture.shape == (2 * tile, 4 * 512 + 3 * 8, 3)
    prompted = picture[:512, 2 * 520 : 2 * 520 + 512]  # slice 5 of 3…7
    other = picture[:512, :512]
    green, yellow = (0, 158, 115), (240, 228, 66)
    for colour in (green, yellow):
        assert (np.abs(prompted - colour).max(axis=-1) < 12).any()
        assert not (np.abs(other - colour).max(axis=-1) < 12).any()
    # the label's tint is inside the square, and nothing outside it is tinted
    blue = other[..., 2] - other[..., 0] > 40
    places = np.argwhere(blue)
    assert places.min() == pytest.approx(5 / 20 * 512, abs=3)
    assert places.max() == pytest.approx(15 / 20 * 512, abs=3)
    assert (picture[tile:, 520:] == 0).all()  # no tiles there


def test_a_montage_of_many_slices_shows_twelve(tmp_path: Path) -> None:
    array = np.full((30, 12, 20), 200, np.uint8)
    array[0, 0, 0] = 0
    np.save(tmp_path / "v.npy", array)
    segmented(
        bright_pixels(),
        tmp_path / "v.npy",
        box_of(array.shape),
        options=VolumeOptions(),
        mask=tmp_path / "s.npy",
        overlay=tmp_path / "m.jpg",
    )
    with PIL.Image.open(tmp_path / "m.jpg") as picture:
        assert picture.format == "JPEG"
        assert picture.size == (4 * 512 + 3 * 8, 3 * (307 + 28))


@pytest.mark.parametrize(
    ("mask", "overlay", "error", "match"),
    [
        ("seg.png", None, UsageError, "no segmentation can be written as '.png'"),
        ("seg.dcm", None, UsageError, "refers to DICOM images"),
        ("v.npy", None, UsageError, "part of the volume itself"),
        ("none/seg.npy", None, UsageError, "none is not a folder: make it, or name"),
        (".", None, UsageError, "is a folder: name a file"),
        ("seg.npy", "seg.gif", UsageError, "no overlay can be written as '.gif'"),
        ("seg.npy", "none/a.png", UsageError, "none is not a folder"),
    ],
)
def test_targets_are_refused_before_anything_is_computed(
    tmp_path: Path, mask: str, overlay: str | None, error: type[Exception], match: str
) -> None:
    np.save(tmp_path / "v.npy", np.random.default_rng(0).random((3, 12, 20)))
    session = bright_pixels()
    with pytest.raises(error, match=match):
        segmented(
            session,
            tmp_path / "v.npy",
            box_of((3, 12, 20)),
            options=VolumeOptions(),
            mask=tmp_path / mask,
            overlay=overlay and tmp_path / overlay,
        )
    assert session.backend.encoded == []  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]


def test_the_default_name_of_the_folder_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = series(tmp_path / "thorax", ct((1, 1, 1)))
    monkeypatch.chdir(path)
    segmentation = segmented(bright_pixels(), Path(), box_of((COLUMNS, ROWS, SLICES)), options=CT)
    assert segmentation.mask == Path("thorax.seg.nii.gz")
    assert nibabel.load(path / "thorax.seg.nii.gz").shape == (COLUMNS, ROWS, SLICES)
