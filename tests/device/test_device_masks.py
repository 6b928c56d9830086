"""Masks and label maps on the GPU: those that numpy makes of the same logits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from device_sessions import POINT, assert_masks, frame, open_engines, same
from fake_engines import describe, session_of, write
from fake_gpu import CudaLogicError, Machine
from fake_network import SIDE
from numpy.testing import assert_array_equal

from medsa_deploy import errors
from medsa_deploy.nvidia.device_array import DeviceArray
from medsa_deploy.nvidia.engines import AxisRange
from medsa_deploy.runtime import Session
from medsa_deploy.runtime.backends import tensorrt
from medsa_deploy.transforms import prompts


def test_more_prompts_than_the_engine_takes_are_several_runs(
    session: Session, plain: Session
) -> None:
    points = np.random.default_rng(0).integers(0, SIDE, (7, 1, 2))
    same(session, plain, frame(0), points=points)


def test_prompts_are_parted_evenly_and_never_below_the_least(
    machine: Machine, plain: Session, tmp_path: Path
) -> None:
    options = describe(prompts=AxisRange(min=2, opt=2, max=4))
    folder = write(tmp_path / "b.medsa" / "engines" / "x", plain.manifest, options)
    session = open_engines(plain, folder)
    random = np.random.default_rng(0)
    for sets in range(2, 10):
        same(session, plain, frame(0), points=random.integers(0, SIDE, (sets, 1, 2)))
    embedding = session.encode(frame(0))
    with pytest.raises(errors.PromptError, match="1 prompt sets: these engines take 2 to 4"):
        session.segment(embedding, **POINT)


def test_kernels_the_driver_does_not_take_leave_masks_to_the_processor(
    machine: Machine, plain: Session, folder: Path, monkeypatch, caplog
) -> None:
    def refuse(cubin: bytes) -> None:
        raise CudaLogicError("cuModuleLoadDataEx failed: device kernel image is invalid")

    monkeypatch.setattr(sys.modules["pycuda.driver"], "module_from_buffer", refuse)
    session = open_engines(plain, folder)
    same(session, plain, frame(0), **POINT)
    assert "masks are made on the processor: the driver does not take the kernels" in caplog.text
    with pytest.raises(errors.BuildError, match="kernel image is invalid"):
        session.encode(machine.put(frame(0)))
    same(session, plain, frame(1), **POINT)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("shape", [(60, 60), (83, 71), (200, 33), (20, 301)])
def test_masks_are_made_on_the_gpu(
    machine: Machine, session: Session, plain: Session, shape: tuple[int, int], on_device: bool
) -> None:
    """The kernels' own sources run, compiled for the host."""
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    embedding, on_host = session.encode(image), plain.encode(image)
    boxes = np.array([[1, 2, 30, 19], [5, 6, 32, 18], [0, 0, 9, 9], [3, 3, 20, 9], [2, 4, 6, 8]])
    for prompt in ({"points": [(20, 10)]}, {"box": boxes}, {"box": boxes[:2], "threshold": 0.4}):
        prediction = session.segment(embedding, **prompt, on_device=on_device)
        assert_masks(prediction, plain.segment(on_host, **prompt))
        assert isinstance(prediction.masks, DeviceArray) == on_device
    assert set(machine.launched) == {"label_map" if on_device else "threshold_masks"}


def test_only_what_is_asked_for_comes_to_the_host(machine: Machine, session: Session) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96), dtype=np.uint8)
    embedding = session.encode(image)
    logits, words, tally = 4 * SIDE**2 + 4, 64 * 96 // 8, 5 * 4
    for on_device in (False, True):
        machine.downloaded = 0
        prediction = session.segment(embedding, points=[(20, 10)], on_device=on_device)
        assert prediction.masks.shape == (1, 1, 64, 96)
        assert machine.downloaded == logits + tally + (0 if on_device else words)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("multimask", [False, True])
def test_masks_of_several_a_set(
    machine: Machine, tmp_path: Path, multimask: bool, on_device: bool
) -> None:
    """SAM's candidates, of which only those that are wanted are made."""
    plain = session_of(machine, outputs="sam")
    folder = write(tmp_path / "x", plain.manifest, describe())
    image, points = frame(3)[:50], np.array([[[9, 9]], [[30, 20]], [[5, 40]], [[50, 45]]])
    with open_engines(plain, folder) as session:
        options = {"points": points, "multimask": multimask}
        prediction = session.segment(session.encode(image), **options, on_device=on_device)
        assert_masks(prediction, plain.segment(plain.encode(image), **options))
        assert prediction.masks.shape[:2] == (4, 3 if multimask else 1)


def test_sets_of_different_lengths_keep_their_order(session: Session, plain: Session) -> None:
    two = {"points": [(40, 9), (3, 3)], "labels": [1, 0]}
    sets = [*prompts(box=[1, 2, 40, 50]), *prompts(**two), *prompts(points=[(9, 9)])]
    embedding, on_host = (opened.encode(frame(3)[:50]) for opened in (session, plain))
    assert_masks(session.segment_sets(embedding, sets), plain.segment_sets(on_host, sets))
    with pytest.raises(errors.UsageError, match="sets with equally many points"):
        session.segment_sets(embedding, sets, on_device=True)


def test_masks_on_the_gpu_are_arrays_for_other_libraries(
    machine: Machine, session: Session, plain: Session
) -> None:
    embedding, prompt = session.encode(frame(0)[:40]), {"points": [(9, 9)], "on_device": True}
    prediction = session.segment(embedding, **prompt)
    interface = prediction.masks.__cuda_array_interface__
    assert (interface["typestr"], interface["shape"]) == ("|b1", (1, 1, 40, SIDE))
    seen = machine.view(interface["data"][0], 40 * SIDE).reshape(40, SIDE)
    assert_array_equal(seen, np.asarray(prediction.masks)[0, 0])
    assert_array_equal(prediction.label_map() > 0, seen)
    with pytest.raises(errors.UsageError, match=r"is \|b1 with strides None, expected contiguous"):
        session.backend.encode(prediction.masks)
    predictions = [session.segment(embedding, **prompt) for _ in range(3)]
    assert len({each.masks.address for each in (prediction, *predictions)}) == 4
    del predictions
    blocks = set(machine.blocks)
    for _ in range(5):
        session.segment(embedding, **prompt)
    assert set(machine.blocks) == blocks
    session.close()
    with pytest.raises(errors.UsageError, match="released with its session"):
        np.asarray(prediction.masks)
    with pytest.raises(errors.UsageError, match="bright pixels makes no masks on a GPU"):
        plain.segment(plain.encode(frame(0)), **prompt)


def test_sizes_of_masks_do_not_pile_up(machine: Machine, session: Session) -> None:
    used = []
    for height in range(10, 40):
        embedding = session.encode(frame(0)[:height])
        for on_device in (False, True):
            session.segment(embedding, points=[(2, 2)], on_device=on_device)
        used.append((len(machine.blocks), machine.pinned))
    assert used[-1] == used[-9] == max(used)


def test_without_kernels_masks_are_made_on_the_processor(
    machine: Machine, plain: Session, folder: Path, monkeypatch, caplog
) -> None:
    def load_kernels(source: str, *arguments: object, **options: object) -> None:
        raise errors.MissingDependencyError("nvidia-cuda-nvrtc", extra="kernels", purpose="it")

    monkeypatch.setattr(tensorrt, "load_kernels", load_kernels)
    with open_engines(plain, folder) as session:
        assert "masks are made on the processor: it needs nvidia-cuda-nvrtc" in caplog.text
        assert session.backend.facts()["masks"] == "processor"
        same(session, plain, frame(0)[:40], points=[(9, 9)])
        with pytest.raises(errors.UsageError, match="tensorrt makes no masks on a GPU"):
            session.segment(session.encode(frame(0)), **POINT, on_device=True)


def test_too_many_points_are_refused(session: Session) -> None:
    embedding = session.encode(frame(0))
    with pytest.raises(errors.PromptError, match="these engines take 1 to 4, which --points"):
        session.segment(embedding, points=np.ones((6, 2)))
