"""A video, a multi-frame DICOM or a folder of frames → `Clip`: its frames in order, one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from medsa_deploy.errors import ImageError, about

from .image import Image, check_values
from .read import find_images, format_of, is_derived, read_frame
from .signatures import SUFFIXES as IMAGE_SUFFIXES
from .video import SUFFIXES, is_video, video_facts, video_frames

ClipKind: TypeAlias = Literal["video", "dicom", "folder"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipFrame:
    """One frame of a clip."""

    image: Image
    name: str
    """The file's name in a folder; otherwise the frame's number, from 0, with five digits."""
    timestamp: float | None
    """Seconds from the beginning; None if the clip does not say."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """Frames in the order in which they were recorded."""

    path: Path
    kind: ClipKind
    count: int | None
    """Frames; None if a video does not announce them."""
    rate: float | None
    """Frames a second; None if the clip does not say."""
    read: Callable[[], Iterator[ClipFrame]]
    """Reads from the first frame, one at a time."""
    files: tuple[Path, ...]
    dataset: Any = None
    """The DICOM, its pixels still encoded."""

    def __iter__(self) -> Iterator[ClipFrame]:
        return self.read()


def open_clip(path: Path) -> Clip:
    """The clip at a path; ImageError if there is none that can be read.

    A folder's images are its frames, in the order of the numbers in their names. Of a DICOM with
    several frames they are the frames in stored order. Anything else is opened as a video.

    >>> clip = open_clip(Path("frames"))
    >>> clip.kind, clip.count
    ('folder', 2)
    """
    with about(path):
        if path.is_dir():
            images = [file for file in find_images(path) if not is_derived(file)]
            files = tuple(sorted(images, key=_by_numbers))
            read = partial(_folder_frames, files)
            return Clip(
                path=path, kind="folder", count=len(files), rate=None, read=read, files=files
            )
        if not is_video(path):
            return _dicom_clip(path)
        facts = video_facts(path)
        return Clip(
            path=path,
            kind="video",
            count=facts.count,
            rate=facts.rate,
            read=partial(_video_clip_frames, path),
            files=(path,),
        )


def _by_numbers(path: Path) -> tuple[Sequence[str | int], str]:
    """The order of names in which 2 comes before 10."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def _folder_frames(files: Sequence[Path]) -> Iterator[ClipFrame]:
    for file in files:
        yield ClipFrame(image=read_frame(file), name=file.name, timestamp=None)


def _video_clip_frames(path: Path) -> Iterator[ClipFrame]:
    for number, (picture, timestamp) in enumerate(video_frames(path)):
        image = Image(pixels=picture, path=path)
        yield ClipFrame(image=image, name=f"{number:05}", timestamp=timestamp)


def _dicom_clip(path: Path) -> Clip:
    """A DICOM's frames; ImageError for another file, or a single frame."""
    if format_of(path) != "dicom":
        raise ImageError(
            f"{path} is a picture or a volume, expected a clip: a video ({', '.join(SUFFIXES)}), a "
            f"DICOM with several frames, or a folder of images ({', '.join(IMAGE_SUFFIXES)})"
        )
    from .dicom import check_is_image
    from .dicom_files import load
    from .dicom_frames import check_frames, frame_count
    from .files import reading

    dataset = load(path)
    with reading(path, "DICOM"):
        check_is_image(path, dataset)
        check_frames(path, dataset)
        count, times = frame_count(dataset), _frame_times(dataset)
    if count < 2:
        raise ImageError(f"{path} has a single frame: leave --track out, or give a clip")
    rate = (len(times) - 1) / times[-1] if len(times) == count and times[-1] > 0 else None
    return Clip(
        path=path,
        kind="dicom",
        count=count,
        rate=rate,
        read=partial(_dicom_frames, path, dataset, count, times),
        files=(path,),
        dataset=dataset,
    )


def _frame_times(dataset: Any) -> list[float]:
    """Seconds of each frame from the first, of FrameTimeVector or FrameTime; empty without both."""
    from .dicom import number
    from .dicom_frames import frame_count

    count = frame_count(dataset)
    vector = dataset.get("FrameTimeVector")
    if vector is not None and len(vector) == count:
        times, total = [], 0.0
        for step in vector:
            total += float(step) / 1e3
            times.append(total)
        return times
    step_ms = number(dataset, "FrameTime") or 0.0
    return [k * step_ms / 1e3 for k in range(count)] if step_ms > 0 else []


def _dicom_frames(
    path: Path, dataset: Any, count: int, times: Sequence[float]
) -> Iterator[ClipFrame]:
    """Each frame, rendered as the first is."""
    from .dicom import frame_image, rendering_of

    rendering = rendering_of(dataset, 0)
    for k in range(count):
        image = frame_image(dataset, path, k, rendering=rendering)
        yield ClipFrame(
            image=check_values(image, f"{path}, frame {k}"),
            name=f"{k:05}",
            timestamp=times[k] if times else None,
        )
