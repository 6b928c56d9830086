"""Networks that segment without a click, and classes that exclude each other, end to end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bright_volumes import volume_of
from fake_network import SIDE, bright_pixels
from hypothesis import given, settings
from hypothesis import strategies as st

from medsa_deploy import transforms
from medsa_deploy.errors import PromptError, UsageError
from medsa_deploy.evaluation.cases import needed_prompts, parity_cases, seeded_image, seeded_prompts
from medsa_deploy.evaluation.latency_worker import run_once, seeded_work
from medsa_deploy.evaluation.parity import compare_case, run_case
from medsa_deploy.images.image import as_image
from medsa_deploy.runtime import Session, Structure, VolumeOptions, segment_volume
from medsa_deploy.stages.verify.drawn_prompts import segment_labelled, segment_picture
from medsa_deploy.transforms import UNPROMPTED, Frame, MaskRule

IMAGE = seeded_image(SIDE, 4)[..., 0]
EXCLUSIVE = MaskRule(postprocess="samed", exclusive=True)


def automatic(classes: int = 3, need: str = "none", **options) -> Session:
    """Background and classes by brightness, without a prompt."""
    return bright_pixels(
        classes=classes, outputs="labels", prompts=need, postprocess="samed", **options
    )


def brute_force(session: Session, logits: np.ndarray, frame: Frame) -> np.ndarray:
    """Label map of logits (K, 4g, 4g)."""
    values = transforms.pixel_values(logits, frame, session.conventions.postprocess)
    return np.argmax(values, axis=0).astype(np.uint8)


def test_an_image_is_segmented_without_a_click() -> None:
    with automatic() as session:
        assert session.classes == ("class 1", "class 2", "class 3")
        prediction = session.segment(session.encode(IMAGE))
        ((_, labels),) = session.backend.prompts
    assert not len(labels)  # no padding point either
    assert prediction.masks.shape == (1, 3, SIDE, SIDE)
    assert prediction.scores.shape == (1, 3)
    assert prediction.low_res_logits.shape == (1, 4, SIDE, SIDE)
    expected = brute_force(session, prediction.low_res_logits[0], prediction.frame)
    assert set(np.unique(expected)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(prediction.labels, expected)
    np.testing.assert_array_equal(prediction.label_map(), expected)
    for label, mask in enumerate(prediction.masks[0], 1):
        np.testing.assert_array_equal(mask, expected == label)
    assert [region.area for region in prediction.regions[0]] == [
        int((expected == label).sum()) for label in (1, 2, 3)
    ]


def test_probabilities_are_a_softmax_with_the_background() -> None:
    with automatic() as session:
        prediction = session.segment(session.encode(IMAGE))
    probabilities = prediction.probabilities
    assert probabilities.shape == (1, 3, SIDE, SIDE)
    values = prediction.low_res_logits[0].astype(np.float64)
    softmax = np.exp(values) / np.exp(values).sum(axis=0)
    np.testing.assert_allclose(probabilities[0], softmax[1:], rtol=1e-5)


@pytest.mark.parametrize("postprocess", ["sam", "medsam"])
def test_probabilities_of_masks_that_overlap(postprocess: str) -> None:
    with bright_pixels(classes=2, postprocess=postprocess) as session:
        prediction = session.segment(session.encode(IMAGE), points=[(5, 5)])
    probabilities = prediction.probabilities
    np.testing.assert_allclose(
        probabilities, 1 / (1 + np.exp(-prediction.low_res_logits)), rtol=1e-6
    )
    clear = np.abs(probabilities - 0.5) > 1e-6
    np.testing.assert_array_equal(prediction.masks[clear], (probabilities > 0.5)[clear])


def test_one_class_and_a_background() -> None:
    with automatic(classes=1, names=("lesion",)) as session:
        prediction = session.segment(session.encode(IMAGE))
        assert session.classes == ("lesion",)
    assert 0 < prediction.mask.mean() < 1
    np.testing.assert_array_equal(prediction.labels, prediction.mask)


def test_prompts_are_refused_or_required() -> None:
    with automatic() as session:
        embedding = session.encode(IMAGE)
        with pytest.raises(PromptError, match="segments without prompts: leave points"):
            session.segment(embedding, points=[(3, 3)])
        with pytest.raises(UsageError, match="exclude each other: a pixel belongs"):
            session.segment(embedding, threshold=0.3)
        with pytest.raises(UsageError, match="multimask is for SAM's outputs"):
            session.segment(embedding, multimask=True)
    with bright_pixels() as session, pytest.raises(PromptError, match="give points, a box or"):
        session.segment(session.encode(IMAGE))
    with bright_pixels() as session, pytest.raises(PromptError, match="SAMed, finetune-SAM"):
        session.segment_sets(session.encode(IMAGE), [UNPROMPTED])


def test_an_optional_box_restricts_the_classes() -> None:
    with automatic(need="optional") as session:
        embedding = session.encode(IMAGE)
        everywhere = session.segment(embedding)
        boxed = session.segment(embedding, box=(10, 20, 40, 50))
    inside = np.zeros((SIDE, SIDE), bool)
    inside[20:50, 10:40] = True
    np.testing.assert_array_equal(boxed.labels[inside], everywhere.labels[inside])
    assert not boxed.labels[~inside].any()


def test_a_network_of_overlapping_classes_may_need_no_prompt() -> None:
    with bright_pixels(classes=2, prompts="none") as session:
        prediction = session.segment(session.encode(IMAGE))
    np.testing.assert_array_equal(prediction.masks, prediction.low_res_logits > 0)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("outputs", ["labels", "classes"])
def test_a_volume_is_segmented_slice_by_slice(chunk: int, outputs: str) -> None:
    slices = np.stack([seeded_image(SIDE, i)[..., 0] for i in range(5)])
    with bright_pixels(classes=3, outputs=outputs, prompts="none", chunk=chunk) as session:
        prediction = segment_volume(session, volume_of(slices), [])
        padded = [*slices, slices[-1]] if chunk == 3 else slices
        embeddings = session.encode_slices(list(padded))[:5]
        expected = [session.segment(embedding).labels for embedding in embeddings]
    assert prediction.names == ("class 1", "class 2", "class 3")
    assert prediction.slices == (0, 1, 2, 3, 4)
    np.testing.assert_array_equal(prediction.labels, np.stack(expected))


def test_a_volume_without_prompts_cannot_be_followed_or_prompted() -> None:
    volume = volume_of(np.stack([IMAGE] * 3))
    with automatic() as session:
        with pytest.raises(UsageError, match="segments every slice; leave --propagate out"):
            segment_volume(session, volume, [], VolumeOptions(propagate=True))
        with pytest.raises(PromptError, match="segments without prompts"):
            segment_volume(session, volume, [Structure(points=((1, 2, 3),), labels=(1,))])
    with bright_pixels() as session, pytest.raises(PromptError, match="no structure to segment"):
        segment_volume(session, volume, [])


def test_several_structures_of_classes_that_exclude_each_other() -> None:
    """A structure's background does not erase another structure."""
    volume = volume_of(np.stack([IMAGE] * 2))
    left = Structure(boxes=((0, 0, 0, 2, SIDE, 30),), name="left")
    right = Structure(boxes=((0, 0, 30, 2, SIDE, SIDE),), name="right")
    with automatic(classes=1, need="optional") as session:
        both = segment_volume(session, volume, [left, right])
        alone = [segment_volume(session, volume, [s]).labels for s in (left, right)]
        followed = segment_volume(
            session,
            volume,
            [Structure(boxes=((0, 0, 0, 1, SIDE, SIDE),))],
            VolumeOptions(propagate=True),
        )
    assert both.names == ("left", "right")
    assert all(labels.any() for labels in alone)
    np.testing.assert_array_equal(both.labels, alone[0] + 2 * alone[1])
    assert followed.slices == (0, 1)
    assert followed.labels[1].any()


@settings(max_examples=50, deadline=None)
@given(classes=st.integers(1, 5), seed=st.integers(0, 99), levels=st.sampled_from([2, 9, 1000]))
def test_margins_are_above_zero_exactly_where_the_class_is(
    classes: int, seed: int, levels: int
) -> None:
    """Equal values included: the first of them wins."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, levels, (classes + 1, 12, 13)).astype(np.float32)
    labels, margins = transforms.exclusive_labels(values), transforms.class_margins(values)
    assert margins.dtype == np.float32
    for k, margin in enumerate(margins, 1):
        np.testing.assert_array_equal(margin > 0, labels == k)
        rival = np.delete(values, k, axis=0).max(axis=0)
        np.testing.assert_allclose(margin, values[k] - rival, atol=1e-30)


@pytest.mark.parametrize(("need", "count"), [("required", 4), ("optional", 5), ("none", 1)])
def test_cases_have_the_prompts_that_the_network_takes(need: str, count: int) -> None:
    prompts = needed_prompts(seeded_prompts(64, 64, None, 1), need)
    assert len(prompts) == count
    assert (prompts[0] is UNPROMPTED) == (need != "required")


def test_verification_and_profiling_of_such_networks() -> None:
    with automatic() as session:
        cases = parity_cases(replace(session.manifest), None)
        outputs = run_case(session, cases[0])
        rule = transforms.mask_rule(session.manifest)
        assert rule.exclusive
        parity = compare_case(cases[0], outputs, outputs, rule)
        assert parity.mask_dice == (1.0,) * 3
        assert parity.mask_pixels_differing == 0
        times = run_once(session, seeded_work(session.manifest))
    assert times["first click"] > 0


def test_accuracy_without_prompts() -> None:
    """Every slice counts, those without a label too."""
    slices = np.stack([seeded_image(SIDE, i)[..., 0] for i in range(3)])
    with automatic(classes=2) as session:
        volume = volume_of(slices)
        truth = segment_volume(session, volume, []).labels
        truth[0] = 0
        masks = dict(segment_labelled(session, volume, truth, "none"))
        assert sorted(masks) == [1, 2]
        full = segment_volume(session, volume, []).labels
        for label, mask in masks.items():
            np.testing.assert_array_equal(mask, full == label)
        pictured = dict(segment_picture(session, as_image(slices[1]), full[1], "none"))
    for label, mask in pictured.items():
        np.testing.assert_array_equal(mask, full[1] == label)
