"""A real tritonserver that is killed, restarted, stopped under load, or has no memory left."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from triton_server import TritonServer

from medsa_deploy import errors, load, remote
from medsa_deploy.runtime import Session
from medsa_deploy.triton.embedding_store import embedding_bytes

pytestmark = [pytest.mark.triton, pytest.mark.slow]

CLICK = {"points": [(120, 88)]}
IDLE_SECONDS = 3.0
LEAVE = """
import sys, os
import numpy as np
from medsa_deploy import remote
session = remote.connect(sys.argv[1], "liver")
embedding = session.encode(np.load(sys.argv[2]))
print(embedding.image.number, flush=True)
os._exit(9)
"""
"""A client that dies with an image on the server."""


@pytest.fixture(scope="module")
def session(liver: Path) -> Iterator[Session]:
    with load(liver) as session:
        yield session


@pytest.fixture(scope="module")
def small_server(
    liver: Path, session: Session, images, serving: Callable[..., TritonServer]
) -> TritonServer:
    """It keeps two images, for three seconds."""
    size = embedding_bytes(session.encode(images[0]))
    return serving(liver, embedding_bytes=int(2.5 * size), idle_seconds=IDLE_SECONDS)


def test_the_oldest_image_makes_room_and_says_so(
    small_server: TritonServer, session: Session, images: list[np.ndarray]
) -> None:
    with remote.connect(small_server.grpc, "liver") as served:
        first, second = (served.encode(image) for image in images[:2])
        served.segment(first, **CLICK)
        third = served.encode(images[2])
        with pytest.raises(errors.DeviceMemoryError, match="make room for newer ones"):
            served.segment(second, **CLICK)
        for i, embedding in ((0, first), (2, third)):
            expected = session.segment(session.encode(images[i]), **CLICK).masks
            assert np.array_equal(served.segment(embedding, **CLICK).masks, expected)
        del first  # frees its memory with the next call
        served.encode(images[3])
        assert served.segment(third, **CLICK).masks.any()


def test_a_client_that_dies_leaves_nothing(
    small_server: TritonServer, images: list[np.ndarray], tmp_path: Path
) -> None:
    """Its image is dropped after the idle time; until then others can use the server."""
    np.save(tmp_path / "image.npy", images[0])
    command = [sys.executable, "-c", LEAVE, small_server.http, str(tmp_path / "image.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 9, done.stderr
    with remote.connect(small_server.http, "liver") as served:
        assert served.segment(served.encode(images[1]), **CLICK).masks.any()
        embedding = served.encode(images[2])
        time.sleep(2 * IDLE_SECONDS)
        with pytest.raises((errors.DeviceLostError, errors.DeviceMemoryError), match="again"):
            served.segment(embedding, **CLICK)


def test_a_server_that_is_killed_and_restarted(
    small_server: TritonServer, session: Session, images: list[np.ndarray]
) -> None:
    """Images are lost, and said to be. A call that meets no server waits for one."""
    expected = session.segment(session.encode(images[0]), **CLICK).masks
    for url in (small_server.http, small_server.grpc):
        with remote.connect(url, "liver", timeout_s=150) as served:
            lost = served.encode(images[0])
            small_server.kill()
            restart = threading.Timer(1.0, small_server.start)
            restart.start()
            embedding = served.encode(images[0])
            restart.join()
            assert np.array_equal(served.segment(embedding, **CLICK).masks, expected)
            with pytest.raises(errors.DeviceLostError, match="encode the image again"):
                served.segment(lost, **CLICK)


def test_without_a_server(small_server: TritonServer, images: list[np.ndarray]) -> None:
    """The deadline holds, and the message names the server."""
    for url in (small_server.http, small_server.grpc):
        with remote.connect(url, "liver", timeout_s=2) as served:
            small_server.kill()
            start = time.monotonic()
            with pytest.raises(errors.DeviceError, match="did not answer within 2 s"):
                served.encode(images[0])
            assert time.monotonic() - start < 20
            with pytest.raises(errors.DeviceError, match="did not answer"):
                remote.connect(url, "liver", timeout_s=1)
        small_server.start()


def test_sigterm_under_load(
    small_server: TritonServer, session: Session, images: list[np.ndarray]
) -> None:
    """Every call ends with the right masks or an error.

    tritonserver goes on answering until its clients leave, 30 s at most, and then ends with a
    failure of its own if they did not.
    """
    expected = session.segment(session.encode(images[0]), **CLICK).masks
    answers: list[bool] = []
    refusals: list[errors.MedsaError] = []
    warm = threading.Semaphore(0)

    def click() -> None:
        with remote.connect(small_server.http, "liver", timeout_s=5) as served:
            try:
                embedding = served.encode(images[0])
                while True:
                    mask = served.segment(embedding, **CLICK).masks
                    answers.append(np.array_equal(mask, expected))
                    warm.release()
            except errors.MedsaError as e:
                refusals.append(e)

    threads = [threading.Thread(target=click) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        assert warm.acquire(timeout=120)
    small_server.stop()
    for thread in threads:
        thread.join(120)
    assert all(answers)
    assert len(answers) >= 4
    assert len(refusals) == len(threads)
    small_server.start()
