"""Files with a patient's name in every text: no message, log line, JSON, page or picture has it.

Texts stand where they belong, and where something else belongs. Files are read whole, cut off and
with damaged bytes. The paths of files are the user's own words, and are repeated.
"""

from __future__ import annotations

import copy
import gzip
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import PIL.Image
import pydicom
import pytest
import SimpleITK
from command_line import call
from dicom_images import dicom
from PIL.PngImagePlugin import PngInfo
from pydicom.datadict import dictionary_VR, keyword_dict
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from medsa_deploy.bundle.atomic import whole_file
from medsa_deploy.errors import MedsaError
from medsa_deploy.images import read_image, read_volume

MARK = "ZXQMARK"
NAME = f"{MARK}^Jane"
PIXELS = np.random.default_rng(0).integers(0, 200, (24, 24), np.uint8)
VOXELS = np.random.default_rng(1).integers(0, 200, (24, 24, 4), np.int16)
TEXTS = ("PN", "LO", "SH", "ST", "LT", "UT", "UC", "AE", "UR")
STRUCTURAL = (
    "Rows Columns SamplesPerPixel PhotometricInterpretation BitsAllocated BitsStored HighBit "
    "PixelRepresentation NumberOfFrames Modality PixelSpacing ImagePositionPatient "
    "ImageOrientationPatient RescaleSlope RescaleIntercept WindowCenter WindowWidth "
    "SOPClassUID SOPInstanceUID SeriesInstanceUID FrameOfReferenceUID ImageType "
    "SpecificCharacterSet SliceThickness InstanceNumber VOILUTFunction PresentationLUTShape "
    "SmallestImagePixelValue PixelPaddingValue PlanarConfiguration TransferSyntaxUID"
).split()
"""Elements that readers interpret: each gets the text in a file of its own."""


@cache
def marked_image() -> pydicom.Dataset:
    """A DICOM image with the mark in every text of its identifying groups."""
    dataset = dicom(PIXELS.astype(np.uint16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tag in keyword_dict.values():
            kind = dictionary_VR(tag)
            if kind in TEXTS and Tag(tag).group in (0x8, 0x10, 0x20):
                dataset.add_new(tag, kind, NAME if kind == "PN" else MARK)
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.Modality = "CT"
    return dataset


def dicom_files(folder: Path) -> Iterator[Path]:
    """An intact file, and one for each element that holds a text it should not."""
    intact = marked_image()
    intact.save_as(folder / "intact.dcm", enforce_file_format=True)
    yield folder / "intact.dcm"
    for keyword in STRUCTURAL:
        dataset = copy.deepcopy(marked_image())
        if keyword == "TransferSyntaxUID":
            dataset.file_meta.add(raw(keyword, "UI"))
        else:
            dataset._dict[Tag(keyword)] = raw(keyword, text_kind(keyword))
        path = folder / f"{keyword}.dcm"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset.save_as(path, implicit_vr=False, little_endian=True, enforce_file_format=False)
        yield path


def text_kind(keyword: str) -> str:
    """The representation of an element's texts; a number in binary becomes a text."""
    kind = dictionary_VR(keyword)
    return "LO" if kind in ("US", "SS", "US or SS") else kind


def raw(keyword: str, kind: str) -> RawDataElement:
    """An element whose value is the name, unchecked."""
    value = NAME.encode() + b" " * (len(NAME) % 2)
    return RawDataElement(Tag(keyword), kind, len(value), value, 0, False, True)


def nifti_files(folder: Path) -> Iterator[Path]:
    image = nibabel.Nifti1Image(VOXELS, np.eye(4))
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        image.header[field] = MARK[: image.header[field].dtype.itemsize]
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", NAME.encode()))
    nibabel.save(image, folder / "a.nii")
    yield folder / "a.nii"
    (folder / "b.nii.gz").write_bytes(gzip.compress((folder / "a.nii").read_bytes()))
    yield folder / "b.nii.gz"


def raster_files(folder: Path) -> Iterator[Path]:
    picture, texts = PIL.Image.fromarray(PIXELS), PngInfo()
    texts.add_text("Author", NAME)
    texts.add_itxt("Comment", NAME)
    texts.add_text("Description", NAME, zip=True)
    picture.save(folder / "a.png", pnginfo=texts)
    exif = PIL.Image.Exif()
    exif[0x010E], exif[0x013B], exif[0x9C9B] = NAME, NAME, NAME.encode()
    picture.save(folder / "a.jpg", comment=NAME, exif=exif)
    picture.save(folder / "a.tif", tiffinfo={270: NAME, 315: NAME, 269: NAME, 305: NAME})
    picture.save(folder / "a.gif", comment=NAME)
    yield from (folder / f"a.{suffix}" for suffix in ("png", "jpg", "tif", "gif"))


def nrrd_files(folder: Path) -> Iterator[Path]:
    image = SimpleITK.GetImageFromArray(VOXELS)
    for key in ("PatientName", "content", "Comment", "space"):
        image.SetMetaData(key, NAME)
    for name in ("a.nrrd", "a.mha"):
        SimpleITK.WriteImage(image, str(folder / name))
        yield folder / name
    for name, line in (("type", "type"), ("spacings", "space directions"), ("kinds", "kinds")):
        content = (folder / "a.nrrd").read_bytes()
        head, blank, data = content.partition(b"\n\n")
        lines = [
            f"{line}: {NAME}".encode() if text.startswith(line.encode()) else text
            for text in head.split(b"\n")
        ]
        path = folder / f"{name}.nrrd"
        path.write_bytes(b"\n".join([*lines, f"{MARK}:={NAME}".encode()]) + blank + data)
        yield path


FORMATS: dict[str, Callable[[Path], Iterator[Path]]] = {
    "dicom": dicom_files,
    "nifti": nifti_files,
    "raster": raster_files,
    "nrrd": nrrd_files,
}


def damaged(path: Path, folder: Path, count: int) -> Iterator[Path]:
    """A file whole, cut off, and with the name at `count` places of its header."""
    yield path
    content, rng = path.read_bytes(), random.Random(path.name)
    target = folder / f"damaged{''.join(path.suffixes)}"
    for part in (0.3, 0.9):
        target.write_bytes(content[: int(len(content) * part)])
        yield target
    for _ in range(count):
        mutable = bytearray(content)
        start = rng.randrange(0, min(len(content), 1200))
        mutable[start : start + len(MARK)] = MARK.encode()
        target.write_bytes(bytes(mutable))
        yield target


def spoken(path: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Everything that reading a file says: errors, warnings and log lines."""
    caplog.clear()
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for read in (read_image, read_volume):
            reader: Any = read
            try:
                result = reader(path)
                texts.append(repr(result) if read is read_volume else str(result.path))
            except MedsaError as e:
                texts.append(str(e))
    texts += [str(warning.message) for warning in caught]
    return texts + [record.getMessage() for record in caplog.records]


def leaks(kind: str, folder: Path, count: int, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    """What readers say of a format's files that has the mark in it."""
    caplog.set_level(logging.DEBUG, logger="medsa_deploy")
    (folder / "damaged").mkdir()
    readings = 0
    for path in FORMATS[kind](folder):
        for variant in damaged(path, folder / "damaged", count):
            readings += 1
            texts = spoken(variant, caplog)
            yield from (f"{path.name}: {text}" for text in texts if MARK in text.upper())
    assert readings >= 6


@pytest.mark.parametrize("kind", FORMATS)
def test_readers_repeat_no_text(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(leaks(kind, tmp_path, 1 if kind == "dicom" else 4, caplog)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_readers_repeat_no_text_of_many(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(leaks(kind, tmp_path, 60, caplog)) == []


def test_commands_write_no_text(bundle: Path, tmp_path: Path) -> None:
    """Stdout, stderr, JSON and everything that a run writes except DICOM, which names a patient."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    out.mkdir()
    named = ("intact", "Modality", "WindowCenter", "SOPClassUID")
    for kind in ("dicom", "raster"):
        for path in FORMATS[kind](images):
            if path.suffix == ".dcm" and path.stem not in named:
                path.unlink()
    done = call(*("run", bundle, images, "--point", "9,9", "-o", out, "--overlay", out, "--json"))
    assert done.json
    page = call(
        *("profile", bundle, "--image", images / "intact.dcm", "--runs", "1"),
        *("-o", out / "profile.json", "--html", out / "profile.html"),
    )
    assert page.code == 0, page.err
    for text in (done.out, done.err, page.out, page.err):
        assert MARK not in text.upper()
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) > 6
    for path in written:
        assert MARK.encode() not in path.read_bytes().upper(), path.name


def test_temporary_names_have_no_part_of_a_name(tmp_path: Path) -> None:
    for name in (f"{MARK}.png", f"a.{MARK}.png", f"a.{MARK}.nii.gz", f"{MARK}.seg.nrrd"):
        with whole_file(tmp_path / name) as temporary:
            temporary.write_bytes(b"1")
            assert MARK not in temporary.name.upper()
            assert temporary.suffix == Path(name).suffix
