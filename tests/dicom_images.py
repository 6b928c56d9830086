"""Single DICOM images, made and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gdcm
import numpy as np
from pydicom.data import get_testdata_file
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
)

from medsa_deploy.images import Image, read_image

RAMP = np.linspace(0, 4095, 32 * 40).astype(np.uint16).reshape(32, 40)


def sample(name: str) -> Path:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    return Path(path)


def dicom(stored: np.ndarray, **attributes: Any) -> Dataset:
    """A minimal DICOM of stored values (H, W) or (H, W, 3)."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, "1.2.3.4"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel = 3 if stored.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if stored.ndim == 3 else "MONOCHROME2"
    if stored.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = stored.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW" if stored.dtype.itemsize > 1 else "OB"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


def lut(first: int, bits: int, table: np.ndarray) -> Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(table) % 2**16, first, bits])
    item.add_new("LUTData", "OW", table.astype("<u2").tobytes())
    return Sequence([item])


def read(dataset: Dataset, folder: Path, name: str = "a.dcm") -> Image:
    dataset.save_as(folder / name, enforce_file_format=True)
    return read_image(folder / name)


def transcode(source: Path, target: Path, syntax: Any) -> None:
    """Compress a file with gdcm."""
    reader, change, writer = (
        gdcm.ImageReader(),
        gdcm.ImageChangeTransferSyntax(),
        gdcm.ImageWriter(),
    )
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def put_text(dataset: Any, name: str, text: bytes) -> None:
    """Store a value's text as a file has it, unchecked."""
    tag = Tag(name)
    dataset._dict[tag] = RawDataElement(tag, "DS", len(text), text, 0, False, True)
