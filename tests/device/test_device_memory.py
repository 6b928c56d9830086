"""GPU memory: reused between frames, and full at any moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from device_sessions import BOX, POINT, frame, open_engines, same
from fake_engines import describe, session_of, write
from fake_gpu import Machine
from fake_network import SIDE
from numpy.testing import assert_array_equal

from medsa_deploy import errors
from medsa_deploy.runtime import Session


def test_nothing_is_allocated_between_frames(machine: Machine, session: Session) -> None:
    for seed in range(3):
        session.segment(session.encode(frame(seed)), **POINT)
    blocks, pinned = set(machine.blocks), machine.pinned
    for seed in range(6):
        embedding = session.encode(frame(seed))
        session.segment(embedding, **POINT)
        session.segment(embedding, **BOX)
    assert (set(machine.blocks), machine.pinned) == (blocks, pinned)


def test_a_full_memory_for_masks_is_named_and_leaves_nothing(
    machine: Machine, session: Session, plain: Session
) -> None:
    embedding, other = session.encode(frame(0)[:40]), session.encode(frame(1)[:40])
    before = machine.used, machine.pinned
    machine.capacity = machine.used
    for _ in range(2):
        with pytest.raises(errors.DeviceMemoryError):
            session.segment(embedding, points=[(9, 9)])
    machine.capacity, machine.pinnable = np.inf, 0
    with pytest.raises(errors.DeviceMemoryError):
        session.segment(embedding, points=[(9, 9)])
    assert (machine.used, machine.pinned) == before
    machine.pinnable = np.inf
    del other
    same(session, plain, frame(0)[:40], points=[(9, 9)])


def test_a_full_memory_at_load_is_named_and_released(
    machine: Machine, plain: Session, folder: Path
) -> None:
    open_engines(plain, folder).close()
    with open_engines(plain, folder):
        needed = machine.used
    for capacity in range(1, needed, needed // 7):
        machine.capacity = capacity
        with pytest.raises(errors.DeviceMemoryError, match="memory is full"):
            open_engines(plain, folder)
        assert machine.used == machine.pinned == 0


def test_a_full_memory_that_tensorrt_reports_is_named(
    machine: Machine, plain: Session, folder: Path
) -> None:
    machine.refuses = "[defaultAllocator.cpp::allocate] Cuda failure: out of memory"
    with pytest.raises(errors.DeviceMemoryError, match=r"Allocator.*build engines for fewer"):
        open_engines(plain, folder)
    assert machine.used == machine.pinned == 0


def test_memory_that_nothing_uses_makes_room(
    machine: Machine, session: Session, plain: Session
) -> None:
    """Embeddings' memory, which is kept for the next images, for masks; once for each request."""
    embeddings = [session.encode(frame(seed)) for seed in range(3)]
    embedding, released = embeddings[0], embeddings[1].values.nbytes
    del embeddings
    machine.capacity = machine.used
    before = machine.used
    same_masks = session.segment(embedding, points=[(9, 9)], on_device=True)
    assert machine.used < before - released
    expected = plain.segment(plain.encode(frame(0)), points=[(9, 9)])
    assert_array_equal(np.asarray(same_masks.masks), expected.masks)
    with pytest.raises(errors.DeviceMemoryError):
        [session.encode(frame(seed)) for seed in range(3)]


def test_a_full_memory_mid_stream_leaves_a_session_that_works(
    machine: Machine, session: Session, plain: Session
) -> None:
    embeddings = [session.encode(frame(0)), session.encode(frame(1))]
    session.segment(embeddings[0], **POINT)
    machine.capacity = machine.used
    with pytest.raises(errors.DeviceMemoryError):
        session.encode(frame(2))
    expected = plain.segment(plain.encode(frame(1)), **POINT)
    assert_array_equal(session.segment(embeddings[1], **POINT).masks, expected.masks)
    del embeddings
    same(session, plain, frame(2), **POINT)


@pytest.mark.parametrize("stage", ["frame", "masks", "mask on the GPU"])
def test_a_full_memory_at_each_stage_of_a_stream_leaves_nothing(
    machine: Machine, tmp_path: Path, stage: str
) -> None:
    """A new size of frame or mask needs memory: it comes, or the session is what it was."""
    plain = session_of(machine, preprocess="medsam")
    folder = write(tmp_path / "x", plain.manifest, describe())
    image = frame(0)[:40]
    with open_engines(plain, folder) as session:
        embedding, theirs = session.encode(image), machine.put(image)
        other = session.encode(image)  # no memory is idle

        def step() -> object:
            if stage == "frame":
                return session.encode(theirs)
            return session.segment(embedding, points=[(9, 9)], on_device=stage != "masks")

        before = machine.used, machine.pinned
        needed = 4 * 3 * SIDE**2 + 10_000
        failed = 0
        for more in range(0, needed, needed // 9):
            machine.capacity = before[0] + more
            try:
                step()
            except errors.DeviceMemoryError:
                failed += 1
        assert failed > 0
        machine.capacity = np.inf
        del other
        step()
        after = machine.used
        for _ in range(5):
            step()
        assert machine.used == after
        same(session, plain, image, points=[(9, 9)])
    assert machine.pinned == 0
