"""Compressed DICOM images: decoded without loss, or refused by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import PIL.Image
import pydicom
import pytest
from dicom_images import RAMP, dicom, read, sample, transcode
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import (
    MPEG2MPML,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medsa_deploy.errors import ImageError
from medsa_deploy.images import read_image


@pytest.mark.parametrize(
    ("syntax", "package"),
    [(JPEGLosslessSV1, "python-gdcm"), (JPEGLossless, "python-gdcm"), (JPEGLSLossless, "pyjpegls"),
     (JPEG2000Lossless, "pylibjpeg pylibjpeg-openjpeg")],
)  # fmt: skip
def test_a_missing_codec_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: Any, package: str
) -> None:
    dataset = dicom(RAMP)
    dataset.PixelData = encapsulate([b"whatever"])
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    dataset.file_meta.TransferSyntaxUID = syntax
    monkeypatch.setattr(get_decoder(syntax), "_available", {})
    with pytest.raises(ImageError) as caught:
        read(dataset, tmp_path)
    message = str(caught.value)
    assert syntax.name in message
    assert str(syntax) in message
    assert message.endswith(f"pip install {package}")


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_twelve_bit_jpeg_is_what_gdcm_decodes(name: str) -> None:
    reader = gdcm.ImageReader()
    reader.SetFileName(str(sample(name)))
    assert reader.Read()
    picture = reader.GetImage()
    rows, columns = picture.GetDimension(1), picture.GetDimension(0)
    raw = picture.GetBuffer().encode("utf-8", "surrogateescape")
    reference = np.frombuffer(raw, np.uint16).reshape(rows, columns)
    image = read_image(sample(name))
    dataset = pydicom.dcmread(sample(name))
    scaled = reference * float(dataset.get("RescaleSlope", 1)) + float(
        dataset.get("RescaleIntercept", 0)
    )
    np.testing.assert_array_equal(image.pixels, scaled)


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLossless])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_lossless_jpeg_gives_the_values_back(
    tmp_path: Path, syntax: Any, dtype: type[np.generic]
) -> None:
    stored = (np.arange(40 * 50) * 31 % np.iinfo(dtype).max).astype(dtype).reshape(40, 50)
    plain = tmp_path / "plain.dcm"
    dicom(stored).save_as(plain, enforce_file_format=True)
    compressed = tmp_path / "compressed.dcm"
    transcode(plain, compressed, syntax)
    assert pydicom.dcmread(compressed).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_image(compressed).pixels, stored)


def test_samples_that_do_not_lie_in_the_lowest_bits_are_refused(tmp_path: Path) -> None:
    dataset = dicom(RAMP.astype(np.uint16), BitsStored=12, HighBit=15)
    with pytest.raises(ImageError, match="stores 12 bits up to bit 15, expected up to bit 11"):
        read(dataset, tmp_path)


def test_a_video_is_refused(tmp_path: Path) -> None:
    dataset = dicom(RAMP)
    dataset.PixelData = encapsulate([b"whatever"])
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    dataset.file_meta.TransferSyntaxUID = MPEG2MPML
    with pytest.raises(ImageError, match=f"{MPEG2MPML.name}.*convert it to uncompressed"):
        read(dataset, tmp_path)


@pytest.mark.parametrize("name", ["JPEG2000-embedded-sequence-delimiter.dcm"])
def test_what_no_installed_codec_can_decode_is_one_line(name: str) -> None:
    with pytest.raises(ImageError, match="cannot be decoded") as caught:
        read_image(sample(name))
    assert "\n" not in str(caught.value)
    assert "1.2.840.10008.1.2.4." in str(caught.value)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_lossless_compression_changes_nothing(tmp_path: Path, syntax: Any) -> None:
    dataset = dicom(RAMP, WindowCenter=100, WindowWidth=200)
    plain = read(dataset, tmp_path)
    dataset.compress(syntax)
    packed = read(dataset, tmp_path, "packed.dcm")
    np.testing.assert_array_equal(packed.pixels, plain.pixels)
    np.testing.assert_array_equal(packed.display, plain.display)


def test_baseline_jpeg_needs_no_plugin(tmp_path: Path) -> None:
    picture = PIL.Image.linear_gradient("L").resize((40, 32))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    dataset = dicom(np.asarray(picture))
    dataset.PixelData = encapsulate([buffer.getvalue()])
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    image = read(dataset, tmp_path)
    assert image.pixels.dtype == np.uint8
    assert np.abs(image.pixels.astype(int) - np.asarray(picture)).max() <= 4
