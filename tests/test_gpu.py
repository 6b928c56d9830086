"""Engines on a real GPU, against ONNX Runtime on the processor. `make gpu-check` runs these.

TensorRT and TensorRT-RTX cannot meet in a process: MEDSA_TEST_FLAVOR says which one to try, by
default the first that is installed. With MEDSA_REHEARSAL the stand-ins take the GPU's place.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rehearsal
from command_line import call, copied
from numpy.testing import assert_array_equal

from medsa_deploy import errors, load, transforms
from medsa_deploy.kernels.postprocess import region
from medsa_deploy.nvidia import cuda, tensorrt_api
from medsa_deploy.nvidia.device_array import DeviceArray
from medsa_deploy.runtime import Session

pytestmark = pytest.mark.gpu

IMAGE = np.random.default_rng(0).integers(0, 256, (200, 240), dtype=np.uint8)
PROMPTS = (
    {"points": [(120, 90)]},
    {"points": [(120, 90), (30, 40)], "labels": [1, 0]},
    {"box": (40, 30, 180, 170)},
    {"points": [[(10, 10)], [(120, 90)], [(200, 150)]]},
)
ROUNDS = 1 if rehearsal.rehearsing() else 20
"""Images of each thread."""
CLOSE = 5e-3
"""Relative L2 that TF32 may differ by, over all layers."""


@pytest.fixture(scope="module", autouse=True)
def flavor() -> Iterator[tensorrt_api.Flavor]:
    """The library that runs the engines."""
    choice = os.environ.get("MEDSA_TEST_FLAVOR")
    with pytest.MonkeyPatch.context() as monkeypatch:
        if rehearsal.rehearsing():
            rehearsal.install(monkeypatch, choice or "tensorrt")
        yield next(
            f
            for f in tensorrt_api.FLAVORS
            if (f == choice if choice else tensorrt_api.installed(f))
        )


@pytest.fixture(scope="module")
def engines(
    bundle: Path, tmp_path_factory: pytest.TempPathFactory, flavor: tensorrt_api.Flavor
) -> Path:
    """A bundle with engines for this GPU. Tests must not change it: copy it first."""
    copy = copied(bundle, tmp_path_factory.mktemp("engines"))
    device = cuda.device()
    assert device is not None
    target = ["--target", device.capability] if flavor == "rtx" else []
    done = call("build-engine", copy, "--fp32", "--no-tf32", "--flavor", flavor, *target)
    assert done.code == 0, done.err
    return copy


def difference(values: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def compare(session: Session, plain: Session) -> None:
    """Every prompt three times: plainly, captured, replayed."""
    reference = plain.encode(IMAGE)
    for _ in range(3):
        embedding = session.encode(IMAGE)
        assert difference(np.asarray(embedding.values), reference.values) < CLOSE
        for prompt in PROMPTS:
            prediction = session.segment(embedding, **prompt)
            expected = plain.segment(reference, **prompt)
            assert difference(prediction.low_res_logits, expected.low_res_logits) < CLOSE


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_engines_give_the_masks_of_the_graphs(
    engines: Path, flavor: tensorrt_api.Flavor, cuda_graphs: bool
) -> None:
    with (
        load(engines, backend=flavor, cuda_graphs=cuda_graphs) as session,
        load(engines) as plain,
    ):
        compare(session, plain)
        embedding = session.encode(IMAGE)
    with pytest.raises(errors.UsageError, match="released"):
        np.asarray(embedding.values)


def test_masks_are_made_on_the_gpu_and_may_stay_there(
    engines: Path, flavor: tensorrt_api.Flavor
) -> None:
    """Those that numpy makes of the logits, but where these are the threshold up to rounding."""
    with load(engines, backend=flavor) as session:
        assert session.backend.facts()["masks"] == "GPU"
        embedding = session.encode(IMAGE)
        for prompt in PROMPTS:
            for on_device in (False, True):
                prediction = session.segment(embedding, **prompt, on_device=on_device)
                assert isinstance(prediction.masks, DeviceArray) == on_device
                rule = prediction.rule
                logits = transforms.pixel_values(
                    prediction.low_res_logits, prediction.frame, rule.postprocess
                )
                threshold = rule.threshold
                clear = np.abs(logits - threshold) > 1e-6 * max(
                    float(np.abs(logits).max()), abs(threshold)
                )
                masks = np.asarray(prediction.masks)
                assert_array_equal(masks[clear], (logits > threshold)[clear])
                assert prediction.regions == [[region(mask) for mask in of_set] for of_set in masks]


def test_a_frame_on_the_gpu_is_prepared_there(engines: Path, flavor: tensorrt_api.Flavor) -> None:
    gpu = cuda.Gpu()
    with gpu.current():
        address = gpu.allocate(IMAGE.nbytes)
        gpu.write(address, IMAGE.tobytes())
    interface = {"shape": IMAGE.shape, "typestr": "|u1", "data": (address, True), "version": 3}
    theirs = SimpleNamespace(__cuda_array_interface__=interface)
    with load(engines, backend=flavor) as session:
        expected = np.asarray(session.encode(IMAGE).values)
        values = np.asarray(session.encode(theirs).values)
    gpu.close()
    assert difference(values, expected) < CLOSE


def test_verify_marks_them(engines: Path, tmp_path: Path, flavor: tensorrt_api.Flavor) -> None:
    copy = copied(engines, tmp_path)
    for folder in (copy / "engines").glob("*"):
        if not folder.name.startswith(f"{flavor}-fp32-"):
            shutil.rmtree(folder)
    done = call("verify", copy, "--json")
    assert done.code == 0, done.err
    assert [engines["state"] for engines in done.json["engines"]] == ["verified"]


def test_loading_again_and_again_leaks_nothing(engines: Path, flavor: tensorrt_api.Flavor) -> None:
    for _ in range(5):
        with load(engines, backend=flavor) as session:
            session.segment(session.encode(IMAGE), **PROMPTS[0])


def test_two_sessions_in_two_threads(engines: Path, flavor: tensorrt_api.Flavor) -> None:
    """Each captures and replays graphs while the other does, reads arrays, and a third is opened.

    Two threads on one session are refused, or wait for their turn by chance; never a wrong mask.
    """
    with load(engines) as plain:
        reference = plain.encode(IMAGE)
        expected = [plain.segment(reference, **prompt).low_res_logits for prompt in PROMPTS]
    problems: list[BaseException] = []

    def work(session: Session) -> None:
        try:
            for _ in range(ROUNDS):
                embedding = session.encode(IMAGE)
                for prompt, logits in zip(PROMPTS, expected, strict=True):
                    prediction = session.segment(embedding, **prompt)
                    assert difference(prediction.low_res_logits, logits) < CLOSE
                assert difference(np.asarray(embedding.values), reference.values) < CLOSE
        except BaseException as e:
            problems.append(e)

    with load(engines, backend=flavor) as first, load(engines, backend=flavor) as second:
        threads = [threading.Thread(target=work, args=(session,)) for session in (first, second)]
        for thread in threads:
            thread.start()
        with load(engines, backend=flavor) as third:
            work(third)
        for thread in threads:
            thread.join()
        assert problems == []
        refused = []

        def call_first() -> None:
            try:
                first.encode(IMAGE)
            except errors.UsageError as e:
                refused.append(str(e))

        threads = [threading.Thread(target=call_first) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all("two threads use one session" in text for text in refused)
        work(first)
        assert problems == []
        assert first.backend.facts()["cuda_graphs"] is True


def test_a_full_memory_leaves_a_session_that_works(
    engines: Path, flavor: tensorrt_api.Flavor
) -> None:
    gpu = cuda.Gpu()
    with load(engines, backend=flavor) as session:
        embeddings = [session.encode(IMAGE) for _ in range(3)]
        expected = session.segment(embeddings[0], **PROMPTS[0])
        del embeddings[1:]
        block = 1 << 30
        while block >= 1 << 16:
            try:
                with gpu.current():
                    gpu.allocate(block)
            except errors.DeviceMemoryError:
                block //= 2
        with pytest.raises(errors.DeviceMemoryError, match="memory is full"):
            embeddings += [session.encode(IMAGE) for _ in range(1000)]
        full = session.segment(embeddings[0], **PROMPTS[0])
        assert difference(full.low_res_logits, expected.low_res_logits) < CLOSE
        with pytest.raises(errors.DeviceMemoryError, match="memory is full"):
            load(engines, backend=flavor)
        gpu.close()
        with load(engines, backend=flavor) as other:
            again = other.segment(other.encode(IMAGE), **PROMPTS[0])
        assert difference(again.low_res_logits, expected.low_res_logits) < CLOSE


def test_onnxruntime_on_the_gpu(bundle: Path) -> None:
    with load(bundle, backend="onnxruntime-cuda") as session, load(bundle) as plain:
        compare(session, plain)
