"""Session: prompts, embeddings and outputs that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_backend import BOXES, FOUR_BY_FOUR, POINTS, full_size

from medsa_deploy import load
from medsa_deploy.errors import DeviceError, PromptError, UsageError
from medsa_deploy.transforms import Prompt


# What else it refuses
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({}, "the prompt is empty"),
        ({"labels": [1]}, "0 points have 1 labels"),
        ({"points": np.zeros((0, 2))}, "the prompt is empty"),
        ({"points": [(160, 0)]}, "outside the 160×120 image"),
        ({"points": [(0, -1)]}, "outside the 160×120 image"),
        ({"points": [(float("nan"), 5)]}, "outside"),
        ({"points": [(5, 5)], "labels": [2]}, "label 2"),
        ({"points": [(5, 5)], "labels": [1, 0]}, "1 points have 2 labels"),
        ({"points": [5, 5]}, "should have the shape"),
        ({"box": (90, 20, 10, 100)}, "empty or inverted"),
        ({"box": (10, 20, 10, 100)}, "empty or inverted"),
        ({"box": (10, 20, 170, 100)}, "outside the 160×120 image"),
        ({"mask": np.zeros((32, 32))}, r"expected \(64, 64\)"),
        ({"mask": np.full((64, 64), np.nan)}, "NaN"),
        ({"points": POINTS, "box": BOXES[:2]}, "different numbers of sets"),
    ],
)
def test_prompts_that_cannot_be_used(session, image, prompt: dict[str, Any], message: str) -> None:
    embedding = session.encode(image)
    with pytest.raises(PromptError, match=message):
        session.segment(embedding, **prompt)


NO_POINTS = np.zeros((0, 2), np.float32)


@pytest.mark.parametrize(
    "sets", [[], [Prompt(points=NO_POINTS, labels=NO_POINTS[:, 0], box=None, mask=None)]]
)
def test_no_prompt_sets_and_empty_ones_are_refused(session, image, sets: list[Prompt]) -> None:
    embedding = session.encode(image)
    with pytest.raises(PromptError, match="give"):
        session.segment_sets(embedding, sets)


def test_a_closed_session_is_refused(bundle: Path, image) -> None:
    with load(bundle) as session:
        embedding = session.encode(image)
    session.close()
    for use in (
        lambda: session.encode(image),
        lambda: session.segment(embedding, points=[(1, 1)]),
        lambda: session.backend,
    ):
        with pytest.raises(UsageError, match="this session is closed: load the bundle again"):
            use()


@pytest.mark.parametrize("part", ["values", "frame"])
def test_an_embedding_of_another_network_is_refused(session, image, part: str) -> None:
    embedding = session.encode(image)
    frame = replace(embedding.frame, network_size=512)
    other = {"values": embedding.values[..., :8, :8], "frame": frame}[part]
    with pytest.raises(UsageError, match="encode the image with this session"):
        session.segment(replace(embedding, **{part: other}), points=[(1, 1)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"embedding": np.nan}, "fake gave an embedding with NaN or Inf"),
        ({"embedding": np.inf}, "fake gave an embedding with NaN or Inf"),
        ({"logit": np.nan}, "fake gave masks with NaN or Inf"),
        ({"logit": -np.inf}, "fake gave masks with NaN or Inf"),
    ],
)
def test_nan_from_a_backend_never_becomes_a_mask(
    faked, values: dict[str, float], message: str
) -> None:
    session = faked(values=values)
    with pytest.raises(DeviceError, match=message):
        session.segment(session.encode(full_size(FOUR_BY_FOUR)), points=[(1, 1)])


def test_a_failing_backend_is_a_device_error(session, image) -> None:
    embedding = session.encode(image)
    coords = np.zeros((1, 2, 3), np.float32)  # three coordinates a point
    with pytest.raises(DeviceError, match=r"ONNX Runtime failed: .+"):
        session.backend.decode(embedding.values, coords, coords[..., 0], None)
