"""A real tritonserver: every model loads, and its masks are those of a session, bit for bit."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http
from triton_server import TritonServer

from medsa_deploy import errors, load, remote, transforms
from medsa_deploy.kernels.postprocess import unpack
from medsa_deploy.runtime import Session
from medsa_deploy.triton.models import RepositoryOptions
from medsa_deploy.triton.repository import write_repository

pytestmark = [pytest.mark.triton, pytest.mark.slow]

CLICKS = [
    {"points": [(120, 88)]},
    {"points": [(120, 88), (10, 200)], "labels": [1, 0]},
    {"box": (60, 40, 200, 150), "threshold": 0.3},
    {"boxes": [(60, 40, 200, 150), (0, 0, 90, 80)]},
    {"points": [[(120, 88)], [(30, 30)]]},
]
TYPES = {"uint8": "UINT8", "int16": "INT16", "float32": "FP32", "float64": "FP64", "int32": "INT32"}


@pytest.fixture(scope="module")
def server(liver: Path, bundle_3d: Path, serving: Callable[..., TritonServer]) -> TritonServer:
    return serving(liver, bundle_3d)


@pytest.fixture(scope="module")
def session(liver: Path) -> Iterator[Session]:
    """A session in this process, to compare with."""
    with load(liver) as session:
        yield session


def infer(
    server: TritonServer, model: str, arrays: dict[str, np.ndarray], **options: object
) -> tritonclient.http.InferResult:
    """One request by NVIDIA's client, with every output."""
    inputs = []
    for name, array in arrays.items():
        tensor = tritonclient.http.InferInput(name, list(array.shape), TYPES[array.dtype.name])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    with tritonclient.http.InferenceServerClient(server.http.removeprefix("http://")) as client:
        return client.infer(model, inputs, **options)


def test_every_model_is_ready(server: TritonServer) -> None:
    with tritonclient.http.InferenceServerClient(server.http.removeprefix("http://")) as client:
        states = {entry["name"]: entry["state"] for entry in client.get_model_repository_index()}
    kinds = ("session", "segment", "encoder", "decoder")
    assert states == {f"{b}_{k}": "READY" for b in ("liver", "medsa_hyp_3d") for k in kinds}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_masks_are_those_of_a_session(
    protocol: str, server: TritonServer, session: Session, images: list[np.ndarray]
) -> None:
    with remote.connect(getattr(server, protocol), "liver") as served:
        assert served.manifest == session.manifest
        assert (served.classes, served.image_size) == (session.classes, session.image_size)
        mine, theirs = session.encode(images[0]), served.encode(images[0])
        assert mine.frame == theirs.frame
        for prompts in CLICKS:
            expected, answer = session.segment(mine, **prompts), served.segment(theirs, **prompts)
            assert np.array_equal(answer.masks, expected.masks)
            assert answer.masks.any()
            assert np.array_equal(answer.low_res_logits, expected.low_res_logits)
            assert np.array_equal(answer.scores, expected.scores)
            assert answer.regions == expected.regions
            assert np.array_equal(answer.label_map(), expected.label_map())
        prompts = {"points": [(120, 88)], "mask": answer.low_res_logits[0, 0]}
        expected, answer = session.segment(mine, **prompts), served.segment(theirs, **prompts)
        assert np.array_equal(answer.masks, expected.masks)


@pytest.mark.parametrize("window", [None, "auto", (-50.0, 400.0)])
def test_raw_intensities_are_mapped_alike(
    window: object, server: TritonServer, session: Session, images: list[np.ndarray]
) -> None:
    raw = images[1].astype(np.int16) * 3 - 100
    with remote.connect(server.grpc, "liver") as served:
        mine = session.encode(raw, intensity_window=window)
        theirs = served.encode(raw, intensity_window=window)
        assert theirs.intensity_window == mine.intensity_window
        expected = session.segment(mine, box=(60, 40, 200, 150))
        assert np.array_equal(served.segment(theirs, box=(60, 40, 200, 150)).masks, expected.masks)
    arrays = {
        "intensities": raw.astype(np.float32)[None, ..., None],
        "boxes": np.array([[60, 40, 200, 150]], np.float32),
    }
    if isinstance(window, tuple):
        arrays["window"] = np.array(window)
    if window != "auto":
        words = infer(server, "liver_segment", arrays).as_numpy("masks")
        assert np.array_equal(unpack(words, 320), expected.masks)


def test_slices_of_a_3d_network(server: TritonServer, bundle_3d: Path, images) -> None:
    window = (0.0, 255.0)
    with load(bundle_3d) as mine, remote.connect(server.http, "medsa_hyp_3d") as served:
        expected = mine.encode_slices(images[:4], intensity_window=window)
        theirs = served.encode_slices(images[:4], intensity_window=window)
        for i, (embedding, other) in enumerate(zip(expected, theirs, strict=True)):
            prompts = {"points": [(120 + i, 88)]}
            mask = mine.segment(embedding, **prompts).masks
            assert np.array_equal(served.segment(other, **prompts).masks, mask)
        with pytest.raises(errors.UsageError, match="multiple of 4"):
            served.encode_slices(images[:3])
        with pytest.raises(errors.UsageError, match="encode_slices"):
            served.encode(images[0])


def test_an_image_with_its_prompts(
    server: TritonServer, session: Session, images: list[np.ndarray]
) -> None:
    arrays = {
        "image": images[2][None, ..., None],
        "points": np.array([[[120, 88]]], np.float32),
    }
    expected = session.segment(session.encode(images[2]), points=[(120, 88)])
    answer = infer(server, "liver_segment", arrays)
    assert np.array_equal(unpack(answer.as_numpy("masks"), 320), expected.masks)
    assert answer.as_numpy("image_size").tolist() == [240, 320]
    area, *box = answer.as_numpy("regions")[0, 0].tolist()
    assert (area, tuple(box)) == (expected.regions[0][0].area, expected.regions[0][0].box)
    assert (answer.as_numpy("timings_ms") > 0).all()
    sequence = {"sequence_id": 77, "sequence_start": True, "sequence_end": True}
    answer = infer(server, "liver_session", arrays, **sequence)
    assert np.array_equal(unpack(answer.as_numpy("masks"), 320), expected.masks)


def test_encoder_and_decoder_alone(
    server: TritonServer, session: Session, images: list[np.ndarray]
) -> None:
    """Requests to the encoder that arrive together share its runs."""
    conventions, size = session.conventions, session.image_size
    inputs = [transforms.preprocess(i, conventions.preprocess, size)[0][None] for i in images]
    before = server.metric("nv_inference_exec_count", "liver_encoder")
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda image: infer(server, "liver_encoder", {"image": image}), inputs * 3)
        )
    assert server.metric("nv_inference_exec_count", "liver_encoder") - before < len(answers)
    for image, answer in zip(inputs * 3, answers, strict=True):
        values = session.backend.encode(image)
        assert np.allclose(answer.as_numpy("image_embeddings"), values, atol=1e-4)
    (prompt,) = transforms.prompts(points=[(120, 88)])
    embedding = session.encode(images[0])
    coords, labels = transforms.network_prompt(prompt, embedding.frame, conventions, mask_size=64)
    arrays = {
        "image_embeddings": embedding.values,
        "point_coords": coords[None],
        "point_labels": labels[None],
        "mask_input": np.zeros((1, 1, 64, 64), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
    }
    logits = infer(server, "liver_decoder", arrays).as_numpy("low_res_masks")
    assert np.allclose(logits, session.decode_logits(embedding, [prompt])[0], atol=1e-4)


def test_six_interleaved_sessions(
    server: TritonServer, session: Session, images: list[np.ndarray]
) -> None:
    """Each keeps its own image, and each image is encoded once."""
    clicks = [(100 + 7 * i, 70 + 9 * i) for i in range(6)]
    embeddings = [session.encode(image) for image in images]
    expected = [
        [session.segment(embedding, points=[click]).masks for click in clicks]
        for embedding in embeddings
    ]
    barrier, starts = threading.Barrier(6), server.metric("nv_inference_count", "liver_session")

    def use(i: int) -> list[np.ndarray]:
        url = server.grpc if i % 2 else server.http
        with remote.connect(url, "liver") as served:
            embedding = served.encode(images[i])
            masks = []
            for click in clicks:
                barrier.wait(120)
                masks.append(served.segment(embedding, points=[click]).masks)
        return masks

    with ThreadPoolExecutor(6) as pool:
        for masks, wanted_masks in zip(pool.map(use, range(6)), expected, strict=True):
            assert np.array_equal(masks, wanted_masks)
    requests = server.metric("nv_inference_count", "liver_session") - starts
    assert requests == 6 * (1 + len(clicks) + 1)


def test_threads_share_a_session(
    server: TritonServer, session: Session, images: list[np.ndarray]
) -> None:
    expected = session.segment(session.encode(images[0]), points=[(120, 88)]).masks
    with remote.connect(server.http, "liver") as served, ThreadPoolExecutor(3) as pool:
        embedding = served.encode(images[0])
        calls = [pool.submit(served.segment, embedding, points=[(120, 88)]) for _ in range(9)]
        assert all(np.array_equal(call.result().masks, expected) for call in calls)


@pytest.mark.parametrize(
    ("model", "arrays", "message"),
    [
        ("liver_session", {"image": np.zeros((1, 240, 320), np.uint8)}, "unexpected shape"),
        ("liver_session", {"image": np.zeros((1, 9, 9, 1), np.int16)}, "data-type"),
        ("liver_session", {"image": np.zeros((1, 9, 9, 2), np.uint8)}, "ImageError"),
        ("liver_session", {"image": np.zeros((1, 9, 9, 1), np.uint8)}, "nothing to segment"),
        ("liver_session", {"display": np.full((1, 9, 9, 1), 300, np.float32)}, "0…255"),
        ("liver_session", {"points": np.zeros((1, 1, 2), np.float32)}, "carries no image"),
        ("liver_segment", {"points": np.zeros((1, 1, 2), np.float32)}, "carries no image"),
        ("liver_encoder", {"image": np.zeros((1, 2, 256, 256), np.float32)}, "unexpected shape"),
        ("spleen_session", {"points": np.zeros((1, 1, 2), np.float32)}, "unknown model"),
    ],
)
def test_unusable_requests_are_refused(
    model: str, arrays: dict[str, np.ndarray], message: str, server: TritonServer
) -> None:
    sequence = {"sequence_id": 78, "sequence_start": True} if "session" in model else {}
    with pytest.raises(tritonclient.utils.InferenceServerException, match=message):
        infer(server, model, arrays, **sequence)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_errors_are_those_of_a_session(
    protocol: str, server: TritonServer, session: Session, images: list[np.ndarray]
) -> None:
    url = getattr(server, protocol)
    with remote.connect(url, "liver") as served, remote.connect(url, "liver") as other:
        mine, theirs = session.encode(images[0]), served.encode(images[0])
        for prompts in (
            {"points": [(1000, 2)]},
            {"box": (5, 5, 2, 2)},
            {},
            {"points": [(3, 3)], "multimask": True},
            {"points": [(3, 3)], "threshold": 2.0},
        ):
            with pytest.raises(errors.MedsaError) as expected:
                session.segment(mine, **prompts)
            with pytest.raises(type(expected.value)) as refused:
                served.segment(theirs, **prompts)
            assert str(refused.value) == str(expected.value)
        with pytest.raises(errors.ImageError, match="nothing to segment"):
            served.encode(np.zeros((9, 9), np.uint8))
        with pytest.raises(errors.UsageError, match="another session"):
            other.segment(theirs, points=[(3, 3)])
    with pytest.raises(errors.UsageError, match="closed"):
        served.segment(theirs, points=[(3, 3)])
    with pytest.raises(errors.BundleError, match=r"serves no spleen_session.*liver_session"):
        remote.connect(url, "spleen", timeout_s=10)


def test_a_changed_bundle_is_refused(liver: Path, tmp_path: Path, triton_packages: Path) -> None:
    write_repository([liver], tmp_path / "models", RepositoryOptions())
    for model in ("liver_segment", "liver_decoder"):
        shutil.rmtree(tmp_path / "models" / model)
    copy = tmp_path / "models/liver_session/1/liver.medsa"
    manifest, encoder = copy / "manifest.json", tmp_path / "encoder.onnx"
    text = manifest.read_text()
    manifest.unlink()  # the files of the other models are links to this one
    manifest.write_text(text.replace("\n", "\n ", 1))
    encoder.write_bytes((copy / "encoder.onnx").read_bytes()[:-1] + b"\0")
    target = tmp_path / "models/liver_encoder/1/liver.medsa/encoder.onnx"
    target.unlink()
    encoder.rename(target)
    server = TritonServer(triton_packages, tmp_path / "models", tmp_path / "log")
    with pytest.raises(AssertionError), server:
        pytest.fail("the server started")
    assert "manifest.json is not as it was written" in server.log
    assert "encoder.onnx" in server.log
