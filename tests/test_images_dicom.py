"""DICOM comes in as the standard says: rescaled, windowed, inverted once, in RGB."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pydicom
import pytest
import SimpleITK
from dicom_images import RAMP, dicom, lut, put_text, read, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut, apply_voi_lut, apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RTDoseStorage,
    SecondaryCaptureImageStorage,
)

from medsa_deploy.errors import ImageError, MissingDependencyError
from medsa_deploy.images import read_image


def test_the_rescale_is_applied() -> None:
    image = read_image(sample("CT_small.dcm"))
    stored = pydicom.dcmread(sample("CT_small.dcm")).pixel_array
    assert image.pixels.dtype == np.float32
    assert image.display is None
    assert not image.inverted
    assert image.plane is None
    np.testing.assert_array_equal(image.pixels, stored.astype(float) - 1024)


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm",
        "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm",
        "examples_overlay.dcm", "image_dfl.dcm", "examples_rgb_color.dcm", "693_J2KI.dcm",
    ],
)  # fmt: skip
def test_simpleitk_reads_the_same_intensities(name: str) -> None:
    image = read_image(sample(name))
    reference = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(sample(name))))[0]
    # JPEG 2000 lossy: two decoders, rounding apart.
    np.testing.assert_allclose(image.pixels, reference, atol=1 if name.startswith("693") else 0)


def test_the_window_of_a_real_file() -> None:
    image = read_image(sample("MR_small.dcm"))
    dataset = pydicom.dcmread(sample("MR_small.dcm"))
    centre, width = float(dataset.WindowCenter), float(dataset.WindowWidth)
    expected = np.clip((dataset.pixel_array - centre + 0.5) / (width - 1) + 0.5, 0, 1) * 255
    assert image.pixels.dtype == np.int16
    assert image.display is not None
    assert image.display.dtype == np.float32
    np.testing.assert_allclose(image.display, expected, atol=1e-3)


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@settings(max_examples=25, deadline=None)
@given(centre=st.floats(-3000, 6000), width=st.floats(1, 9000), slope=st.sampled_from([1, 0.5, 2]))
def test_windows_are_the_standards(
    tmp_path_factory: pytest.TempPathFactory,
    function: str | None,
    centre: float,
    width: float,
    slope: float,
) -> None:
    dataset = dicom(
        RAMP, WindowCenter=f"{centre:.6g}", WindowWidth=f"{width:.6g}", BitsStored=12, HighBit=11,
        RescaleSlope=slope, RescaleIntercept=-1024,
    )  # fmt: skip
    if function:
        dataset.VOILUTFunction = function
    image = read(dataset, tmp_path_factory.getbasetemp(), "window.dcm")
    assert image.display is not None
    low, high = -1024, 4095 * slope - 1024  # pydicom's output range: all that 12 bits can hold
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        reference = apply_windowing(image.pixels, dataset)
    np.testing.assert_allclose(image.display, (reference - low) / (high - low) * 255, atol=1e-2)


def test_the_narrowest_window_is_a_step(tmp_path: Path) -> None:
    image = read(dicom(RAMP, WindowCenter=100, WindowWidth=1), tmp_path)
    np.testing.assert_array_equal(image.display, np.where(RAMP > 99.5, 255, 0))


def test_the_first_of_several_windows_counts(tmp_path: Path) -> None:
    image = read(dicom(RAMP, WindowCenter=[40, 400], WindowWidth=[100, 2000]), tmp_path)
    first = read(dicom(RAMP, WindowCenter=40, WindowWidth=100), tmp_path)
    np.testing.assert_array_equal(image.display, first.display)


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"WindowCenter": 40},
        {"WindowCenter": None, "WindowWidth": None},
        {"WindowCenter": "", "WindowWidth": ""},
    ],
)
def test_a_file_without_a_window_asks_for_nothing(tmp_path: Path, window: dict[str, Any]) -> None:
    image = read(dicom(RAMP, **window), tmp_path)
    assert image.display is None
    assert image.pixels.dtype == np.uint16


@pytest.mark.parametrize(
    "window",
    [
        {"WindowWidth": 0},
        {"WindowWidth": -100},
        {"WindowWidth": 0, "VOILUTFunction": "SIGMOID"},
        {"WindowWidth": 100, "VOILUTFunction": "CUBIC"},
    ],
)
def test_an_invalid_window_is_ignored_aloud(
    tmp_path: Path, window: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="medsa_deploy"):
        image = read(dicom(RAMP, WindowCenter=40, **window), tmp_path)
    assert image.display is None
    assert "is invalid and ignored" in caplog.text


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_the_voi_lut_outranks_the_window(tmp_path: Path, bits: int) -> None:
    table = np.linspace(0, 2**bits - 1, 1000) ** 2 / (2**bits - 1)
    dataset = dicom(RAMP, WindowCenter=40, WindowWidth=100, VOILUTSequence=lut(500, bits, table))
    image = read(dataset, tmp_path)
    index = np.clip(RAMP.astype(int) - 500, 0, 999)
    expected = table.astype(int)[index] / (2**bits - 1) * 255
    np.testing.assert_allclose(image.display, expected, atol=1e-3)  # type: ignore[arg-type]
    if bits > 8:  # pydicom's own overflows on an 8-bit table of more than 256 entries
        reference = apply_voi_lut(RAMP, pydicom.dcmread(tmp_path / "a.dcm"))
        np.testing.assert_allclose(image.display, reference / (2**bits - 1) * 255, atol=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [-1000, 2**16 - 1000])
def test_a_voi_lut_starts_at_signed_values(tmp_path: Path, first: int) -> None:
    table = np.arange(2000) * 32
    dataset = dicom(
        RAMP.astype(np.int16), RescaleSlope=1, RescaleIntercept=-1024,
        VOILUTSequence=lut(first, 16, table),
    )  # fmt: skip
    image = read(dataset, tmp_path)
    expected = np.clip(RAMP.astype(int) - 1024 + 1000, 0, 1999) * 32 / 65535 * 255
    np.testing.assert_allclose(image.display, expected, atol=1e-3)  # type: ignore[arg-type]


def test_a_modality_lut_replaces_the_rescale(tmp_path: Path) -> None:
    table = np.arange(4096)[::-1] * 4
    image = read(dicom(RAMP, ModalityLUTSequence=lut(0, 16, table)), tmp_path)
    assert image.pixels.dtype == np.uint16
    np.testing.assert_array_equal(image.pixels, table[RAMP])


def test_a_lut_of_65536_entries(tmp_path: Path) -> None:
    table = np.arange(2**16)[::-1]
    image = read(dicom(RAMP, ModalityLUTSequence=lut(0, 16, table)), tmp_path)
    np.testing.assert_array_equal(image.pixels, 65535 - RAMP)


def test_a_lut_shorter_than_it_says_is_refused(tmp_path: Path) -> None:
    sequence = lut(0, 16, np.arange(4096))
    sequence[0].LUTData = sequence[0].LUTData[:100]
    with pytest.raises(ImageError, match="4096 entries has only"):
        read(dicom(RAMP, ModalityLUTSequence=sequence), tmp_path)


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("shape", [None, "INVERSE", "IDENTITY"])
def test_monochrome1_is_inverted_in_display_alone(
    tmp_path: Path, window: bool, shape: str | None
) -> None:
    dataset = dicom(RAMP, PhotometricInterpretation="MONOCHROME1")
    if window:
        dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    if shape:
        dataset.PresentationLUTShape = shape
    image = read(dataset, tmp_path)
    assert image.inverted
    np.testing.assert_array_equal(image.pixels, RAMP)
    # By hand: the lowest value is white.
    expected = 255 - np.clip((RAMP - 2047.5) / 4095 + 0.5, 0, 1) * 255
    if window:
        np.testing.assert_allclose(image.display, expected, atol=1e-3)  # type: ignore[arg-type]
    else:
        assert image.display is None
    # SimpleITK hands out MONOCHROME1 as if inverted by the maximum of the stored bits or the
    # data; whichever, it falls where the stored values rise, as `display` does.
    itk = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "a.dcm")))[0]
    assert np.corrcoef(itk.ravel(), RAMP.ravel())[0, 1] == pytest.approx(-1)
    assert np.corrcoef(itk.ravel(), expected.ravel())[0, 1] == pytest.approx(1)


def test_monochrome1_of_8_bits_is_shown_without_a_window(tmp_path: Path) -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = read(dicom(stored, PhotometricInterpretation="MONOCHROME1"), tmp_path)
    assert image.inverted
    np.testing.assert_array_equal(image.pixels, stored)
    np.testing.assert_array_equal(image.display, 255 - stored)
    itk = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "a.dcm")))[0]
    np.testing.assert_array_equal(image.display, itk)


def test_ybr_becomes_rgb(tmp_path: Path) -> None:
    rgb = read_image(sample("examples_rgb_color.dcm"))
    assert rgb.pixels.dtype == np.uint8
    assert rgb.display is None
    r, g, b = np.moveaxis(rgb.pixels.astype(float), -1, 0)
    # PS3.3 C.7.6.3.1.2
    y = 0.299 * r + 0.587 * g + 0.114 * b
    ybr = np.stack([y, 128 + 0.564 * (b - y), 128 + 0.713 * (r - y)], axis=-1)
    ybr = np.rint(np.clip(ybr, 0, 255)).astype(np.uint8)
    image = read(dicom(ybr, PhotometricInterpretation="YBR_FULL"), tmp_path)
    assert np.abs(image.pixels.astype(int) - rgb.pixels).max() <= 2


@pytest.mark.parametrize("frame", [0, 15])
def test_a_compressed_ybr_frame_becomes_rgb(tmp_path: Path, frame: int) -> None:
    dataset = pydicom.dcmread(sample("examples_ybr_color.dcm"))
    jpeg = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=30))[frame]
    dataset.PixelData, dataset.NumberOfFrames = encapsulate([jpeg]), 1
    image = read(dataset, tmp_path)
    assert dataset.PhotometricInterpretation == "YBR_FULL_422"
    viewer = np.asarray(PIL.Image.open(io.BytesIO(jpeg)).convert("RGB"))
    assert np.abs(image.pixels.astype(int) - viewer).max() <= 4


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_rle.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm",
        "SC_rgb_gdcm_KY.dcm", "SC_rgb_jls_lossy_line.dcm", "SC_ybr_full_422_uncompressed.dcm",
    ],
)  # fmt: skip
def test_the_test_pattern_has_the_same_colours_in_every_encoding(name: str) -> None:
    pixels = read_image(sample(name)).pixels.astype(int)
    # Bands of 10 rows: red, light red, green, light green, blue, light blue, black, …, white.
    for row, expected in ((5, (255, 0, 0)), (25, (0, 255, 0)), (45, (0, 0, 255)), (95, (255,) * 3)):
        assert np.abs(pixels[row, 50] - expected).max() <= 6, (name, row)  # some are lossy


def test_a_palette_becomes_rgb() -> None:
    image = read_image(sample("examples_palette.dcm"))
    dataset = pydicom.dcmread(sample("examples_palette.dcm"))
    assert image.pixels.shape == (350, 800, 3)
    assert image.pixels.dtype == np.uint8
    reference = apply_color_lut(dataset.pixel_array, dataset)
    assert reference.dtype == np.uint16
    np.testing.assert_array_equal(image.pixels, reference >> 8)


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes_of_8_bits_in_words(tmp_path: Path, bits: int) -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    table = np.arange(256)[::-1] if bits == 8 else np.arange(256)[::-1] * 257
    dataset = dicom(stored, PhotometricInterpretation="PALETTE COLOR")
    for colour in ("Red", "Green", "Blue"):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(dataset, f"{colour}PaletteColorLookupTableData", table.astype("<u2").tobytes())
    np.testing.assert_array_equal(read(dataset, tmp_path).pixels[..., 1], 255 - stored)


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(sample("liver_1frame.dcm"))
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    image = read(dataset, tmp_path)
    assert sorted(np.unique(image.pixels)) == [0, 255]


def test_enhanced_objects_nest_rescale_and_window(tmp_path: Path) -> None:
    def nested(name: str, **attributes: Any) -> Dataset:
        inner, outer = Dataset(), Dataset()
        for key, value in attributes.items():
            setattr(inner, key, value)
        setattr(outer, name, Sequence([inner]))
        return outer

    dataset = dicom(
        RAMP, NumberOfFrames=1,
        SharedFunctionalGroupsSequence=Sequence(
            [nested("PixelValueTransformationSequence", RescaleSlope=2, RescaleIntercept=-10)]
        ),
        PerFrameFunctionalGroupsSequence=Sequence(
            [nested("FrameVOILUTSequence", WindowCenter=100, WindowWidth=200)]
        ),
    )  # fmt: skip
    image = read(dataset, tmp_path)
    flat = read(
        dicom(RAMP, RescaleSlope=2, RescaleIntercept=-10, WindowCenter=100, WindowWidth=200),
        tmp_path,
    )
    np.testing.assert_array_equal(image.pixels, flat.pixels)
    np.testing.assert_array_equal(image.display, flat.display)


def test_a_file_without_preamble_or_transfer_syntax(tmp_path: Path) -> None:
    with_meta = read(dicom(RAMP, WindowCenter=100, WindowWidth=200), tmp_path)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    for implicit in (True, False):
        bare = Dataset({tag: element for tag, element in dataset.items() if tag.group > 2})
        with (tmp_path / "bare.dcm").open("wb") as f:
            pydicom.dcmwrite(f, bare, implicit_vr=implicit, little_endian=True)
        assert b"DICM" not in (tmp_path / "bare.dcm").read_bytes()[:200]
        image = read_image(tmp_path / "bare.dcm")
        np.testing.assert_array_equal(image.pixels, with_meta.pixels)
        np.testing.assert_array_equal(image.display, with_meta.display)


def test_a_name_without_suffix_is_enough(tmp_path: Path) -> None:
    (tmp_path / "IM0001").write_bytes(sample("CT_small.dcm").read_bytes())
    assert read_image(tmp_path / "IM0001").pixels.shape == (128, 128)


@pytest.mark.parametrize("frames", [2, 30])
def test_several_frames_are_refused(frames: int) -> None:
    name = {2: "SC_rgb_rle_2frame.dcm", 30: "examples_ybr_color.dcm"}[frames]
    with pytest.raises(ImageError, match=f"has {frames} frames, expected 1: extract one frame"):
        read_image(sample(name))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("rtplan.dcm", "RT Plan Storage"), ("test-SR.dcm", "Comprehensive SR Storage")],
)
def test_dicom_without_an_image_is_refused(name: str, kind: str) -> None:
    with pytest.raises(ImageError, match=f"holds no pixel data .it is {kind}"):
        read_image(sample(name))


def test_what_only_claims_to_be_dicom_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.dcm").write_text("no DICOM at all " * 50)
    with pytest.raises(ImageError, match=r"text\.dcm"):
        read_image(tmp_path / "text.dcm")
    (tmp_path / "head.dcm").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(ImageError, match="does not look like DICOM"):
        read_image(tmp_path / "head.dcm")


def test_missing_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match="less than expected") as caught:
        read_image(sample("MR_truncated.dcm"))
    assert "\n" not in str(caught.value)


def test_an_odd_photometric_interpretation_is_refused(tmp_path: Path) -> None:
    stored = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    with pytest.raises(ImageError, match="HSV"):
        read(dicom(stored, PhotometricInterpretation="HSV"), tmp_path)


def test_a_window_with_decimal_commas_is_dropped_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = dicom(RAMP)
    put_text(dataset, "WindowCenter", b"40,5")
    put_text(dataset, "WindowWidth", b"400 ")
    image = read(dataset, tmp_path)
    assert image.display is None
    assert "its window is ignored: its WindowCenter is no number" in caplog.text
    assert "40,5" in caplog.text


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept"])
def test_a_slope_with_decimal_commas_is_refused(tmp_path: Path, name: str) -> None:
    dataset = dicom(RAMP, RescaleSlope=2, RescaleIntercept=1)
    put_text(dataset, name, b"1,25")
    with pytest.raises(ImageError, match=f"its {name} is no number.*1,25"):
        read(dataset, tmp_path)


def test_a_segmentation_is_called_a_segmentation() -> None:
    with pytest.raises(ImageError, match="is a segmentation, not an image"):
        read_image(sample("liver_1frame.dcm"))


def test_a_dose_is_called_a_dose(tmp_path: Path) -> None:
    dataset = dicom(RAMP)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = RTDoseStorage
    with pytest.raises(ImageError, match="is a dose distribution, not an image"):
        read(dataset, tmp_path)


def test_values_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    dataset = dicom(RAMP, WindowCenter=1, WindowWidth=2)
    values = RAMP.astype(np.float32)
    values[3, 4] = np.nan
    del dataset.PixelData, dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit
    dataset.FloatPixelData, dataset.BitsAllocated = values.tobytes(), 32
    with pytest.raises(ImageError, match="1 NaN or infinite"):
        read(dataset, tmp_path)


def test_without_pydicom_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.delitem(sys.modules, "medsa_deploy.images.dicom", raising=False)
    monkeypatch.delattr("medsa_deploy.images.dicom", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'medsa-deploy\[dicom\]'"):
        read_image(sample("CT_small.dcm"))
    np.save(tmp_path / "a.npy", np.eye(4))
    assert read_image(tmp_path / "a.npy").pixels.shape == (4, 4)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_nothing_but_image_errors(
    tmp_path_factory: pytest.TempPathFactory, syntax: Any, data: st.DataObject
) -> None:
    dataset = dicom(
        RAMP[:4, :4], RescaleSlope=2, RescaleIntercept=-1, WindowCenter=1, WindowWidth=20,
        VOILUTSequence=lut(0, 8, np.arange(16)),
    )  # fmt: skip
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.dcm"
    path.write_bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    with contextlib.suppress(ImageError):
        read_image(path)
