"""`session.health()`: calls, refusals and faults are counted, and a call that hangs is seen."""

from __future__ import annotations

import mmap
import threading
from typing import Any

import numpy as np
import pytest
from fake_network import SIDE, bright_pixels

from medsa_deploy.errors import DeviceError, ImageError, PromptError, UsageError
from medsa_deploy.runtime import Session

IMAGE = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE), np.uint8)


@pytest.fixture
def session() -> Session:
    return bright_pixels()


def break_backend(session: Session, method: str, failure: Any) -> None:
    """Make a call of the session's backend raise or wait."""

    def call(*_: Any) -> Any:
        raise failure

    setattr(session.backend, method, failure if callable(failure) else call)


def test_a_new_session_has_no_result(session: Session) -> None:
    health = session.health()
    assert (health.open, health.results, health.refusals, health.faults) == (True, 0, 0, 0)
    assert health.last_result_age_s is health.running_s is health.last_fault is None
    assert health.degraded is None


def test_results_are_counted_once_and_age(session: Session) -> None:
    embedding = session.encode(IMAGE)
    session.segment(embedding, points=[(9, 9)])  # calls segment_sets, which is the same call
    first, second = session.health(), session.health()
    assert first.results == second.results == 2
    assert first.last_result_age_s is not None
    assert second.last_result_age_s is not None
    assert 0 <= first.last_result_age_s <= second.last_result_age_s
    assert first.running_s is None


def test_refusals_are_no_faults(session: Session) -> None:
    with pytest.raises(ImageError):
        session.encode(np.full((9, 9), np.nan, np.float32))
    embedding = session.encode(IMAGE)
    with pytest.raises(PromptError):
        session.segment(embedding, points=[(1e6, 1)])
    with pytest.raises(UsageError):
        session.segment(embedding, points=[(1, 1)], multimask=True)
    health = session.health()
    assert (health.results, health.refusals, health.faults) == (1, 3, 0)
    assert health.last_fault is None


@pytest.mark.parametrize("failure", [DeviceError("/patients/a: no memory"), ZeroDivisionError()])
def test_a_fault_is_named_by_its_kind_alone(session: Session, failure: Exception) -> None:
    break_backend(session, "encode", failure)
    with pytest.raises(type(failure)):
        session.encode(IMAGE)
    health = session.health()
    assert (health.results, health.refusals, health.faults) == (0, 0, 1)
    assert health.last_fault == type(failure).__name__
    assert health.running_s is None


def test_a_call_that_hangs_is_seen_from_another_thread(session: Session) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hang(*_: Any) -> Any:
        entered.set()
        leave.wait(60)
        raise DeviceError("the device hung")

    break_backend(session, "encode", hang)

    def encode() -> None:
        with pytest.raises(DeviceError):
            session.encode(IMAGE)

    thread = threading.Thread(target=encode)
    thread.start()
    try:
        assert entered.wait(60)
        first, second = session.health(), session.health()
        assert first.running_s is not None
        assert second.running_s is not None
        assert 0 < first.running_s <= second.running_s
    finally:
        leave.set()
        thread.join()
    assert session.health().running_s is None
    assert session.health().last_fault == "DeviceError"


def test_threads_are_counted_together(session: Session) -> None:
    embedding = session.encode(IMAGE)

    def prompt() -> None:
        for _ in range(20):
            session.segment(embedding, points=[(9, 9)])

    threads = [threading.Thread(target=prompt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.health().results == 81


def test_memory_is_that_of_the_process(session: Session) -> None:
    before = session.health().memory_mb
    if before is None:
        pytest.skip("this system does not report resident memory")
    block = np.frombuffer(mmap.mmap(-1, 40_000_000), np.uint8)  # memory that was never freed
    block[:] = 1
    after = session.health().memory_mb
    assert after is not None
    assert after - before > 30
    del block


def test_a_closed_session_says_so(session: Session) -> None:
    session.close()
    health = session.health()
    assert not health.open
    assert health.degraded is None
