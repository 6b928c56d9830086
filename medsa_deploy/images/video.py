"""A video file → its frames, one at a time; pictures → an MP4. Through PyAV (extra `video`).

Frames are decoded when they are read, so the length of a video takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.errors import ImageError, MissingDependencyError

from .files import output_file, reading
from .limits import check_plane

Picture = np.ndarray
"""(H, W, 3) uint8."""

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv")
"""Suffixes of files that are read as videos."""
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,asf"
"""Containers that are opened. Playlists are left out, because they name other files."""
ENCODERS = ("libx264", "libopenh264", "mpeg4")
"""Encoders of what is written, the best first."""
USUAL_RATE = 25
"""Frames a second of a video that announces no rate."""


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What the header of a video announces."""

    count: int | None
    """Frames; None if the container does not say."""
    rate: float | None
    """Frames a second, on average."""


def is_video(path: Path) -> bool:
    """Whether a path is a file with the suffix of a video.

    >>> is_video(Path("no-such-clip.mp4"))
    False
    """
    return path.suffix.lower() in SUFFIXES and path.is_file()


def video_facts(path: Path) -> VideoFacts:
    """What a video announces; ImageError if it cannot be read or its frames are too large."""
    with reading(path, "video"), _opened(path) as (_, stream):
        rate = stream.average_rate
        return VideoFacts(count=stream.frames or None, rate=float(rate) if rate else None)


def video_frames(path: Path) -> Iterator[tuple[Picture, float | None]]:
    """The frames of a video in the order of display, with their times in seconds.

    Pictures are as they are stored: a rotation that the file asks for is not applied.
    ImageError if the video cannot be read, is damaged, or its frames are too large.
    """
    with _opened(path) as (container, stream):
        frames = container.decode(stream)
        while True:
            with reading(path, "video"):
                frame = next(frames, None)
                if frame is None:
                    return
                check_plane(path, (frame.width, frame.height), 3 * frame.width * frame.height)
                picture: Picture = frame.to_ndarray(format="rgb24")
                time = None if frame.time is None else float(frame.time)
            yield picture, time


@contextmanager
def video_file(path: Path, rate: float | None) -> Iterator[Callable[[Picture], None]]:
    """A callable that appends pictures of one size to an MP4, whole at the end or not there.

    `rate`: pictures a second. An odd side is completed by repeating its last row or column.
    ImageError if the file cannot be written.

    >>> with video_file(Path("overlay.mp4"), 25) as append:
    ...     append(np.zeros((240, 320, 3), np.uint8))
    """
    av = _av()
    with output_file(path) as temporary:
        try:
            with av.open(str(temporary), "w", format="mp4") as container:
                stream = _stream(av, container, rate)

                def append(picture: Picture) -> None:
                    height, width = picture.shape[:2]
                    even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                    if not stream.codec_context.is_open:
                        stream.height, stream.width = even.shape[:2]
                    frame = av.VideoFrame.from_ndarray(even, format="rgb24")
                    container.mux(stream.encode(frame))

                yield append
                container.mux(stream.encode(None))
        except av.FFmpegError as e:
            raise ImageError(f"{path} cannot be written as a video: {e.strerror}") from e


def _stream(av: Any, container: Any, rate: float | None) -> Any:
    """A stream of the best encoder of this build of FFmpeg, in colours that every player shows."""
    encoder = next((name for name in ENCODERS if name in av.codecs_available), ENCODERS[-1])
    stream = container.add_stream(
        encoder, rate=Fraction(rate or USUAL_RATE).limit_denominator(1001)
    )
    stream.pix_fmt = "yuv420p"
    return stream


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A video's container and its first picture stream; ImageError if it has none."""
    av = _av()
    options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
    with reading(path, "video"):
        container = av.open(str(path), options=options)
    with container:
        if not container.streams.video:
            raise ImageError(f"{path} holds no pictures; give a video")
        stream = container.streams.video[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        check_plane(path, (width, height), 3 * width * height)
        stream.thread_type = "AUTO"
        yield container, stream


def _av() -> Any:
    """The library, imported for the first video."""
    try:
        import av
    except ImportError as e:
        raise MissingDependencyError("av", extra="video", purpose="video") from e
    return av
