"""Format → its reader, its intact files and its mutation; and what a result must be."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fuzz_mutations as mutations
import fuzz_seeds as seeds
import numpy as np
from fuzz_mutations import Mutation

from medsa_deploy.images import Image, Volume, read_image, read_volume
from medsa_deploy.images.label_files import read_labels

Reader = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one kind of file is damaged and read."""

    suffix: str
    seeds: Callable[[], list[bytes]]
    mutation: Mutation
    read: Reader
    """Reads a path and checks the result: an error of the tree, or AssertionError."""
    weight: int
    """Inputs of a thousand."""
    name: str = "a"
    """The file's, without its suffix."""


def check_image(image: Image) -> None:
    """AssertionError unless the pixels are numbers that networks take."""
    pixels = image.pixels
    assert pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3), pixels.shape
    assert pixels.dtype.kind in "uif", pixels.dtype
    assert pixels.size > 0
    if pixels.dtype.kind == "f":
        assert np.isfinite(pixels).all()
    if image.display is not None:
        assert image.display.shape == pixels.shape
        assert np.isfinite(image.display).all()


def check_volume(volume: Volume) -> None:
    """AssertionError unless the volume's slices are what it says."""
    assert len(volume.shape) == 3
    assert min(volume.shape) > 0
    assert all(0 < length < np.inf for length in volume.spacing_mm), volume.spacing_mm
    assert volume.affine is None or np.isfinite(volume.affine).all()
    for index in {0, len(volume) - 1}:
        image = volume.slice(index)
        check_image(image)
        assert image.pixels.shape[:2] == volume.slice_size


def picture(path: Path) -> None:
    """A picture, or the pages of a TIFF."""
    check_image(read_image(path))


def array(path: Path) -> None:
    """A picture or a slice of it, a volume and labels: content decides which of them it can be."""
    content = path.stat().st_size
    match content % 3:
        case 0:
            check_image(read_image(path, axis=2, index=0))
        case 1:
            check_volume(read_volume(path))
        case _:
            labels = read_labels(path)
            assert labels.values.ndim in (2, 3)


def dicom(path: Path) -> None:
    """A frame, or frames as a volume."""
    if path.stat().st_size % 3:
        check_image(read_image(path))
    else:
        check_volume(read_volume(path))


def series(path: Path) -> None:
    """A folder in which one of three slices is damaged."""
    for number, content in enumerate(seeds.neighbours()):
        if not (other := path.with_name(f"{number}.dcm")).exists():
            other.write_bytes(content)
    check_volume(read_volume(path.parent))


def labels(path: Path) -> None:
    """A DICOM segmentation."""
    assert read_labels(path).values.ndim == 3


def received(path: Path) -> None:
    """An object that the node receives, and the prompts in it."""
    from medsa_deploy.dicom_node.received import received_object

    item = received_object(path.read_bytes(), "SCANNER")
    assert re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]{16}", item.series_key)


def checkpoint(path: Path) -> None:
    """A state dict."""
    from medsa_deploy.exporters.checkpoint import load_checkpoint

    assert load_checkpoint(path).tensors


def manifest(path: Path) -> None:
    """A bundle's manifest."""
    from medsa_deploy.bundle.manifest import load_manifest, manifest_from_json, manifest_to_json

    loaded = load_manifest(path.parent)
    assert manifest_from_json(manifest_to_json(loaded)) == loaded


def prompts(path: Path) -> None:
    """Structures and styles."""
    from medsa_deploy.stages.run.prompt_file import read_prompts, read_styles

    assert isinstance(read_prompts(path), list)
    assert isinstance(read_styles(path), dict)


def rules(path: Path) -> None:
    """Rules, and what they match."""
    from medsa_deploy.dicom_node.rules import matching_rule, read_rules

    parsed = read_rules(path, Path("a.medsa"))
    matching_rule(parsed, {"modality": "CT", "series_description": "Portal"})


def codes(path: Path) -> None:
    """Codes of classes."""
    from medsa_deploy.images.class_codes import read_class_codes

    assert isinstance(read_class_codes(path), dict)


def engine(path: Path) -> None:
    """A record of engines."""
    from medsa_deploy.nvidia.engines import load_engines

    load_engines(path.parent).file("encoder")


def signature(path: Path) -> None:
    """A signature, and what it signs."""
    from medsa_deploy.bundle.signature import read_signature, signed_files
    from medsa_deploy.bundle.trusted_keys import TrustedKey, fingerprint

    public = seeds.signing_key().public_key()
    key = TrustedKey(path=path, public_key=public, fingerprint=fingerprint(public))
    files = signed_files(read_signature(path), key)
    assert files is None or all(len(digest) == 64 for digest in files.values())


def _format(
    suffix: str,
    intact: Callable[[], list[bytes]],
    mutation: Mutation,
    read: Reader,
    weight: int,
    name: str = "a",
) -> Format:
    return Format(
        suffix=suffix, seeds=intact, mutation=mutation, read=read, weight=weight, name=name
    )


FORMATS: dict[str, Format] = {
    "png": _format(".png", seeds.png, mutations.damage_png, picture, 60),
    "jpeg": _format(".jpg", seeds.jpeg, mutations.damage_bytes, picture, 50),
    "tiff": _format(".tif", seeds.tiff, mutations.damage_bytes, picture, 60),
    "tiff-pages": _format(".tif", seeds.tiff, mutations.damage_bytes, array, 20),
    "pictures": _format("", seeds.pictures, mutations.damage_bytes, picture, 40),
    "npy": _format(".npy", seeds.npy, mutations.damage_bytes, array, 60),
    "nifti": _format(".nii", seeds.nifti, mutations.damage_bytes, array, 70),
    "nifti-gz": _format(".nii.gz", seeds.nifti_gz, mutations.damage_gzip, array, 40),
    "nrrd": _format(".nrrd", seeds.nrrd, mutations.damage_bytes, array, 50),
    "dicom": _format(".dcm", seeds.native, mutations.damage_dicom, dicom, 90),
    "dicom-rle": _format(".dcm", seeds.rle, mutations.damage_frames, dicom, 60),
    "dicom-deflated": _format(".dcm", seeds.deflated, mutations.damage_deflated, dicom, 40),
    "dicom-jpeg": _format(".dcm", seeds.jpeg_dicom, mutations.damage_frames, dicom, 30),
    "dicom-series": _format(".dcm", seeds.native, mutations.damage_dicom, series, 20),
    "segmentation": _format(".dcm", seeds.segmentation, mutations.damage_dicom, labels, 10),
    "received": _format(".dcm", seeds.received, mutations.damage_dicom, received, 40),
    "checkpoint": _format(".pth", seeds.checkpoint, mutations.damage_archive, checkpoint, 40),
    "safetensors": _format(
        ".safetensors", seeds.safetensors, mutations.damage_safetensors, checkpoint, 40
    ),
    "manifest": _format(
        ".json", seeds.manifest, mutations.damage_manifest, manifest, 50, name="manifest"
    ),
    "prompts": _format(".json", seeds.prompts, mutations.damage_json, prompts, 40),
    "rules": _format(".json", seeds.rules, mutations.damage_json, rules, 40),
    "codes": _format(".csv", seeds.codes, mutations.damage_bytes, codes, 20),
    "engine": _format(".json", seeds.engine, mutations.damage_json, engine, 20, name="engine"),
    "signature": _format(".sig", seeds.signature, mutations.damage_signature, signature, 30),
}
"""Name of each format → how it is damaged and read; the weights add up to about 1000."""
