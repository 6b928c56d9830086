"""Session: an image is encoded once; prompts of every kind, alone and together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import copied, edit_manifest
from fake_backend import BOXES, FOUR_BY_FOUR, HEIGHT, POINTS, WIDTH, assert_same, full_size

from medsa_deploy import load
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.runtime import Session
from medsa_deploy.transforms import prompts
from medsa_deploy.transforms.masks import axis_operator


# Encoding once, prompting often
def test_the_encoder_runs_once_however_many_prompts_follow(session, image, monkeypatch) -> None:
    runs = []
    encode = session.backend.encode
    monkeypatch.setattr(session.backend, "encode", lambda x: runs.append(x.shape) or encode(x))
    embedding = session.encode(image)
    for point in POINTS:
        session.segment(embedding, points=point)
    session.segment(embedding, box=BOXES)
    session.segment_sets(embedding, prompts(points=POINTS))
    assert runs == [(1, 3, 256, 256)]


@pytest.mark.parametrize(
    ("prompt", "sets"),
    [
        ({"points": [(30, 40)]}, 1),
        ({"points": POINTS[0], "labels": [1]}, 1),
        ({"points": POINTS[:, 0], "labels": [1, 0, 1]}, 1),
        ({"box": BOXES[0]}, 1),
        ({"box": list(BOXES[0]), "points": [(30, 40)], "labels": [0]}, 1),
        ({"mask": np.ones((64, 64))}, 1),
        ({"mask": np.ones((64, 64)), "box": BOXES[0], "points": [(1, 1), (2, 2)]}, 1),
        ({"points": POINTS}, 3),
        ({"points": POINTS, "labels": [[1], [0], [1]], "box": BOXES}, 3),
        ({"box": BOXES}, 3),
        ({"mask": np.ones((2, 64, 64)), "box": BOXES[:2]}, 2),
    ],
)
def test_prompts_of_every_kind(session, image, prompt: dict[str, Any], sets: int) -> None:
    prediction = session.segment(session.encode(image), **prompt)
    assert prediction.masks.shape == (sets, 1, HEIGHT, WIDTH)
    assert prediction.masks.dtype == np.bool_
    assert prediction.scores.shape == (sets, 1)
    assert prediction.low_res_logits.shape == (sets, 1, 64, 64)
    assert prediction.low_res_logits.dtype == np.float32
    assert set(prediction.timings_ms) == {"decode", "postprocess"}
    assert all(ms >= 0 for ms in prediction.timings_ms.values())


def test_timings_and_frame_of_an_embedding(session, image) -> None:
    embedding = session.encode(image)
    assert set(embedding.timings_ms) == {"preprocess", "encode"}
    assert all(ms > 0 for ms in embedding.timings_ms.values())
    assert embedding.frame.image_size == (HEIGHT, WIDTH)
    assert embedding.values.shape == (1, 256, 16, 16)


SETS = [
    prompts(points=POINTS[0])[0],
    prompts(box=BOXES[0])[0],
    prompts(points=POINTS[:, 0], labels=[1, 0, 1])[0],
    prompts(points=POINTS[1])[0],
    prompts(points=POINTS[1], mask=np.linspace(-4, 4, 64 * 64).reshape(64, 64))[0],
    prompts(points=POINTS[0], box=BOXES[1])[0],
    prompts(points=POINTS[2], mask=np.full((64, 64), 2.0))[0],
]


@pytest.mark.parametrize("network", ["session", "two_classes", "sam"])
def test_sets_of_different_lengths_equal_the_sets_one_by_one(
    request: pytest.FixtureRequest, network: str, image
) -> None:
    session: Session = request.getfixturevalue(network)
    embedding = session.encode(image)
    together = session.segment_sets(embedding, SETS)
    assert len(together.masks) == len(SETS)
    for i, prompt_set in enumerate(SETS):
        alone = session.segment_sets(embedding, [prompt_set])
        np.testing.assert_allclose(together.low_res_logits[i], alone.low_res_logits[0], atol=1e-5)
        np.testing.assert_allclose(together.scores[i], alone.scores[0], atol=1e-5)
        assert (together.masks[i] != alone.masks[0]).mean() <= 1e-4


@pytest.mark.parametrize(
    "prompt",
    [
        {"points": POINTS},
        {"box": BOXES},
        {"points": POINTS, "labels": np.array([[1], [0], [1]]), "box": BOXES},
        {"points": POINTS, "mask": np.random.default_rng(0).normal(0, 4, (3, 64, 64))},
    ],
    ids=lambda prompt: " + ".join(prompt),
)
def test_p_sets_in_one_call_equal_p_calls(session, image, prompt: dict[str, np.ndarray]) -> None:
    embedding = session.encode(image)
    together = session.segment(embedding, **prompt)
    for i in range(3):
        alone = session.segment(embedding, **{name: part[i] for name, part in prompt.items()})
        np.testing.assert_allclose(together.low_res_logits[i], alone.low_res_logits[0], atol=1e-5)
        np.testing.assert_allclose(together.scores[i], alone.scores[0], atol=1e-5)


def test_equal_sets_go_through_the_decoder_together_and_are_never_padded(faked) -> None:
    with faked() as session:
        embedding = session.encode(full_size(FOUR_BY_FOUR))
        session.segment_sets(embedding, [p for p in SETS if p.mask is None])
        shapes = sorted(coords.shape for coords, _, _ in session.backend.prompts)
    assert shapes == [(1, 3, 2), (1, 4, 2), (3, 2, 2)]


def test_many_sets_take_the_decoder_several_runs(faked, session, image) -> None:
    points = np.random.default_rng(0).uniform(0, HEIGHT, (19, 1, 2))
    with faked() as fake:
        prediction = fake.segment(fake.encode(full_size(FOUR_BY_FOUR)), points=points)
        assert [len(coords) for coords, _, _ in fake.backend.prompts] == [7, 6, 6]
    assert prediction.masks.shape == (19, 1, 256, 256)
    embedding = session.encode(image)
    together = session.segment(embedding, points=points)
    for i in (0, 8, 18):
        alone = session.segment(embedding, points=points[i])
        np.testing.assert_allclose(together.low_res_logits[i], alone.low_res_logits[0], atol=1e-5)


# Conventions
@pytest.mark.parametrize(
    ("order", "frame", "expected"),
    [
        ("xy", "network", [[48, 85.33333]]),
        ("yx", "network", [[85.33333, 48]]),
        ("xy", "image", [[30, 40]]),
        ("yx", "image", [[40, 30]]),
    ],
)
def test_points_go_in_as_the_manifest_says(
    faked, image, order: str, frame: str, expected: list[list[float]]
) -> None:
    with faked(point_order=order, point_frame=frame) as session:
        session.segment(session.encode(image), points=[(30, 40)])
        coords, labels, mask = session.backend.prompts[0]
    np.testing.assert_allclose(coords[0], [*expected, [0, 0]], rtol=1e-6)
    assert labels.tolist() == [[1, -1]]
    assert mask is None


def test_a_yx_network_gets_the_clicks_an_xy_network_would_get_swapped(
    bundle: Path, session, tmp_path: Path
) -> None:
    square = seeded_image(90, 2)
    copy = copied(bundle, tmp_path)
    edit_manifest(copy, conventions__point_order="xy")
    assert session.conventions.point_order == "yx"
    with load(copy) as swapped:
        prediction = session.segment(session.encode(square), points=[(20, 70)], box=(5, 10, 80, 60))
        same = swapped.segment(swapped.encode(square), points=[(70, 20)], box=(10, 5, 60, 80))
        other = swapped.segment(swapped.encode(square), points=[(20, 70)], box=(5, 10, 80, 60))
    assert_same(prediction, same)
    assert np.abs(prediction.low_res_logits - other.low_res_logits).max() > 1e-3


def test_a_previous_mask_is_fed_back(session, image) -> None:
    embedding = session.encode(image)
    first = session.segment(embedding, points=POINTS[0])
    logits = first.low_res_logits
    again = session.segment(embedding, points=POINTS[0], mask=logits)
    for same in (logits[0], logits[0, 0]):
        assert_same(again, session.segment(embedding, points=POINTS[0], mask=same))
    assert np.abs(again.low_res_logits - logits).max() > 1e-3
    zeros = session.segment(embedding, points=POINTS[0], mask=np.zeros((64, 64)))
    assert np.abs(zeros.low_res_logits - logits).max() > 1e-3, "an empty mask is not no mask"


def test_what_the_first_click_needs_is_built_while_the_image_is_encoded(session: Session) -> None:
    axis_operator.cache_clear()
    rng = np.random.default_rng(0)
    embedding = session.encode(rng.integers(0, 255, (211, 307), np.uint8))
    built = axis_operator.cache_info().misses
    assert built == 2
    session.segment(embedding, points=[(100, 50)])
    assert axis_operator.cache_info().misses == built
