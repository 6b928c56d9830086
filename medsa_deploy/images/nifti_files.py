"""A path → nibabel's image of a NIfTI, judged by content: compressed or not, one file or a pair.

Suffixes are often wrong: files are compressed and keep the name `.nii`, or are downloaded without
one. A header without NIfTI's magic number is Analyze 7.5, which is read as NIfTI.
"""

from __future__ import annotations

import gzip
import logging
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nibabel
from nibabel.fileholders import FileHolder

from medsa_deploy.errors import ImageError

from .files import reading, suffix
from .signatures import GZIP, NIFTI_HEADER_BYTES, nifti_header_size

logger = logging.getLogger(__name__)

PAIR = (".hdr", ".img", ".hdr.gz", ".img.gz")


def load(path: Path) -> Any:
    """nibabel's image of a NIfTI-1, NIfTI-2 or Analyze file; ImageError for any other format.

    Of a pair, either file may be given.
    """
    with reading(path, "NIfTI"):
        source = _open(path)
    if isinstance(source, nibabel.Nifti1Pair):
        return source
    if isinstance(source, nibabel.AnalyzeImage):
        logger.warning(
            "%s is Analyze 7.5, which does not say where left and right are: masks keep its stored "
            "order, and their affine is a guess",
            path,
        )
        pair = nibabel.Nifti1Pair.from_image(source)
        pair.file_map = source.file_map
        return pair
    raise ImageError(f"{path} is {type(source).__name__}, not NIfTI; convert it to .nii")


def files_of(path: Path, source: Any) -> tuple[Path, ...]:
    """The file with the voxels first; then the header of a pair."""
    names = (
        source.file_map[part].filename for part in ("image", "header") if part in source.file_map
    )
    return tuple(Path(name) for name in names if name) or (path,)


def is_compressed(path: Path) -> bool:
    """Whether a file's content is compressed, whatever its name says."""
    with path.open("rb") as f:
        return f.read(2) == GZIP


def _open(path: Path) -> Any:
    """nibabel's image. A file whose suffix hides its content is opened by the content."""
    if suffix(path) in PAIR:
        return nibabel.load(path)
    compressed = is_compressed(path)
    if suffix(path) == (".nii.gz" if compressed else ".nii"):
        return nibabel.load(path)
    with gzip.open(path) if compressed else path.open("rb") as f:
        head = f.read(NIFTI_HEADER_BYTES)
    kind = nibabel.Nifti2Image if nifti_header_size(head) == 540 else nibabel.Nifti1Image
    with ExitStack() as closing:
        content = closing.enter_context(gzip.open(path) if compressed else path.open("rb"))
        source = kind.from_file_map({"image": FileHolder(fileobj=content)})
        weakref.finalize(source, closing.pop_all().close)  # slices are read from it until then
    return source
