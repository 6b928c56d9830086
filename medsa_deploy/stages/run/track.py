"""A bundle, a clip and a prompt in its first frame → the mask of every frame: `run --track`.

Frames are read, segmented and written one by one: a clip of any length takes the memory of a frame,
or for a DICOM segmentation of one bit a pixel. Outputs get their names when all are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.bundle.folder import new_bundle
from medsa_deploy.errors import PromptError, UsageError, about
from medsa_deploy.images import SegmentationDetails, draw_overlay, write_mask
from medsa_deploy.images.clip import Clip, ClipFrame, open_clip
from medsa_deploy.images.files import check_writable, output_file, suffix
from medsa_deploy.images.segments import segments, warn_of_unknown
from medsa_deploy.images.video import video_file
from medsa_deploy.progress import OnCount
from medsa_deploy.runtime import TrackedFrame, Tracker, TrackerOptions
from medsa_deploy.transforms.intensities import intensities

from .images import Prompts, prompts_of
from .run import RunRequest, SessionOptions, bundle_details

Mask: TypeAlias = NDArray[np.bool_]
Write: TypeAlias = Callable[[int, ClipFrame, Mask], None]
"""Called with the number of a frame, from 0, the frame and its mask, empty if it is lost."""
VIDEO_SUFFIX, SEGMENTATION_SUFFIX = ".mp4", ".dcm"


@dataclass(frozen=True, kw_only=True)
class FrameReport:
    """The result for one frame."""

    frame: str
    """Its number, or its file's name in a folder."""
    timestamp: float | None
    """Seconds from the beginning of the clip; None if the clip does not say."""
    lost: bool
    """Whether no mask was written, because it was empty or broke a limit; see `TrackerOptions`."""
    reacquired: bool
    score: float
    """The IoU that the network predicts of its mask."""
    pixels: int
    """Of the mask that was written."""
    latency_ms: float


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """The result for one clip."""

    clip: Path
    mask: Path | None
    """The folder of masks, or the DICOM segmentation."""
    overlay: Path | None
    frames: tuple[FrameReport, ...]
    timings_ms: dict[str, float]
    """Medians per frame: `preprocess`, `encode`, `decode`, `postprocess`."""
    seconds: float
    """With reading and writing."""
    degraded: str | None
    """Why a fallback segmented part of it instead of the backend that was asked for."""


def track_clip(
    bundle: Path,
    path: Path,
    request: RunRequest,
    session: SessionOptions,
    *,
    class_name: str | None = None,
    on_frame: OnCount = lambda done, total: None,
) -> Tracking:
    """Follow the structure that is prompted in the first frame of a clip, and write its masks.

    The mask of `request.targets` is a folder for a PNG of each frame (default `masks`), a .dcm for
    a DICOM segmentation of a DICOM clip, or a .mp4 for a video that shows the masks. UsageError for
    options that do not fit, ImageError for a clip that cannot be read, PromptError for prompts that
    cannot be used.
    """
    start = perf_counter()
    _refuse_others(request)
    prompts = _one_structure(request)
    clip = open_clip(path)
    mask, overlay = _targets(clip, request)
    options = TrackerOptions(
        intensity_window=request.intensity_window,
        threshold=request.threshold,
        class_name=class_name,
    )
    with session.open(bundle) as opened, ExitStack() as outputs:
        tracker = Tracker(opened, options)
        writers: list[Write] = []
        if mask is not None:
            name = class_name or opened.classes[0]
            details = bundle_details(bundle)
            writer = _segmentation(clip, mask, name, details) if suffix(mask) else _folder(mask)
            writers.append(outputs.enter_context(writer))
        if overlay is not None:
            writers.append(outputs.enter_context(_video(clip, overlay, tracker, prompts)))
        reports, timings = [], []
        for report, timings_ms in _track(clip, tracker, prompts, writers, on_frame):
            reports.append(report)
            timings += [timings_ms] if timings_ms else []
        degraded = opened.degraded
    return Tracking(
        clip=path,
        mask=mask,
        overlay=overlay,
        frames=tuple(reports),
        timings_ms={name: median(each[name] for each in timings) for name in timings[0]},
        seconds=perf_counter() - start,
        degraded=degraded,
    )


def _track(
    clip: Clip, tracker: Tracker, prompts: Prompts, writers: Sequence[Write], on_frame: OnCount
) -> Iterator[tuple[FrameReport, dict[str, float]]]:
    """Segment and write each frame: its report, and the times that its parts took."""
    for index, frame in enumerate(clip):
        with about(clip.path):
            result = _segmented(tracker, frame, prompts, first=index == 0)
        shown = np.zeros_like(result.mask) if result.lost else result.mask
        for write in writers:
            write(index, frame, shown)
        on_frame(index + 1, max(clip.count or 0, index + 1))
        report = FrameReport(
            frame=frame.name,
            timestamp=frame.timestamp,
            lost=result.lost,
            reacquired=result.reacquired,
            score=result.score,
            pixels=int(np.count_nonzero(shown)),
            latency_ms=result.latency_ms,
        )
        yield report, result.timings_ms


def _segmented(
    tracker: Tracker, frame: ClipFrame, prompts: Prompts, *, first: bool
) -> TrackedFrame:
    if not first:
        return tracker.update(frame.image)
    points, boxes = prompts.points or None, prompts.boxes
    return tracker.start(
        frame.image,
        points=points,
        labels=None if points is None else prompts.labels,
        box=boxes[0] if boxes else None,
    )


@contextmanager
def _folder(path: Path) -> Iterator[Write]:
    """A PNG for each frame, in a folder that is there whole or not at all."""
    with new_bundle(path) as folder:

        def write(index: int, frame: ClipFrame, mask: Mask) -> None:
            write_mask(folder / f"{frame.name}.mask.png", mask, frame.image)

        yield write


@contextmanager
def _segmentation(
    clip: Clip, path: Path, name: str, details: SegmentationDetails
) -> Iterator[Write]:
    """A DICOM segmentation of the frames of a DICOM clip."""
    from medsa_deploy.images.dicom_frame_seg import FrameSegmentation
    from medsa_deploy.images.dicom_seg import save

    described = segments(1, [name], {})
    segmentation = FrameSegmentation(path, clip.path, described[0], details)
    yield lambda index, frame, mask: segmentation.add(index, mask)
    warn_of_unknown(described)
    with output_file(path) as temporary:
        save(segmentation.dataset(), temporary, path)


@contextmanager
def _video(clip: Clip, path: Path, tracker: Tracker, prompts: Prompts) -> Iterator[Write]:
    """A video of the frames with their masks; the first one also shows the prompts."""
    conventions = tracker.session.conventions
    signs = prompts.labels or (1,) * len(prompts.points)
    with video_file(path, clip.rate) as append:

        def write(index: int, frame: ClipFrame, mask: Mask) -> None:
            background, _ = intensities(frame.image, conventions, tracker.intensity_window)
            shown = prompts if index == 0 else Prompts()
            append(
                draw_overlay(
                    background,
                    mask,
                    points=shown.points,
                    labels=signs[: len(shown.points)],
                    boxes=shown.boxes,
                )
            )

        yield write


def _targets(clip: Clip, request: RunRequest) -> tuple[Path | None, Path | None]:
    """The masks and the video to write; UsageError for those that cannot be written."""
    mask, overlay = request.targets.mask or Path("masks"), request.targets.overlay
    if suffix(mask) == VIDEO_SUFFIX:
        if overlay is not None:
            raise UsageError(f"{mask} and {overlay} would be the same video: leave --overlay out")
        return None, _checked_file(clip, mask)
    if overlay is not None and suffix(overlay) != VIDEO_SUFFIX:
        raise UsageError(f"{overlay}: the overlay of a clip is a video: name a .mp4")
    if suffix(mask) == SEGMENTATION_SUFFIX:
        if clip.kind != "dicom":
            raise UsageError(
                f"{mask}: a DICOM segmentation refers to DICOM frames, and {clip.path} is not "
                "DICOM: name a folder or a .mp4"
            )
        _checked_file(clip, mask)
    elif suffix(mask):
        raise UsageError(f"{mask}: the masks of a clip are a folder, a .dcm or a .mp4")
    elif mask.exists() and not (mask.is_dir() and not any(mask.iterdir())):
        raise UsageError(f"{mask} exists and is not an empty folder: name another with -o")
    return mask, None if overlay is None else _checked_file(clip, overlay)


def _checked_file(clip: Clip, path: Path) -> Path:
    check_writable(path)
    if path.exists() and any(path.samefile(file) for file in clip.files):
        raise UsageError(f"{path} is part of the clip: name another output")
    return path


def _one_structure(request: RunRequest) -> Prompts:
    """The prompts of the first frame."""
    prompts = prompts_of(request.points, request.boxes, None)
    if len(prompts.boxes) > 1:
        raise PromptError(
            f"{len(prompts.boxes)} boxes are as many structures, and --track follows "
            "one: give one box, and run again for the others"
        )
    if not (prompts.points or prompts.boxes):
        raise PromptError("no prompt: give --point X,Y or --box X0,Y0,X1,Y1 in the first frame")
    return prompts


def _refuse_others(request: RunRequest) -> None:
    """UsageError for an option that is not for clips."""
    selection = request.selection
    options = {
        "--prompts": request.prompts,
        "--mask-input": request.mask_input,
        "--save-logits": request.targets.logits,
        "--measurements": request.measurements,
        "--class-codes": request.class_codes,
        "--colors": request.colours or None,
        "--to-web": request.to_web,
        "--axis": selection.axis,
        "--slice": request.slice_index,
        "--volume": selection.volume,
        "--series": selection.series,
        "--orientation": selection.orientation,
        "--phase": selection.phase,
        "--nan": None if selection.nan == "refuse" else selection.nan,
        "--overlap": request.overlap,
        "--propagate": request.propagate or None,
        "--margin": request.margin,
        "--multimask": request.multimask or None,
    }
    if chosen := [name for name, value in options.items() if value is not None]:
        raise UsageError(f"{', '.join(chosen)} cannot be used with --track: leave it out")
