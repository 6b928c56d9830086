"""The runtime of engines on a GPU in host memory (fake_gpu.py): same masks, faults by name.

What runs here is the package's own code; what stands in is pycuda, cuda-bindings and TensorRT.
"""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import fake_gpu
import numpy as np
import pytest
from fake_engines import compute, describe, session_of, write
from fake_gpu import CudaLogicError, CudaMemoryError, Machine
from fake_network import SIDE, BrightPixels, bright_pixels
from numpy.testing import assert_array_equal

from medsa_deploy import errors, transforms
from medsa_deploy.kernels.postprocess import region
from medsa_deploy.nvidia.device_array import DeviceArray
from medsa_deploy.nvidia.engines import AxisRange
from medsa_deploy.runtime import Prediction, Session
from medsa_deploy.runtime.backends import tensorrt
from medsa_deploy.runtime.backends.fallback import FallbackBackend
from medsa_deploy.runtime.backends.tensorrt import TensorRTBackend
from medsa_deploy.transforms import prompts

POINT = {"points": [(20, 30)]}
BOX = {"box": (5, 8, 40, 50)}
TOLERANCE = 1e-6
"""As postprocess.cu states it, of the largest logit."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return fake_gpu.install(monkeypatch)


@pytest.fixture
def plain(machine: Machine) -> Session:
    """The network without a GPU."""
    return session_of(machine)


@pytest.fixture
def folder(plain: Session, tmp_path: Path) -> Path:
    return write(tmp_path / "a.medsa" / "engines" / "x", plain.manifest, describe())


@pytest.fixture
def session(plain: Session, folder: Path) -> Session:
    return open_engines(plain, folder)


def open_engines(plain: Session, folder: Path, **options) -> Session:
    flavor = options.pop("flavor", "tensorrt")
    return Session(plain.manifest, TensorRTBackend(folder, plain.manifest, flavor, **options))


def frame(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)


def same(session: Session, plain: Session, image: np.ndarray, **prompt) -> None:
    """The same logits with a GPU and without."""
    found = session.segment(session.encode(image), **prompt)
    wanted = plain.segment(plain.encode(image), **prompt)
    assert_array_equal(found.low_res_logits, wanted.low_res_logits)
    assert_array_equal(found.masks, wanted.masks)
    assert_array_equal(found.scores, wanted.scores)
    assert found.degraded is None


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
        found = session.segment(session.encode(frame(1)), **POINT, mask=mask)
        wanted = plain.segment(plain.encode(frame(1)), **POINT)
        assert_array_equal(found.low_res_logits, wanted.low_res_logits + mask)
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
    one = {"points": [(20, 30)]}
    two = {"points": [(20, 30), (40, 10)], "labels": [1, 0]}
    for prompt in (one, one, two, two, one, two, one):
        found = session.segment(embedding, **prompt)
        wanted = plain.segment(plain.encode(frame(0)), **prompt)
        assert_array_equal(found.low_res_logits, wanted.low_res_logits)
    assert machine.captured == 2
    assert machine.replayed == 3


def test_graphs_are_bounded(machine: Machine, session: Session, plain: Session) -> None:
    embeddings = [session.encode(frame(i)) for i in range(12)]
    for _ in range(3):
        for i, embedding in enumerate(embeddings):
            found = session.segment(embedding, **POINT)
            wanted = plain.segment(plain.encode(frame(i)), **POINT)
            assert_array_equal(found.low_res_logits, wanted.low_res_logits)
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


def test_nothing_is_allocated_between_frames(machine: Machine, session: Session) -> None:
    for seed in range(3):
        session.segment(session.encode(frame(seed)), **POINT)
    blocks, pinned = set(machine.blocks), machine.pinned
    for seed in range(6):
        embedding = session.encode(frame(seed))
        session.segment(embedding, **POINT)
        session.segment(embedding, **BOX)
    assert (set(machine.blocks), machine.pinned) == (blocks, pinned)


def test_an_embedding_that_is_held_is_not_overwritten(session: Session, plain: Session) -> None:
    held = [session.encode(frame(seed)) for seed in range(5)]
    for seed, embedding in enumerate(held):
        assert isinstance(embedding.values, DeviceArray)
        wanted = plain.encode(frame(seed)).values
        assert_array_equal(np.asarray(embedding.values), wanted)
        assert embedding.values.nbytes == wanted.nbytes


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


def test_frames_on_the_gpu_are_taken_where_they_are(
    machine: Machine, session: Session, plain: Session
) -> None:
    image = np.random.default_rng(0).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    theirs = machine.put(image)
    before = machine.used
    embeddings = session.backend.encode(theirs)
    assert machine.used == before
    assert_array_equal(np.asarray(embeddings), plain.backend.encode(image))
    interface = embeddings.__cuda_array_interface__
    assert interface["shape"] == embeddings.shape
    assert interface["typestr"] == "<f4"
    assert interface["data"][1] is False, "PyTorch refuses what is read-only"
    seen = machine.array(interface["data"][0], embeddings.shape)
    assert_array_equal(seen, np.asarray(embeddings))


@pytest.mark.parametrize(
    ("shape", "dtype", "window"),
    [
        ((83, 71), np.uint8, None),
        ((83, 71, 3), np.uint8, None),
        ((60, 60), np.int16, (-100, 900)),
        ((40, 90), np.float32, (0, 700)),
    ],
)
def test_a_frame_on_the_gpu_stays_there(
    machine: Machine, session: Session, plain: Session, shape, dtype, window
) -> None:
    """The kernels' own sources run, compiled for the host; rows of the frame are apart."""
    wide = np.random.default_rng(0).integers(0, 250, (shape[0], shape[1] + 5, *shape[2:]))
    wide = wide.astype(dtype)
    pixels = wide[:, : shape[1]]
    theirs = machine.put(pixels)
    for _ in range(3):
        embedding = session.encode(theirs, intensity_window=window)
        wanted = plain.encode(pixels, intensity_window=window)
        assert embedding.frame == wanted.frame
        assert embedding.intensity_window == window
        close = 0 if dtype == np.uint8 else 1e-3
        assert np.abs(np.asarray(embedding.values) - wanted.values).max() <= close
        found = session.segment(embedding, points=[(20, 30)])
        assert found.masks.shape[-2:] == shape[:2]
    blocks = set(machine.blocks)
    session.encode(theirs, intensity_window=window)
    assert len(set(machine.blocks) - blocks) <= 1  # an embedding's, as the last is held


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_frame_with_values_that_are_no_numbers_is_refused(
    machine: Machine, session: Session, value: float
) -> None:
    pixels = np.random.default_rng(0).normal(0, 100, (40, 90)).astype(np.float32)
    pixels[7, 80] = value
    with pytest.raises(errors.ImageError, match="has NaN or infinite values"):
        session.encode(machine.put(pixels), intensity_window=(0, 700))
    pixels[7, 80] = 0
    session.encode(machine.put(pixels), intensity_window=(0, 700))


def test_formats_of_frames_do_not_pile_up(machine: Machine, session: Session) -> None:
    used = []
    for height in range(10, 32):
        theirs = machine.put(np.zeros((height, 20), np.uint8))
        session.encode(theirs)
        machine.blocks.pop(theirs.__cuda_array_interface__["data"][0])
        used.append(len(machine.blocks))
    assert used[-1] == used[-5] == max(used)


def test_frames_the_kernels_cannot_read_are_refused(
    machine: Machine, session: Session, plain: Session
) -> None:
    for pixels, message in (
        (np.zeros((1, 20, 20, 3), np.uint8), r"has shape \(1, 20, 20, 3\)"),
        (np.zeros((20, 20), np.float64), "type <f8"),
        (np.zeros((20, 40), np.uint8)[:, ::2], "expected pixels side by side"),
        (np.zeros((0, 40), np.uint8), "at least one pixel"),
    ):
        with pytest.raises((errors.ImageError, errors.UsageError), match=message):
            session.encode(machine.put(pixels))
    with pytest.raises(errors.UsageError, match="bright pixels takes no frames on a GPU"):
        plain.encode(machine.put(np.zeros((20, 20), np.uint8)))


def assert_masks(found: Prediction, wanted: Prediction) -> None:
    """Those that numpy makes of the logits, but where these are the threshold up to rounding."""
    assert_array_equal(found.low_res_logits, wanted.low_res_logits)
    rule = wanted.rule
    logits = transforms.pixel_values(wanted.low_res_logits, wanted.frame, rule.postprocess)
    cut = rule.threshold
    clear = np.abs(logits - cut) > TOLERANCE * max(float(np.abs(logits).max()), abs(cut))
    masks = np.asarray(found.masks)
    assert masks.dtype == np.bool_
    assert clear.mean() > 0.99
    assert_array_equal(masks[clear], wanted.masks[clear])
    assert found.regions == [[region(mask) for mask in of_set] for of_set in masks]


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
        found = session.segment(embedding, **prompt, on_device=on_device)
        assert_masks(found, plain.segment(on_host, **prompt))
        assert isinstance(found.masks, DeviceArray) == on_device
    assert set(machine.launched) == {"label_map" if on_device else "threshold_masks"}


def test_only_what_is_asked_for_comes_to_the_host(machine: Machine, session: Session) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96), dtype=np.uint8)
    embedding = session.encode(image)
    logits, words, tally = 4 * SIDE**2 + 4, 64 * 96 // 8, 5 * 4
    for on_device in (False, True):
        machine.downloaded = 0
        found = session.segment(embedding, points=[(20, 10)], on_device=on_device)
        assert found.masks.shape == (1, 1, 64, 96)
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
        found = session.segment(session.encode(image), **options, on_device=on_device)
        assert_masks(found, plain.segment(plain.encode(image), **options))
        assert found.masks.shape[:2] == (4, 3 if multimask else 1)


def test_sets_of_different_lengths_keep_their_order(session: Session, plain: Session) -> None:
    two = {"points": [(40, 9), (3, 3)], "labels": [1, 0]}
    sets = [*prompts(box=[1, 2, 40, 50]), *prompts(**two), *prompts(points=[(9, 9)])]
    embedding, on_host = (one.encode(frame(3)[:50]) for one in (session, plain))
    assert_masks(session.segment_sets(embedding, sets), plain.segment_sets(on_host, sets))
    with pytest.raises(errors.UsageError, match="sets with equally many points"):
        session.segment_sets(embedding, sets, on_device=True)


def test_masks_on_the_gpu_are_arrays_for_other_libraries(
    machine: Machine, session: Session, plain: Session
) -> None:
    embedding, prompt = session.encode(frame(0)[:40]), {"points": [(9, 9)], "on_device": True}
    found = session.segment(embedding, **prompt)
    interface = found.masks.__cuda_array_interface__
    assert (interface["typestr"], interface["shape"]) == ("|b1", (1, 1, 40, SIDE))
    seen = machine.view(interface["data"][0], 40 * SIDE).reshape(40, SIDE)
    assert_array_equal(seen, np.asarray(found.masks)[0, 0])
    assert_array_equal(found.label_map() > 0, seen)
    with pytest.raises(errors.UsageError, match=r"is \|b1 with strides None, expected contiguous"):
        session.backend.encode(found.masks)
    others = [session.segment(embedding, **prompt) for _ in range(3)]
    assert len({one.masks.address for one in (found, *others)}) == 4
    del others
    blocks = set(machine.blocks)
    for _ in range(5):
        session.segment(embedding, **prompt)
    assert set(machine.blocks) == blocks
    session.close()
    with pytest.raises(errors.UsageError, match="released with its session"):
        np.asarray(found.masks)
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


def test_work_in_another_stream_is_waited_for(machine: Machine, session: Session) -> None:
    theirs = machine.put(np.zeros((1, 3, SIDE, SIDE), np.float32))
    for stream in (1, None, 77):
        theirs.__cuda_array_interface__["stream"] = stream
        joined = machine.joined
        session.backend.encode(theirs)
        assert machine.joined == joined + 1
    assert machine.awaited == [77]


@pytest.mark.parametrize(
    ("values", "strides"),
    [
        (np.zeros((1, 3, SIDE, SIDE)), None),
        (np.zeros((1, 3, SIDE, SIDE), np.float32), (4, 4, 4, 4)),
    ],
    ids=["float64", "strides"],
)
def test_other_arrays_on_the_gpu_are_refused(
    machine: Machine, session: Session, values: np.ndarray, strides
) -> None:
    theirs = machine.put(values)
    theirs.__cuda_array_interface__["strides"] = strides
    with pytest.raises(errors.UsageError, match="expected contiguous float32"):
        session.backend.encode(theirs)


@pytest.mark.parametrize("values", ["image", "frame", "embedding"])
def test_arrays_on_another_gpu_are_refused(
    machine: Machine, session: Session, plain: Session, values: str
) -> None:
    """Where a kernel would read them, and end every program's use of this GPU."""
    shapes = {"image": (1, 3, SIDE, SIDE), "frame": (SIDE, SIDE), "embedding": (1, 1, 15, 15)}
    pixels = np.zeros(shapes[values], np.uint8 if values == "frame" else np.float32)
    theirs = machine.put(pixels)
    address = theirs.__cuda_array_interface__["data"][0]
    machine.elsewhere[address] = "NVIDIA A2"
    coordinates, labels = np.zeros((1, 2, 2), np.float32), np.ones((1, 2), np.float32)
    calls = {
        "image": lambda: session.backend.encode(theirs),
        "frame": lambda: session.encode(theirs),
        "embedding": lambda: session.backend.decode(theirs, coordinates, labels, None),
    }
    message = r"is on NVIDIA A2 \(GPU 1\).* on NVIDIA Orin \(GPU 0\): copy it there"
    with pytest.raises(errors.UsageError, match=message):
        calls[values]()
    machine.elsewhere.clear()
    theirs.__cuda_array_interface__["data"] = (0xDEAD000, False)
    with pytest.raises(errors.UsageError, match="not memory of a GPU: CUDA_ERROR_INVALID_VALUE"):
        calls[values]()
    same(session, plain, frame(0), **POINT)


@pytest.mark.parametrize("shape", [(1, 3, SIDE, SIDE + 4), (3, 3, SIDE, SIDE), (1, 1, SIDE, SIDE)])
def test_frames_of_a_wrong_size_are_refused(session: Session, shape: tuple[int, ...]) -> None:
    with pytest.raises(errors.ImageError, match=r"this engine encodes \(1, 3, 60, 60\) to \(2, 3"):
        session.backend.encode(np.zeros(shape, np.float32))


def test_too_many_points_are_refused(session: Session) -> None:
    embedding = session.encode(frame(0))
    with pytest.raises(errors.PromptError, match="these engines take 1 to 4, which --points"):
        session.segment(embedding, points=np.ones((6, 2)))


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
    held = [session.encode(frame(seed)) for seed in range(3)]
    embedding, released = held[0], held[1].values.nbytes
    del held
    machine.capacity = machine.used
    before = machine.used
    same_masks = session.segment(embedding, points=[(9, 9)], on_device=True)
    assert machine.used < before - released
    wanted = plain.segment(plain.encode(frame(0)), points=[(9, 9)])
    assert_array_equal(np.asarray(same_masks.masks), wanted.masks)
    with pytest.raises(errors.DeviceMemoryError):
        [session.encode(frame(seed)) for seed in range(3)]


def test_a_full_memory_mid_stream_leaves_a_session_that_works(
    machine: Machine, session: Session, plain: Session
) -> None:
    held = [session.encode(frame(0)), session.encode(frame(1))]
    session.segment(held[0], **POINT)
    machine.capacity = machine.used
    with pytest.raises(errors.DeviceMemoryError):
        session.encode(frame(2))
    wanted = plain.segment(plain.encode(frame(1)), **POINT)
    assert_array_equal(session.segment(held[1], **POINT).masks, wanted.masks)
    del held
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


def raising(error: BaseException):
    def on_wait() -> None:
        raise error

    return on_wait


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
    kept = session.segment(embedding, **POINT, on_device=True).masks
    steps = {
        "encode": lambda: session.encode(frame(1)),
        "frame": lambda: session.encode(theirs),
        "mask on the GPU": lambda: session.segment(embedding, **POINT, on_device=True),
        "read": lambda: np.asarray(kept),
    }
    machine.on_wait = raising(CudaLogicError("cuStreamSynchronize failed: unspecified launch"))
    with pytest.raises(errors.DeviceLostError, match="unspecified launch"):
        steps[step]()
    machine.on_wait = lambda: None
    for call in steps.values():
        with pytest.raises(errors.DeviceLostError, match="unspecified launch"):
            call()
    session.close()


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


def test_two_threads_on_one_session_are_refused(
    machine: Machine, session: Session, plain: Session
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def on_wait() -> None:
        entered.set()
        assert go_on.wait(30)

    found = []
    machine.on_wait = on_wait
    thread = threading.Thread(target=lambda: found.append(session.encode(frame(0))))
    thread.start()
    assert entered.wait(30)
    with pytest.raises(errors.UsageError, match="two threads use one session on tensorrt"):
        session.encode(frame(1))
    machine.on_wait = lambda: None
    go_on.set()
    thread.join(30)
    assert_array_equal(np.asarray(found[0].values), plain.encode(frame(0)).values)


def test_every_call_of_a_second_thread_is_refused(machine: Machine, session: Session) -> None:
    """And `close` waits for the one that is running."""
    embedding, theirs = session.encode(frame(0)), machine.put(frame(1))
    entered, go_on = threading.Event(), threading.Event()

    def on_wait() -> None:
        entered.set()
        assert go_on.wait(30)

    found = []
    machine.on_wait = on_wait
    running = threading.Thread(target=lambda: found.append(session.segment(embedding, **POINT)))
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
    assert found[0].masks.shape == (1, 1, SIDE, SIDE)
    assert machine.used == sum(block.nbytes for block in (theirs.block,))
    assert machine.pinned == machine.graphs == 0


def test_threads_on_a_chain_wait_for_each_other(
    machine: Machine, session: Session, plain: Session
) -> None:
    falling = chain(session, plain)
    found: dict[int, np.ndarray] = {}

    def stream(seed: int) -> None:
        for _ in range(5):
            embedding = falling.encode(frame(seed))
            found[seed] = falling.segment(embedding, **POINT).low_res_logits

    threads = [threading.Thread(target=stream, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed in range(3):
        wanted = plain.segment(plain.encode(frame(seed)), **POINT)
        assert_array_equal(found[seed], wanted.low_res_logits)


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
        found = session.segment(embedding, **POINT)
    threads[0].join(30)
    wanted = plain.encode(frame(0))
    assert_array_equal(results[0], wanted.values)
    assert_array_equal(found.masks, plain.segment(wanted, **POINT).masks)


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


def test_engines_that_are_none_are_named(machine: Machine, plain: Session, folder: Path) -> None:
    del machine.functions["decoder"]
    with pytest.raises(errors.EngineChangedError, match=r"decoder.engine was not loaded: magic"):
        open_engines(plain, folder)
    assert machine.used == machine.pinned == 0


@pytest.mark.tensorrt
def test_the_listener_is_one_that_the_library_takes() -> None:
    """TensorRT-RTX itself, in a process of its own; without a GPU it refuses the engine as well."""
    code = (
        "from medsa_deploy.nvidia import tensorrt_api; library = tensorrt_api.load('rtx');"
        "listener = tensorrt_api.error_logger(library);"
        "print(library.Runtime(listener).deserialize_cuda_engine(b'none' * 99), listener.errors)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("None ['IRuntime::deserializeCudaEngine: Error Code"), done.stderr


def test_engines_of_another_contract_are_refused(
    machine: Machine, plain: Session, folder: Path
) -> None:
    machine.functions["decoder"].tensors["point_labels"] = (-1, 7)
    with pytest.raises(errors.BundleError, match=r"point_labels is float32 \(\*, 7\)"):
        open_engines(plain, folder)


@pytest.mark.parametrize(
    "sizes",
    [
        {"points": AxisRange(min=2, opt=2, max=2)},
        {"prompts": AxisRange(min=3, opt=3, max=3)},
        {"embeddings": AxisRange(min=1, opt=1, max=2)},
        {"batch": AxisRange(min=2, opt=2, max=2)},
    ],
    ids=lambda sizes: next(iter(sizes)),
)
def test_axes_that_cannot_vary_are_static_in_the_engine(
    machine: Machine, plain: Session, tmp_path: Path, sizes: dict[str, AxisRange]
) -> None:
    folder = write(tmp_path / "b.medsa" / "engines" / "x", plain.manifest, describe(**sizes))
    with open_engines(plain, folder) as session:
        decoder = session.backend._decoder._engine
        assert (decoder.get_tensor_shape("point_coords")[1] == 2) == ("points" in sizes)
        assert (decoder.get_tensor_shape("low_res_masks")[0] == 3) == ("prompts" in sizes)
        assert (decoder.get_tensor_shape("image_embeddings")[0] == 1) != ("embeddings" in sizes)


def test_a_static_axis_outside_the_profile_is_another_graphs(
    machine: Machine, plain: Session, folder: Path
) -> None:
    tensors = machine.functions["decoder"].tensors
    machine.functions["decoder"].tensors = tensors | {"low_res_masks": (4, 1, SIDE, SIDE)}
    with pytest.raises(errors.BundleError, match=r"low_res_masks is float32 \(4, 1, 60, 60\)"):
        open_engines(plain, folder)


def test_chunks_of_slices(machine: Machine, tmp_path: Path) -> None:
    plain = bright_pixels(chunk=4, context=0.3)
    compute(machine, plain.manifest, BrightPixels(plain.manifest.network, context=0.3))
    network = BrightPixels(plain.manifest.network, context=0.3)
    encoder = machine.functions["encoder"]

    def chunked(image: np.ndarray) -> dict[str, np.ndarray]:
        return {"image_embeddings": network.encode(image)}

    chunked.tensors = encoder.tensors
    machine.functions["encoder"] = chunked
    four = AxisRange(min=4, opt=4, max=4)
    folder = write(tmp_path / "x", plain.manifest, describe(batch=four))
    slices = [frame(i) for i in range(8)]
    with open_engines(plain, folder) as session:
        found, wanted = session.encode_slices(slices), plain.encode_slices(slices)
        for one, other in zip(found, wanted, strict=True):
            assert_array_equal(np.asarray(one.values), other.values)
            assert_array_equal(
                session.segment(one, **POINT).masks, plain.segment(other, **POINT).masks
            )


def test_kernels_of_rtx_are_kept(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = fake_gpu.install(monkeypatch, name="tensorrt_rtx")
    plain = session_of(machine)
    folder = write(tmp_path / "x", plain.manifest, describe("rtx"))
    open_engines(plain, folder, flavor="rtx").close()
    kept = list((tmp_path / "medsa-deploy" / "rtx").iterdir())
    assert [path.read_bytes() for path in kept] == [b"compiled kernels"] * len(kept)
    assert len(kept) == 2
    assert machine.runtime_cache is None
    open_engines(plain, folder, flavor="rtx").close()
    assert machine.runtime_cache == b"compiled kernels"
    assert not list(folder.glob("*cache*"))


def test_kernels_of_rtx_that_cannot_be_kept_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = fake_gpu.install(monkeypatch, name="tensorrt_rtx")
    plain = session_of(machine)
    folder = write(tmp_path / "x", plain.manifest, describe("rtx"))
    session = open_engines(plain, folder, flavor="rtx")

    def write_half(path: Path, data: bytes) -> None:
        with path.open("wb") as f:
            f.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    session.close()
    assert list((tmp_path / "medsa-deploy" / "rtx").iterdir()) == []
    assert machine.used == 0


def chain(session: Session, plain: Session, *, also=()) -> Session:
    """A session that falls back from the engines to the network itself."""
    openers = [
        ("tensorrt", lambda: session.backend),
        *also,
        ("plain", lambda: BrightPixels(plain.manifest.network)),
    ]
    return Session(plain.manifest, FallbackBackend(openers))


def test_a_fallback_is_marked(machine: Machine, session: Session, plain: Session, caplog) -> None:
    falling = chain(session, plain)
    same(falling, plain, frame(0), **POINT)
    embedding = falling.encode(frame(1))
    machine.on_wait = raising(CudaMemoryError("cuMemAlloc failed: out of memory"))
    backend = falling.backend
    with pytest.raises(errors.DeviceError, match=r"was given up.*out of memory.*encode it again"):
        falling.segment(embedding, **POINT)
    assert backend.name == "bright pixels"
    found = falling.segment(falling.encode(frame(1)), **POINT)
    assert "tensorrt: the GPU's memory is full" in found.degraded
    assert_array_equal(found.masks, plain.segment(plain.encode(frame(1)), **POINT).masks)
    assert "plain is used, because tensorrt: the GPU's memory is full" in caplog.text
    machine.on_wait = lambda: None
    assert falling.segment(falling.encode(frame(2)), **POINT).degraded == found.degraded
    falling.close()


def test_an_embedding_is_brought_along_where_it_can_be(
    machine: Machine, session: Session, plain: Session
) -> None:
    falling = chain(session, plain)
    embedding = falling.encode(frame(1))
    machine.refuses = "Error Code 3"
    found = falling.segment(embedding, **BOX)
    assert "Error Code 3" in found.degraded
    assert_array_equal(found.masks, plain.segment(plain.encode(frame(1)), **BOX).masks)
    assert machine.used == machine.pinned == 0


def test_frames_and_masks_stay_on_the_gpu_within_a_chain(
    machine: Machine, session: Session, plain: Session
) -> None:
    """Until its first backend is given up; also between two prompt sets of one call."""
    falling, image = chain(session, plain), frame(1)[:50]
    embedding, on_host = falling.encode(machine.put(image)), plain.encode(image)
    found = falling.segment(embedding, points=[(9, 9)], on_device=True)
    assert isinstance(found.masks, DeviceArray)
    assert_masks(found, plain.segment(on_host, points=[(9, 9)]))
    sets = [*prompts(points=[(9, 9), (20, 30)], labels=[1, 0]), *prompts(points=[(9, 9)])]

    def on_wait() -> None:
        machine.refuses = "Error Code 3"

    machine.on_wait = on_wait
    found = falling.segment_sets(embedding, sets)
    assert "Error Code 3" in found.degraded
    wanted = plain.segment_sets(on_host, sets)
    assert_array_equal(found.masks, wanted.masks)
    assert found.regions == wanted.regions
    with pytest.raises(errors.UsageError, match="bright pixels takes no frames on a GPU"):
        falling.encode(machine.put(image))
    with pytest.raises(errors.UsageError, match="bright pixels makes no masks on a GPU"):
        falling.segment(falling.encode(image), points=[(9, 9)], on_device=True)


def test_an_encoder_that_fails_falls_back_at_once(
    machine: Machine, session: Session, plain: Session
) -> None:
    falling = chain(session, plain)
    machine.refuses = "Error Code 3"
    found = falling.segment(falling.encode(frame(1)), **POINT)
    assert "Error Code 3" in found.degraded
    assert_array_equal(found.masks, plain.segment(plain.encode(frame(1)), **POINT).masks)


def test_a_chain_skips_what_cannot_be_opened(machine: Machine, plain: Session) -> None:
    def absent():
        raise errors.MissingDependencyError("onnxruntime-gpu", extra="gpu", purpose="it")

    def no_engine():
        raise errors.EngineError("no engines here")

    openers = [("tensorrt", no_engine), ("onnxruntime-cuda", absent)]
    last = ("plain", lambda: BrightPixels(plain.manifest.network))
    falling = Session(plain.manifest, FallbackBackend([*openers, last]))
    found = falling.segment(falling.encode(frame(0)), **POINT)
    assert found.degraded.startswith("tensorrt: no engines here; onnxruntime-cuda: it needs")
    assert falling.backend.facts()["degraded"] == found.degraded
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
    found = falling.segment(falling.encode(frame(0)), **POINT)
    assert "Error Code 3" in found.degraded
    assert_array_equal(found.masks, plain.segment(plain.encode(frame(0)), **POINT).masks)


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


def test_an_option_of_another_flavor_is_found_by_name(plain: Session, folder: Path) -> None:
    with pytest.raises(errors.EngineFlavorError, match="TensorRT is loaded in this process"):
        open_engines(plain, folder, flavor="rtx")


def test_a_gpu_without_pycuda_names_the_extra(
    machine: Machine, plain: Session, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, extra in (("cuda.bindings", "cuda-bindings"), ("pycuda.driver", "pycuda")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(errors.MissingDependencyError, match=rf"{extra}.*medsa-deploy\[cuda\]"):
            open_engines(plain, folder)
    assert replace(describe(), tf32=True).tf32
