"""Masks of a multi-frame DICOM's frames → a DICOM Segmentation that refers to these frames.

An ultrasound clip has no place in the patient. Its segmentation has none either: each of its frames
names the frame of the clip that it belongs to, as the standard asks for (PS3.3 A.51.5, Derivation
Image). highdicom writes such a segmentation of one frame; the others are added here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.errors import UsageError

from .dicom import functional_group
from .dicom_files import load_header
from .dicom_frames import frame_count
from .dicom_seg import complete, new_segmentation, writing
from .files import reading
from .limits import check_memory
from .segments import Segment, SegmentationDetails

REQUIRED_ATTRIBUTES = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
OF_FRAMES = (
    "NumberOfFrames", "FrameIncrementPointer", "FrameOfReferenceUID",
    "PositionReferenceIndicator", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "DimensionIndexSequence", "DimensionOrganizationSequence",
)  # fmt: skip
"""Attributes of a clip that an image of one frame without a place does not have."""
SINGLE_FRAME = "1.2.840.10008.5.1.4.1.1.7"
"""Secondary Capture: a class whose objects have one frame, so that highdicom takes it."""


class BitPacker:
    """Frames of bits → bytes as DICOM stores them: one after another, without a gap."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._waiting = np.zeros(0, np.bool_)
        """Fewer than 8 bits, which share a byte with the next frame."""

    def add(self, mask: NDArray[np.bool_]) -> None:
        """Append a frame (H, W)."""
        bits = np.concatenate([self._waiting, mask.ravel()])
        in_bytes = len(bits) // 8 * 8
        self._bytes += np.packbits(bits[:in_bytes], bitorder="little").tobytes()
        self._waiting = bits[in_bytes:]

    def content(self) -> bytes:
        """All bytes, of an even number as DICOM demands."""
        content = bytes(self._bytes) + np.packbits(self._waiting, bitorder="little").tobytes()
        return content + b"\0" * (len(content) % 2)


class FrameSegmentation:
    """Collects the masks of one structure in a clip, then gives their segmentation."""

    def __init__(
        self, path: Path, clip: Path, segment: Segment, details: SegmentationDetails
    ) -> None:
        """`clip`: the file of the frames. `path`, of the segmentation, only appears in messages.

        ImageError if the clip lacks an attribute that a segmentation must copy; UsageError if its
        frames have places in the patient.
        """
        self._path, self._segment, self._details = path, segment, details
        self._source = load_header(clip)
        self._class = str(self._source.get("SOPClassUID"))
        self._size = int(self._source.Rows), int(self._source.Columns)
        count = frame_count(self._source)
        check_memory(clip, 2 * count * math.prod(self._size) // 8, f"masks of {count} frames")
        _make_single_frame(self._source, path, clip)
        self._frames: list[int] = []
        self._packer = BitPacker()
        self._dataset([0], b"")  # so that an unusable clip is refused before any work

    def add(self, frame: int, mask: NDArray[np.bool_]) -> None:
        """The mask (H, W) of a frame of the clip, counted from 0; an empty mask is left out."""
        if mask.any():
            self._frames.append(frame)
            self._packer.add(mask)

    def dataset(self) -> Any:
        """The segmentation. If no mask has a pixel, it has an empty mask of the first frame,
        because a segmentation without frames is invalid."""
        if not self._frames:
            self._frames.append(0)
            self._packer.add(np.zeros(self._size, np.bool_))
        return self._dataset(self._frames, self._packer.content())

    def _dataset(self, frames: Sequence[int], pixels: bytes) -> Any:
        planes = np.zeros((1, *self._size), np.uint8)
        with writing(self._path):
            dataset = new_segmentation(
                [self._source], planes, [self._segment], self._details, omit_empty_frames=False
            )
            _index_by_frame(dataset)
            (first,) = dataset.PerFrameFunctionalGroupsSequence
            dataset.PerFrameFunctionalGroupsSequence = [
                _functional_groups(first, frame) for frame in frames
            ]
            dataset.NumberOfFrames = len(frames)
            dataset.PixelData = pixels
            dataset.PatientOrientation = self._source.get("PatientOrientation")
            for element in dataset.iterall():
                if element.keyword == "ReferencedSOPClassUID" and element.value == SINGLE_FRAME:
                    element.value = self._class
        return dataset


def _make_single_frame(header: Any, path: Path, clip: Path) -> None:
    """Turn a clip's header into one of a single frame without a place in the patient."""
    with reading(clip, "DICOM"):
        if functional_group(header, "PlanePositionSequence", 0) is not header:
            raise UsageError(
                f"{path}: the frames of {clip} have places in the patient: segment it as a volume, "
                "without --track, or write masks or a video"
            )
        for name in OF_FRAMES:
            if name in header:
                delattr(header, name)
        complete(header, path, clip, REQUIRED_ATTRIBUTES, instead="write masks or a video")
        header.SOPClassUID = SINGLE_FRAME


def _index_by_frame(dataset: Any) -> None:
    """Let viewers order the frames of a segmentation by time."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.dataset import Dataset

    index = Dataset()
    (segments,) = dataset.DimensionIndexSequence
    index.DimensionIndexPointer = tag_for_keyword("TemporalPositionIndex")
    index.FunctionalGroupPointer = tag_for_keyword("FrameContentSequence")
    index.DimensionOrganizationUID = segments.DimensionOrganizationUID
    index.DimensionDescriptionLabel = "Temporal Position Index"
    dataset.DimensionIndexSequence = [segments, index]


def _functional_groups(first: Any, frame: int) -> Any:
    """The attributes of a segmentation's frame that belongs to `frame` of the source."""
    groups = copy.deepcopy(first)
    content = groups.FrameContentSequence[0]
    content.TemporalPositionIndex = frame + 1
    content.DimensionIndexValues = [1, frame + 1]
    (image,) = groups.DerivationImageSequence[0].SourceImageSequence
    image.ReferencedFrameNumber = frame + 1
    return groups
