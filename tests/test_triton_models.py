"""The python models and their client in one process: masks, memory, refusals."""

from __future__ import annotations

import contextlib
import gc
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from triton_backend import ModelServer

from medsa_deploy import errors, load, remote, transforms
from medsa_deploy.bundle.files import sha256
from medsa_deploy.kernels.postprocess import unpack
from medsa_deploy.remote import session as remote_session
from medsa_deploy.remote.transport import SequencePlace, Transport
from medsa_deploy.runtime import Session
from medsa_deploy.triton.embedding_store import EmbeddingStore, embedding_bytes
from medsa_deploy.triton.models import RepositoryOptions
from medsa_deploy.triton.refusals import error_of, error_text
from medsa_deploy.triton.repository import write_repository

URL = "http://127.0.0.1:8000"
CLICK = {"points": [(33, 20)]}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """(50, 70) uint8, its width no multiple of 32."""
    plane = np.random.default_rng(3).integers(0, 60, (50, 70), np.uint8)
    plane[10:30, 20:50] += 150
    return plane


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[Session]:
    with load(bundle, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """Room for two images and a half."""
    folder = tmp_path_factory.mktemp("served")
    liver = Path(shutil.copytree(bundle, folder / "liver.medsa"))
    with load(liver, threads=1) as session:
        size = embedding_bytes(session.encode(np.eye(9, dtype=np.uint8)))
    options = RepositoryOptions(embedding_bytes=int(2.5 * size))
    write_repository([liver], folder / "models", options)
    with pytest.MonkeyPatch.context() as monkeypatch:
        server = ModelServer(folder / "models", monkeypatch)
        monkeypatch.setattr(remote_session, "Transport", server.transport)
        yield server
        server.close()


@pytest.mark.parametrize(
    "prompts",
    [
        CLICK,
        {"points": [(33, 20), (2, 40)], "labels": [1, 0], "threshold": 0.25},
        {"boxes": [(20, 10, 50, 30), (1, 2, 30, 40)]},
    ],
)
def test_served_masks_are_a_sessions(
    prompts: dict[str, object], server: ModelServer, session: Session, image: np.ndarray
) -> None:
    with remote.connect(URL, "liver") as served:
        expected = session.segment(session.encode(image), **prompts)
        answer = served.segment(served.encode(image), **prompts)
    for name in ("masks", "scores", "low_res_logits"):
        assert np.array_equal(getattr(answer, name), getattr(expected, name))
    assert answer.regions == expected.regions
    assert answer.rule == expected.rule
    assert answer.masks.any()


def test_display_values_that_are_no_whole_numbers(
    server: ModelServer, session: Session, image: np.ndarray
) -> None:
    """Raw intensities become display values in the client; a slice may be flat there."""
    raw = image.astype(np.float32) * 7.3 - 20
    with remote.connect(URL, "liver") as served:
        mine, theirs = session.encode(raw), served.encode(raw)
        assert theirs.intensity_window == mine.intensity_window
        masks = session.segment(mine, **CLICK).masks
        assert np.array_equal(served.segment(theirs, **CLICK).masks, masks)
        (flat,) = served.encode_slices([np.zeros((50, 70), np.uint8)])
        expected = session.segment(*session.encode_slices([np.zeros((50, 70), np.uint8)]), **CLICK)
        assert np.array_equal(served.segment(flat, **CLICK).masks, expected.masks)


def test_one_request_for_image_and_prompts(
    server: ModelServer, session: Session, image: np.ndarray
) -> None:
    arrays = {
        "intensities": image.astype(np.float32)[None, ..., None],
        "window": np.array([10.0, 150.0]),
        "boxes": np.array([[20, 10, 50, 30]], np.float32),
    }
    embedding = session.encode(image.astype(np.float32), intensity_window=(10.0, 150.0))
    expected = session.segment(embedding, box=(20, 10, 50, 30))
    answer = server.execute("liver_segment", arrays)
    assert np.array_equal(unpack(answer["masks"], 70), expected.masks)
    assert answer["regions"][0, 0, 0] == expected.masks.sum()
    with pytest.raises(errors.UsageError, match="slices 0 to 0"):
        server.execute("liver_segment", arrays | {"slice": np.array([1], np.int32)})
    with pytest.raises(errors.PromptError, match="one prompt set or more"):
        server.execute("liver_segment", arrays | {"boxes": np.zeros((0, 4), np.float32)})
    with pytest.raises(errors.ImageError, match=r"image and intensities, expected one of"):
        server.execute("liver_segment", arrays | {"image": image[None, ..., None]})


def test_decoder_model(server: ModelServer, session: Session, image: np.ndarray) -> None:
    embedding = session.encode(image)
    (prompt,) = transforms.prompts(**CLICK)
    coords, labels = transforms.network_prompt(
        prompt, embedding.frame, session.conventions, mask_size=64
    )
    arrays = {
        "image_embeddings": np.asarray(embedding.values),
        "point_coords": coords[None],
        "point_labels": labels[None],
        "mask_input": np.zeros((1, 1, 64, 64), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
    }
    logits, scores = session.decode_logits(embedding, [prompt])
    answer = server.execute("liver_decoder", arrays)
    assert np.allclose(answer["low_res_masks"], logits, atol=1e-4)
    assert np.allclose(answer["iou_predictions"], scores, atol=1e-4)


def test_images_that_are_dropped(server: ModelServer, image: np.ndarray) -> None:
    """By the client, they free their memory; for room, the next prompt says so."""
    store = server.models["liver_session"]._store
    with remote.connect(URL, "liver") as served:
        first, second = served.encode(image), served.encode(image)
        assert len(store) == 2
        third = served.encode(image)
        with pytest.raises(errors.DeviceMemoryError, match="make room for newer ones"):
            served.segment(first, **CLICK)
        del third
        gc.collect()
        served.segment(second, **CLICK)
        assert len(store) == 1
    assert len(store) == store.bytes == 0
    assert not server.sequences


def test_a_lost_sequence(server: ModelServer, image: np.ndarray) -> None:
    with remote.connect(URL, "liver") as served:
        embedding = served.encode(image)
        server.sequences.clear()  # as a server that was restarted
        with pytest.raises(errors.DeviceLostError):
            served.segment(embedding, **CLICK)


def test_a_bundle_that_changed(bundle: Path, tmp_path: Path) -> None:
    """Another bundle in the place of the one that the configuration names."""
    write_repository([bundle], tmp_path / "models")
    config = tmp_path / "models" / f"{bundle.stem}_encoder" / "config.pbtxt"
    digest = sha256(bundle / "manifest.json")
    config.write_text(config.read_text().replace(digest, "0" * 64))
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        pytest.raises(errors.BundleError, match="changed since the repository was written"),
    ):
        ModelServer(tmp_path / "models", monkeypatch)


def test_the_store_forgets_idle_images(session: Session, image: np.ndarray) -> None:
    now = [0.0]
    embedding = session.encode(image)
    store = EmbeddingStore(most_bytes=1 << 30, idle_seconds=10, clock=lambda: now[0])
    store.add(1, [embedding])
    now[0] = 6.0
    store.add(2, [embedding])
    now[0] = 11.0
    store.remove_idle()
    with pytest.raises(errors.DeviceMemoryError, match="not used for 10 s"):
        store.find(1, slice_index=0)
    assert store.find(2, slice_index=0) is embedding
    with pytest.raises(errors.UsageError, match="slices 0 to 0"):
        store.find(2, slice_index=1)
    with pytest.raises(errors.UsageError, match="has no image"):
        store.find(3, slice_index=0)
    small = EmbeddingStore(most_bytes=1000, idle_seconds=10)
    with pytest.raises(errors.DeviceMemoryError, match="larger --cache"):
        small.add(1, [embedding])
    assert embedding_bytes(embedding) == store.bytes


@pytest.mark.parametrize(
    "error",
    [errors.PromptError("the box is empty"), errors.DeviceMemoryError("full:\nin two lines")],
)
def test_errors_travel(error: errors.MedsaError) -> None:
    read = error_of(f"[500] {error_text(error)}")
    assert type(read) is type(error)
    assert str(read) == str(error)


def test_other_errors_travel_as_a_fault() -> None:
    assert type(error_of(error_text(ValueError("x")))) is errors.DeviceError
    assert error_of("[400] unexpected shape for input") is None
    missing = errors.MissingDependencyError("a", extra="b", purpose="c")
    assert str(error_of(error_text(missing))) == str(missing)


@pytest.mark.parametrize(
    ("url", "timeout_s"), [("127.0.0.1:8000", 5), ("ftp://a:1", 5), (URL, 0), ("http://", 5)]
)
def test_addresses_that_cannot_be_used(url: str, timeout_s: float) -> None:
    with pytest.raises(errors.UsageError):
        Transport(url, timeout_s=timeout_s)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_is_not_there(scheme: str) -> None:
    """No port 9 is listened on; the deadline holds."""
    with pytest.raises(errors.DeviceError, match=r"did not answer within 0\.4 s"):
        Transport(f"{scheme}://127.0.0.1:9", timeout_s=0.4).model_config("liver_session")


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", b"?\r\n"]
)
def test_a_server_that_closes_connections(answer: bytes) -> None:
    """As one that is stopped: the call is sent again until its deadline, and then refused."""
    connections = 0
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def close_all() -> None:
            nonlocal connections
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    connections += 1
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(answer)

        thread = threading.Thread(target=close_all)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        arrays = {"image": np.zeros((1, 9, 9, 1), np.uint8)}
        with pytest.raises(errors.DeviceError, match="did not answer within 1 s"):
            Transport(url, timeout_s=1).infer(
                "liver_session", arrays, ["masks"], SequencePlace(number=1), again=True
            )
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert connections > 1
