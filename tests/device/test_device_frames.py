"""Frames and embeddings on the GPU: taken where they are, prepared there, refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from device_sessions import POINT, frame, open_engines, same
from fake_engines import compute, describe, write
from fake_gpu import Machine
from fake_network import SIDE, BrightPixels, bright_pixels
from numpy.testing import assert_array_equal

from medsa_deploy import errors
from medsa_deploy.nvidia.device_array import DeviceArray
from medsa_deploy.nvidia.engines import AxisRange
from medsa_deploy.runtime import Session


def test_an_embedding_that_is_held_is_not_overwritten(session: Session, plain: Session) -> None:
    embeddings = [session.encode(frame(seed)) for seed in range(5)]
    for seed, embedding in enumerate(embeddings):
        assert isinstance(embedding.values, DeviceArray)
        expected = plain.encode(frame(seed)).values
        assert_array_equal(np.asarray(embedding.values), expected)
        assert embedding.values.nbytes == expected.nbytes


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
        expected = plain.encode(pixels, intensity_window=window)
        assert embedding.frame == expected.frame
        assert embedding.intensity_window == window
        close = 0 if dtype == np.uint8 else 1e-3
        assert np.abs(np.asarray(embedding.values) - expected.values).max() <= close
        prediction = session.segment(embedding, points=[(20, 30)])
        assert prediction.masks.shape[-2:] == shape[:2]
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
        embeddings, expected = session.encode_slices(slices), plain.encode_slices(slices)
        for embedding, other in zip(embeddings, expected, strict=True):
            assert_array_equal(np.asarray(embedding.values), other.values)
            assert_array_equal(
                session.segment(embedding, **POINT).masks, plain.segment(other, **POINT).masks
            )
