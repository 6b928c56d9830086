"""A chain of backends: what fails is given up, and what comes after is marked."""

from __future__ import annotations

import pytest
from device_sessions import BOX, POINT, assert_masks, chain, frame, raising, same
from fake_gpu import CudaMemoryError, Machine
from fake_network import BrightPixels
from numpy.testing import assert_array_equal

from medsa_deploy import errors
from medsa_deploy.nvidia.device_array import DeviceArray
from medsa_deploy.runtime import Session
from medsa_deploy.runtime.backends.fallback import FallbackBackend
from medsa_deploy.transforms import prompts


def test_a_fallback_is_marked(machine: Machine, session: Session, plain: Session, caplog) -> None:
    falling = chain(session, plain)
    same(falling, plain, frame(0), **POINT)
    embedding = falling.encode(frame(1))
    machine.on_wait = raising(CudaMemoryError("cuMemAlloc failed: out of memory"))
    backend = falling.backend
    with pytest.raises(errors.DeviceError, match=r"was given up.*out of memory.*encode it again"):
        falling.segment(embedding, **POINT)
    assert backend.name == "bright pixels"
    prediction = falling.segment(falling.encode(frame(1)), **POINT)
    assert "tensorrt: the GPU's memory is full" in prediction.degraded
    assert_array_equal(prediction.masks, plain.segment(plain.encode(frame(1)), **POINT).masks)
    assert "plain is used, because tensorrt: the GPU's memory is full" in caplog.text
    machine.on_wait = lambda: None
    assert falling.segment(falling.encode(frame(2)), **POINT).degraded == prediction.degraded
    falling.close()


def test_an_embedding_is_brought_along_where_it_can_be(
    machine: Machine, session: Session, plain: Session
) -> None:
    falling = chain(session, plain)
    embedding = falling.encode(frame(1))
    machine.refuses = "Error Code 3"
    prediction = falling.segment(embedding, **BOX)
    assert "Error Code 3" in prediction.degraded
    assert_array_equal(prediction.masks, plain.segment(plain.encode(frame(1)), **BOX).masks)
    assert machine.used == machine.pinned == 0


def test_frames_and_masks_stay_on_the_gpu_within_a_chain(
    machine: Machine, session: Session, plain: Session
) -> None:
    """Until its first backend is given up; also between two prompt sets of one call."""
    falling, image = chain(session, plain), frame(1)[:50]
    embedding, on_host = falling.encode(machine.put(image)), plain.encode(image)
    prediction = falling.segment(embedding, points=[(9, 9)], on_device=True)
    assert isinstance(prediction.masks, DeviceArray)
    assert_masks(prediction, plain.segment(on_host, points=[(9, 9)]))
    sets = [*prompts(points=[(9, 9), (20, 30)], labels=[1, 0]), *prompts(points=[(9, 9)])]

    def on_wait() -> None:
        machine.refuses = "Error Code 3"

    machine.on_wait = on_wait
    prediction = falling.segment_sets(embedding, sets)
    assert "Error Code 3" in prediction.degraded
    expected = plain.segment_sets(on_host, sets)
    assert_array_equal(prediction.masks, expected.masks)
    assert prediction.regions == expected.regions
    with pytest.raises(errors.UsageError, match="bright pixels takes no frames on a GPU"):
        falling.encode(machine.put(image))
    with pytest.raises(errors.UsageError, match="bright pixels makes no masks on a GPU"):
        falling.segment(falling.encode(image), points=[(9, 9)], on_device=True)


def test_an_encoder_that_fails_falls_back_at_once(
    machine: Machine, session: Session, plain: Session
) -> None:
    falling = chain(session, plain)
    machine.refuses = "Error Code 3"
    prediction = falling.segment(falling.encode(frame(1)), **POINT)
    assert "Error Code 3" in prediction.degraded
    assert_array_equal(prediction.masks, plain.segment(plain.encode(frame(1)), **POINT).masks)


def test_a_chain_skips_what_cannot_be_opened(machine: Machine, plain: Session) -> None:
    def absent():
        raise errors.MissingDependencyError("onnxruntime-gpu", extra="gpu", purpose="it")

    def no_engine():
        raise errors.EngineError("no engines here")

    openers = [("tensorrt", no_engine), ("onnxruntime-cuda", absent)]
    last = ("plain", lambda: BrightPixels(plain.manifest.network))
    falling = Session(plain.manifest, FallbackBackend([*openers, last]))
    prediction = falling.segment(falling.encode(frame(0)), **POINT)
    assert prediction.degraded.startswith("tensorrt: no engines here; onnxruntime-cuda: it needs")
    assert falling.backend.facts()["degraded"] == prediction.degraded
    with pytest.raises(errors.MissingDependencyError):
        FallbackBackend(openers)


def test_a_chain_survives_whatever_an_opener_says(machine: Machine, plain: Session) -> None:
    def saying(error: BaseException):
        def opener():
            raise error

        return opener

    last = ("plain", lambda: BrightPixels(plain.manifest.network))
    for error in (
        errors.UsageError("TensorRT 8 is installed"),
        errors.BundleError("no graph"),
        ImportError("libnvinfer.so.10: cannot open shared object file"),
        OSError("libcuda"),
    ):
        falling = Session(plain.manifest, FallbackBackend([("tensorrt", saying(error)), last]))
        assert str(error) in falling.segment(falling.encode(frame(0)), **POINT).degraded


def test_an_interrupted_step_down_goes_on_with_the_next(
    machine: Machine, session: Session, plain: Session
) -> None:
    def interrupted():
        raise KeyboardInterrupt

    last = ("plain", lambda: BrightPixels(plain.manifest.network))
    openers = [("tensorrt", lambda: session.backend), ("rtx", interrupted), last]
    falling = Session(plain.manifest, FallbackBackend(openers))
    machine.refuses = "Error Code 3"
    with pytest.raises(KeyboardInterrupt):
        falling.encode(frame(0))
    prediction = falling.segment(falling.encode(frame(0)), **POINT)
    assert "Error Code 3" in prediction.degraded
    assert_array_equal(prediction.masks, plain.segment(plain.encode(frame(0)), **POINT).masks)


def test_a_chain_that_ends_is_an_error_and_can_be_closed(
    machine: Machine, session: Session, plain: Session
) -> None:
    def no_engine():
        raise errors.EngineError("no engines here")

    falling = Session(
        plain.manifest,
        FallbackBackend([("tensorrt", lambda: session.backend), ("rtx", no_engine)]),
    )
    machine.refuses = "Error Code 3"
    with pytest.raises(errors.EngineError, match="no engines here"):
        falling.encode(frame(0))
    with pytest.raises(errors.DeviceError, match="no backend is left"):
        falling.encode(frame(0))
    falling.close()
    assert machine.used == 0
