"""PNG, JPEG, TIFF and BMP come in with the values other software wrote."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import skimage
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medsa_deploy.errors import ImageError
from medsa_deploy.images import (
    is_volume,
    read_image,
    read_labels,
    read_volume,
    write_mask,
    write_segmentation,
)

SIDES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=9)
RETINA = Path(skimage.__file__).parent / "data" / "retina.jpg"


def grey(dtype: type[np.generic]) -> st.SearchStrategy[np.ndarray]:
    """Images of a dtype that are not constant."""
    return hnp.arrays(dtype, SIDES).filter(lambda a: np.ptp(a.astype(float)) > 0)


def colour(dtype: type[np.generic], channels: int) -> st.SearchStrategy[np.ndarray]:
    shapes = SIDES.map(lambda shape: (*shape, channels))
    return hnp.arrays(dtype, shapes).filter(lambda a: len(np.unique(a[..., 0])) > 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("raster")


def save(array: np.ndarray, path: Path, mode: str | None = None, **options: object) -> Path:
    picture = PIL.Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
@settings(max_examples=25, deadline=None)
@given(array=grey(np.uint8) | colour(np.uint8, 3))
def test_eight_bit_values_survive(folder: Path, name: str, array: np.ndarray) -> None:
    image = read_image(save(array, folder / name))
    assert image.pixels.dtype == np.uint8
    assert image.display is None
    assert not image.inverted
    np.testing.assert_array_equal(image.pixels, array)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@settings(max_examples=25, deadline=None)
@given(array=grey(np.uint16))
def test_sixteen_bit_grey_keeps_all_its_bits(folder: Path, name: str, array: np.ndarray) -> None:
    path = folder / name
    cv2.imwrite(str(path), array)
    image = read_image(path)
    assert image.pixels.dtype == np.uint16
    np.testing.assert_array_equal(image.pixels, array)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@settings(max_examples=15, deadline=None)
@given(array=colour(np.uint8, 4))
def test_alpha_is_dropped_not_blended(folder: Path, name: str, array: np.ndarray) -> None:
    image = read_image(save(array, folder / name))
    np.testing.assert_array_equal(image.pixels, array[..., :3])


@settings(max_examples=15, deadline=None)
@given(array=colour(np.uint8, 2))
def test_grey_with_alpha_is_grey(folder: Path, array: np.ndarray) -> None:
    image = read_image(save(array, folder / "la.png"))
    np.testing.assert_array_equal(image.pixels, array[..., 0])


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_one_bit_becomes_black_and_white(folder: Path, name: str) -> None:
    array = np.eye(7, dtype=bool)
    path = folder / f"bits-{name}"
    PIL.Image.fromarray(array).save(path)
    with PIL.Image.open(path) as picture:
        assert picture.mode == "1"
    np.testing.assert_array_equal(read_image(path).pixels, array.astype(np.uint8) * 255)


@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_becomes_its_colours(folder: Path, transparent: bool) -> None:
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4)
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    picture = PIL.Image.fromarray(indices).convert("P")
    picture.putpalette(colours.tobytes())
    options = {"transparency": bytes([0, 128] + [255] * 254)} if transparent else {}
    picture.save(folder / "p.png", **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(read_image(folder / "p.png").pixels, colours[indices])


def test_a_jpeg_is_what_another_decoder_sees() -> None:
    image = read_image(RETINA)
    expected = cv2.cvtColor(cv2.imread(str(RETINA)), cv2.COLOR_BGR2RGB)
    assert image.pixels.shape == (1411, 1411, 3)
    assert np.abs(image.pixels.astype(int) - expected).mean() < 0.5


def test_a_cmyk_jpeg_becomes_rgb(folder: Path) -> None:
    array = np.full((16, 16, 3), 40, np.uint8)
    array[:8] = 200
    path = save(array, folder / "cmyk.jpg", "CMYK", quality=100)
    assert np.abs(read_image(path).pixels.astype(int) - array).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("e.jpg", "u1"), ("e.png", "u1"), ("e.png", "u2"), ("e.tif", "u1"), ("e.tif", "u2")],
)
def test_exif_orientation_is_applied(folder: Path, name: str, dtype: str, orientation: int) -> None:
    array = np.zeros((24, 40), np.uint8)
    array[:12, :12] = 250  # one bright corner: top left as stored
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = folder / f"{orientation}-{dtype}-{name}"
    PIL.Image.fromarray(array.astype(dtype)).save(path, exif=exif)
    pixels = read_image(path).pixels
    # What each orientation makes of the stored picture (TIFF 6.0, section 8).
    seen = {
        1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1],
        5: array.T, 6: array.T[:, ::-1], 7: array.T[::-1, ::-1], 8: array.T[::-1],
    }[orientation]  # fmt: skip
    assert pixels.shape == seen.shape
    assert np.abs(pixels.astype(int) - seen).max() <= 25


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("name", ["c.png", "c.tif"])
def test_sixteen_bit_colour_is_reduced_and_says_so(
    folder: Path, name: str, alpha: bool, caplog: pytest.LogCaptureFixture
) -> None:
    array = np.random.default_rng(1).integers(0, 2**16, (9, 7, 4 if alpha else 3), np.uint16)
    path = folder / f"16-{alpha}-{name}"
    cv2.imwrite(str(path), array[..., [2, 1, 0, 3][: array.shape[2]]])
    with caplog.at_level(logging.WARNING):
        image = read_image(path)
    assert image.pixels.dtype == np.uint8
    np.testing.assert_array_equal(image.pixels, array[..., :3] >> 8)
    assert "upper 8 bits" in caplog.text


def test_eight_bit_colour_warns_of_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_image(
        save(np.random.default_rng(1).integers(0, 255, (9, 7, 3), np.uint8), folder / "8.png")
    )
    assert caplog.text == ""


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.float32]
)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_intensities_keep_their_dtype(
    folder: Path, dtype: type[np.generic], compression: str | None
) -> None:
    if np.issubdtype(dtype, np.integer):
        ends = np.iinfo(dtype)  # type: ignore[type-var]
        array = np.array([[ends.min, ends.max, 1], [0, 2, 3]], dtype)
    else:
        array = np.array([[-1e30, 1e30, 0.25], [0, 1, 2]], dtype)
    path = folder / f"{np.dtype(dtype)}-{compression}.tif"
    tifffile.imwrite(path, array, compression=compression, photometric="minisblack")
    pixels = read_image(path).pixels
    assert pixels.dtype == dtype
    np.testing.assert_array_equal(pixels, array)


def test_big_endian_tiff(folder: Path) -> None:
    array = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    tifffile.imwrite(folder / "be.tif", array, byteorder=">", photometric="minisblack")
    image = read_image(folder / "be.tif")
    assert image.pixels.dtype.isnative
    np.testing.assert_array_equal(image.pixels, array)


def test_min_is_white_is_inverted_once(folder: Path) -> None:
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)
    tifffile.imwrite(folder / "white16.tif", array, photometric="miniswhite")
    image = read_image(folder / "white16.tif")
    assert image.inverted
    np.testing.assert_array_equal(image.pixels, array)

    tifffile.imwrite(folder / "white8.tif", array.astype(np.uint8), photometric="miniswhite")
    image = read_image(folder / "white8.tif")
    assert not image.inverted, "Pillow has inverted it already"
    np.testing.assert_array_equal(image.pixels, 255 - array)


def test_several_pages_are_refused(folder: Path) -> None:
    tifffile.imwrite(
        folder / "pages.tif", np.zeros((5, 16, 16), np.uint8), photometric="minisblack"
    )
    with pytest.raises(ImageError, match="5 pages"):
        read_image(folder / "pages.tif")
    frames = [PIL.Image.new("L", (8, 8), value) for value in (0, 100, 200)]
    frames[0].save(folder / "animated.png", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="several pages or frames"):
        read_image(folder / "animated.png")


def test_a_jpeg_with_previews_is_its_first_picture(folder: Path) -> None:
    first = PIL.Image.linear_gradient("L")
    first.save(folder / "mpo.jpg", "MPO", save_all=True, append_images=[PIL.Image.new("L", (9, 9))])
    assert read_image(folder / "mpo.jpg").pixels.shape == (256, 256)


@pytest.mark.parametrize("name", ["t.png", "t.jpg", "t.tif", "t.bmp"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_files_are_refused(folder: Path, name: str, share: float) -> None:
    path = save(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8), folder / name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_large_image_is_read_and_a_huge_one_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(np.eye(64, dtype=np.uint8), folder / "large.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 64 * 40)  # Pillow warns from here on
    assert read_image(path).pixels.shape == (64, 64)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 64 * 20)  # and refuses twice as many
    with pytest.raises(ImageError, match="million pixels; crop"):
        read_image(path)


def test_a_rare_variant_is_refused_with_advice(folder: Path) -> None:
    tifffile.imwrite(folder / "f64.tif", np.eye(8, dtype=np.float64), photometric="minisblack")
    with pytest.raises(ImageError, match=r"convert it to an 8- or 16-bit PNG or to \.npy"):
        read_image(folder / "f64.tif")
    PIL.Image.new("LAB", (8, 8)).save(folder / "lab.tif")
    with pytest.raises(ImageError, match="colour mode LAB"):
        read_image(folder / "lab.tif")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_nothing_but_image_errors(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["d.png", "d.jpg", "d.tif", "d.bmp"]))
    buffer = io.BytesIO()
    PIL.Image.linear_gradient("L").resize((16, 16)).save(
        buffer, {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "bmp": "BMP"}[name[2:]]
    )
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = folder / name
    path.write_bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    with contextlib.suppress(ImageError):
        read_image(path)


STILLS = [("GIF", {}), ("WEBP", {"lossless": True}), ("JPEG2000", {"irreversible": False})]


@pytest.mark.parametrize(("kind", "options"), STILLS)
def test_stills_of_the_web_come_in_as_they_were(
    tmp_path: Path, kind: str, options: dict[str, bool]
) -> None:
    pixels = (np.arange(40 * 50) % 251).astype(np.uint8).reshape(40, 50)
    PIL.Image.fromarray(pixels).save(tmp_path / "still", kind, **options)
    image = read_image(tmp_path / "still").pixels  # by its content: the name says nothing
    np.testing.assert_array_equal(image if image.ndim == 2 else image[..., 0], pixels)


def test_an_animation_is_no_volume(tmp_path: Path) -> None:
    frames = [PIL.Image.fromarray(np.full((9, 9), k * 60, np.uint8)) for k in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert not is_volume(tmp_path / "a.gif")
    with pytest.raises(ImageError, match="holds several pages or frames"):
        read_image(tmp_path / "a.gif")


@pytest.mark.parametrize("mask", [np.eye(9, dtype=bool), np.diag(np.arange(9, dtype=np.uint8))])
@pytest.mark.parametrize("suffix", [".tif", ".tiff"])
def test_masks_are_written_as_tiff(tmp_path: Path, mask: np.ndarray, suffix: str) -> None:
    np.save(tmp_path / "a.npy", np.arange(81.0).reshape(9, 9))
    path = tmp_path / f"mask{suffix}"
    write_mask(path, mask, read_image(tmp_path / "a.npy"))
    expected = mask.astype(np.uint8) * 255 if mask.dtype == bool else mask
    np.testing.assert_array_equal(tifffile.imread(path), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_the_pages_of_a_tiff_are_slices(tmp_path: Path, dtype: type[np.generic]) -> None:
    pages = np.arange(3 * 4 * 5).reshape(3, 4, 5).astype(dtype)
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, pages, photometric="minisblack")
    assert is_volume(path)
    volume = read_volume(path)
    assert (volume.kind, volume.shape, volume.axis, len(volume)) == ("tiff", (5, 4, 3), 2, 3)
    assert volume.dtype == dtype
    for index in (2, 0, 1):  # in any order
        np.testing.assert_array_equal(volume.slice(index).pixels, pages[index])
    np.testing.assert_array_equal(read_image(path, index=1).pixels, pages[1])
    assert volume.locate((4, 1, 2)) == (2, 4.0, 1.0)
    labels = np.zeros(volume.shape, np.uint8)
    labels[4, 1, 2] = 3
    write_segmentation(tmp_path / "seg.tif", labels, volume)
    written = tifffile.imread(tmp_path / "seg.tif")
    assert (written.shape, written[2, 1, 4], written.sum()) == ((3, 4, 5), 3, 3)
    np.testing.assert_array_equal(read_labels(tmp_path / "seg.tif").values, labels)


def test_pages_of_two_sizes_are_refused(tmp_path: Path) -> None:
    first, second = (PIL.Image.fromarray(np.eye(n, dtype=np.uint8)) for n in (8, 9))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[first, second])
    with pytest.raises(ImageError, match="8×8 L on page 1, 9×9 L on page 3"):
        read_volume(tmp_path / "a.tif")


def test_another_axis_of_a_tiff_is_refused(tmp_path: Path) -> None:
    pages = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack")
    for axis in (0, 1):
        with pytest.raises(ImageError, match=f"axis {axis} was given, expected 2"):
            read_volume(tmp_path / "a.tif", axis=axis)
        with pytest.raises(ImageError, match=f"axis {axis} was given, expected 2"):
            read_image(tmp_path / "a.tif", axis=axis, index=0)
    with pytest.raises(ImageError, match="no page 3"):
        read_image(tmp_path / "a.tif", index=3)
