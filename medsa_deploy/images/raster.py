"""PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000 → `Image`, through Pillow; TIFF pages → `Volume`.

The pixels are those a viewer shows: EXIF orientation is applied, and palettes become RGB. Alpha is
dropped, not blended: it is opaque in medical exports, and blending would need a background colour.
16-bit grey keeps its values. Pillow has no 16-bit colour, so such files are read as their upper
8 bits (value >> 8), with a warning in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import PIL.TiffImagePlugin  # Pillow would import all its plugins to find it

from medsa_deploy.errors import ImageError

from .files import reading
from .image import Image
from .limits import check_volume_size
from .raster_limits import announced_size, check_pages, check_picture
from .volume import Volume

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000")
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
UNSIGNED, SIGNED = 1, 2
MIN_IS_WHITE = 0


def read_raster(path: Path, *, page: int | None = None) -> Image:
    """The only picture in a file, or one page of it; ImageError for several and no `page`."""
    try:
        # From an open file: from a path, Pillow (13.0) memory-maps plain TIFFs with the sides
        # swapped if their orientation tag turns them, and scrambles the picture.
        with reading(path, "an image"), path.open("rb") as f:
            picture = PIL.Image.open(f, formats=FORMATS)
            pages = _page_count(picture, path)
            if page is not None:
                if not 0 <= page < pages:
                    raise ImageError(f"{path} has no page {page}: give 0…{pages - 1}")
                picture.seek(page)
            elif pages > 1:
                count = pages if picture.format == "TIFF" else "several"
                raise ImageError(
                    f"{path} holds {count} pages or frames, expected 1; extract one into its own "
                    "file"
                )
            check_picture(path, picture)
            return _read(picture, path)
    except ImageError as e:
        if isinstance(e.__cause__, PIL.UnidentifiedImageError):
            raise ImageError(
                f"{path} is damaged, or a variant of its format that Pillow cannot decode; "
                "convert it to an 8- or 16-bit PNG or to .npy"
            ) from e.__cause__
        if isinstance(e.__cause__, PIL.Image.DecompressionBombError):
            limit = 2 * (PIL.Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
            raise ImageError(
                f"{path} announces {announced_size(e.__cause__)}, more than {limit} million "
                "pixels; crop it or scale it down first"
            ) from e.__cause__
        raise


@dataclass(frozen=True, kw_only=True, eq=False)
class TiffSlices:
    """The pages of a TIFF, each decoded when it is read."""

    path: Path

    def read(self, index: int) -> Image:
        """The page as a picture."""
        return read_raster(self.path, page=index)


def is_raster_volume(path: Path) -> bool:
    """Whether a file is a TIFF of several pages; frames of a GIF or WebP are an animation."""
    try:
        with reading(path, "a TIFF"), path.open("rb") as f:
            return _page_count(PIL.Image.open(f, formats=("TIFF",)), path) > 1
    except ImageError:  # another format, or damaged, which reading the picture reports
        return False


def read_tiff_volume(path: Path, *, axis: int | None) -> Volume:
    """The pages of a TIFF as slices: voxel (x, y, z) is column, row, page; spacing 1.

    ImageError for another axis than 2, or for pages of different sizes or kinds of pixels.
    """
    if axis not in (None, 2):
        raise ImageError(
            f"{path}: axis {axis} was given, expected 2: the pages of a TIFF are its slices; leave "
            "the axis out"
        )
    with reading(path, "a TIFF"), path.open("rb") as f:
        picture = PIL.Image.open(f, formats=("TIFF",))
        pages = _page_count(picture, path)
        kinds: dict[tuple[tuple[int, int], str], int] = {}
        for page in range(pages):
            picture.seek(page)
            kinds.setdefault((picture.size, picture.mode), page)
    if len(kinds) > 1:
        (first, _), (other, page), *_ = kinds.items()
        raise ImageError(
            f"{path} mixes pages: {_kind(first)} on page 1, {_kind(other)} on page {page + 1}; "
            "expected pages of one size and one kind of pixels: split it into several files"
        )
    slices = TiffSlices(path=path)
    image = slices.read(pages // 2)
    rows, columns = image.pixels.shape[:2]
    stored = image.pixels.dtype.newbyteorder("=")
    check_volume_size(path, (columns, rows, pages), stored, 0, rows * columns)
    return Volume(
        path=path,
        kind="tiff",
        files=(path,),
        shape=(columns, rows, pages),
        axis=2,
        plane_axes=(1, 0),
        spacing_mm=(1.0, 1.0, 1.0),
        affine=None,
        dtype=np.dtype(np.float32) if stored.kind == "f" else stored,
        colour=image.pixels.ndim == 3,
        inverted=image.inverted,
        slices=slices,
    )


def write_tiff(path: Path, pages: np.ndarray) -> None:
    """Write (pages, H, W) uint8 as a TIFF with a page each, compressed without loss."""
    first, *later_pages = (PIL.Image.fromarray(np.ascontiguousarray(page)) for page in pages)
    first.save(
        path,
        format="TIFF",
        compression="tiff_adobe_deflate",
        save_all=True,
        append_images=later_pages,
    )


def _page_count(picture: PIL.ImageFile.ImageFile, path: Path) -> int:
    """The pages of a TIFF; 2 for any animation; a JPEG's own previews (MPO) do not count."""
    if picture.format == "TIFF":
        check_pages(path)
        return int(getattr(picture, "n_frames", 1))
    if picture.format == "MPO":
        return 1
    return 2 if getattr(picture, "is_animated", False) else 1


def _kind(page: tuple[tuple[int, int], str]) -> str:
    """`320×240 L`"""
    (width, height), mode = page
    return f"{width}×{height} {mode}"


def _read(picture: PIL.ImageFile.ImageFile, path: Path) -> Image:
    """The image of an open picture, with the dtype and inversion its file declares."""
    # Pillow drops these three facts when it decodes the pixels.
    reduced = _has_16_bit_colour(picture)
    dtype, inverted = _stored_dtype(picture), _is_inverted(picture)
    pixels = _pixels(PIL.ImageOps.exif_transpose(picture), path)
    if dtype is not None:
        pixels = pixels.astype(dtype)
    if reduced:
        logger.warning("%s: 16-bit colour is read as its upper 8 bits", path)
    return Image(pixels=pixels, path=path, inverted=inverted)


def _pixels(picture: PIL.Image.Image, path: Path) -> np.ndarray:
    """The pixels, (H, W) or (H, W, 3), in Pillow's dtype."""
    match picture.mode:
        case "1":
            return np.asarray(picture).astype(np.uint8) * 255
        case "L" | "I" | "F" | "I;16" | "I;16L" | "I;16B" | "I;16N":
            return np.asarray(picture)
        case "LA" | "La":
            return np.asarray(picture.convert("LA"))[..., 0]
        case "RGB" | "RGBX" | "RGBA":
            return np.asarray(picture)[..., :3]
        case "P" | "PA" | "RGBa":
            # A palette may hold alpha: convert to RGBA, then drop it.
            return np.asarray(picture.convert("RGBA"))[..., :3]
        case "CMYK" | "YCbCr":
            return np.asarray(picture.convert("RGB"))
    raise ImageError(f"{path} has colour mode {picture.mode}; convert it to RGB or greyscale")


def _has_16_bit_colour(picture: PIL.ImageFile.ImageFile) -> bool:
    """Whether Pillow will reduce 16-bit colour (or grey with alpha) to 8 bits."""
    if picture.mode not in ("RGB", "RGBA", "LA", "CMYK"):
        return False
    # A tile's last entry is its raw mode, or a tuple that starts with it.
    raw_modes = [tile[3][0] if isinstance(tile[3], tuple) else tile[3] for tile in picture.tile]
    return any(";16" in str(raw_mode) for raw_mode in raw_modes)


def _stored_dtype(picture: PIL.ImageFile.ImageFile) -> type[np.number] | None:
    """The file's dtype of greyscale values that Pillow opens as L (uint8) or I (int32)."""
    if picture.format == "PNG" and picture.mode == "I":  # 16 bits, before Pillow 11
        return np.uint16
    if picture.format != "TIFF" or picture.mode not in ("L", "I"):
        return None
    dtypes: dict[tuple[int, int], type[np.number]] = {
        (SIGNED, 8): np.int8,
        (SIGNED, 16): np.int16,
        (UNSIGNED, 32): np.uint32,
    }
    sample_format = _tiff_tag(picture, TIFF_SAMPLE_FORMAT, UNSIGNED)
    return dtypes.get((sample_format, _tiff_tag(picture, TIFF_BITS, 1)))


def _is_inverted(picture: PIL.ImageFile.ImageFile) -> bool:
    """Whether intensities are MinIsWhite: Pillow inverts up to 8 bits and leaves more as stored."""
    if picture.format != "TIFF" or picture.mode not in ("I", "I;16", "I;16B", "F"):
        return False
    return _tiff_tag(picture, TIFF_PHOTOMETRIC, 1) == MIN_IS_WHITE


def _tiff_tag(picture: PIL.ImageFile.ImageFile, tag: int, default: int) -> int:
    """The value of a TIFF tag; the first channel's if each channel has one."""
    tags: Mapping[int, Any] = getattr(picture, "tag_v2", {})
    value = tags.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)
