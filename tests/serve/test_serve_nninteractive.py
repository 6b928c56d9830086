"""nnInteractive's own client against the server: masks are `segment_volume`'s, voxel by voxel."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from nnInteractive.inference.remote import (
    ServerAtCapacityError,
    SessionExpiredError,
    nnInteractiveRemoteInferenceSession,
)
from nninteractive_client import SPACING, connected

from medsa_deploy import Session, Structure, VolumeOptions, load, segment_volume
from medsa_deploy.serve.images import open_array
from medsa_deploy.serve.server import Server

CLICKS = (((5, 15, 20), True), ((5, 20, 30), True), ((5, 3, 4), False), ((9, 15, 20), True))
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def server(serving, bundle: Path, bundle_3d: Path) -> Server:
    return serving(bundle, bundle_3d, users=4)


@pytest.fixture(scope="module")
def sessions(bundle: Path, bundle_3d: Path) -> Iterator[dict[str, Session]]:
    with load(bundle) as flat, load(bundle_3d) as deep:
        yield {"": flat, f"/models/{bundle_3d.stem}/class 2": deep}


def expected(
    session: Session, array: np.ndarray, structure: Structure, *, spacing=SPACING, **options: bool
) -> np.ndarray:
    """The mask of `segment_volume` with the same prompts."""
    volume = open_array(array, spacing, most_bytes=10**9).volume
    prediction = segment_volume(session, volume, [structure], VolumeOptions(**options))
    class_name = structure.class_name
    return prediction.labels == (prediction.names.index(class_name) + 1 if class_name else 1)


def clicked(count: int, path: str) -> Structure:
    """The first clicks as a structure."""
    points, signs = zip(*CLICKS[:count], strict=True)
    class_name = "class 2" if path else None
    return Structure(points=points, labels=tuple(map(int, signs)), class_name=class_name)


@pytest.mark.parametrize("deep", [False, True], ids=["2D", "3D chunks, several classes"])
def test_masks_are_those_of_segment_volume(server, sessions, array, deep: bool) -> None:
    path = list(sessions)[deep]
    session = sessions[path]
    with connected(server, array, path) as client:
        masks = []
        for count, (point, positive) in enumerate(CLICKS, 1):
            client.add_point_interaction(point, positive)
            masks.append(client.target_buffer.copy())
            assert (masks[-1] == expected(session, array, clicked(count, path))).all()
        assert masks[-1].any()
        assert len({mask.tobytes() for mask in masks}) > 2
        client.set_do_autozoom(True)
        client._predict()
        structure = clicked(len(CLICKS), path)
        followed = expected(session, array, structure, propagate=True)
        assert (client.target_buffer == followed).all()
        client.set_do_autozoom(False)
        for mask in [*masks[-2::-1], np.zeros_like(masks[0])]:
            assert client.undo()
            assert (client.target_buffer == mask).all()
        assert not client.undo()
        assert client.add_bbox_interaction([[4, 5], [10, 28], [12, 36]], True) is not None
        boxed = Structure(boxes=((4, 10, 12, 5, 28, 36),), class_name=structure.class_name)
        assert (client.target_buffer == expected(session, array, boxed)).all()
        client.reset_interactions()
        client.add_point_interaction(*CLICKS[0])
        assert (client.target_buffer == masks[0]).all()


def test_one_slice_is_an_image(server, sessions, array) -> None:
    """napari sends a picture as (1, 1, H, W)."""
    plane = array[5:6].astype(np.float32)
    with connected(server, plane, spacing=(1, 1, 1)) as client:
        client.add_point_interaction((0, 15, 20), True)
        structure = Structure(points=((0, 15, 20),), labels=(1,))
        assert (
            client.target_buffer == expected(sessions[""], plane, structure, spacing=(1, 1, 1))
        ).all()


def test_what_is_not_supported_is_said(server, array) -> None:
    with connected(server, array) as client:
        assert client.supported_interactions["points"]
        assert client.supported_interactions["bbox2d"]
        assert not client.supported_interactions["scribble"]
        assert not client.supported_interactions["lasso"]
        assert client.supports_undo
        with pytest.raises(httpx.HTTPStatusError) as refusal:
            client.add_scribble_interaction(client.target_buffer, True)
        assert refusal.value.response.status_code == 501
        with pytest.raises(httpx.HTTPStatusError, match="501"):
            client.add_bbox_interaction([[4, 5], [10, 28], [12, 36]], False)
        with pytest.raises(httpx.HTTPStatusError) as refusal:
            client.add_point_interaction((5, 400, 20), True)
        assert refusal.value.response.status_code == 422
        assert "outside the volume" in refusal.value.response.json()["detail"]
        client.add_point_interaction((5, 15, 20), True)  # the refused one is not counted
        assert client.target_buffer.any()


def test_two_clients_are_not_mixed_up(server, sessions, array) -> None:
    other_array = np.ascontiguousarray(array[:, ::-1])
    with connected(server, array) as client, connected(server, other_array) as other:
        for point, positive in CLICKS[:2]:
            client.add_point_interaction(point, positive)
            other.add_point_interaction(point, positive)
        structure = clicked(2, "")
        for connection, values in ((client, array), (other, other_array)):
            assert (connection.target_buffer == expected(sessions[""], values, structure)).all()
        assert (client.target_buffer != other.target_buffer).any()


def test_leases_end(serving, bundle: Path, array) -> None:
    server = serving(bundle, users=1, idle_seconds=500, liveness_seconds=500)
    with connected(server, array) as client:
        with pytest.raises(ServerAtCapacityError, match="1 users are connected"):
            nnInteractiveRemoteInferenceSession(server.url)
        client.add_point_interaction(*CLICKS[0])
        (lease,) = server.service.leases.all()
        lease.last_action -= 501  # the user did nothing for so long
        limit = time.monotonic() + 60
        while server.service.leases.all() and time.monotonic() < limit:
            server.service.leases.expire()  # not while the answer to the click is still sent
            time.sleep(0.02)
        assert time.monotonic() < limit
        assert not len(server.service.cache)
        assert server.service.leases.image_bytes == 0
        with pytest.raises(SessionExpiredError, match="expired"):
            client.add_point_interaction(*CLICKS[1])
    with connected(server, array) as client:
        client.add_point_interaction(*CLICKS[0])
