"""One frame of a DICOM file → `Image`, through pydicom (extra `dicom`).

The steps are the standard's (PS3.4 N.2): stored values, modality transformation (rescale or LUT),
values of interest (LUT or window), presentation. `Image.pixels` are the values after the modality
transformation, `Image.display` those after the last step. Inversion follows the photometric
interpretation alone: a Presentation LUT Shape only repeats it.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.errors import ImageError, MissingDependencyError

from .dicom_files import load
from .dicom_frames import check_frame, decoded_file_frame, decoded_frame, frame_count
from .file_texts import PHOTOMETRIC, code_text, library_text, uid_name, uid_text
from .files import reading
from .image import Image

try:
    import pydicom
    from pydicom.pixels import apply_color_lut, get_decoder
    from pydicom.uid import JPEGExtended12Bit
except ImportError as e:
    raise MissingDependencyError("pydicom", extra="dicom", purpose="reading DICOM") from e

logger = logging.getLogger(__name__)

PACKAGES = {
    "1.2.840.10008.1.2.4.51": "python-gdcm",
    "1.2.840.10008.1.2.4.57": "python-gdcm",
    "1.2.840.10008.1.2.4.70": "python-gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg pylibjpeg-openjpeg",
}
"""Packages with a permissive licence, by the transfer syntax that pydicom needs them for."""
RENDERING = ("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction")
"""Attributes that map intensities to display values."""
COLOURS = ("Red", "Green", "Blue")
DERIVED = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "a label map segmentation",
    "1.2.840.10008.5.1.4.1.1.30": "a parametric map",
    "1.2.840.10008.5.1.4.1.1.481.2": "a dose distribution",
}
"""SOP classes of objects with pixels that are computed from images."""


def read_dicom(path: Path) -> Image:
    """The only frame of a DICOM file: greyscale, or any colour space as RGB.

    ImageError if the file is not an image, holds several frames, or cannot be decoded.
    """
    dataset = load(path)
    with reading(path, "DICOM"):
        check_is_image(path, dataset)
        frames = frame_count(dataset)
    if frames != 1:
        raise ImageError(
            f"{path} has {frames} frames, expected 1: extract one frame into a file of its own"
        )
    return frame_image(dataset, path)


def frame_image(
    dataset: Any,
    path: Path,
    frame: int = 0,
    *,
    dtype: np.dtype | None = None,
    rendering: Any = None,
) -> Image:
    """Frame `frame`, counted from 0, of a dataset that holds pixels.

    For the slices of a volume, `dtype` converts the intensities of every slice to one type, and
    `rendering` holds the LUT or window that all slices share.
    """
    stored, photometric = decode_frame(dataset, path, frame)
    with reading(path, "DICOM"):  # pydicom parses a value at first use, and may fail then
        if photometric == "PALETTE COLOR":
            return Image(pixels=_palette(stored, dataset), path=path)
        if photometric == "RGB":
            return Image(pixels=stored, path=path)
        if photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise ImageError(
                f"{path} has photometric interpretation {code_text(photometric, PHOTOMETRIC)}; "
                "convert it to RGB or MONOCHROME2"
            )
        values = _modality(stored, dataset, frame)
        values = values if dtype is None else values.astype(dtype, copy=False)
        if rendering is None:
            rendering = functional_group(dataset, "FrameVOILUTSequence", frame)
        display = _values_of_interest(values, rendering, dataset, path)
        pixels = _eight_bit(values, dataset)
        inverted = photometric == "MONOCHROME1"
        if inverted and display is None and pixels.dtype == np.uint8:
            display = pixels.astype(np.float32)  # 8-bit values need no window to be shown
        if inverted and display is not None:
            display = np.float32(255) - display
        return Image(
            pixels=pixels,
            path=path,
            display=display,
            inverted=inverted,
            background=_padding(stored, dataset),
        )


def check_is_image(path: Path, dataset: Any) -> None:
    """ImageError for an object that was computed from images, or has no pixels."""
    if not is_image(dataset):
        kind = DERIVED.get(str(dataset.get("SOPClassUID")), "an object without pixels")
        raise ImageError(f"{path} is {kind}, not an image; give the image it was made from")


def is_image(header: Any) -> bool:
    """Whether an object has pixels and is not computed from other images."""
    has_pixels = bool(header.get("Rows")) and bool(header.get("Columns"))
    return has_pixels and not is_derived(header)


def is_derived(header: Any) -> bool:
    """Whether an object's SOP class is one of `DERIVED`."""
    return str(header.get("SOPClassUID", "")) in DERIVED


def rendering_of(dataset: Any, frame: int) -> Any:
    """A copy of the attributes with the LUT or window of a frame; empty without one."""
    group = functional_group(dataset, "FrameVOILUTSequence", frame)
    rendering = pydicom.Dataset()
    for name in RENDERING:
        if name in group:
            rendering[name] = group[name]
    return rendering


def decode_frame(dataset: Any, path: Path, frame: int) -> tuple[np.ndarray, str]:
    """Stored values, (H, W) or (H, W, 3), and their photometric interpretation, RGB for YBR."""
    with reading(path, "DICOM"):
        _check_bits(path, dataset)
        syntax = dataset.file_meta.TransferSyntaxUID
        syntax_name = f"transfer syntax {uid_name(syntax)} ({uid_text(syntax)})"
        check_frame(path, dataset)
        try:
            decoding = get_decoder(syntax)
        except NotImplementedError as e:
            raise ImageError(
                f"{path} has {syntax_name}, which pydicom cannot decode; convert it to "
                "uncompressed DICOM"
            ) from e
    if syntax == JPEGExtended12Bit and dataset.get("BitsStored", 8) > 8:
        return _decode_twelve_bits(dataset, path, frame), str(dataset.PhotometricInterpretation)
    package = PACKAGES.get(str(syntax), "python-gdcm")
    if not decoding.is_available:
        raise ImageError(f"{path} has {syntax_name}; to decode it: pip install {package}")
    if not syntax.is_encapsulated:
        with reading(path, "DICOM"):
            # Without an index, more pixels than the header announces would be more frames.
            pixels, meta = decoding.as_array(dataset, index=frame)
            # Not from the dataset: its tag still says YBR after the decoder has converted to RGB.
            return pixels, str(meta["photometric_interpretation"])
    try:
        with reading(path, "DICOM"):
            return decoded_frame(dataset, syntax, frame)
    except ImageError as e:
        raise ImageError(
            f"{path} has {syntax_name} and cannot be decoded ({library_text(e.__cause__ or e)}): "
            "it is damaged, or another tool (gdcmconv, dcmdjpeg) must convert it to uncompressed "
            "DICOM"
        ) from e.__cause__


def _decode_twelve_bits(dataset: Any, path: Path, frame: int) -> np.ndarray:
    """Stored values (H, W) of a JPEG with more than 8 bits, which pydicom leaves to nobody."""
    if importlib.util.find_spec("gdcm") is None:
        raise ImageError(
            f"{path} has 12-bit JPEG; to decode it: pip install {PACKAGES[str(JPEGExtended12Bit)]}"
        )
    with reading(path, "DICOM"):
        return decoded_file_frame(dataset, path, frame)


def _check_bits(path: Path, dataset: Any) -> None:
    """ImageError for samples that are not stored in the lowest bits of their words."""
    high, stored = dataset.get("HighBit"), dataset.get("BitsStored")
    if high is not None and stored is not None and int(high) != int(stored) - 1:
        raise ImageError(
            f"{path} stores {stored} bits up to bit {high}, expected up to bit {stored - 1}: "
            "convert it to uncompressed DICOM with another tool (gdcmconv, dcmconv)"
        )


def _modality(stored: np.ndarray, dataset: Any, frame: int) -> np.ndarray:
    """Stored values → intensities: by LUT (uint16), slope and intercept (float32), or as is."""
    group = functional_group(dataset, "PixelValueTransformationSequence", frame)
    if luts := group.get("ModalityLUTSequence"):
        return _look_up(stored, luts[0].LUTDescriptor, luts[0].LUTData, dataset).astype(np.uint16)
    slope, intercept = rescale(group)
    if (slope, intercept) == (1.0, 0.0):
        return stored
    values = stored.astype(np.float64)
    values *= slope  # in place: new pages of memory cost more than the arithmetic
    values += intercept
    return values.astype(np.float32)


def _padding(stored: np.ndarray, dataset: Any) -> np.ndarray | None:
    """(H, W) bool: stored values that the file marks as padding (PS3.3 C.7.5.1.1.2)."""
    value = number(dataset, "PixelPaddingValue")
    if value is None:
        return None
    limit = number(dataset, "PixelPaddingRangeLimit")
    low, high = sorted((value, value if limit is None else limit))
    return np.asarray((low <= stored) & (stored <= high))


def rescale(group: Any) -> tuple[float, float]:
    """(slope, intercept) of a dataset or functional group; (1, 0) if it has none.

    ValueError for values that are no numbers: intensities would be guessed.
    """
    slope, intercept = number(group, "RescaleSlope"), number(group, "RescaleIntercept")
    return 1.0 if slope is None else slope, intercept or 0.0


def _values_of_interest(
    values: np.ndarray, group: Any, dataset: Any, path: Path
) -> np.ndarray | None:
    """Intensities → float32 0…255 by a group's VOI LUT or first window; None without either."""
    if luts := group.get("VOILUTSequence"):
        shown = _look_up(values, luts[0].LUTDescriptor, luts[0].LUTData, dataset)
        top = 2 ** int(luts[0].LUTDescriptor[2]) - 1
        return np.asarray(np.minimum(shown, top) * (255 / top), np.float32)
    try:
        centre, width = number(group, "WindowCenter"), number(group, "WindowWidth")
    except ValueError as e:
        logger.warning("%s: its window is ignored: %s", path, library_text(e))
        return None
    if centre is None or width is None:
        return None
    function = str(group.get("VOILUTFunction") or "LINEAR").strip().upper()
    minimum = 1 if function == "LINEAR" else np.finfo(np.float32).tiny
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID") or not width >= minimum:
        logger.warning(
            "%s: its window (%s, width %g) is invalid and ignored", path, function, width
        )
        return None
    return window(values, centre, width, function)


def window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Values → float32 0…255 by a DICOM window (PS3.3 C.11.2.1.2.1 and C.11.2.1.3)."""
    x = values.astype(np.float64)
    x -= centre
    if function == "SIGMOID":
        # The standard's 1 / (1 + exp(-4x/w)), in a form that cannot overflow.
        return np.asarray(127.5 * (1 + np.tanh(2 * x / width)), np.float32)
    if function == "LINEAR":
        x += 0.5
        width -= 1
    if width == 0:
        return np.asarray(np.where(x > 0, 255, 0), np.float32)
    x /= width
    x += 0.5
    np.clip(x, 0, 1, out=x)
    x *= 255
    return x.astype(np.float32)


def _eight_bit(values: np.ndarray, dataset: Any) -> np.ndarray:
    """uint8 values of fewer than 8 bits (a 1-bit segmentation), scaled to 0…255."""
    bits = int(dataset.get("BitsStored") or 8)
    if values.dtype != np.uint8 or bits >= 8:
        return values
    return np.asarray(values.astype(np.uint16) * 255 // (2**bits - 1), np.uint8)


def _palette(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """Palette indices → (H, W, 3) uint8."""
    if "SegmentedRedPaletteColorLookupTableData" in dataset:
        colours = apply_color_lut(stored, dataset)[..., :3]
    else:
        channels = [
            _look_up(
                stored,
                dataset[f"{colour}PaletteColorLookupTableDescriptor"].value,
                dataset[f"{colour}PaletteColorLookupTableData"].value,
                dataset,
            )
            for colour in COLOURS
        ]
        colours = np.stack(channels, axis=-1)
    # Some tables hold 8-bit colours in 16-bit words, whatever their descriptor says.
    return np.asarray(colours >> 8 if colours.max() > 255 else colours, np.uint8)


def _look_up(values: np.ndarray, descriptor: Any, data: Any, dataset: Any) -> np.ndarray:
    """`values` through a DICOM lookup table (PS3.3 C.11.1.1), as int64.

    pydicom's functions are not used: they index with the table's dtype, so an 8-bit table of more
    than 256 entries wraps around.
    """
    entries, first = int(descriptor[0]) or 2**16, int(descriptor[1])
    if isinstance(data, bytes):
        order = "<" if dataset.original_encoding[1] else ">"
        size = 2 if len(data) >= 2 * entries else 1
        table = np.frombuffer(data[: entries * size], f"{order}u{size}").astype(np.int64)
    else:
        table = np.atleast_1d(np.asarray(data, np.int64))
    if len(table) < entries:
        raise ValueError(f"a lookup table of {entries} entries has only {len(table)}")
    if first >= 2**15 and values.min() < 0:
        first -= 2**16  # the file wrote a signed first value as unsigned
    index = np.rint(values).astype(np.int64) - first
    looked_up: np.ndarray = table[np.clip(index, 0, entries - 1)]
    return looked_up


def functional_group(dataset: Any, name: str, frame: int) -> Any:
    """The innermost dataset with a group's attributes; see `functional_groups`."""
    return functional_groups(dataset, name, frame)[0]


def functional_groups(dataset: Any, name: str, frame: int) -> list[Any]:
    """The datasets that may hold a group's attributes: the frame's own, the shared one, `dataset`.

    Enhanced (multi-frame) objects nest their groups, others keep the attributes at the top.
    """
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    shared = dataset.get("SharedFunctionalGroupsSequence") or ()
    nested = [
        item[name][0] for item in (*per_frame[frame : frame + 1], *shared[:1]) if item.get(name)
    ]
    return [*nested, dataset]


def number(dataset: Any, name: str) -> float | None:
    """The first value of a numeric attribute; None if it is absent or empty.

    ValueError for text that is no number, such as "40,5" from a machine with decimal commas.
    """
    try:
        value = dataset.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, str | float | int):
            return float(value)
        return float(value[0]) if len(value) else None
    except ValueError as e:  # pydicom parses a value at first use
        raise ValueError(f"its {name} is no number: {library_text(e)}") from e
