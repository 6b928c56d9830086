"""Format → small intact files, the same in every run: what the fuzzer mutates."""

from __future__ import annotations

import base64
import dataclasses
import functools
import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel
import numpy as np
import PIL.Image
import SimpleITK
from dicom_images import dicom, sample, transcode
from fake_network import bright_pixels
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medsa_deploy.bundle.manifest import manifest_to_json

GREY = (np.arange(32 * 40) * 37 % 251).astype(np.uint8).reshape(32, 40)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)
DEEP = (np.arange(32 * 40) * 137 % 4093).astype(np.uint16).reshape(32, 40)
VOXELS = (np.arange(6 * 7 * 5) * 31 % 997).astype(np.int16).reshape(6, 7, 5)


def _picture(file_format: str, array: np.ndarray, mode: str | None = None, **options: Any) -> bytes:
    picture = PIL.Image.fromarray(array)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, file_format, **options)
    return buffer.getvalue()


def png() -> list[bytes]:
    """Grey of 1, 8 and 16 bits, colours, with a palette and with alpha."""
    modes = (None, "1", "P", "LA", "RGBA")
    return [
        *(_picture("PNG", GREY, mode) for mode in modes),
        _picture("PNG", COLOUR),
        _picture("PNG", DEEP),
    ]


def jpeg() -> list[bytes]:
    """Baseline and progressive, grey, RGB and CMYK, turned by its EXIF."""
    exif = PIL.Image.Exif()
    exif[274] = 6
    return [
        _picture("JPEG", GREY),
        _picture("JPEG", COLOUR, progressive=True),
        _picture("JPEG", COLOUR, "CMYK"),
        _picture("JPEG", COLOUR, exif=exif),
    ]


def tiff() -> list[bytes]:
    """Every compression that Pillow writes, grey of 8, 16 and 32 bits, floats, pages."""
    compressions = ("raw", "tiff_deflate", "tiff_adobe_deflate", "tiff_lzw", "packbits", "jpeg")
    page = PIL.Image.fromarray(GREY)
    return [
        *(_picture("TIFF", COLOUR, compression=name) for name in compressions),
        _picture("TIFF", GREY, "1", compression="group4"),
        _picture("TIFF", DEEP, compression="tiff_lzw"),
        _picture("TIFF", GREY.astype(np.float32)),
        _picture("TIFF", GREY.astype(np.int32)),
        _picture("TIFF", GREY, save_all=True, append_images=[page, page]),
    ]


def pictures() -> list[bytes]:
    """The rarer formats."""
    return [
        _picture("BMP", COLOUR),
        _picture("BMP", GREY, "P"),
        _picture("GIF", GREY),
        _picture("WEBP", COLOUR, lossless=True),
        _picture("WEBP", COLOUR, quality=50),
        _picture("JPEG2000", COLOUR),
        _picture("JPEG2000", GREY),
    ]


def npy() -> list[bytes]:
    """Pictures and volumes of several types, in either order."""
    arrays = (
        GREY, COLOUR, VOXELS, VOXELS.astype(">f4"), np.asfortranarray(DEEP), VOXELS > 500,
        np.array(["text"]), GREY.astype(np.float16),
    )  # fmt: skip
    buffers = [io.BytesIO() for _ in arrays]
    for buffer, array in zip(buffers, arrays, strict=True):
        np.save(buffer, array, allow_pickle=False)
    return [buffer.getvalue() for buffer in buffers]


def nifti() -> list[bytes]:
    """NIfTI-1, NIfTI-2 and Analyze: integers, floats, scaled, colours, four dimensions."""
    affine = np.diag([0.5, 0.7, 2.0, 1.0])
    colours = np.zeros(VOXELS.shape, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    colours["G"] = VOXELS % 256
    images = [
        nibabel.Nifti1Image(VOXELS, affine),
        nibabel.Nifti2Image(VOXELS.astype(np.float32), affine),
        nibabel.Nifti1Image(VOXELS.astype(np.uint8), affine),
        nibabel.Nifti1Image(np.stack([VOXELS, VOXELS + 1], axis=-1), affine),
        nibabel.Nifti1Image(VOXELS[..., :1], affine),
        nibabel.Nifti1Image(colours, affine),
    ]
    images[2].header.set_slope_inter(2.0, -10.0)
    return [image.to_bytes() for image in images]


def nifti_gz() -> list[bytes]:
    """The same, compressed."""
    return [gzip.compress(content, 1, mtime=0) for content in nifti()]


def nrrd() -> list[bytes]:
    """NRRD and MetaImage: raw, compressed, as text, in two dimensions."""
    text = (
        b"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 2 3 2\n"
        b"space directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (0,0,0)\nencoding: ascii\n\n"
        b"1 2 3 4 5 6 7 8 9 10 11 12\n"
    )
    files = [text]
    for name in ("a.nrrd", "a.mha"):
        for array, packed in ((VOXELS, False), (VOXELS, True), (GREY, False)):
            files.append(_written(functools.partial(_save_itk, array, packed), name))
    return files


def _save_itk(array: np.ndarray, compressed: bool, path: Path) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path), useCompression=compressed)


def _written(write: Callable[[Path], object], name: str = "a.dcm") -> bytes:
    """The bytes that a function writes to a path."""
    with TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def _saved(dataset: Any) -> bytes:
    return _written(lambda path: dataset.save_as(path, enforce_file_format=True))


def _slice(z: int) -> Any:
    """A CT's slice at z mm."""
    ct = dicom(DEEP, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    ct.ImagePositionPatient, ct.ImageOrientationPatient = [1, 2, z], [1, 0, 0, 0, 1, 0]
    ct.PixelSpacing, ct.SliceThickness, ct.SeriesInstanceUID = [0.7, 0.7], 2.5, "1.2.3.5"
    ct.SOPInstanceUID, ct.StudyInstanceUID = f"1.2.3.4.{z}", "1.2.3"
    return ct


@functools.cache
def neighbours() -> list[bytes]:
    """The two slices behind that of `native`."""
    return [_saved(_slice(z)) for z in (5, 7)]


def native() -> list[bytes]:
    """Uncompressed DICOM in every byte order: a CT's header, windows, frames, sequences."""
    ct = _slice(3)
    frames = dicom(np.vstack([GREY, GREY]), NumberOfFrames=2, Rows=32)
    reordered = [dicom(DEEP), dicom(DEEP)]
    for dataset, syntax in zip(
        reordered, (ImplicitVRLittleEndian, ExplicitVRBigEndian), strict=True
    ):
        dataset.file_meta.TransferSyntaxUID = syntax
    files = ("ExplVR_LitEndNoMeta.dcm", "nested_priv_SQ.dcm", "UN_sequence.dcm",
             "SC_rgb_small_odd.dcm", "MR_truncated.dcm")  # fmt: skip
    return [
        *map(_saved, (ct, dicom(GREY), dicom(COLOUR), frames, *reordered)),
        *(sample(name).read_bytes() for name in files),
    ]


def rle() -> list[bytes]:
    """RLE of 8, 16 and 32 bits, grey and colours, and of two frames."""
    arrays = (GREY, DEEP, COLOUR, DEEP.astype(np.int16), np.zeros((32, 40), np.uint16))
    frames = dicom(np.vstack([DEEP, DEEP]), NumberOfFrames=2, Rows=32)
    datasets = [*map(dicom, arrays), frames]
    for dataset in datasets:
        dataset.compress(RLELossless, generate_instance_uid=False)
    return [*map(_saved, datasets), sample("SC_rgb_rle_32bit.dcm").read_bytes()]


def deflated() -> list[bytes]:
    """Deflated DICOM."""
    dataset = dicom(DEEP)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return [_saved(dataset)]


def jpeg_dicom() -> list[bytes]:
    """DICOM with every kind of JPEG."""
    datasets = []
    for syntax in (JPEG2000Lossless, JPEGLSLossless):
        for array in (DEEP, GREY):
            dataset = dicom(array)
            dataset.compress(syntax, generate_instance_uid=False)
            datasets.append(dataset)
    baseline = dicom(GREY)
    baseline.PixelData = encapsulate([_picture("JPEG", GREY)])
    baseline["PixelData"].VR, baseline["PixelData"].is_undefined_length = "OB", True
    baseline.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    files = ("JPGExtended.dcm", "SC_rgb_jpeg_dcmtk.dcm", "JPEGLSNearLossless_16.dcm")
    return [
        *map(_saved, (*datasets, baseline)),
        *(sample(name).read_bytes() for name in files),
        _transcoded(DEEP),
    ]


def _transcoded(array: np.ndarray) -> bytes:
    def write(path: Path) -> None:
        plain = path.with_name("plain.dcm")
        dicom(array).save_as(plain, enforce_file_format=True)
        transcode(plain, path, JPEGLosslessSV1)

    return _written(write)


def segmentation() -> list[bytes]:
    """DICOM segmentations of one frame."""
    return [sample(name).read_bytes() for name in ("liver_1frame.dcm", "liver_expb_1frame.dcm")]


def received() -> list[bytes]:
    """Objects that come to the node: images, and prompts."""
    reports = [sample(name).read_bytes() for name in ("rtstruct.dcm", "test-SR.dcm")]
    return [*native()[:3], *reports]


def _state() -> dict[str, Any]:
    import torch

    names = (
        "image_encoder.patch_embed.proj.weight",
        "prompt_encoder.no_mask_embed.weight",
        "mask_decoder.iou_token.weight",
        "image_encoder.blocks.0.Space_Adapter.D_fc1.weight",
    )
    return {name: torch.linspace(-1, 1, 12).reshape(3, 4) for name in names}  # fmt: skip


def checkpoint() -> list[bytes]:
    """torch's archive and its older format, a training's whole state, a plain pickle."""
    import torch

    training = {"epoch": 7, "state_dict": _state(), "optimizer": {"state": {}}, "path_helper": {}}
    files = []
    for state, zipped in ((_state(), True), (_state(), False), (training, True)):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
        files.append(buffer.getvalue())
    return [*files, pickle.dumps({"state_dict": {"a": [1.0, 2.0]}}, 2)]


def safetensors() -> list[bytes]:
    """A state dict as safetensors."""
    from safetensors.torch import save

    return [save(_state())]


def manifest() -> list[bytes]:
    """Manifests of a 2D and of a 3D network."""
    sessions = (bright_pixels(), bright_pixels(chunk=4, classes=2, names=("liver", "spleen")))
    return [manifest_to_json(session.manifest).encode() for session in sessions]


def prompts() -> list[bytes]:
    """Points, boxes, names, colours and codes."""
    codes = {"category": "91723000:Anatomical Structure", "type": "10200004:Liver"}
    structures = [
        {"name": "liver", "points": [[3, 4, 2], [1, 2, 3, 0]], "colour": "#dd8265"},
        {"name": "spleen", "boxes": [[0, 0, 0, 3, 3.5, 2]], "codes": codes},
        {"class": "kidney"},
    ]
    return [json.dumps({"structures": structures}).encode()]


def rules() -> list[bytes]:
    """Rules of the node, with every key."""
    box = {"structures": [{"name": "liver", "boxes": [[0.2, 0.2, 0.3, 0.8, 0.8, 0.7]]}]}
    first = {
        "match": {"modality": "CT", "series_description": "*portal*"}, "bundle": "a.medsa",
        "prompts": {"relative": True, **box}, "propagate": True, "margin": 4, "overlap": 0.2,
        "intensity_window": [-175, 250], "threshold": 0.4, "measurements": True,
    }  # fmt: skip
    return [json.dumps({"rules": [first, {"prompts": {"template": "body"}}]}).encode()]


def codes() -> list[bytes]:
    """Codes of classes, as CSV."""
    return [
        b"name,category,type,colour\n"
        b"liver,91723000:Anatomical Structure,10200004:Liver,#dd8265\n"
        b"tumour,49755003:Morphologically Abnormal Structure,4147007:Mass,\n"
    ]


def engine() -> list[bytes]:
    """The record of a folder of engines."""
    from fake_engines import describe

    from medsa_deploy.nvidia.engines import Engine, EngineFile

    files = tuple(
        EngineFile(
            role=role, path=f"{role}.engine", bytes=7, sha256="0" * 64, attention="unknown",
            sources={f"{role}.onnx": "0" * 64}, seconds=1.0,
            profile={"image": ((1, 3, 64, 64), (1, 3, 64, 64), (2, 3, 64, 64))},
        )
        for role in ("encoder", "decoder")
    )  # fmt: skip
    record = Engine(options=describe(), version="10.13.0", device="GPU", state="built", files=files)
    return [json.dumps(dataclasses.asdict(record)).encode()]


def signature() -> list[bytes]:
    """A signature over two files."""
    from medsa_deploy.bundle.signature import sign_files
    from medsa_deploy.bundle.trusted_keys import fingerprint

    key = signing_key()
    files = {"manifest.json": "1" * 64, "encoder.onnx": "2" * 64}
    text = sign_files(files, "a.medsa", key, fingerprint(key.public_key()))
    data = json.loads(text)
    return [signed(data, base64.b64decode(data["dsseEnvelope"]["payload"]))]


def signed(data: dict[str, Any], payload: bytes) -> bytes:
    """A signature's file for another statement; the same bytes in every run."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    envelope = data["dsseEnvelope"]
    kind = envelope["payloadType"].encode()
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    envelope["payload"] = base64.b64encode(payload).decode()
    envelope["signatures"][0]["sig"] = base64.b64encode(
        signing_key().sign(message, algorithm)
    ).decode()
    return json.dumps(data).encode()


def signing_key() -> Any:
    """A private key, the same in every run."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.derive_private_key(1234567, ec.SECP256R1())
