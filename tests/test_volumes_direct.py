"""segment_volume against a slow formulation, written out: chunks, scopes, overlaps, propagation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bright_volumes import COLUMNS, ROWS, boxed, clicked, volume_of
from fake_network import bright_pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medsa_deploy import load, transforms
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.images import Volume
from medsa_deploy.runtime import Session, Structure, VolumeOptions, VolumePrediction, segment_volume


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
        weighed: dict[int, list[tuple[float, np.ndarray]]] = {}
        for start in self.starts:
            chunk = range(start, min(start + self.size, self.count))
            prompts = {i: prompt for i in chunk if (prompt := self.on_slice(structure, i))}
            if not prompts:
                continue
            sets: dict[int, list[Any]] = {i: [prompt] for i, prompt in prompts.items()}
            if self.session.conventions.prompt_scope == "chunk" and self.size > 1:
                together = list(prompts.values())
                sets = {i: together for i in (prompts if structure.boxes else chunk)}
            for i, parts in sets.items():
                weighed.setdefault(i, []).append(self.weighed(start, i, parts))
        return {i: mean(parts) for i, parts in weighed.items()}

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
        inside = np.argwhere((pixels > cut).any(axis=0))
        if not len(inside):
            return None
        (top, left), (bottom, right) = inside.min(axis=0), inside.max(axis=0) + 1
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
    prediction = segment_volume(session, volume, structures, options)
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
                pixels = direct.full(of_slice[[mask]])[0]
                highest[label, index] = np.maximum(highest[label, index], pixels)
    assert prediction.slices == tuple(sorted(slices))
    second, first = np.sort(highest, axis=0)[-2:]
    clear = first - second > 1e-5
    # equal logits of two labels, above the threshold: the lower label wins
    tied = (second == first) & (first > cut)
    expected = highest.argmax(axis=0)
    assert clear.mean() > 0.9 or tied.any()
    np.testing.assert_array_equal(prediction.labels[clear | tied], expected[clear | tied])
    return prediction


@st.composite
def structures(draw: st.DrawFn, count: int) -> Structure:
    """Points on any slices, each slice with a foreground one, or a box, or both."""
    voxels = [st.integers(0, n - 1) for n in (count, ROWS, COLUMNS)]
    points = draw(st.lists(st.tuples(*voxels), max_size=3))
    more = [(x, ROWS - 1 - y, COLUMNS - 1 - z) for x, y, z in points if draw(st.booleans())]
    boxes = []
    if not points or draw(st.booleans()):
        low = draw(st.tuples(*voxels))
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
    drawn = data.draw(st.lists(structures(count), min_size=1, max_size=3))
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
        channels = [{0: i + 1} for i in range(len(drawn))]
    else:
        channels = [{k: k + 1 for k in range(classes)}] * len(drawn)
    assert_direct(session, array, drawn, options, channels)


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
    prompted = (REAL[0], replace(REAL[1], class_name="b"))
    prediction = assert_direct(
        session, real_array, prompted, VolumeOptions(**options), [{0: 1, 1: 2}, {1: 2}]
    )
    assert prediction.names == ("a", "b")
    assert len(np.unique(prediction.labels)) > 1


def test_a_real_2d_network_is_followed(bundle: Path, real_array) -> None:
    with load(bundle, threads=2) as session:
        # its two forms round differently, and a box that moves by a pixel moves what follows
        session.backend.splits = False
        prompted = [clicked((2, 30, 40), name="a"), boxed(4, 10, 20, 5, 80, 110, name="b")]
        options = VolumeOptions(propagate=True, threshold=0.4)
        prediction = assert_direct(session, real_array[:6], prompted, options, [{0: 1}, {0: 2}])
    assert prediction.names == ("a", "b")
