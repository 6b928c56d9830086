"""Masks that nnInteractive's own client brings: the session's with the same mask prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from nninteractive_client import SPACING, connected

from medsa_deploy import Session, Structure, load, segment_volume
from medsa_deploy.serve.images import open_array
from medsa_deploy.serve.initial_mask import MASK_LOGIT, mask_logits
from medsa_deploy.serve.server import Server
from medsa_deploy.transforms import Frame

SHAPE = (12, 40, 48)
POSITIVE, NEGATIVE = ((5, 15, 20), True), ((6, 24, 33), False)
BOX = [12, 10, 36, 28]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def server(serving, bundle: Path, bundle_3d: Path, bundle_of) -> Server:
    return serving(bundle, bundle_3d, bundle_of("efficientsam_official"))


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    """(12, 40, 48), in slices 4…6, with a hole and a ragged edge."""
    inside = np.zeros(SHAPE, np.uint8)
    inside[4:7, 10:28, 12:36] = 1
    inside[4:7, 14:17, 20:23] = 0
    inside[5, 27, ::2] = 0
    return inside


def logits(plane: np.ndarray) -> np.ndarray:
    """(40, 48) → (64, 64): how much of each pixel the mask covers."""
    fine = plane.astype(np.float64).repeat(8, 0).repeat(4, 1)  # 320 × 192
    covered = fine.reshape(64, 5, 64, 3).mean(axis=(1, 3))
    return (MASK_LOGIT * (2 * covered - 1)).astype(np.float32)


def in_python(
    session: Session,
    array: np.ndarray,
    mask: np.ndarray,
    prompts: Mapping[int, dict[str, Any]],
    channel: int = 0,
) -> np.ndarray:
    """Slices → masks of the session, with the slices' prompts and their masks; else `mask`."""
    volume = open_array(array, SPACING, most_bytes=10**9).volume
    any_structure = Structure(points=((5, 15, 20),), labels=(1,))
    window = segment_volume(session, volume, [any_structure]).intensity_window
    masks, chunk = mask != 0, session.manifest.network.chunk
    for index, prompt in prompts.items():
        first = index // chunk * chunk
        slices = [volume.slice(k) for k in range(first, first + chunk)]
        embeddings = session.encode_slices(slices, intensity_window=window)
        prompt |= {"mask": logits(mask[index])} if mask[index].any() else {}
        segmented = session.segment(embeddings[index - first], **prompt)
        masks[index] = segmented.masks.reshape(-1, 40, 48)[channel]
    return masks


def test_a_mask_is_shown_segmented_again_and_refined(server, bundle: Path, array, mask) -> None:
    positive = {"points": [(20, 15)], "labels": [1]}
    negative = {"points": [(33, 24)], "labels": [0], "box": BOX}
    with load(bundle) as session, connected(server, array) as client:
        assert client.supports_initial_label
        client.add_point_interaction((9, 15, 20), True)
        before = client.target_buffer.copy()
        assert client.add_initial_seg_interaction(mask) is None
        assert (client.target_buffer == mask).all()
        client.add_point_interaction(*POSITIVE)
        clicked = in_python(session, array, mask, {5: positive})
        assert (client.target_buffer == clicked).all()
        client.add_point_interaction(*NEGATIVE)
        refined = in_python(session, array, mask, {5: positive, 6: negative})
        assert (client.target_buffer == refined).all()
        for expected in (clicked, mask, before):
            assert client.undo()
            assert (client.target_buffer == expected).all()
        assert not client.undo()

        client.add_initial_seg_interaction(mask, run_prediction=True)
        everywhere = {index: {"box": BOX} for index in (4, 5, 6)}
        again = in_python(session, array, mask, everywhere)
        assert (client.target_buffer == again).all()
        assert (again[5] != refined[5]).any()
        client.add_point_interaction(*POSITIVE)
        refined = in_python(session, array, mask, everywhere | {5: positive})
        assert (client.target_buffer == refined).all()
        assert client.undo()
        assert (client.target_buffer == again).all()

        client.reset_interactions()
        assert not client.undo()
        client.add_initial_seg_interaction(mask.astype(bool))
        assert client._predict() is not None
        assert (client.target_buffer == again).all()


def test_a_chunk_of_slices(server, bundle_3d: Path, array, mask) -> None:
    with (
        load(bundle_3d) as session,
        connected(server, array, f"/models/{bundle_3d.stem}/class 2") as client,
    ):
        client.add_initial_seg_interaction(mask, run_prediction=True)
        everywhere = {index: {"box": BOX} for index in (4, 5, 6)}
        assert (client.target_buffer == in_python(session, array, mask, everywhere, 1)).all()
        client.reset_interactions()
        client.add_initial_seg_interaction(mask)
        client.add_point_interaction(*POSITIVE)
        click = {"points": [(20, 15)], "labels": [1]}
        clicked = {index: dict(click) for index in (4, 5, 6, 7)}
        assert (client.target_buffer == in_python(session, array, mask, clicked, 1)).all()


def test_a_mask_that_cannot_be_used_is_refused(server, bundle: Path, array, mask) -> None:
    with connected(server, array) as client:
        client.add_point_interaction(*POSITIVE)
        clicked = client.target_buffer.copy()
        client.target_buffer = np.zeros((1, 2, 3), np.uint8)
        with pytest.raises(httpx.HTTPStatusError) as refusal:
            client.add_initial_seg_interaction(np.zeros((1, 2, 3), np.uint8))
        assert refusal.value.response.status_code == 422
        assert "expected (12, 40, 48)" in refusal.value.response.json()["detail"]
        client.target_buffer = np.ones(SHAPE, np.uint8)
        client._predict()  # the server sends all of the mask: it does not know the client's
        assert (client.target_buffer == clicked).all()
        client.add_initial_seg_interaction(np.zeros_like(mask), run_prediction=True)
        assert not client.target_buffer.any()
        assert client._predict() is None
        assert client.undo()
        assert (client.target_buffer == clicked).all()


def test_a_network_without_mask_prompts(server, array, mask) -> None:
    with connected(server, array, "/models/efficientsam_official") as client:
        assert not client.supports_initial_label
        client.add_point_interaction(*POSITIVE)
        clicked = client.target_buffer.copy()
        with pytest.raises(httpx.HTTPStatusError) as refusal:
            client.add_initial_seg_interaction(mask)
        assert refusal.value.response.status_code == 501
        detail = refusal.value.response.json()["detail"]
        assert "takes no mask prompt: begin the object with a click or a box" in detail
        client._predict()
        assert (client.target_buffer == clicked).all()


def test_a_mask_in_a_frame_with_padding() -> None:
    plane = np.zeros((30, 60), bool)
    plane[10:20, 15:30] = True
    frame = Frame(image_size=(30, 60), network_size=256, content_size=(128, 256))
    expected = np.full((64, 64), -MASK_LOGIT, np.float32)
    rows = np.clip(np.minimum(np.arange(1, 65) - 32 / 3, 64 / 3 - np.arange(64)), 0, 1)
    columns = (np.arange(64) >= 16) & (np.arange(64) < 32)
    expected += 2 * MASK_LOGIT * rows[:, None] * columns
    np.testing.assert_allclose(mask_logits(plane, frame, 64), expected, atol=1e-5)
