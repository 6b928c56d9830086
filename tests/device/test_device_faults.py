"""A lost GPU, NaN, refusals of TensorRT and interrupts: named, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from device_sessions import BOX, POINT, frame, open_engines, raising, same
from fake_gpu import CudaLogicError, Machine
from fake_network import SIDE

from medsa_deploy import errors
from medsa_deploy.runtime import Session


def test_a_lost_gpu_stays_lost(machine: Machine, session: Session) -> None:
    embedding = session.encode(frame(0))
    machine.on_wait = raising(CudaLogicError("cuStreamSynchronize failed: illegal address"))
    with pytest.raises(errors.DeviceLostError, match=r"illegal address.*start the program"):
        session.segment(embedding, **POINT)
    machine.on_wait = lambda: None
    for call in (
        lambda: session.segment(embedding, **POINT),
        lambda: session.encode(frame(0)),
        lambda: np.asarray(embedding.values),
    ):
        with pytest.raises(errors.DeviceLostError, match="illegal address"):
            call()
    session.close()


@pytest.mark.parametrize("step", ["encode", "frame", "mask on the GPU", "read"])
def test_a_gpu_is_lost_at_each_stage_of_a_stream(
    machine: Machine, session: Session, step: str
) -> None:
    embedding, theirs = session.encode(frame(0)), machine.put(frame(1))
    masks = session.segment(embedding, **POINT, on_device=True).masks
    steps = {
        "encode": lambda: session.encode(frame(1)),
        "frame": lambda: session.encode(theirs),
        "mask on the GPU": lambda: session.segment(embedding, **POINT, on_device=True),
        "read": lambda: np.asarray(masks),
    }
    machine.on_wait = raising(CudaLogicError("cuStreamSynchronize failed: unspecified launch"))
    with pytest.raises(errors.DeviceLostError, match="unspecified launch"):
        steps[step]()
    machine.on_wait = lambda: None
    for call in steps.values():
        with pytest.raises(errors.DeviceLostError, match="unspecified launch"):
            call()
    session.close()


def test_an_error_that_tensorrt_got_over_is_not_the_cause_of_another(
    machine: Machine, session: Session
) -> None:
    machine.recovers = "[defaultAllocator.cpp::allocate] Cuda failure: out of memory"
    embedding = session.encode(frame(0))
    session.segment(embedding, **POINT)
    machine.recovers, machine.refuses = None, "IExecutionContext::enqueueV3: Error Code 3"
    for call in (lambda: session.encode(frame(0)), lambda: session.segment(embedding, **POINT)):
        with pytest.raises(errors.DeviceError, match=r"IExec.*Error Code 3") as caught:
            call()
        assert not isinstance(caught.value, errors.DeviceMemoryError)


def test_what_tensorrt_refuses_is_said(machine: Machine, session: Session, plain: Session) -> None:
    machine.refuses = "IExecutionContext::enqueueV3: Error Code 3"
    with pytest.raises(errors.DeviceError, match=r"encoder.engine failed: IExec.*Error Code 3"):
        session.encode(frame(0))
    machine.refuses = None
    same(session, plain, frame(0), **POINT)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("broken", ["encoder", "decoder"])
def test_nan_is_never_a_mask(
    machine: Machine, session: Session, plain: Session, broken: str, on_device: bool
) -> None:
    """An embedding on the GPU is not looked at: what is decoded from it is."""
    function = machine.functions[broken]
    engine = getattr(session.backend, f"_{broken}")._engine

    def nan(**inputs):
        return {name: values * np.nan for name, values in function(**inputs).items()}

    engine._function = nan
    embedding = session.encode(frame(0))
    with pytest.raises(errors.DeviceError, match="tensorrt gave masks with NaN or Inf"):
        session.segment(embedding, **POINT, on_device=on_device)
    engine._function = function
    same(session, plain, frame(0), **POINT)


def test_a_session_used_after_close_is_refused(machine: Machine, session: Session) -> None:
    embedding, backend = session.encode(frame(0)), session.backend
    session.close()
    session.close()
    assert machine.used == machine.pinned == 0
    with pytest.raises(errors.UsageError, match="this session is closed"):
        session.segment(embedding, **POINT)
    with pytest.raises(errors.UsageError, match="released with its session"):
        np.asarray(embedding.values)
    with pytest.raises(errors.UsageError, match="released with its session"):
        backend.encode(np.zeros((1, 3, SIDE, SIDE), np.float32))


def test_an_embedding_of_another_session_is_refused(
    machine: Machine, session: Session, plain: Session, folder: Path
) -> None:
    """Its memory may be another's by now."""
    embedding = session.encode(frame(0))
    session.close()
    with (
        open_engines(plain, folder) as other,
        pytest.raises(errors.UsageError, match="belongs to another session"),
    ):
        other.segment(embedding, **POINT)


def test_an_interrupt_in_a_stream_leaves_nothing_behind(
    machine: Machine, session: Session, plain: Session
) -> None:
    embedding = session.encode(frame(0))
    for _ in range(3):
        machine.on_wait = raising(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            session.segment(embedding, **BOX)
        with pytest.raises(KeyboardInterrupt):
            session.encode(frame(7))
        machine.on_wait = lambda: None
        same(session, plain, frame(1), **POINT)
    assert machine.current.depth == 0
    session.close()
    assert machine.used == machine.pinned == machine.graphs == 0
