"""A click or a box in one frame of a stream → the mask of its structure in each frame after it.

The mask of a frame prompts the next frame. A tracker keeps one mask and no frame: a host that is
faster than the network drops frames itself, so that no result is older than its own frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from threading import Lock
from time import perf_counter
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medsa_deploy.errors import ImageError, PromptError, UsageError
from medsa_deploy.images.image import Image
from medsa_deploy.kernels.postprocess import Region
from medsa_deploy.transforms.intensities import IntensityWindow

from .backends.interface import Array
from .decoding import Embedding
from .prediction import Prediction
from .session import Session

Mask: TypeAlias = NDArray[np.bool_]
Box: TypeAlias = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of a frame."""
FramePrompt: TypeAlias = Literal["box", "box+logits"]


@dataclass(frozen=True, kw_only=True)
class TrackerOptions:
    """How a tracker prompts a frame with the mask of an earlier one, and when a mask is lost.

    >>> from medsa_deploy import TrackerOptions
    >>> careful = TrackerOptions(min_overlap=0.5, deadline_ms=33)
    """

    margin: float = 0.05
    """The box of a mask grows on every side by this part of its longer side, at least a pixel."""
    prompt: FramePrompt = "box"
    """What prompts the next frame: the box, or the box and the mask's low-resolution logits."""
    max_area_change: float = 2.0
    """A mask is lost if its area is this many times larger or smaller than the last good mask's."""
    min_overlap: float = 0.3
    """A mask is lost if its IoU with the last good mask is lower."""
    min_score: float = 0.0
    """A mask is lost if the network's predicted IoU is lower."""
    deadline_ms: float | None = None
    """Time for one frame, from the call to its result; see `TrackedFrame.late`. None for no
    limit."""
    class_name: str | None = None
    """The class to follow, for a network of several classes."""
    intensity_window: IntensityWindow = None
    """Intensities of black and white; None or "auto" for those of the first frame."""
    threshold: float | None = None
    """Probability above which a pixel belongs to the mask; None for the bundle's."""

    def __post_init__(self) -> None:
        limits = {
            "margin": (self.margin, 0, inf),
            "max_area_change": (self.max_area_change, 1, inf),
            "min_overlap": (self.min_overlap, 0, 1),
            "min_score": (self.min_score, 0, 1),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high or value == inf:
                raise UsageError(f"{name} {value:g} cannot be used: give {low} to {high}")
        if self.deadline_ms is not None and not self.deadline_ms > 0:
            raise UsageError(f"deadline_ms {self.deadline_ms:g} cannot be used: give more than 0")
        if self.prompt not in ("box", "box+logits"):
            raise UsageError(f"unknown prompt {self.prompt!r}; there are: box, box+logits")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrackedFrame:
    """The result for one frame.

    >>> from medsa_deploy import Tracker, load, read_image
    >>> with load("liver.medsa") as session:
    ...     result = Tracker(session).start(read_image("slice.png"), box=(40, 60, 200, 210))
    >>> result.mask.shape, result.frame_id, result.late
    ((240, 320), 0, False)
    """

    mask: Mask
    """(H, W) bool at the frame's size. If the structure is lost, the mask that was refused."""
    score: float
    """The IoU that the network predicts of the mask; 0 for a frame of one grey."""
    lost: bool
    """Whether the mask is empty, or breaks a limit of the options: do not show it."""
    reacquired: bool
    """Whether this is the first good mask after a lost one."""
    late: bool
    """Whether the result took longer than `deadline_ms`. It is the whole result of its frame and
    prompts the next frame: nothing was skipped, and no frame waits. Show it or drop it."""
    frame_id: Any
    """As it was given; without one, the number of frames since the start."""
    timestamp: Any
    """As it was given."""
    box: tuple[int, int, int, int] | None
    """x0, y0, x1, y1 around the mask, the last two exclusive; None if it is empty."""
    latency_ms: float
    """From the call to the result."""
    timings_ms: dict[str, float]
    """`preprocess`, `encode`, `decode`, `postprocess`; empty for a frame of one grey."""
    degraded: str | None
    """Why a fallback backend made it; None if the backend that was asked for did."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _GoodMask:
    """The last mask that was not lost, as the prompt of later frames."""

    mask: Mask
    region: Region
    logits: Array
    """(4g, 4g)"""


class Tracker:
    """Follows one structure through the frames of a stream.

    `start` takes a click or a box in a frame; `update` takes each frame after it. Frames are what
    `Session.encode` takes, also on the GPU, all of one size. After a lost frame, the last good mask
    prompts the following frames, in a box that grows by `margin` with each of them.

    Threads: a tracker serves one thread at a time. A call during another is a UsageError, because a
    frame that waits would be late. Trackers of one session run at the same time if the session
    takes several threads.

    UsageError for a 3D network, a network that segments without prompts, or a network of several
    classes without `class_name`.

    >>> from medsa_deploy import Tracker, load, read_image
    >>> frame = read_image("slice.png")
    >>> with load("liver.medsa") as session:
    ...     tracker = Tracker(session)
    ...     first = tracker.start(frame, box=(40, 60, 200, 210), frame_id="a", timestamp=0.0)
    ...     second = tracker.update(frame, frame_id="b", timestamp=0.04)
    >>> second.frame_id, second.timestamp
    ('b', 0.04)
    """

    def __init__(self, session: Session, options: TrackerOptions | None = None) -> None:
        self.session = session
        self.options = options or TrackerOptions()
        self._mask_index, self._logits_index = _followed_mask(session, self.options.class_name)
        if self.options.prompt == "box+logits" and session.manifest.mask_prompt_size is None:
            raise UsageError("this network takes no mask prompt: choose the prompt 'box'")
        self._lock = Lock()
        self.intensity_window = self.options.intensity_window
        """Intensities of black and white in every frame; after `start`, those of the first."""
        self._size: tuple[int, int] | None = None
        """(H, W) of every frame; None before `start`."""
        self._prompts: dict[str, Any] = {}
        """The user's, until there is a good mask."""
        self._good: _GoodMask | None = None
        self._frames = self._lost_frames = 0

    def start(
        self,
        frame: Image | ArrayLike,
        *,
        box: ArrayLike | None = None,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        frame_id: Any = None,
        timestamp: Any = None,
    ) -> TrackedFrame:
        """Segment a frame from a click or a box, and follow its mask from there.

        `points` (N, 2) with `labels` (N,), 1 foreground (default) or 0, and `box` (4,) as x0, y0,
        x1, y1, in pixels (x, y). Starting again forgets everything about earlier frames. If the
        mask is empty, the result is lost and the same prompts are tried on the next frame. If the
        call fails, the tracker stays as it was.

        ImageError and PromptError as `Session.encode` and `Session.segment`. PromptError for
        prompts of several structures.
        """
        with self._alone():
            begun = perf_counter()
            prompts = {"box": box, "points": points, "labels": labels}
            embedding = self._encode(frame, self.options.intensity_window)
            prediction = self._segment(embedding, prompts)
            self.intensity_window = embedding.intensity_window or self.options.intensity_window
            self._size = embedding.frame.image_size
            self._prompts, self._good = prompts, None
            self._frames = self._lost_frames = 0
            return self._result(begun, embedding, prediction, frame_id, timestamp)

    def update(
        self, frame: Image | ArrayLike, *, frame_id: Any = None, timestamp: Any = None
    ) -> TrackedFrame:
        """The mask of the structure in the next frame, of the size of the first.

        A frame of one grey is lost, without a run of the network. A frame that cannot be used is an
        error, and leaves the tracker as it was: go on with the next frame.

        UsageError before `start`. ImageError for a frame of another size, and as `Session.encode`.
        """
        with self._alone():
            begun = perf_counter()
            if self._size is None:
                raise UsageError("the tracker follows nothing yet: call start with a click or box")
            self._check_size(_frame_size(frame))
            if _is_one_grey(frame):
                return self._result(begun, None, None, frame_id, timestamp)
            embedding = self._encode(frame, self.intensity_window)
            self._check_size(embedding.frame.image_size)
            prediction = self._segment(embedding, self._next_prompts())
            return self._result(begun, embedding, prediction, frame_id, timestamp)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """UsageError if another call of this tracker runs."""
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                "a tracker serves one thread at a time, and another call is running: drop the "
                "frame, or use a tracker for each thread"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _check_size(self, size: tuple[int, int] | None) -> None:
        if size is not None and size != self._size:
            assert self._size is not None
            (height, width), (first_height, first_width) = size, self._size
            raise ImageError(
                f"the frame is {width}×{height} pixels, expected {first_width}×{first_height} as "
                "the first: call start again with a prompt in this frame"
            )

    def _encode(self, frame: Image | ArrayLike, window: IntensityWindow) -> Embedding:
        return self.session.encode(frame, intensity_window=window)

    def _segment(self, embedding: Embedding, prompts: dict[str, Any]) -> Prediction:
        """The masks of one prompt set."""
        prediction = self.session.segment(embedding, threshold=self.options.threshold, **prompts)
        if (sets := prediction.masks.shape[0]) > 1:
            raise PromptError(
                f"the prompts are of {sets} structures, expected one: use a tracker for each"
            )
        return prediction

    def _next_prompts(self) -> dict[str, Any]:
        """The prompts of the next frame: the user's until there is a good mask."""
        if self._good is None:
            return self._prompts
        assert self._good.region.box is not None
        assert self._size is not None
        box = _grown(self._good.region.box, self.options.margin, 1 + self._lost_frames, self._size)
        if self.options.prompt == "box" or self._lost_frames:
            return {"box": box}  # after a lost frame, logits would hold the mask where it was
        return {"box": box, "mask": self._good.logits}

    def _result(
        self,
        begun: float,
        embedding: Embedding | None,
        prediction: Prediction | None,
        frame_id: Any,
        timestamp: Any,
    ) -> TrackedFrame:
        """Judge the mask of a frame, keep it if it is good, and report it."""
        if embedding is None or prediction is None:
            assert self._size is not None
            mask, region, score = np.zeros(self._size, np.bool_), Region(area=0, box=None), 0.0
        else:
            mask = np.asarray(prediction.masks[:1])[0, self._mask_index]
            region = prediction.regions[0][self._mask_index]
            score = float(prediction.scores[0, self._mask_index])
        lost = self._is_lost(mask, region, score)
        reacquired = self._lost_frames > 0 and not lost
        if not lost:
            assert prediction is not None
            logits = prediction.low_res_logits[0, self._logits_index]
            self._good = _GoodMask(mask=mask, region=region, logits=logits)
        self._lost_frames = self._lost_frames + 1 if lost else 0
        number, self._frames = self._frames, self._frames + 1
        latency_ms, deadline_ms = 1e3 * (perf_counter() - begun), self.options.deadline_ms
        return TrackedFrame(
            mask=mask,
            score=score,
            lost=lost,
            reacquired=reacquired,
            late=deadline_ms is not None and latency_ms > deadline_ms,
            frame_id=number if frame_id is None else frame_id,
            timestamp=timestamp,
            box=region.box,
            latency_ms=latency_ms,
            timings_ms=_timings(embedding, prediction),
            degraded=None if prediction is None else prediction.degraded,
        )

    def _is_lost(self, mask: Mask, region: Region, score: float) -> bool:
        """Whether a mask is empty, or breaks a limit."""
        if region.area == 0 or score < self.options.min_score:
            return True
        if self._good is None:
            return False
        change = region.area / self._good.region.area
        if max(change, 1 / change) > self.options.max_area_change:
            return True
        return _overlap(mask, region, self._good) < self.options.min_overlap


def _followed_mask(session: Session, class_name: str | None) -> tuple[int, int]:
    """The index of the mask to follow among a set's masks, and of its logits."""
    network, classes = session.manifest.network, session.classes
    if network.chunk > 1:
        raise UsageError(
            f"this network sees {network.chunk} neighbouring slices at a time and frames come one "
            "by one: a tracker needs a 2D network"
        )
    if session.conventions.prompts == "none":
        raise UsageError(
            "this network segments without prompts, so no mask can prompt the next frame: call "
            "segment for each frame"
        )
    if class_name is None and len(classes) > 1:
        raise UsageError(f"the network has the classes {', '.join(classes)}: give class_name")
    if class_name is not None and class_name not in classes:
        raise UsageError(f"unknown class {class_name!r}; there are: {', '.join(classes)}")
    index = 0 if class_name is None else classes.index(class_name)
    return index, index + (network.outputs == "labels")


def _frame_size(frame: Any) -> tuple[int, int] | None:
    """(H, W) of a frame; None if only `encode` can tell."""
    pixels = frame.pixels if isinstance(frame, Image) else frame
    shape: tuple[int, ...] = getattr(pixels, "shape", ())
    return (int(shape[0]), int(shape[1])) if len(shape) in (2, 3) else None


def _is_one_grey(frame: Any) -> bool:
    """Whether every pixel of a frame in host memory has one value; a frame on a GPU is not read."""
    pixels = frame.pixels if isinstance(frame, Image) else frame
    if not isinstance(pixels, np.ndarray) or pixels.ndim not in (2, 3) or pixels.size == 0:
        return False
    return bool(pixels.min() == pixels.max())


def _grown(box: tuple[int, int, int, int], margin: float, times: int, size: tuple[int, int]) -> Box:
    """A box with `times` margins on every side, within a frame of (H, W)."""
    x0, y0, x1, y1 = box
    reach = times * max(1.0, margin * max(x1 - x0, y1 - y0))
    height, width = size
    return max(0, x0 - reach), max(0, y0 - reach), min(width, x1 + reach), min(height, y1 + reach)


def _overlap(mask: Mask, region: Region, good: _GoodMask) -> float:
    """IoU of a mask with the last good one."""
    assert region.box is not None
    x0, y0, x1, y1 = region.box
    part = np.s_[y0:y1, x0:x1]  # outside of it the mask is empty
    shared = int(np.count_nonzero(mask[part] & good.mask[part]))
    return shared / (region.area + good.region.area - shared)


def _timings(embedding: Embedding | None, prediction: Prediction | None) -> dict[str, float]:
    if embedding is None or prediction is None:
        return {}
    return embedding.timings_ms | prediction.timings_ms
