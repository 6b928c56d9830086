"""Which files are images, .npy arrays, and what is refused whatever the format."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medsa_deploy.errors import ImageError
from medsa_deploy.images import Image, find_images, read_image
from medsa_deploy.images.image import check_image

PICTURE = np.arange(48, dtype=np.uint8).reshape(6, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("read")


def save(array: np.ndarray, path: Path) -> Path:
    np.save(path, array)
    return path


def test_importing_the_package_loads_neither_nibabel_nor_pydicom() -> None:
    code = (
        "import sys, medsa_deploy.images; sys.exit(bool({'nibabel', 'pydicom'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_content_outranks_the_suffix(tmp_path: Path) -> None:
    PIL.Image.fromarray(PICTURE).save(tmp_path / "a.png")
    for name in ("a.tif", "a.dcm", "a.dat", "picture"):
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
        np.testing.assert_array_equal(read_image(tmp_path / name).pixels, PICTURE)


def test_suffixes_count_in_any_case(tmp_path: Path) -> None:
    PIL.Image.fromarray(PICTURE).save(tmp_path / "a.BMP")
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.BMP")).pixels, PICTURE)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="is a folder: give one image"):
        read_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match="is an empty file"):
        read_image(tmp_path / "empty.png")
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(ImageError, match=r"is not a known image.*\.png, \.jpg"):
        read_image(tmp_path / "notes.txt")


def test_a_file_nobody_may_open_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(PICTURE, tmp_path / "a.npy")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match="cannot be opened: Permission denied"):
        read_image(path)


@pytest.mark.parametrize("options", [{"axis": 0}, {"index": 3}])
def test_a_single_image_has_no_slices(tmp_path: Path, options: dict[str, int]) -> None:
    PIL.Image.fromarray(PICTURE).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="is a single image"):
        read_image(tmp_path / "a.png", **options)
    with pytest.raises(ImageError, match=r"has shape \(6, 8\)"):
        read_image(save(PICTURE, tmp_path / "a.npy"), **options)


def test_a_folder_is_searched_for_images(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds no images"):
        find_images(tmp_path)
    preamble = bytes(128) + b"DICM"
    images = ["1.2.840.3", "IM0001", "a.nii.gz", "b.PNG", "c.dcm"]
    for name in images:
        (tmp_path / name).write_bytes(preamble if "." not in name or name[0] == "1" else b"x")
    for name in ("DICOMDIR", ".hidden.png", "._c.dcm"):
        (tmp_path / name).write_bytes(preamble)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "archive.gz").write_text("x")
    (tmp_path / "README").write_text("x")
    (tmp_path / "inner.png").mkdir()
    assert [path.name for path in find_images(tmp_path)] == images


def test_only_a_folder_is_searched(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        find_images(tmp_path / "missing")
    (tmp_path / "a.png").touch()
    with pytest.raises(ImageError, match="is a file, not a folder"):
        find_images(tmp_path / "a.png")


NUMBERS = st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "i8", "f4", ">u2", ">f4"])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_arrays_keep_values_and_dtype(folder: Path, data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(NUMBERS))
    shape = data.draw(st.sampled_from([(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)]))
    elements = st.floats(-1e6, 1e6, width=32) if dtype.kind == "f" else None
    array = data.draw(hnp.arrays(dtype, shape, elements=elements))
    array.flat[0], array.flat[-2] = 1, 2
    image = read_image(save(array, folder / "a.npy"))
    expected = {1: array[..., 0], 3: array, 4: array[..., :3], 6: array}[shape[-1]]
    assert image.pixels.dtype == dtype.newbyteorder("=")
    assert image.plane is None
    np.testing.assert_array_equal(image.pixels, expected)


def test_array_dtypes_are_brought_to_three_kinds(tmp_path: Path) -> None:
    truth = read_image(save(np.eye(4, dtype=bool), tmp_path / "b.npy")).pixels
    np.testing.assert_array_equal(truth, np.eye(4, dtype=np.uint8) * 255)
    for dtype in (np.float16, np.float64):
        assert read_image(save(np.eye(4, dtype=dtype), tmp_path / "f.npy")).pixels.dtype == "f4"
    for bad in (np.eye(4, dtype=complex), np.array([["a", "b"]]), np.zeros((2, 2), "u1,u1")):
        with pytest.raises(ImageError, match="expected real numbers"):
            read_image(save(bad, tmp_path / "bad.npy"))


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([[{}, []]], dtype=object), allow_pickle=True)
    with pytest.raises(ImageError, match=r"o\.npy cannot be read as a \.npy array"):
        read_image(tmp_path / "o.npy")
    np.savez(tmp_path / "z.npz", PICTURE)
    (tmp_path / "z.npz").rename(tmp_path / "z.npy")
    with pytest.raises(ImageError, match="cannot be read as a"):
        read_image(tmp_path / "z.npy")


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_a_slice_of_an_array_keeps_the_stored_order(tmp_path: Path, axis: int | None) -> None:
    volume = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    image = read_image(save(volume, tmp_path / "v.npy"), axis=axis, index=4)
    np.testing.assert_array_equal(image.pixels, volume.take(4, axis or 0))


def test_a_volume_needs_a_slice(tmp_path: Path) -> None:
    path = save(np.arange(5 * 6 * 7).reshape(5, 6, 7), tmp_path / "v.npy")
    with pytest.raises(ImageError, match=r"0…4 along axis 0; none was given"):
        read_image(path)
    with pytest.raises(ImageError, match=r"0…6 along axis 2; 7 was given"):
        read_image(path, axis=2, index=7)
    with pytest.raises(ImageError, match=r"0…4 along axis 0; -1 was given"):
        read_image(path, index=-1)
    with pytest.raises(ImageError, match="there is no axis 3"):
        read_image(path, axis=3, index=0)
    for shape in [(7,), (2, 3, 4, 5), ()]:
        with pytest.raises(ImageError, match=r"expected \(H, W\)"):
            read_image(save(np.zeros(shape), tmp_path / "s.npy"))


def test_a_slice_asked_for_makes_channels_a_volume(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
    image = read_image(save(array, tmp_path / "v.npy"), axis=2, index=1)
    np.testing.assert_array_equal(image.pixels, array[..., 1])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0, 3), (4, 4, 0)])
def test_an_image_without_pixels_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError):
        read_image(save(np.zeros(shape), tmp_path / "e.npy"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_counted(tmp_path: Path, bad: float) -> None:
    array = np.arange(12.0).reshape(3, 4)
    array[1, 1:3] = bad
    with pytest.raises(ImageError, match="2 NaN or infinite values out of 12"):
        read_image(save(array, tmp_path / "n.npy"))
    with pytest.raises(ImageError, match="1 NaN or infinite"):
        read_image(save(np.array([[1e300, 1.0]]), tmp_path / "n.npy"))


@pytest.mark.parametrize(
    ("array", "value"),
    [
        (np.full((3, 4), 7, np.uint8), "7"),
        (np.full((3, 4), -2.5), "-2.5"),
        (np.tile(np.array([1, 2, 3], np.uint8), (3, 4, 1)), r"\[1, 2, 3\]"),
    ],
)
def test_a_constant_image_is_refused(tmp_path: Path, array: np.ndarray, value: str) -> None:
    with pytest.raises(ImageError, match=f"every pixel is {value}: nothing to segment"):
        read_image(save(array, tmp_path / "c.npy"))


def test_a_window_that_shows_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    flat = np.zeros(PICTURE.shape, np.float32)
    with caplog.at_level(logging.WARNING):
        check_image(Image(pixels=PICTURE, display=flat, path=Path("a.dcm")))
    assert "one flat grey; its values span 0 to 47" in caplog.text


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_arrays_raise_nothing_but_image_errors(folder: Path, data: st.DataObject) -> None:
    path = save(PICTURE, folder / "damaged.npy")
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    with contextlib.suppress(ImageError):
        read_image(path)
