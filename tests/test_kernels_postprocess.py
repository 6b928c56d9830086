"""postprocess.cu, run on the host, against what the runtime does in numpy."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
from cuda_on_host import CONTRACTIONS, ROUNDED, address, library, run
from hypothesis import given, settings
from hypothesis import strategies as st

from medsa_deploy import transforms
from medsa_deploy.errors import UsageError
from medsa_deploy.kernels.postprocess import (
    Parameters,
    Region,
    pack,
    postprocessing,
    reference_labels,
    reference_masks,
    region,
    regions,
    unpack,
)
from medsa_deploy.transforms import POSTPROCESSING, PREPROCESSING, Frame, MaskRule

TOLERANCE = 1e-6
"""As postprocess.cu states it, of the largest logit."""

GUARD = 16
SAM = MaskRule(postprocess="sam")


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Logits of a decoder, and the image they are for."""

    logits: np.ndarray
    """(count, h, w) float32"""
    frame: Frame
    rule: MaskRule = SAM
    seed: int = 1
    contraction: tuple[str, ...] = ROUNDED


def run_case(case: Case, *, labels: bool) -> tuple[np.ndarray, list[Region]]:
    """Words of the masks, or the label map, and the regions."""
    channels, *size = case.logits.shape
    count = channels - case.rule.exclusive
    plan = postprocessing((size[0], size[1]), count, case.frame, case.rule, labels=labels)
    dtype = np.uint8 if labels else np.uint32
    memory = np.full(int(np.prod(plan.shape)) + 2 * GUARD, 0xEE, dtype)
    output = memory[GUARD:-GUARD]
    tally = np.zeros(plan.tally_shape, np.uint32)
    tables = np.frombuffer(plan.tables, np.uint8)
    launch = plan.launch(
        logits=address(case.logits),
        output=address(output),
        tally=address(tally),
        tables=address(tables),
    )
    run(launch, seed=case.seed, contraction=case.contraction)
    assert (memory[:GUARD] == 0xEE).all()
    assert (memory[-GUARD:] == 0xEE).all()
    return output.reshape(plan.shape), regions(tally, case.frame.image_size)


def undecided(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Pixel values (channels, H, W), and how far round-off may move them."""
    values = transforms.pixel_values(case.logits, case.frame, case.rule.postprocess)
    largest = 1 if case.rule.postprocess == "medsam" else float(np.abs(case.logits).max())
    return values, TOLERANCE * max(largest, abs(case.rule.threshold))


def decided(case: Case) -> np.ndarray:
    """The pixels (H, W) whose highest value round-off cannot change."""
    values, reach = undecided(case)
    if not case.rule.exclusive:
        threshold = np.full_like(values[:1], case.rule.threshold)
        values = np.concatenate([values, threshold])
    ordered = np.sort(values, axis=0)
    equal = (case.logits == case.logits[:1]).all()  # classes that are the same stay equal
    return (ordered[-1] - ordered[-2] > 2 * reach) | equal


def assert_masks(case: Case) -> None:
    assert_clear_masks(case, *run_case(case, labels=False))


def assert_clear_masks(case: Case, words: np.ndarray, counted: list[Region]) -> None:
    """What a kernel gave for a case, against the reference where round-off cannot matter."""
    masks = unpack(words, case.frame.image_size[1])
    expected, _ = reference_masks(case.logits, case.frame, case.rule)
    values, reach = undecided(case)
    clear = np.abs(values - case.rule.threshold) > reach
    if case.rule.exclusive:
        clear = np.broadcast_to(decided(case), masks.shape)
    np.testing.assert_array_equal(masks[clear], unpack(expected, masks.shape[-1])[clear])
    np.testing.assert_array_equal(pack(masks), words)  # bits beyond the width are 0
    assert counted == [region(mask) for mask in masks]


def assert_labels(case: Case) -> None:
    assert_clear_labels(case, *run_case(case, labels=True))


def assert_clear_labels(case: Case, labels: np.ndarray, counted: list[Region]) -> None:
    """As `assert_clear_masks`."""
    expected, _ = reference_labels(case.logits, case.frame, case.rule)
    clear = decided(case)
    np.testing.assert_array_equal(labels[clear], expected[clear])
    assert counted == [region(labels == k + 1) for k in range(len(counted))]


@st.composite
def cases(draw: st.DrawFn, *, side: int = 90, most: int = 6) -> Case:
    """Images of every size, in frames of every profile, with smooth or noisy logits."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    image_size = (draw(st.integers(1, side)), draw(st.integers(1, side)))
    network_size = draw(st.integers(1, 100))
    low = draw(st.sampled_from([max(1, network_size // 4), draw(st.integers(1, 40))]))
    profile = draw(st.sampled_from(sorted(PREPROCESSING)))
    exclusive = draw(st.booleans())
    shape = (draw(st.integers(1, most)) + exclusive, low, low)
    logits = random.normal(0, 4, shape) + draw(st.sampled_from([-9.0, -1.0, 0.0, 9.0]))
    return Case(
        logits=logits.astype(np.float32),
        frame=transforms.frame_of(image_size, profile, network_size),
        rule=MaskRule(
            postprocess=draw(st.sampled_from(sorted(POSTPROCESSING))),
            probability=draw(st.sampled_from([0.5, 0.21, 0.88])),
            exclusive=exclusive,
        ),
        seed=draw(st.integers(0, 1000)),
        contraction=draw(st.sampled_from(CONTRACTIONS)),
    )


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_random_masks(case: Case) -> None:
    assert_masks(case)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_random_label_maps(case: Case) -> None:
    assert_labels(case)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(case=cases(side=120, most=9))
def test_thousands_of_random_masks_and_label_maps(case: Case) -> None:
    assert_masks(case)
    assert_labels(case)


def a_frame(height: int, width: int) -> Frame:
    return transforms.frame_of((height, width), "sam", 64)


@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 65])
def test_full_and_empty_masks_at_the_borders_of_words(width: int) -> None:
    logits = np.stack([np.full((16, 16), value, np.float32) for value in (3, -3)])
    case = Case(logits=logits, frame=a_frame(20, width))
    words, counted = run_case(case, labels=False)
    assert unpack(words, width)[0].all()
    assert not words[1].any()
    assert counted == [
        Region(area=20 * width, box=(0, 0, width, 20)),
        Region(area=0, box=None),
    ]


def test_the_first_of_equal_classes_wins() -> None:
    logits = np.random.default_rng(1).normal(2, 1, (1, 16, 16)).astype(np.float32).repeat(3, axis=0)
    case = Case(logits=logits, frame=a_frame(40, 50))
    labels, counted = run_case(case, labels=True)
    assert set(np.unique(labels)) == {0, 1}
    assert [label.area for label in counted[1:]] == [0, 0]


def test_255_classes() -> None:
    logits = np.random.default_rng(1).normal(0, 1, (255, 8, 8)).astype(np.float32)
    case = Case(logits=logits, frame=a_frame(40, 33))
    assert_labels(case)
    assert run_case(case, labels=True)[0].max() > 200


def test_the_references_are_the_runtimes_masks_and_labels() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (3, 16, 16)).astype(np.float32)
    frame = a_frame(50, 41)
    words, counted = reference_masks(logits, frame, SAM)
    values = transforms.pixel_values(logits, frame, "sam")
    np.testing.assert_array_equal(unpack(words, 41), values > 0)
    assert [label.area for label in counted] == unpack(words, 41).sum(axis=(1, 2)).tolist()
    labels, _ = reference_labels(logits, frame, SAM)
    assert labels.shape == (50, 41)


def test_parameters_lie_as_in_cuda() -> None:
    size = ctypes.c_ulonglong.in_dll(library(), "size_of_postprocess").value
    assert ctypes.sizeof(Parameters) == size


@pytest.mark.parametrize("count", [0, 256])
def test_a_label_map_holds_at_most_255_classes(count: int) -> None:
    with pytest.raises(UsageError, match="1 to 255 classes"):
        postprocessing((8, 8), count, a_frame(5, 5), SAM, labels=True)
