"""Tracker: the mask of a frame prompts the next; lost and found again; late; one thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
from blob_backend import BlobBackend

from medsa_deploy import Image, Tracker, TrackerOptions
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.errors import ImageError, MedsaError, PromptError, UsageError
from medsa_deploy.runtime import Session
from medsa_deploy.transforms import preprocess

SIDE = 256
BOX = (56, 56, 104, 104)


@pytest.fixture
def blobs(bundle: Path) -> Callable[..., Session]:
    """Changed conventions → a session that segments bright squares of frames of its own size."""
    manifest = load_manifest(bundle)

    def make(**conventions: Any) -> Session:
        changed = replace(manifest.conventions, **({"point_order": "xy"} | conventions))
        manifest_of = replace(manifest, conventions=changed)
        return Session(manifest_of, BlobBackend(manifest_of))

    return make


def square(x: int, y: int, side: int = 40) -> np.ndarray:
    """A frame with a bright square, whose grey is not flat."""
    frame = np.full((SIDE, SIDE), 10, np.uint8)
    frame[y : y + side, x : x + side] = 220
    return frame


def followed(tracker: Tracker, places: list[tuple[int, ...]], box: Any = BOX) -> list[Any]:
    """Results for squares at these places."""
    first, *later = places
    results = [tracker.start(square(*first), box=box)]
    return results + [tracker.update(square(*place)) for place in later]


def centre(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.mean()), float(rows.mean())


def test_a_square_is_followed_beyond_its_first_box(blobs) -> None:
    tracker = Tracker(blobs(), TrackerOptions(margin=0.2))
    places = [(60 + 4 * k, 60 + 3 * k) for k in range(25)]
    results = followed(tracker, places)
    assert not any(result.lost or result.late or result.reacquired for result in results)
    assert [result.frame_id for result in results] == list(range(25))
    for (x, y), result in zip(places, results, strict=True):
        assert centre(result.mask) == pytest.approx((x + 19.5, y + 19.5), abs=3)
    last = results[-1]
    assert last.mask.shape == (SIDE, SIDE)
    assert last.mask.dtype == np.bool_
    assert last.score == pytest.approx(0.9)
    assert last.box is not None
    assert last.latency_ms > 0
    assert set(last.timings_ms) == {"preprocess", "encode", "decode", "postprocess"}


def test_the_box_of_a_mask_with_its_margin_prompts_the_next_frame(blobs) -> None:
    tracker = Tracker(blobs(), TrackerOptions(margin=0.25))
    first, _ = followed(tracker, [(60, 60), (60, 60)])
    x0, y0, x1, y1 = first.box
    coords, labels, mask = tracker.session.backend.prompts[1]
    reach = 0.25 * max(x1 - x0, y1 - y0)
    expected = [[x0 - reach, y0 - reach], [x1 + reach, y1 + reach]]
    np.testing.assert_allclose(coords[0][labels[0] >= 2], expected, atol=0.01)
    assert mask is None


def test_the_logits_prompt_the_next_frame_if_the_options_say_so(blobs) -> None:
    tracker = Tracker(blobs(), TrackerOptions(prompt="box+logits"))
    followed(tracker, [(60, 60), (60, 60), (61, 60)])
    masks = [mask for _, _, mask in tracker.session.backend.prompts]
    assert masks[0] is None
    for mask in masks[1:]:
        assert mask.shape == (1, 1, 64, 64)
        assert mask.max() > 0 > mask.min()


def test_frames_keep_their_names_and_times(blobs) -> None:
    tracker = Tracker(blobs())
    first = tracker.start(square(60, 60), box=BOX, frame_id="a", timestamp=1.5)
    second = tracker.update(square(61, 60), frame_id="b", timestamp=1.6)
    assert (first.frame_id, first.timestamp) == ("a", 1.5)
    assert (second.frame_id, second.timestamp) == ("b", 1.6)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (square(200, 200), "empty: the square is outside of the box"),
        (square(60, 60, 20), "a quarter of the area"),
        (np.full((SIDE, SIDE), 10, np.uint8), "one grey"),
    ],
)
def test_a_jump_is_lost_and_the_structure_is_found_again(blobs, frame, reason: str) -> None:
    tracker = Tracker(blobs(), TrackerOptions(margin=0.2))
    followed(tracker, [(60, 60), (62, 60)])
    lost = [tracker.update(frame) for _ in range(2)]
    assert [result.lost for result in lost] == [True, True], reason
    assert not lost[0].reacquired
    found_again = tracker.update(square(66, 60))
    assert (found_again.lost, found_again.reacquired) == (False, True)
    after = tracker.update(square(66, 60))
    assert (after.lost, after.reacquired) == (False, False)


def test_a_mask_that_overlaps_too_little_is_lost(blobs) -> None:
    tracker = Tracker(blobs(), TrackerOptions(margin=1.0, min_overlap=0.5))
    results = followed(tracker, [(60, 60), (80, 60)])  # IoU 1/3
    assert [result.lost for result in results] == [False, True]
    assert results[1].mask.any(), "the refused mask can be looked at"


def test_a_mask_of_a_low_score_is_lost(blobs) -> None:
    session = blobs()
    tracker = Tracker(session, TrackerOptions(min_score=0.5))
    followed(tracker, [(60, 60)])
    session.backend.score = 0.4
    assert tracker.update(square(60, 60)).lost


def test_the_search_grows_while_the_structure_is_lost(blobs) -> None:
    tracker = Tracker(blobs(), TrackerOptions(margin=0.25, min_overlap=0))
    followed(tracker, [(60, 60)])
    for _ in range(3):
        assert tracker.update(square(200, 200)).lost
    assert tracker.update(square(90, 60)).reacquired


def test_without_a_good_mask_the_users_prompts_go_on(blobs) -> None:
    tracker = Tracker(blobs())
    assert tracker.start(square(200, 200), box=BOX).lost
    assert tracker.update(square(200, 200)).lost
    result = tracker.update(square(60, 60))
    assert (result.lost, result.reacquired) == (False, True)


def test_points_start_a_tracker(blobs) -> None:
    tracker = Tracker(blobs())
    first = tracker.start(square(60, 60), points=[(70, 70), (5, 5)], labels=[1, 0])
    assert not first.lost
    assert not tracker.update(square(61, 61)).lost


def test_starting_again_forgets_the_earlier_frames(blobs) -> None:
    tracker = Tracker(blobs())
    followed(tracker, [(60, 60), (61, 60)])
    again = tracker.start(square(160, 160), box=(150, 150, 210, 210))
    assert (again.lost, again.frame_id) == (False, 0)
    small = np.full((100, 120), 10, np.uint8)
    small[20:60, 20:70] = 220
    assert tracker.start(small, box=(10, 10, 80, 70)).mask.shape == (100, 120)


def test_a_late_frame_says_so_and_loses_nothing(blobs, monkeypatch) -> None:
    session = blobs()
    tracker = Tracker(session, TrackerOptions(deadline_ms=60_000))
    assert not tracker.start(square(60, 60), box=BOX).late
    tracker = Tracker(session, TrackerOptions(deadline_ms=20))
    encode = session.backend.encode

    def slow(image: np.ndarray) -> np.ndarray:
        time.sleep(0.03)
        return encode(image)

    monkeypatch.setattr(session.backend, "encode", slow)
    results = followed(tracker, [(60, 60), (61, 60)])
    assert [(result.late, result.lost) for result in results] == [(True, False)] * 2
    assert results[1].latency_ms > 30
    assert centre(results[1].mask)[0] > centre(results[0].mask)[0] - 1


def test_a_second_thread_is_refused_and_nothing_waits(blobs, monkeypatch) -> None:
    session = blobs()
    tracker = Tracker(session)
    tracker.start(square(60, 60), box=BOX)
    inside, done = Barrier(2), Barrier(2)
    encode = session.backend.encode

    def held_up(image: np.ndarray) -> np.ndarray:
        inside.wait(60)
        done.wait(60)
        return encode(image)

    monkeypatch.setattr(session.backend, "encode", held_up)
    results: list[Any] = []
    thread = Thread(target=lambda: results.append(tracker.update(square(61, 60), frame_id="slow")))
    thread.start()
    inside.wait(60)
    with pytest.raises(UsageError, match="serves one thread at a time"):
        tracker.update(square(62, 60))
    done.wait(60)
    thread.join()
    assert results[0].frame_id == "slow"


def test_the_window_of_the_first_frame_is_that_of_all(blobs) -> None:
    tracker = Tracker(blobs(preprocess="medsa", intensity_window=None))
    frame = square(60, 60).astype(np.uint16) * 4
    tracker.start(frame, box=BOX)
    assert tracker.intensity_window == (40.0, 880.0)
    dimmer = frame // 2
    assert not tracker.update(dimmer).lost
    assert tracker.intensity_window == (40.0, 880.0)


REFUSED = [
    (
        UsageError,
        "call start with a click or box",
        lambda t: Tracker(t.session).update(square(1, 1)),
    ),
    (
        ImageError,
        "64×48 pixels, expected 256×256",
        lambda t: t.update(np.eye(48, 64, dtype=np.uint8)),
    ),
    (ImageError, "NaN", lambda t: t.update(np.full((SIDE, SIDE), np.nan))),
    (ImageError, "expected .H, W.", lambda t: t.update(np.zeros((2, 2, 2, 2)))),
    (PromptError, "prompts are of 2 structures", lambda t: t.start(square(1, 1), box=[BOX, BOX])),
    (PromptError, "empty", lambda t: t.start(square(1, 1))),
    (ImageError, "every pixel is 0", lambda t: t.start(np.zeros((SIDE, SIDE), np.uint8), box=BOX)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_a_refused_call_leaves_the_tracker_as_it_was(
    blobs, error: type[MedsaError], message: str, call: Callable[[Tracker], object]
) -> None:
    tracker = Tracker(blobs())
    followed(tracker, [(60, 60), (61, 60)])
    with pytest.raises(error, match=message):
        call(tracker)
    result = tracker.update(square(62, 60))
    assert (result.lost, result.reacquired, result.frame_id) == (False, False, 2)


def test_a_frame_with_its_path_is_taken(blobs) -> None:
    tracker = Tracker(blobs())
    frame = Image(pixels=square(60, 60), path=Path("frame.png"))
    tracker.start(frame, box=BOX)
    assert not tracker.update(frame).lost


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -1}, "margin -1"),
        ({"margin": float("nan")}, "margin nan"),
        ({"max_area_change": 0.5}, "max_area_change 0.5"),
        ({"min_overlap": 2}, "min_overlap 2"),
        ({"min_score": -0.1}, "min_score -0.1"),
        ({"deadline_ms": 0}, "deadline_ms 0"),
        ({"prompt": "logits"}, "unknown prompt 'logits'"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrackerOptions(**options)


def test_networks_that_cannot_be_followed(blobs, bundle_3d: Path, two_classes) -> None:
    manifest = load_manifest(bundle_3d)
    with pytest.raises(UsageError, match="a tracker needs a 2D network"):
        Tracker(Session(manifest, BlobBackend(manifest)))
    with pytest.raises(UsageError, match="segments without prompts"):
        Tracker(blobs(prompts="none"))
    with pytest.raises(UsageError, match="give class_name"):
        Tracker(two_classes)
    with pytest.raises(UsageError, match="unknown class 'x'"):
        Tracker(two_classes, TrackerOptions(class_name="x"))


def test_a_class_of_several_is_followed(two_classes) -> None:
    name = two_classes.classes[1]
    tracker = Tracker(two_classes, TrackerOptions(class_name=name))
    result = tracker.start(square(60, 60), box=BOX)
    masks = two_classes.segment(two_classes.encode(square(60, 60)), box=BOX).masks
    np.testing.assert_array_equal(result.mask, masks[0, 1])


class DeviceFrame:
    """A frame that says it is on a GPU."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.shape = pixels, pixels.shape
        self.__cuda_array_interface__ = {"typestr": "|u1", "shape": pixels.shape}


class FrameBlobs(BlobBackend):
    """Takes frames on a GPU."""

    def encode_frame(self, frame: Any, conventions: Any, window: Any) -> Any:
        """The embedding, and the place of the frame in the network's."""
        image, placement = preprocess(frame.pixels, conventions.preprocess, SIDE)
        return self.encode(image[None]), placement


def test_frames_on_a_gpu_pass_through(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    manifest = replace(manifest, conventions=replace(manifest.conventions, point_order="xy"))
    tracker = Tracker(Session(manifest, FrameBlobs(manifest)))
    first = tracker.start(DeviceFrame(square(60, 60)), box=BOX)
    second = tracker.update(DeviceFrame(square(61, 60)))
    assert (first.lost, second.lost) == (False, False)
    with pytest.raises(ImageError, match="64×48 pixels"):
        tracker.update(DeviceFrame(np.eye(48, 64, dtype=np.uint8)))
