"""segment_volume on bright pixels: chunks, labels, followed masks, refusals, intensities."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bright_volumes import ALL_VOXELS, COLUMNS, ROWS, boxed, bright, clicked, volume_of
from fake_network import bright_pixels
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medsa_deploy.errors import ImageError, PromptError, UsageError
from medsa_deploy.images import read_volume
from medsa_deploy.images.volume import VolumeBox
from medsa_deploy.runtime import Session, Structure, VolumeOptions, segment_volume
from medsa_deploy.runtime.volumes import segment
from medsa_deploy.runtime.volumes.chunk_encoder import ChunkEncoder


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
    prediction = segment_volume(session, volume_of(array), [boxed(0, 0, 0, 6, ROWS, COLUMNS)])
    np.testing.assert_array_equal(prediction.labels, array > 0)
    first, second = session.backend.encoded  # type: ignore[attr-defined]
    assert first.max() == 0
    np.testing.assert_array_equal(second.min(axis=(1, 2)), [0, 1, 1, 1])


def test_only_chunks_that_are_prompted_are_encoded() -> None:
    session, steps = bright_pixels(chunk=3), []
    array = bright(12, ALL_VOXELS)
    prediction = segment_volume(
        session,
        volume_of(array),
        [clicked((4, 5, 5)), boxed(10, 0, 0, 11, 2, 2)],
        on_slice=lambda *now: steps.append(now),
    )
    assert len(session.backend.encoded) == 2  # type: ignore[attr-defined]
    assert steps == [(3, 6), (6, 6)]
    assert prediction.slices == (3, 4, 5, 10)


def test_a_chunk_is_encoded_once_however_many_ask_for_it() -> None:
    session = bright_pixels(chunk=4)
    structures = [boxed(0, 0, 0, 8, 3 + i, 5) for i in range(9)]
    options = VolumeOptions(propagate=True)
    segment_volume(session, volume_of(bright(8, ALL_VOXELS)), structures, options)
    assert len(session.backend.encoded) == 2  # type: ignore[attr-defined]


def test_a_chunk_has_the_prompts_of_all_its_slices() -> None:
    structure = clicked((0, 1, 2), (3, 4, 5), (4, 6, 7), labels=(1, 0, 1))
    sets = {}
    for scope, order in (("chunk", "xy"), ("slice", "xy"), ("chunk", "yx")):
        session = bright_pixels(chunk=4, prompt_scope=scope, point_order=order)
        if scope == "slice":
            structure = replace(structure, labels=(1, 1, 1))
        segment_volume(session, volume_of(bright(8, ALL_VOXELS)), [structure])
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
    structure = Structure(boxes=((0, 1, 2, 1, 3, 4), (2, 2, 1, 3, 6, 3)))
    prediction = segment_volume(session, volume_of(bright(4, ALL_VOXELS)), [structure])
    assert prediction.slices == (0, 2)
    for coords, labels in session.backend.prompts:  # type: ignore[attr-defined]
        assert (coords.tolist(), labels.tolist()) == ([[3, 5], [12, 30]], [2, 3])
    np.testing.assert_array_equal(
        prediction.labels, bright(4, (0, 1, 1, 1, 6, 4), (2, 1, 1, 3, 6, 4), value=1)
    )


# Labels
def test_of_two_structures_the_higher_logit_wins() -> None:
    session = bright_pixels(clicks=0.3)
    structures = [
        clicked((0, 5, 3), name="left"),
        clicked((0, 5, 16), name="right"),
        clicked((0, 9, 3), name="left"),
    ]
    prediction = segment_volume(session, volume_of(bright(2, ALL_VOXELS)), structures)
    assert prediction.names == ("left", "right")
    assert (prediction.labels[0, 4:, :9] == 1).all()
    assert (prediction.labels[0, 4:7, 11:] == 2).all()
    assert not prediction.labels[1].any()


def test_of_equal_logits_the_lower_label_wins_in_any_order() -> None:
    array = bright(5, ALL_VOXELS)
    structures = [boxed(4, 0, 0, 5, 9, 20, name="a"), boxed(0, 3, 0, 1, 12, 20, name="b")]
    options = VolumeOptions(propagate=True, margin=0)
    for ordered in (structures, structures[::-1]):
        prediction = segment_volume(bright_pixels(), volume_of(array), ordered, options)
        assert prediction.names == tuple(structure.name for structure in ordered)
        first = prediction.names.index("a") + 1
        lower = 1 if first == 1 else 2  # rows where only a, both, only b reach
        assert (prediction.labels[:, :3] == first).all()
        assert (prediction.labels[:, 3:9] == 1).all()
        assert (prediction.labels[:, 9:] == 3 - first).all()
        assert lower == first


def test_classes_of_one_network_and_of_one_structure() -> None:
    array = bright(2, ALL_VOXELS, value=100)
    array[:, :, 10:] = 200
    session = bright_pixels(classes=2, names=("dim", "bright"))
    every = segment_volume(session, volume_of(array), [boxed(0, 0, 0, 1, 12, 20)])
    assert every.names == ("dim", "bright")
    np.testing.assert_array_equal(every.labels, (array // 100) * np.array([1, 0])[:, None, None])
    structure = boxed(0, 0, 0, 2, 12, 20, class_name="bright")
    prediction = segment_volume(session, volume_of(array), [structure])
    np.testing.assert_array_equal(prediction.labels, (array == 200) * 2)
    with pytest.raises(PromptError, match="no class 'dull'; it has: dim, bright"):
        segment_volume(session, volume_of(array), [replace(structure, class_name="dull")])
    with pytest.raises(PromptError, match="called 'x', but this network's masks are its classes"):
        segment_volume(session, volume_of(array), [replace(structure, class_name=None, name="x")])
    unnamed = segment_volume(
        bright_pixels(classes=2), volume_of(array), [replace(structure, class_name="class 2")]
    )
    assert unnamed.names == ("class 1", "class 2")
    np.testing.assert_array_equal(unnamed.labels, prediction.labels)


@pytest.mark.parametrize(
    ("requested", "names", "expected"),
    [
        (["a", None, "a", None], (), ("a", "structure 2", "structure 4")),
        ([None], (), ("mask",)),
        ([None], ("liver",), ("liver",)),
        (["lesion"], ("liver",), ("lesion",)),
    ],
)
def test_names_of_labels(
    requested: list[str | None], names: Any, expected: tuple[str, ...]
) -> None:
    session = bright_pixels(names=names)
    structures = [boxed(0, 0, 0, 1, 2, 2, name=name) for name in requested]
    assert segment_volume(session, volume_of(bright(2, ALL_VOXELS)), structures).names == expected


def test_the_lone_class_may_be_named() -> None:
    session, volume = bright_pixels(names=("liver",)), volume_of(bright(2, ALL_VOXELS))
    structure = boxed(0, 0, 0, 1, 2, 2, class_name="liver")
    assert segment_volume(session, volume, [structure]).names == ("liver",)
    with pytest.raises(PromptError, match="'spleen' was asked for, but this network has one class"):
        segment_volume(session, volume, [replace(structure, class_name="spleen")])


def test_more_classes_than_labels_are_refused() -> None:
    with bright_pixels(classes=256) as session, pytest.raises(PromptError, match="256 classes"):
        segment_volume(session, volume_of(bright(2, ALL_VOXELS)), [boxed(*ALL_VOXELS)])


def test_labels_end_at_255() -> None:
    volume = volume_of(bright(2, ALL_VOXELS))
    boxes = [boxed(0, 0, 0, 1, 12, 1 + i % 20) for i in range(255)]
    prediction = segment_volume(bright_pixels(), volume, boxes)
    assert len(prediction.names) == 255
    assert set(np.unique(prediction.labels[0])) == set(range(1, 21))
    with pytest.raises(PromptError, match=r"256 structures .* a label map holds 255"):
        segment_volume(bright_pixels(), volume, [*boxes, boxes[0]])


# Following masks
def test_a_mask_is_followed_until_it_is_empty() -> None:
    array = bright(12, (3, 4, 5, 8, 9, 11), (9, 4, 5, 11, 9, 11))
    session = bright_pixels()
    structures = [boxed(5, 0, 0, 6, 12, 20)]
    prediction = segment_volume(
        session, volume_of(array), structures, VolumeOptions(propagate=True)
    )
    assert prediction.slices == (2, 3, 4, 5, 6, 7, 8)  # 2 and 8 are empty, and end it
    array[9:] = 0
    np.testing.assert_array_equal(prediction.labels, array > 0)
    assert len(session.backend.encoded) == 7  # type: ignore[attr-defined]
    boxes = {tuple(coords.ravel()) for coords, _ in session.backend.prompts}  # type: ignore[attr-defined]
    assert boxes == {(0, 0, 60, 60), (6, 5, 42, 60)}  # x (5−3…11+3)·3, y (4−3…9+3)·5


def test_an_empty_mask_is_not_followed() -> None:
    array = bright(5, (0, 0, 0, 1, 12, 20))
    structures = [boxed(2, 0, 0, 3, 12, 20)]
    prediction = segment_volume(
        bright_pixels(), volume_of(array), structures, VolumeOptions(propagate=True)
    )
    assert prediction.slices == (2,)
    assert not prediction.labels.any()


@pytest.mark.parametrize("margin", [0, 2.5, 1000])
def test_margins_end_at_the_border(margin: float) -> None:
    array = bright(3, (0, 0, 18, 3, 2, 20))
    session = bright_pixels()
    structures = [boxed(0, 0, 16, 1, 4, 20)]
    options = VolumeOptions(propagate=True, margin=margin)
    prediction = segment_volume(session, volume_of(array), structures, options)
    np.testing.assert_array_equal(prediction.labels, array > 0)
    (x0, y0), (x1, y1) = session.backend.prompts[-1][0]  # type: ignore[attr-defined]
    assert (x0, y0, x1, y1) == (max(0, 18 - margin) * 3, 0, 60, min(12, 2 + margin) * 5)


def test_between_two_prompts_both_directions_count_alike() -> None:
    """From below only the left half is seen, from above the right: the mean holds what both do."""
    array = bright(5, ALL_VOXELS)
    structures = [Structure(boxes=((0, 0, 0, 1, 12, 14), (4, 0, 8, 5, 12, 20)))]
    options = VolumeOptions(propagate=True, margin=0)
    prediction = segment_volume(bright_pixels(), volume_of(array), structures, options)
    np.testing.assert_array_equal(prediction.labels[0], array[0] * ([1] * 14 + [0] * 6) // 255)
    np.testing.assert_array_equal(prediction.labels[4], array[0] * ([0] * 8 + [1] * 12) // 255)
    for middle in prediction.labels[1:4]:
        np.testing.assert_array_equal(middle, array[0] * ([0] * 8 + [1] * 6 + [0] * 6) // 255)


@pytest.mark.parametrize("kept_bytes", [0, 40_000, 2**30])
def test_few_structures_are_followed_at_a_time(
    monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    """However many logits between prompts may be kept, the labels are the same."""
    boxes: list[VolumeBox] = [(0, 1, 2, 9, 5, 9), (1, 6, 3, 8, 11, 12), (2, 2, 10, 9, 9, 18)]
    volume = volume_of(bright(9, *boxes))
    structures = [
        Structure(boxes=((x0, y0, z0, x0 + 1, y1, z1), (x1 - 1, y0, z0, x1, y1, z1)))
        for x0, y0, z0, x1, y1, z1 in boxes
    ]
    options = VolumeOptions(propagate=True, margin=1)
    expected = segment_volume(bright_pixels(), volume, structures, options)
    assert len(np.unique(expected.labels)) == 4
    monkeypatch.setattr(segment, "KEPT_BYTES", kept_bytes)
    groups = []
    follow = segment._Run._follow
    monkeypatch.setattr(
        segment._Run,
        "_follow",
        lambda run, batch, margin: groups.append(follow(run, batch, margin)),
    )
    prediction = segment_volume(bright_pixels(), volume, structures, options)
    np.testing.assert_array_equal(prediction.labels, expected.labels)
    assert len(groups) == {0: 3, 40_000: 3}.get(kept_bytes, 1)


def test_background_clicks_go_to_the_chunk_that_has_the_foreground() -> None:
    volume = volume_of(bright(12, (0, 2, 2, 12, 9, 9)))
    structure = clicked((3, 5, 5), (5, 1, 15), labels=(1, 0))
    with bright_pixels(chunk=8, prompt_scope="chunk") as session:
        prediction = segment_volume(session, volume, [structure], VolumeOptions(overlap=4))
    assert prediction.slices == tuple(range(8))
    alone = clicked((3, 5, 5), (9, 1, 15), labels=(1, 0))
    with bright_pixels(chunk=8, prompt_scope="chunk") as session:
        with pytest.raises(PromptError, match="chunk of slices 8…11 has background clicks only"):
            segment_volume(session, volume, [alone], VolumeOptions())


def test_structures_are_followed_by_themselves() -> None:
    array = bright(9, (0, 0, 0, 5, 4, 4), (2, 8, 10, 9, 12, 20))
    structures = [boxed(3, 0, 0, 4, 6, 6), boxed(7, 6, 8, 8, 12, 20)]
    session = bright_pixels(chunk=2)
    prediction = segment_volume(
        session, volume_of(array), structures, VolumeOptions(propagate=True)
    )
    expected = (array > 0).astype(np.uint8)
    expected[:, 6:] *= 2
    np.testing.assert_array_equal(prediction.labels, expected)


# Refusals
@pytest.mark.parametrize(
    ("prompted", "options", "error", "match"),
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
def test_what_cannot_be_segmented(prompted, options, error: type[Exception], match: str) -> None:
    session = bright_pixels(chunk=4)
    volume = volume_of(bright(6, (1, 1, 1, 3, 3, 3)))
    prompted = [clicked((0, 1, 1))] if prompted is None else prompted
    with pytest.raises(error, match=match):
        segment_volume(session, volume, prompted, VolumeOptions(**options))
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
    structures = [boxed(0, 0, 0, 4, ROWS, COLUMNS)]
    prediction = segment_volume(bright_pixels(), volume, structures)
    np.testing.assert_array_equal(prediction.labels, array > 510)
    assert prediction.intensity_window == (0, 1020)
    assert [r.message.count("stretched from 0…1020") for r in caplog.records] == [1]
    low = segment_volume(
        bright_pixels(intensity_window=(0, 100)), volume, structures, VolumeOptions()
    )
    np.testing.assert_array_equal(low.labels, array > 50)
    assert low.intensity_window == (0, 100)
    wide = VolumeOptions(intensity_window=(0, 2000))
    high = segment_volume(bright_pixels(intensity_window=(0, 100)), volume, structures, wide)
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
    prediction = segment_volume(session, volume_of(array), [boxed(0, 0, 0, 3, ROWS, COLUMNS)])
    assert prediction.intensity_window is None
    np.testing.assert_array_equal(prediction.labels[:2, 3:7, 3:7], 1)
    assert not prediction.labels[2].any()
