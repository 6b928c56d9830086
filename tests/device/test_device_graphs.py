"""CUDA graphs: captured once per shape, bounded, done without where they cannot be; same masks."""

from __future__ import annotations

import threading
from pathlib import Path

import fake_gpu
import numpy as np
import pytest
from device_sessions import BOX, POINT, frame, open_engines, raising, same
from fake_engines import describe, session_of, write
from fake_gpu import CudaLogicError, Machine
from fake_network import SIDE
from numpy.testing import assert_array_equal

from medsa_deploy import errors
from medsa_deploy.runtime import Session


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_masks_are_those_of_the_network(
    monkeypatch, tmp_path: Path, name: str, cuda_graphs: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine = fake_gpu.install(monkeypatch, name=name)
    flavor = "rtx" if name == "tensorrt_rtx" else "tensorrt"
    plain = session_of(machine)
    folder = write(tmp_path / "x", plain.manifest, describe(flavor))
    with open_engines(plain, folder, flavor=flavor, cuda_graphs=cuda_graphs) as session:
        mask = np.random.default_rng(9).normal(size=(SIDE, SIDE)).astype(np.float32)
        for seed in range(5):
            same(session, plain, frame(seed), **POINT)
            same(session, plain, frame(seed), **BOX)
            same(session, plain, frame(seed), points=[(3, 4), (5, 6)], labels=[1, 0])
            same(session, plain, frame(seed), box=np.array([[1, 2, 30, 40], [5, 6, 50, 51]]))
        prediction = session.segment(session.encode(frame(1)), **POINT, mask=mask)
        expected = plain.segment(plain.encode(frame(1)), **POINT)
        assert_array_equal(prediction.low_res_logits, expected.low_res_logits + mask)
        same(session, plain, frame(1), **POINT)
        assert session.backend.facts()["backend"] == flavor
    assert machine.used == machine.pinned == machine.graphs == 0
    assert (machine.replayed > 10) == (cuda_graphs and flavor == "tensorrt")
    strategies = {True: "WHOLE_GRAPH_CAPTURE", False: "DISABLED"}
    assert machine.strategy == (strategies[cuda_graphs] if flavor == "rtx" else None)


def test_a_graph_of_one_shape_survives_another(
    machine: Machine, session: Session, plain: Session
) -> None:
    """A captured context whose shapes changed would compute the wrong prompt."""
    embedding = session.encode(frame(0))
    single = {"points": [(20, 30)]}
    two = {"points": [(20, 30), (40, 10)], "labels": [1, 0]}
    for prompt in (single, single, two, two, single, two, single):
        prediction = session.segment(embedding, **prompt)
        expected = plain.segment(plain.encode(frame(0)), **prompt)
        assert_array_equal(prediction.low_res_logits, expected.low_res_logits)
    assert machine.captured == 2
    assert machine.replayed == 3


def test_graphs_are_bounded(machine: Machine, session: Session, plain: Session) -> None:
    embeddings = [session.encode(frame(i)) for i in range(12)]
    for _ in range(3):
        for i, embedding in enumerate(embeddings):
            prediction = session.segment(embedding, **POINT)
            expected = plain.segment(plain.encode(frame(i)), **POINT)
            assert_array_equal(prediction.low_res_logits, expected.low_res_logits)
    for _ in range(4):
        session.segment(embeddings[0], **POINT)
    assert 0 < machine.graphs <= 16


def test_what_cannot_be_captured_runs_plainly(
    machine: Machine, session: Session, plain: Session, caplog: pytest.LogCaptureFixture
) -> None:
    machine.uncapturable = True
    for seed in range(4):
        same(session, plain, frame(seed), **POINT)
    assert machine.replayed == 0
    assert "runs without CUDA graphs: cuStreamEndCapture failed" in caplog.text
    assert session.backend.facts()["cuda_graphs"] is False


def test_a_graph_that_finds_no_memory_is_done_without(
    machine: Machine, session: Session, plain: Session, caplog, monkeypatch
) -> None:
    same(session, plain, frame(0), **POINT)

    def full(run: object) -> None:
        raise errors.DeviceMemoryError("the GPU's memory is full")

    monkeypatch.setattr("medsa_deploy.runtime.backends.engine_run.EngineRun._new_context", full)
    for seed in range(4):
        same(session, plain, frame(seed), **POINT)
    assert machine.captured == 0
    assert "runs without CUDA graphs: the GPU's memory is full" in caplog.text


def test_a_capture_of_another_thread_loses_nothing(
    machine: Machine, session: Session, plain: Session
) -> None:
    busy = CudaLogicError("cuStreamSynchronize failed: operation would make the capture invalid")
    machine.on_wait = raising(busy)
    with pytest.raises(errors.DeviceError, match="busy with a capture") as caught:
        session.encode(frame(0))
    assert not isinstance(caught.value, errors.DeviceLostError)
    machine.on_wait = lambda: None
    same(session, plain, frame(0), **POINT)


def test_a_graph_that_cannot_be_launched_is_named(
    machine: Machine, session: Session, plain: Session
) -> None:
    embedding = session.encode(frame(0))
    for _ in range(2):
        session.segment(embedding, **POINT)
    machine.unlaunchable = True
    with pytest.raises(
        errors.DeviceError, match=r"cuGraphLaunch failed: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
    ):
        session.segment(embedding, **POINT)
    machine.unlaunchable = False
    same(session, plain, frame(0), **POINT)


@pytest.mark.parametrize("other_call", ["read", "open"])
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_nothing_breaks_a_capture(monkeypatch, tmp_path: Path, name: str, other_call: str) -> None:
    """Neither reading an embedding in another thread, nor opening another session.

    TensorRT-RTX captures within its own call.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine = fake_gpu.install(monkeypatch, name=name)
    flavor = "rtx" if name == "tensorrt_rtx" else "tensorrt"
    plain = session_of(machine)
    folder = write(tmp_path / "x", plain.manifest, describe(flavor))
    session = open_engines(plain, folder, flavor=flavor)
    embedding = session.encode(frame(0))
    results: list[np.ndarray] = []

    def call() -> None:
        if other_call == "read":
            results.append(np.asarray(embedding.values))
        else:
            with open_engines(plain, folder, flavor=flavor) as other:
                results.append(np.asarray(other.encode(frame(0)).values))

    threads: list[threading.Thread] = []

    def on_capture() -> None:
        if threads:
            return
        threads.append(threading.Thread(target=call))
        threads[0].start()
        threads[0].join(0.3)
        assert threads[0].is_alive(), "it did not wait for the capture"

    machine.on_capture = on_capture
    for _ in range(3):
        prediction = session.segment(embedding, **POINT)
    threads[0].join(30)
    expected = plain.encode(frame(0))
    assert_array_equal(results[0], expected.values)
    assert_array_equal(prediction.masks, plain.segment(expected, **POINT).masks)
