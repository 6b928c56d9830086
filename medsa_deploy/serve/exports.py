"""A user's structures → a file in a format that other programs read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.errors import UsageError
from medsa_deploy.images import SegmentationDetails, write_mask, write_segmentation
from medsa_deploy.images.class_codes import SegmentStyle
from medsa_deploy.images.image import Image
from medsa_deploy.runtime import VolumePrediction
from medsa_deploy.stages.run.prompt_file import parsed_style

from .images import OpenImage


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A format to export in."""

    suffix: str
    media_type: str
    one_slice: bool = False
    """Whether the file holds one slice."""


FORMATS = {
    "nifti": ExportFormat(suffix=".nii.gz", media_type="application/gzip"),
    "dicom-seg": ExportFormat(suffix=".dcm", media_type="application/dicom"),
    "nrrd": ExportFormat(suffix=".seg.nrrd", media_type="application/octet-stream"),
    "png": ExportFormat(suffix=".png", media_type="image/png", one_slice=True),
}


def export_format(name: Any) -> ExportFormat:
    """The format of a name; UsageError."""
    if not isinstance(name, str) or name not in FORMATS:
        raise UsageError(f"the format is {name!r:.40}, expected one of: {', '.join(FORMATS)}")
    return FORMATS[name]


def styles_of(data: Mapping[str, Any]) -> dict[str, SegmentStyle]:
    """The colours and codes of a request's structures, by name or class."""
    styles = {}
    for number, entry in enumerate(data.get("structures") or [], 1):
        style = parsed_style(entry, f"structure {number}")
        if style is not None:
            styles[entry.get("name") or entry.get("class")] = style
    return styles


def export(
    image: OpenImage,
    prediction: VolumePrediction,
    export_format: ExportFormat,
    details: SegmentationDetails,
    *,
    styles: Mapping[str, SegmentStyle],
    index: int,
    folder: Path,
) -> bytes:
    """The file's content. `index`: the slice of a format that holds one."""
    with TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / f"segmentation{export_format.suffix}"
        if export_format.one_slice:
            plane = image.volume.plane(prediction.labels, index)
            write_mask(path, _mask(plane, prediction), _picture(image, index))
        else:
            write_segmentation(
                path,
                prediction.labels,
                image.source,
                names=prediction.names,
                details=replace(details, styles=dict(styles)),
            )
        return path.read_bytes()


def _mask(plane: NDArray[np.uint8], prediction: VolumePrediction) -> NDArray[Any]:
    """Labels with their numbers; a lone label as black and white, as `run` writes it."""
    return plane > 0 if len(prediction.names) == 1 else np.ascontiguousarray(plane)


def _picture(image: OpenImage, index: int) -> Image:
    return replace(image.volume.slice(index), path=Path("image"))
