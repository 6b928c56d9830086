"""Masks are written whole, with the values they have, or not at all."""

from __future__ import annotations

import stat
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images import Image, check_mask_suffix, read_image, write_mask

PICTURE = np.arange(48, dtype=np.uint8).reshape(6, 8)
MASK = PICTURE % 5 == 0
MASKS = hnp.arrays(bool, (6, 8)) | hnp.arrays(np.uint8, (6, 8))


@pytest.fixture
def image(tmp_path: Path) -> Image:
    PIL.Image.fromarray(PICTURE).save(tmp_path / "image.png")
    return read_image(tmp_path / "image.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("write")


@settings(max_examples=40, deadline=None)
@given(mask=MASKS)
def test_every_format_keeps_the_mask(folder: Path, mask: np.ndarray) -> None:
    image = Image(pixels=PICTURE, path=Path("somewhere.png"))
    for name in ("m.png", "m.npy", "m.nii", "m.nii.gz", "m.PNG", "m.NPY", "m.Nii.Gz"):
        write_mask(folder / name, mask, image)
    for name in ("m.png", "m.PNG"):
        with PIL.Image.open(folder / name) as picture:
            assert picture.mode == "L"
            expected = mask * np.uint8(255) if mask.dtype == bool else mask
            np.testing.assert_array_equal(np.asarray(picture), expected)
    for name in ("m.npy", "m.NPY"):
        array = np.load(folder / name, allow_pickle=False)
        assert array.dtype == mask.dtype
        np.testing.assert_array_equal(array, mask)
    for name in ("m.nii", "m.nii.gz"):
        volume = nibabel.load(folder / name)
        assert volume.shape == (6, 8, 1)
        assert volume.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(volume.affine, np.eye(4))
        np.testing.assert_array_equal(np.asarray(volume.dataobj)[..., 0], mask)


def test_a_mask_may_be_a_view(image: Image, tmp_path: Path) -> None:
    write_mask(tmp_path / "m.png", MASK.T.T[::-1], image)
    np.testing.assert_array_equal(read_image(tmp_path / "m.png").pixels, MASK[::-1] * np.uint8(255))


def test_a_colour_image_has_a_mask_of_its_sides(tmp_path: Path) -> None:
    image = Image(pixels=np.stack([PICTURE] * 3, axis=-1), path=tmp_path / "rgb.png")
    write_mask(tmp_path / "m.npy", MASK, image)
    assert np.load(tmp_path / "m.npy").shape == (6, 8)


@pytest.mark.parametrize("name", ["m.jpg", "m", "m.gz", "m.dcm", "nii"])
def test_unknown_suffixes_are_refused_before_anything_is_done(
    image: Image, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.tif, \.tiff, \.npy, \.nii, \.nii\.gz"):
        check_mask_suffix(tmp_path / name)
    with pytest.raises(UsageError):
        write_mask(tmp_path / name, MASK, image)
    assert not (tmp_path / name).exists()


def test_known_suffixes_pass() -> None:
    for name in ("a.png", "a.npy", "a.nii", "a.nii.gz", "A.PNG", "a.b.NII.GZ"):
        check_mask_suffix(name)


@pytest.mark.parametrize("mask", [MASK.astype(float), MASK.astype(int), MASK.astype("u2")])
def test_a_mask_of_another_dtype_is_refused(image: Image, tmp_path: Path, mask: np.ndarray) -> None:
    with pytest.raises(ImageError, match="expected bool or uint8"):
        write_mask(tmp_path / "m.png", mask, image)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8, 1), (6,)])
def test_a_mask_of_another_shape_is_refused(
    image: Image, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ImageError, match=r"its image \(6, 8\)"):
        write_mask(tmp_path / "m.png", np.zeros(shape, bool), image)


def test_the_image_itself_is_never_overwritten(image: Image, tmp_path: Path) -> None:
    before = image.path.read_bytes()
    (tmp_path / "link.png").symlink_to(image.path)
    for path in (image.path, tmp_path / "link.png", tmp_path / "." / "image.png"):
        with pytest.raises(UsageError, match="is the image itself"):
            write_mask(path, MASK, image)
    assert image.path.read_bytes() == before


def test_there_must_be_a_place_to_write_to(image: Image, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"the folder .*missing does not exist"):
        write_mask(tmp_path / "missing" / "m.png", MASK, image)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match="it is a folder"):
        write_mask(tmp_path / "folder.png", MASK, image)


def test_an_older_file_is_replaced(image: Image, tmp_path: Path) -> None:
    write_mask(tmp_path / "m.png", MASK, image)
    write_mask(str(tmp_path / "m.png"), ~MASK, image)
    np.testing.assert_array_equal(read_image(tmp_path / "m.png").pixels, ~MASK * np.uint8(255))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.png", "m.png"]
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "m.png").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    ), "as readable as any other new file"


@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        (OSError(28, "No space left on device"), ImageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_write_leaves_the_older_file(
    image: Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    raised: type[BaseException],
) -> None:
    (tmp_path / "m.npy").write_bytes(b"older")

    def fail(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise fault

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(raised):
        write_mask(tmp_path / "m.npy", MASK, image)
    assert (tmp_path / "m.npy").read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.png", "m.npy"]
