"""Session: logits to masks, candidates, scores and label maps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import copied, edit_manifest
from fake_backend import HEIGHT, POINTS, WIDTH, assert_same

from medsa_deploy import load
from medsa_deploy.errors import UsageError
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.exporters.sam import modeling
from medsa_deploy.runtime import Session


# Outputs
def test_a_sam_gives_one_mask_or_three_candidates(sam, image) -> None:
    embedding = sam.encode(image)
    prediction = sam.segment(embedding, points=POINTS)
    three = sam.segment(embedding, points=POINTS, multimask=True)
    assert prediction.low_res_logits.shape == (3, 1, 64, 64)
    assert three.low_res_logits.shape == (3, 3, 64, 64)
    assert three.masks.shape == (3, 3, HEIGHT, WIDTH)
    assert not three.classes
    labels = np.array([[1, -1]] * 3, np.float32)
    points = np.concatenate([POINTS, np.zeros((3, 1, 2))], 1) * 256 / WIDTH
    every, scores = sam.backend.decode(embedding.values, points.astype(np.float32), labels, None)
    np.testing.assert_allclose(prediction.low_res_logits, every[:, :1], atol=1e-5)
    np.testing.assert_allclose(three.low_res_logits, every[:, 1:], atol=1e-5)
    np.testing.assert_allclose(three.scores, scores[:, 1:], atol=1e-5)
    assert three.best.tolist() == three.scores.argmax(axis=1).tolist()


def test_classes_have_no_candidates(two_classes, image) -> None:
    embedding = two_classes.encode(image)
    with pytest.raises(UsageError, match="multimask is for SAM's outputs"):
        two_classes.segment(embedding, points=[(1, 1)], multimask=True)


def test_the_threshold_is_a_probability(session, bundle: Path, image, tmp_path: Path) -> None:
    embedding = session.encode(image)
    loose, half, strict = (
        session.segment(embedding, points=POINTS[0], threshold=t) for t in (0.3, None, 0.7)
    )
    assert half.threshold == 0.5
    assert loose.masks.sum() > half.masks.sum() > strict.masks.sum() > 0
    assert (loose.masks >= half.masks).all()
    assert (half.masks >= strict.masks).all()
    copy = copied(bundle, tmp_path)
    edit_manifest(copy, conventions__threshold=0.7)
    with load(copy) as other:
        same = other.segment(other.encode(image), points=POINTS[0])
    assert same.threshold == 0.7
    assert_same(same, strict)


@pytest.mark.parametrize("threshold", [0, 1, -0.5, 2, float("nan"), float("inf")])
def test_other_thresholds_are_refused(session, image, threshold: float) -> None:
    embedding = session.encode(image)
    with pytest.raises(UsageError, match="not a probability between 0 and 1"):
        session.segment(embedding, points=[(1, 1)], threshold=threshold)


def test_a_label_map_counts_classes(two_classes, image) -> None:
    prediction = two_classes.segment(two_classes.encode(image), points=POINTS[0])
    assert prediction.classes
    masks, labels = prediction.masks[0], prediction.label_map()
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {0, 1, 2}, "the case should show both classes"
    assert ((labels > 0) == masks.any(axis=0)).all()
    for k in (0, 1):
        alone = masks[k] & ~masks[1 - k]
        assert (labels[alone] == k + 1).all()


def test_a_label_map_of_several_sets_marks_what_their_masks_do(two_classes, image) -> None:
    """The highest logit is taken at the image's size, where masks are made too."""
    boxes = np.array([[1.0, 1, 60, 80], [20, 3, 90, 81], [70, 30, 150, 110]])
    prediction = two_classes.segment(two_classes.encode(image), box=boxes)
    marked = prediction.label_map() > 0
    np.testing.assert_array_equal(marked, prediction.masks.any(axis=(0, 1)))


def test_a_label_map_counts_prompt_sets_of_one_class(session, image) -> None:
    prediction = session.segment(session.encode(image), points=POINTS)
    labels = prediction.label_map()
    assert labels.shape == (HEIGHT, WIDTH)
    assert set(np.unique(labels)) <= {0, 1, 2, 3}
    assert ((labels > 0) == prediction.masks.any(axis=(0, 1))).all()
    number = np.argmax(prediction.masks[:, 0], axis=0) + 1
    single = prediction.masks.sum(axis=(0, 1)) == 1
    assert (labels[single] == number[single]).all()


def test_a_label_map_takes_the_best_candidate_of_each_set(sam, image) -> None:
    prediction = sam.segment(sam.encode(image), points=POINTS[0], multimask=True)
    assert (prediction.label_map() == prediction.masks[0, prediction.best[0]]).all()


@pytest.mark.parametrize("size", [(120, 160), (256, 256), (300, 90), (31, 400)])
@pytest.mark.parametrize("network", ["session", "sam"])
def test_masks_are_those_of_sams_own_postprocessing(
    request: pytest.FixtureRequest, network: str, size: tuple[int, int]
) -> None:
    session: Session = request.getfixturevalue(network)
    image = seeded_image(max(size), 7)[: size[0], : size[1]]
    embedding = session.encode(image)
    points = np.array([[[size[1] / 2, size[0] / 2]], [[3, 4]]])
    prediction = session.segment(embedding, points=points)
    encoder = SimpleNamespace(img_size=session.manifest.network.image_size)
    logits = modeling.Sam.postprocess_masks(
        SimpleNamespace(image_encoder=encoder),
        torch.from_numpy(prediction.low_res_logits),
        embedding.frame.content_size,
        size,
    ).numpy()
    expected = logits > 0
    assert prediction.masks.shape == expected.shape
    differing = prediction.masks != expected
    assert (np.abs(logits[differing]) < 1e-4).all(), "only logits that are 0 up to rounding"
    assert differing.mean() <= 1e-4
