"""segment_volume against a slow formulation, written out: chunks, scopes, overlaps, propagation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_network import bright_pixels
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medsa_deploy import load, transforms
from medsa_deploy.errors import ImageError, PromptError, UsageError
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.images import Volume, read_volume
from medsa_deploy.images.npy import ArraySlices
from medsa_deploy.images.volume import VolumeBox
from medsa_deploy.runtime import Session, Structure, VolumeOptions, VolumePrediction, segment_volume
from medsa_deploy.runtime.volumes import segment
from medsa_deploy.runtime.volumes.chunk_encoder import ChunkEncoder

ROWS, COLUMNS = 12, 20
EVERYTHING: VolumeBox = (0, 0, 0, 99, ROWS, COLUMNS)


def volume_of(array: np.ndarray) -> Volume:
    """(N, H, W) as N slices; a point (x, y, z) is at slice x, row y, column z."""
    path = Path("array.npy")
    n, h, w = array.shape
    return Volume(
        path=path,
        kind="npy",
        files=(path,),
        shape=(n, h, w),
        axis=0,
        plane_axes=(1, 2),
        spacing_mm=(1, 1, 1),
        affine=None,
        dtype=array.dtype,
        slices=ArraySlices(path=path, array=array, axis=0),
    )


def bright(n: int, *boxes: VolumeBox, value: int = 255) -> np.ndarray:
    """(n, ROWS, COLUMNS) uint8 with bright boxes."""
    array = np.zeros((n, ROWS, COLUMNS), np.uint8)
    for x0, y0, z0, x1, y1, z1 in boxes:
        array[x0:x1, y0:y1, z0:z1] = value
    return array


def boxed(*box: float, **others: Any) -> Structure:
    """A structure of one box."""
    return Structure(boxes=(tuple(box),), **others)  # type: ignore[arg-type]


def clicked(*points: tuple[float, float, float], labels: Sequence[int] = (), **others: Any):
    return Structure(points=points, labels=tuple(labels) or (1,) * len(points), **others)


class Direct:
    """The slow formulation: every chunk is encoded, every set decoded alone, logits averaged."""

    def __init__(self, session: Session, volume: Volume, overlap: int) -> None:
        self.session, self.volume, self.count = session, volume, len(volume)
        self.size = session.manifest.network.chunk
        self.starts = [0]
        while self.starts[-1] + self.size < self.count:
            self.starts.append(self.starts[-1] + self.size - overlap)
        self.embeddings = {
            start: session.encode_slices(
                [volume.slice(min(start + i, self.count - 1)) for i in range(self.size)]
            )
            for start in self.starts
        }

    def prompted(self, structure: Structure) -> dict[int, np.ndarray]:
        """Slice → logits (K, 4g, 4g) where the structure's prompts ask for them."""
        found: dict[int, list[tuple[float, np.ndarray]]] = {}
        for start in self.starts:
            chunk = range(start, min(start + self.size, self.count))
            own = {i: one for i in chunk if (one := self.on_slice(structure, i))}
            if not own:
                continue
            sets: dict[int, list[Any]] = {i: [one] for i, one in own.items()}
            if self.session.conventions.prompt_scope == "chunk" and self.size > 1:
                whole = list(own.values())
                sets = {i: whole for i in (own if structure.boxes else chunk)}
            for i, parts in sets.items():
                found.setdefault(i, []).append(self.weighed(start, i, parts))
        return {i: mean(parts) for i, parts in found.items()}

    def on_slice(self, structure: Structure, index: int) -> dict[str, Any] | None:
        """Points with labels, and the box, on one slice."""
        points = [
            ((x, y), label)
            for (at, y, x), label in zip(structure.points, structure.labels, strict=True)
            if at == index
        ]
        boxes = [(z0, y0, z1, y1) for a, y0, z0, b, y1, z1 in structure.boxes if a <= index < b]
        return {"points": points, "boxes": boxes} if points or boxes else None

    def weighed(self, start: int, index: int, parts: list[Any]) -> tuple[float, np.ndarray]:
        """A chunk's weight in a slice, and the logits it gives for all the parts as one set."""
        position = index - start
        points = [point for part in parts for point in part["points"]]
        boxes = np.array([box for part in parts for box in part["boxes"]]).reshape(-1, 4)
        around = [*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0)] if len(boxes) else None
        prediction = self.session.segment(
            self.embeddings[start][position],
            points=[xy for xy, _ in points] or None,
            labels=[label for _, label in points] or None,
            box=around,
        )
        weight = 1 + min(position, self.size - 1 - position)
        return weight, prediction.low_res_logits[0]

    def followed(
        self, prompted: dict[int, np.ndarray], channels: list[int], cut: float, margin: float
    ) -> dict[int, np.ndarray]:
        """Slices beyond the prompted ones; the mean where both directions reach."""
        ways = []
        for step in (1, -1):
            reached = {}
            for first in prompted:
                index, logits = first + step, prompted[first]
                while 0 <= index < self.count and index not in prompted:
                    around = self.box(logits[channels], cut, margin)
                    if around is None:
                        break
                    part = {"points": [], "boxes": [around]}
                    holding = [s for s in self.starts if s <= index < s + self.size]
                    logits = mean([self.weighed(start, index, [part]) for start in holding])
                    reached[index] = logits
                    index += step
            ways.append(reached)
        both = ways[0].keys() | ways[1].keys()
        return {i: np.mean([way[i] for way in ways if i in way], axis=0) for i in both}

    def box(self, logits: np.ndarray, cut: float, margin: float) -> list[float] | None:
        frame = self.embeddings[0][0].frame
        pixels = transforms.pixel_values(logits.astype(np.float32), frame, "sam")
        where = np.argwhere((pixels > cut).any(axis=0))
        if not len(where):
            return None
        (top, left), (bottom, right) = where.min(axis=0), where.max(axis=0) + 1
        height, width = self.volume.slice_size
        return [
            max(left - margin, 0),
            max(top - margin, 0),
            min(right + margin, width),
            min(bottom + margin, height),
        ]

    def full(self, logits: np.ndarray) -> np.ndarray:
        """SAM's postprocessing in float64."""
        frame = self.embeddings[0][0].frame
        height, width = frame.content_size
        planes = torch.from_numpy(logits)[None].double()
        planes = F.interpolate(planes, (frame.network_size,) * 2, mode="bilinear")
        planes = F.interpolate(planes[..., :height, :width], frame.image_size, mode="bilinear")
        return planes[0].numpy()


def mean(parts: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """In float64, where means of different values are not equal by chance."""
    return sum(w * logits.astype(np.float64) for w, logits in parts) / sum(w for w, _ in parts)


def assert_direct(
    session: Session,
    array: np.ndarray,
    structures: Sequence[Structure],
    options: VolumeOptions,
    channels: Sequence[dict[int, int]],
) -> VolumePrediction:
    """`segment_volume` agrees with `Direct` wherever no two logits are equal up to rounding.

    `channels`: for each structure, mask of the decoder → label.
    """
    volume = volume_of(array)
    found = segment_volume(session, volume, structures, options)
    direct = Direct(session, volume, options.overlap)
    threshold = session.conventions.threshold if options.threshold is None else options.threshold
    cut = transforms.probability_to_logit(threshold)
    margin = 3.0 if options.margin is None else options.margin
    highest = np.full((256, *array.shape), -np.inf)
    highest[0] = cut
    slices = set()
    for structure, masks in zip(structures, channels, strict=True):
        logits = direct.prompted(structure)
        if options.propagate:
            logits |= direct.followed(logits, list(masks), cut, margin)
        slices |= logits.keys()
        for index, of_slice in logits.items():
            for mask, label in masks.items():
                here = direct.full(of_slice[[mask]])[0]
                highest[label, index] = np.maximum(highest[label, index], here)
    assert found.slices == tuple(sorted(slices))
    second, first = np.sort(highest, axis=0)[-2:]
    clear = first - second > 1e-5
    # equal logits of two labels, above the threshold: the lower label wins
    tied = (second == first) & (first > cut)
    expected = highest.argmax(axis=0)
    assert clear.mean() > 0.9 or tied.any()
    np.testing.assert_array_equal(found.labels[clear | tied], expected[clear | tied])
    return found


@st.composite
def structures(draw: st.DrawFn, count: int) -> Structure:
    """Points on any slices, each slice with a foreground one, or a box, or both."""
    whole = [st.integers(0, n - 1) for n in (count, ROWS, COLUMNS)]
    points = draw(st.lists(st.tuples(*whole), max_size=3))
    more = [(x, ROWS - 1 - y, COLUMNS - 1 - z) for x, y, z in points if draw(st.booleans())]
    boxes = []
    if not points or draw(st.booleans()):
        low = draw(st.tuples(*whole))
        ends = zip(low, (count, ROWS, COLUMNS), strict=True)
        high = [draw(st.integers(a + 1, n)) for a, n in ends]
        boxes = [(*low, *high)]
    return Structure(
        points=(*points, *more),
        labels=(1,) * len(points) + (0,) * len(more),
        boxes=tuple(boxes),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_prompts_give_what_the_slow_formulation_gives(data: st.DataObject) -> None:
    chunk = data.draw(st.integers(1, 4), "chunk")
    count = data.draw(st.integers(max(2, chunk), 9), "slices")
    classes = data.draw(st.integers(1, 3), "classes")
    given = data.draw(st.lists(structures(count), min_size=1, max_size=3))
    seed = data.draw(st.integers(0, 99), "seed")
    array = np.random.default_rng(seed).integers(0, 256, (count, ROWS, COLUMNS), np.uint8)
    session = bright_pixels(
        chunk=chunk,
        classes=classes,
        clicks=0.3,
        context=0.4,
        prompt_scope=data.draw(st.sampled_from(["chunk", "slice"])),
    )
    propagate = data.draw(st.booleans(), "propagate")
    options = VolumeOptions(
        overlap=data.draw(st.integers(0, chunk - 1), "overlap"),
        propagate=propagate,
        margin=data.draw(st.sampled_from([0, 1, 5.5])) if propagate else None,
        threshold=data.draw(st.sampled_from([None, 0.55])),
    )
    if classes == 1:
        channels = [{0: i + 1} for i in range(len(given))]
    else:
        channels = [{k: k + 1 for k in range(classes)}] * len(given)
    assert_direct(session, array, given, options, channels)


@pytest.mark.parametrize("seed", [0, 4, 12])
def test_means_that_round_alike_are_no_ties(seed: int) -> None:
    """In float32 some voxels' means over two and three chunks are equal, in one order of adding."""
    array = np.random.default_rng(seed).integers(0, 256, (6, ROWS, COLUMNS), np.uint8)
    session = bright_pixels(chunk=3, clicks=0.3, context=0.4, prompt_scope="chunk")
    options = VolumeOptions(overlap=2, propagate=True, margin=0)
    points = (0, 0, 0), (3, 0, 0)
    assert_direct(session, array, [clicked(points[0]), clicked(*points)], options, [{0: 1}, {0: 2}])


@pytest.fixture(scope="module")
def session_3d(bundle_3d: Path) -> Iterator[Session]:
    with load(bundle_3d, threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def real_array() -> np.ndarray:
    """(10, 100, 120) uint8: two and a half chunks that differ."""
    return np.stack([seeded_image(120, [7, i])[:100, :, 0] for i in range(10)])


REAL = (
    Structure(points=((1, 30, 40), (2, 60, 70)), labels=(1, 1)),
    Structure(points=((8, 50, 50),), labels=(1,), boxes=((3, 10, 20, 9, 80, 110),)),
)


@pytest.mark.parametrize(
    ("scope", "options"),
    [
        ("chunk", {}),
        ("slice", {"threshold": 0.6}),
        ("chunk", {"overlap": 2}),
        ("slice", {"overlap": 3, "propagate": True}),
        ("chunk", {"propagate": True, "margin": 0}),
    ],
)
def test_a_real_network_in_chunks(session_3d, real_array, scope: str, options: Any) -> None:
    manifest = session_3d.manifest
    conventions = replace(manifest.conventions, prompt_scope=scope, class_names=("a", "b"))
    session = Session(replace(manifest, conventions=conventions), session_3d.backend)
    given = (REAL[0], replace(REAL[1], class_name="b"))
    found = assert_direct(
        session, real_array, given, VolumeOptions(**options), [{0: 1, 1: 2}, {1: 2}]
    )
    assert found.names == ("a", "b")
    assert len(np.unique(found.labels)) > 1


def test_a_real_2d_network_is_followed(bundle: Path, real_array) -> None:
    with load(bundle, threads=2) as session:
        # its two forms round differently, and a box that moves by a pixel moves what follows
        session.backend.splits = False
        given = [clicked((2, 30, 40), name="a"), boxed(4, 10, 20, 5, 80, 110, name="b")]
        options = VolumeOptions(propagate=True, threshold=0.4)
        found = assert_direct(session, real_array[:6], given, options, [{0: 1}, {0: 2}])
    assert found.names == ("a", "b")


# Chunks


@settings(max_examples=200)
@given(st.integers(1, 12), st.integers(0, 11), st.integers(1, 60))
def test_chunks_cover_every_slice_and_none_is_superfluous(size: int, overlap: int, n: int) -> None:
    assume(overlap < size <= n)
    volume = volume_of(np.zeros((n, ROWS, COLUMNS), np.uint8))
    encoder = ChunkEncoder(bright_pixels(chunk=size), volume, overlap=overlap)
    starts = encoder.starts
    assert starts[0] == 0
    assert {b - a for a, b in pairwise(starts)} <= {size - overlap}
    assert set().union(*map(encoder.slices, starts)) == set(range(n))
    assert encoder.slices(starts[-1]) - set().union(*map(encoder.slices, starts[:-1]))
    for index in range(n):
        holding = list(encoder.holding(index))
        assert holding == [s for s in starts if index in encoder.slices(s)]
        assert all(encoder.weight(start, index) > 0 for start in holding)


def test_the_last_chunk_is_completed_by_its_last_slice() -> None:
    session = bright_pixels(chunk=4)
    array = bright(6, (5, 0, 0, 6, ROWS, COLUMNS))
    found = segment_volume(session, volume_of(array), [boxed(0, 0, 0, 6, ROWS, COLUMNS)])
    np.testing.assert_array_equal(found.labels, array > 0)
    first, second = session.backend.encoded  # type: ignore[attr-defined]
    assert first.max() == 0
    np.testing.assert_array_equal(second.min(axis=(1, 2)), [0, 1, 1, 1])


def test_only_chunks_that_are_prompted_are_encoded() -> None:
    session, told = bright_pixels(chunk=3), []
    array = bright(12, EVERYTHING)
    found = segment_volume(
        session,
        volume_of(array),
        [clicked((4, 5, 5)), boxed(10, 0, 0, 11, 2, 2)],
        on_slice=lambda *now: told.append(now),
    )
    assert len(session.backend.encoded) == 2  # type: ignore[attr-defined]
    assert told == [(3, 6), (6, 6)]
    assert found.slices == (3, 4, 5, 10)


def test_a_chunk_is_encoded_once_however_many_ask_for_it() -> None:
    session = bright_pixels(chunk=4)
    many = [boxed(0, 0, 0, 8, 3 + i, 5) for i in range(9)]
    options = VolumeOptions(propagate=True)
    segment_volume(session, volume_of(bright(8, EVERYTHING)), many, options)
    assert len(session.backend.encoded) == 2  # type: ignore[attr-defined]


def test_a_chunk_has_the_prompts_of_all_its_slices() -> None:
    given = clicked((0, 1, 2), (3, 4, 5), (4, 6, 7), labels=(1, 0, 1))
    sets = {}
    for scope, order in (("chunk", "xy"), ("slice", "xy"), ("chunk", "yx")):
        session = bright_pixels(chunk=4, prompt_scope=scope, point_order=order)
        if scope == "slice":
            given = replace(given, labels=(1, 1, 1))
        segment_volume(session, volume_of(bright(8, EVERYTHING)), [given])
        sets[scope, order] = session.backend.prompts  # type: ignore[attr-defined]
    x, y = 3, 5  # network pixels in a voxel
    both = [[2 * x, 1 * y], [5 * x, 4 * y], [0, 0]]
    assert [coords.tolist() for coords, _ in sets["chunk", "xy"][:4]] == [both] * 4
    assert [labels.tolist() for _, labels in sets["chunk", "xy"][:4]] == [[1, 0, -1]] * 4
    assert [coords.tolist() for coords, _ in sets["chunk", "xy"][4:]] == [[[21, 30], [0, 0]]] * 4
    alone = [[[6, 5], [0, 0]], [[15, 20], [0, 0]], [[21, 30], [0, 0]]]
    assert [coords.tolist() for coords, _ in sets["slice", "xy"]] == alone
    assert sets["chunk", "yx"][0][0].tolist() == [[y, 2 * x], [4 * y, 5 * x], [0, 0]]


def test_boxes_of_a_chunk_become_one_around_them() -> None:
    session = bright_pixels(chunk=4)
    given = Structure(boxes=((0, 1, 2, 1, 3, 4), (2, 2, 1, 3, 6, 3)))
    found = segment_volume(session, volume_of(bright(4, EVERYTHING)), [given])
    assert found.slices == (0, 2)
    for coords, labels in session.backend.prompts:  # type: ignore[attr-defined]
        assert (coords.tolist(), labels.tolist()) == ([[3, 5], [12, 30]], [2, 3])
    np.testing.assert_array_equal(
        found.labels, bright(4, (0, 1, 1, 1, 6, 4), (2, 1, 1, 3, 6, 4), value=1)
    )


# Labels


def test_of_two_structures_the_higher_logit_wins() -> None:
    session = bright_pixels(clicks=0.3)
    given = [
        clicked((0, 5, 3), name="left"),
        clicked((0, 5, 16), name="right"),
        clicked((0, 9, 3), name="left"),
    ]
    found = segment_volume(session, volume_of(bright(2, EVERYTHING)), given)
    assert found.names == ("left", "right")
    assert (found.labels[0, 4:, :9] == 1).all()
    assert (found.labels[0, 4:7, 11:] == 2).all()
    assert not found.labels[1].any()


def test_of_equal_logits_the_lower_label_wins_in_any_order() -> None:
    array = bright(5, EVERYTHING)
    given = [boxed(4, 0, 0, 5, 9, 20, name="a"), boxed(0, 3, 0, 1, 12, 20, name="b")]
    options = VolumeOptions(propagate=True, margin=0)
    for ordered in (given, given[::-1]):
        found = segment_volume(bright_pixels(), volume_of(array), ordered, options)
        assert found.names == tuple(one.name for one in ordered)
        first = found.names.index("a") + 1
        lower = 1 if first == 1 else 2  # rows where only a, both, only b reach
        assert (found.labels[:, :3] == first).all()
        assert (found.labels[:, 3:9] == 1).all()
        assert (found.labels[:, 9:] == 3 - first).all()
        assert lower == first


def test_classes_of_one_network_and_of_one_structure() -> None:
    array = bright(2, EVERYTHING, value=100)
    array[:, :, 10:] = 200
    session = bright_pixels(classes=2, names=("dim", "bright"))
    every = segment_volume(session, volume_of(array), [boxed(0, 0, 0, 1, 12, 20)])
    assert every.names == ("dim", "bright")
    np.testing.assert_array_equal(every.labels, (array // 100) * np.array([1, 0])[:, None, None])
    one = boxed(0, 0, 0, 2, 12, 20, class_name="bright")
    found = segment_volume(session, volume_of(array), [one])
    np.testing.assert_array_equal(found.labels, (array == 200) * 2)
    with pytest.raises(PromptError, match="no class 'dull'; it has: dim, bright"):
        segment_volume(session, volume_of(array), [replace(one, class_name="dull")])
    with pytest.raises(PromptError, match="called 'x', but this network's masks are its classes"):
        segment_volume(session, volume_of(array), [replace(one, class_name=None, name="x")])
    unnamed = segment_volume(
        bright_pixels(classes=2), volume_of(array), [replace(one, class_name="class 2")]
    )
    assert unnamed.names == ("class 1", "class 2")
    np.testing.assert_array_equal(unnamed.labels, found.labels)


@pytest.mark.parametrize(
    ("given", "names", "expected"),
    [
        (["a", None, "a", None], (), ("a", "structure 2", "structure 4")),
        ([None], (), ("mask",)),
        ([None], ("liver",), ("liver",)),
        (["lesion"], ("liver",), ("lesion",)),
    ],
)
def test_names_of_labels(given: list[str | None], names: Any, expected: tuple[str, ...]) -> None:
    session = bright_pixels(names=names)
    several = [boxed(0, 0, 0, 1, 2, 2, name=name) for name in given]
    assert segment_volume(session, volume_of(bright(2, EVERYTHING)), several).names == expected


def test_the_lone_class_may_be_named() -> None:
    session, volume = bright_pixels(names=("liver",)), volume_of(bright(2, EVERYTHING))
    one = boxed(0, 0, 0, 1, 2, 2, class_name="liver")
    assert segment_volume(session, volume, [one]).names == ("liver",)
    with pytest.raises(PromptError, match="'spleen' was asked for, but this network has one class"):
        segment_volume(session, volume, [replace(one, class_name="spleen")])


def test_more_classes_than_labels_are_refused() -> None:
    with bright_pixels(classes=256) as session, pytest.raises(PromptError, match="256 classes"):
        segment_volume(session, volume_of(bright(2, EVERYTHING)), [boxed(*EVERYTHING)])


def test_labels_end_at_255() -> None:
    volume = volume_of(bright(2, EVERYTHING))
    many = [boxed(0, 0, 0, 1, 12, 1 + i % 20) for i in range(255)]
    found = segment_volume(bright_pixels(), volume, many)
    assert len(found.names) == 255
    assert set(np.unique(found.labels[0])) == set(range(1, 21))
    with pytest.raises(PromptError, match=r"256 structures .* a label map holds 255"):
        segment_volume(bright_pixels(), volume, [*many, many[0]])


# Following masks


def test_a_mask_is_followed_until_it_is_empty() -> None:
    array = bright(12, (3, 4, 5, 8, 9, 11), (9, 4, 5, 11, 9, 11))
    session = bright_pixels()
    given = [boxed(5, 0, 0, 6, 12, 20)]
    found = segment_volume(session, volume_of(array), given, VolumeOptions(propagate=True))
    assert found.slices == (2, 3, 4, 5, 6, 7, 8)  # 2 and 8 are empty, and end it
    array[9:] = 0
    np.testing.assert_array_equal(found.labels, array > 0)
    assert len(session.backend.encoded) == 7  # type: ignore[attr-defined]
    boxes = {tuple(coords.ravel()) for coords, _ in session.backend.prompts}  # type: ignore[attr-defined]
    assert boxes == {(0, 0, 60, 60), (6, 5, 42, 60)}  # x (5−3…11+3)·3, y (4−3…9+3)·5


def test_an_empty_mask_is_not_followed() -> None:
    array = bright(5, (0, 0, 0, 1, 12, 20))
    given = [boxed(2, 0, 0, 3, 12, 20)]
    found = segment_volume(bright_pixels(), volume_of(array), given, VolumeOptions(propagate=True))
    assert found.slices == (2,)
    assert not found.labels.any()


@pytest.mark.parametrize("margin", [0, 2.5, 1000])
def test_margins_end_at_the_border(margin: float) -> None:
    array = bright(3, (0, 0, 18, 3, 2, 20))
    session = bright_pixels()
    given = [boxed(0, 0, 16, 1, 4, 20)]
    options = VolumeOptions(propagate=True, margin=margin)
    found = segment_volume(session, volume_of(array), given, options)
    np.testing.assert_array_equal(found.labels, array > 0)
    (x0, y0), (x1, y1) = session.backend.prompts[-1][0]  # type: ignore[attr-defined]
    assert (x0, y0, x1, y1) == (max(0, 18 - margin) * 3, 0, 60, min(12, 2 + margin) * 5)


def test_between_two_prompts_both_directions_count_alike() -> None:
    """From below only the left half is seen, from above the right: the mean holds what both do."""
    array = bright(5, EVERYTHING)
    given = [Structure(boxes=((0, 0, 0, 1, 12, 14), (4, 0, 8, 5, 12, 20)))]
    options = VolumeOptions(propagate=True, margin=0)
    found = segment_volume(bright_pixels(), volume_of(array), given, options)
    np.testing.assert_array_equal(found.labels[0], array[0] * ([1] * 14 + [0] * 6) // 255)
    np.testing.assert_array_equal(found.labels[4], array[0] * ([0] * 8 + [1] * 12) // 255)
    for middle in found.labels[1:4]:
        np.testing.assert_array_equal(middle, array[0] * ([0] * 8 + [1] * 6 + [0] * 6) // 255)


@pytest.mark.parametrize("kept", [0, 40_000, 2**30])
def test_few_structures_are_followed_at_a_time(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """However many logits between prompts may be kept, the labels are the same."""
    boxes: list[VolumeBox] = [(0, 1, 2, 9, 5, 9), (1, 6, 3, 8, 11, 12), (2, 2, 10, 9, 9, 18)]
    volume = volume_of(bright(9, *boxes))
    structures = [
        Structure(boxes=((x0, y0, z0, x0 + 1, y1, z1), (x1 - 1, y0, z0, x1, y1, z1)))
        for x0, y0, z0, x1, y1, z1 in boxes
    ]
    options = VolumeOptions(propagate=True, margin=1)
    wanted = segment_volume(bright_pixels(), volume, structures, options)
    assert len(np.unique(wanted.labels)) == 4
    monkeypatch.setattr(segment, "KEPT_BYTES", kept)
    groups = []
    follow = segment._Run._follow
    monkeypatch.setattr(
        segment._Run, "_follow", lambda run, some, margin: groups.append(follow(run, some, margin))
    )
    found = segment_volume(bright_pixels(), volume, structures, options)
    np.testing.assert_array_equal(found.labels, wanted.labels)
    assert len(groups) == {0: 3, 40_000: 3}.get(kept, 1)


def test_background_clicks_go_to_the_chunk_that_has_the_foreground() -> None:
    volume = volume_of(bright(12, (0, 2, 2, 12, 9, 9)))
    structure = clicked((3, 5, 5), (5, 1, 15), labels=(1, 0))
    with bright_pixels(chunk=8, prompt_scope="chunk") as session:
        found = segment_volume(session, volume, [structure], VolumeOptions(overlap=4))
    assert found.slices == tuple(range(8))
    alone = clicked((3, 5, 5), (9, 1, 15), labels=(1, 0))
    with bright_pixels(chunk=8, prompt_scope="chunk") as session:
        with pytest.raises(PromptError, match="chunk of slices 8…11 has background clicks only"):
            segment_volume(session, volume, [alone], VolumeOptions())


def test_structures_are_followed_by_themselves() -> None:
    array = bright(9, (0, 0, 0, 5, 4, 4), (2, 8, 10, 9, 12, 20))
    given = [boxed(3, 0, 0, 4, 6, 6), boxed(7, 6, 8, 8, 12, 20)]
    session = bright_pixels(chunk=2)
    found = segment_volume(session, volume_of(array), given, VolumeOptions(propagate=True))
    expected = (array > 0).astype(np.uint8)
    expected[:, 6:] *= 2
    np.testing.assert_array_equal(found.labels, expected)


# Refusals


@pytest.mark.parametrize(
    ("given", "options", "error", "match"),
    [
        ([], {}, PromptError, "no structure to segment"),
        ([Structure()], {}, PromptError, "has no prompt"),
        ([clicked((0, 1, 1), labels=(0,))], {}, PromptError, "0…3 has background clicks only"),
        ([clicked((9, 1, 1))], {}, PromptError, r"\(9, 1, 1\) lies outside the volume: x 0…5"),
        ([boxed(0, 0, 0, 7, 1, 1)], {}, PromptError, "lies outside the volume"),
        ([clicked((0.5, 1, 1))], {}, PromptError, "between two slices: give a whole x, 0…5"),
        ([Structure(boxes=((0, 0, 0, 3, 2, 2), (2, 0, 0, 4, 2, 2)))], {}, PromptError, "slice 2"),
        (None, {"overlap": 4}, UsageError, "4 slices does not fit chunks of 4: 0…3 does"),
        (None, {"overlap": -1}, UsageError, "does not fit"),
        (None, {"propagate": True, "margin": -1}, UsageError, "a margin of -1 pixels"),
        (None, {"propagate": True, "margin": float("nan")}, UsageError, "a margin of nan pixels"),
        (None, {"propagate": True, "margin": float("inf")}, UsageError, "a margin of inf pixels"),
        (None, {"margin": 2}, UsageError, "add --propagate"),
        (None, {"threshold": 0}, UsageError, "not a probability"),
        (None, {"intensity_window": (300, 400)}, ImageError, "0…255 lie outside the intensity wi"),
    ],
)  # fmt: skip
def test_what_cannot_be_segmented(given, options, error: type[Exception], match: str) -> None:
    session = bright_pixels(chunk=4)
    volume = volume_of(bright(6, (1, 1, 1, 3, 3, 3)))
    given = [clicked((0, 1, 1))] if given is None else given
    with pytest.raises(error, match=match):
        segment_volume(session, volume, given, VolumeOptions(**options))
    assert session.backend.encoded == []  # type: ignore[attr-defined]


def test_an_overlap_without_chunks_is_refused() -> None:
    with pytest.raises(UsageError, match="1 slices was given, but this network sees each slice al"):
        segment_volume(
            bright_pixels(), volume_of(bright(3)), [clicked((0, 1, 1))], VolumeOptions(overlap=1)
        )


def test_a_volume_of_fewer_slices_than_a_chunk_is_refused() -> None:
    with pytest.raises(ImageError, match="has 3 slices along axis 0; this network sees 4 at"):
        segment_volume(bright_pixels(chunk=4), volume_of(bright(3)), [clicked((0, 1, 1))])


# Intensities


def test_one_window_for_all_slices(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stretched slice by slice, a slice of air would be as bright as bone."""
    array = bright(4, (0, 2, 2, 2, 8, 8)).astype(np.int16) * 4
    array[2:, 2:8, 2:8] = 100
    np.save(tmp_path / "v.npy", array)
    volume = read_volume(tmp_path / "v.npy")
    given = [boxed(0, 0, 0, 4, ROWS, COLUMNS)]
    found = segment_volume(bright_pixels(), volume, given)
    np.testing.assert_array_equal(found.labels, array > 510)
    assert found.intensity_window == (0, 1020)
    assert [r.message.count("stretched from 0…1020") for r in caplog.records] == [1]
    low = segment_volume(bright_pixels(intensity_window=(0, 100)), volume, given, VolumeOptions())
    np.testing.assert_array_equal(low.labels, array > 50)
    assert low.intensity_window == (0, 100)
    own = VolumeOptions(intensity_window=(0, 2000))
    high = segment_volume(bright_pixels(intensity_window=(0, 100)), volume, given, own)
    np.testing.assert_array_equal(high.labels, array > 1000)
    assert len(caplog.records) == 1


def test_values_that_are_no_numbers_are_refused_before_anything_is_encoded() -> None:
    array = np.zeros((4, ROWS, COLUMNS), np.float32)
    array[3, 2, 1] = np.nan
    session = bright_pixels(chunk=2)
    with pytest.raises(ImageError, match="slice 3 has 1 NaN or infinite value"):
        segment_volume(session, volume_of(array), [clicked((0, 1, 1))])
    assert session.backend.encoded == []  # type: ignore[attr-defined]


def test_a_min_max_network_stretches_each_slice_by_itself() -> None:
    array = bright(3, (0, 2, 2, 2, 8, 8)).astype(np.int16)
    array[1] //= 5
    session = bright_pixels()
    conventions = replace(session.conventions, preprocess="medsam")
    session = Session(replace(session.manifest, conventions=conventions), session.backend)
    found = segment_volume(session, volume_of(array), [boxed(0, 0, 0, 3, ROWS, COLUMNS)])
    assert found.intensity_window is None
    np.testing.assert_array_equal(found.labels[:2, 3:7, 3:7], 1)
    assert not found.labels[2].any()
