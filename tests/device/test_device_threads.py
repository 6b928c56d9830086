"""Two threads on one session: refused by engines, in turn on a chain."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from device_sessions import POINT, chain, frame
from fake_gpu import Machine
from fake_network import SIDE
from numpy.testing import assert_array_equal

from medsa_deploy import errors
from medsa_deploy.runtime import Session


def test_two_threads_on_one_session_are_refused(
    machine: Machine, session: Session, plain: Session
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def on_wait() -> None:
        entered.set()
        assert go_on.wait(30)

    embeddings = []
    machine.on_wait = on_wait
    thread = threading.Thread(target=lambda: embeddings.append(session.encode(frame(0))))
    thread.start()
    assert entered.wait(30)
    with pytest.raises(errors.UsageError, match="two threads use one session on tensorrt"):
        session.encode(frame(1))
    machine.on_wait = lambda: None
    go_on.set()
    thread.join(30)
    assert_array_equal(np.asarray(embeddings[0].values), plain.encode(frame(0)).values)


def test_every_call_of_a_second_thread_is_refused(machine: Machine, session: Session) -> None:
    """And `close` waits for the one that is running."""
    embedding, theirs = session.encode(frame(0)), machine.put(frame(1))
    entered, go_on = threading.Event(), threading.Event()

    def on_wait() -> None:
        entered.set()
        assert go_on.wait(30)

    predictions = []
    machine.on_wait = on_wait
    running = threading.Thread(
        target=lambda: predictions.append(session.segment(embedding, **POINT))
    )
    running.start()
    assert entered.wait(30)
    for call in (
        lambda: session.encode(frame(1)),
        lambda: session.encode(theirs),
        lambda: session.segment(embedding, **POINT, on_device=True),
    ):
        with pytest.raises(errors.UsageError, match="two threads use one session on tensorrt"):
            call()
    closing = threading.Thread(target=session.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    machine.on_wait = lambda: None
    go_on.set()
    for thread in (running, closing):
        thread.join(30)
    assert predictions[0].masks.shape == (1, 1, SIDE, SIDE)
    assert machine.used == sum(block.nbytes for block in (theirs.block,))
    assert machine.pinned == machine.graphs == 0


def test_threads_on_a_chain_wait_for_each_other(
    machine: Machine, session: Session, plain: Session
) -> None:
    falling = chain(session, plain)
    logits: dict[int, np.ndarray] = {}

    def stream(seed: int) -> None:
        for _ in range(5):
            embedding = falling.encode(frame(seed))
            logits[seed] = falling.segment(embedding, **POINT).low_res_logits

    threads = [threading.Thread(target=stream, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed in range(3):
        expected = plain.segment(plain.encode(frame(seed)), **POINT)
        assert_array_equal(logits[seed], expected.low_res_logits)
