"""The kernels on a GPU against their references: the cases of the host's tests, through pycuda.

`make gpu-check` runs these, and again under compute-sanitizer. Where there is no GPU a few cases go
through the stand-in, to see that what runs them is right.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import fake_gpu
import numpy as np
import pytest
import test_kernels_postprocess as post
import test_kernels_preprocess as pre
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rehearsal import rehearsing

from medsa_deploy.kernels.axes import BLOCK, Launch
from medsa_deploy.kernels.cubins import load_kernels
from medsa_deploy.kernels.postprocess import Region, postprocessing, regions
from medsa_deploy.kernels.preprocess import EXTREMES_BYTES
from medsa_deploy.nvidia import cuda
from medsa_deploy.nvidia.cuda import Gpu

MOST_EXAMPLES = int(os.environ.get("MEDSA_TEST_EXAMPLES", "1000"))
"""Of a test; under compute-sanitizer each takes many times as long."""
SCANNER, NETWORK = ((60, 80), 64) if rehearsing() else ((1500, 2000), 1024)
"""Size of a scanner's frame, and of the network's."""
GUARD = 64
"""Bytes before and after an output that must stay as they are."""


def cases(number: int) -> settings:
    """One GPU serves all cases of a test."""
    return settings(
        max_examples=min(number, MOST_EXAMPLES),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


class OnGpu:
    """Runs the kernels on copies of numpy's arrays."""

    def __init__(self, gpu: Gpu, load_module: Callable[[str], Any]) -> None:
        self.gpu = gpu
        self.modules = {source: load_module(source) for source in fake_gpu.PARAMETERS}

    def put(self, data: bytes) -> int:
        address = self.gpu.allocate(len(data))
        self.gpu.write(address, data)
        return address

    def launch(self, launch: Launch) -> None:
        module = self.modules[launch.source]
        self.gpu.launch(module, launch.entry, launch.grid, BLOCK, bytes(launch.parameters))

    def guarded_content(self, address: int, size: int) -> np.ndarray:
        """The bytes of an output, whose guards are whole."""
        memory = self.gpu.read(address, (size + 2 * GUARD,), np.uint8)
        assert (memory[:GUARD] == 0xEE).all()
        assert (memory[-GUARD:] == 0xEE).all()
        return memory[GUARD:-GUARD]

    def frame(self, case: pre.Case) -> np.ndarray:
        """What the kernels give, (3, S, S)."""
        plan, pixels = case.plan(), case.pixels
        low, high = np.lib.array_utils.byte_bounds(pixels)
        memory = (np.ctypeslib.ctypes.c_ubyte * (high - low)).from_address(low)
        frame = self.put(bytes(memory))
        output = self.put(b"\xee" * (plan.output_bytes + 2 * GUARD))
        tables = self.put(plan.tables)
        scratch = self.put(bytes(EXTREMES_BYTES) + b"\xee" * plan.scratch_bytes)
        for launch in plan.launches(
            frame=frame + pixels.ctypes.data - low,
            output=output + GUARD,
            tables=tables,
            scratch=scratch,
        ):
            self.launch(launch)
        image = self.guarded_content(output, plan.output_bytes)
        for address in (frame, output, tables, scratch):
            self.gpu.free(address)
        return image.view(np.float16 if case.half else np.float32).reshape(3, case.size, case.size)

    def masks(self, case: post.Case, *, labels: bool) -> tuple[np.ndarray, list[Region]]:
        """Words of the masks, or the label map, and the regions."""
        channels, *size = case.logits.shape
        count = channels - case.rule.exclusive
        plan = postprocessing((size[0], size[1]), count, case.frame, case.rule, labels=labels)
        dtype = np.dtype(np.uint8 if labels else np.uint32)
        byte_count = int(np.prod(plan.shape)) * dtype.itemsize
        addresses = [
            self.put(case.logits.tobytes()),
            self.put(b"\xee" * (byte_count + 2 * GUARD)),
            self.put(bytes(4 * int(np.prod(plan.tally_shape)))),
            self.put(plan.tables),
        ]
        logits, output, tally, tables = addresses
        self.launch(plan.launch(logits=logits, output=output + GUARD, tally=tally, tables=tables))
        masks = self.guarded_content(output, byte_count).view(dtype).reshape(plan.shape)
        counted = regions(self.gpu.read(tally, plan.tally_shape, np.uint32), case.frame.image_size)
        for address in addresses:
            self.gpu.free(address)
        return masks, counted


@pytest.fixture
def on_gpu(request: pytest.FixtureRequest) -> Iterator[OnGpu]:
    """This machine's GPU; the stand-in in a rehearsal, and where a test does not ask for a GPU."""
    if request.node.get_closest_marker("gpu") is None or rehearsing():
        fake_gpu.install(request.getfixturevalue("monkeypatch"))
        gpu = Gpu()

        def load_module(source: str) -> Any:
            return gpu.module(source.encode())
    else:
        device = cuda.device()
        assert device is not None
        gpu, driver_cuda = Gpu(), int(device.driver_cuda.partition(".")[0])

        def load_module(source: str) -> Any:
            return load_kernels(source, device.capability, gpu.module, driver_cuda=driver_cuda)

    with gpu.current():
        yield OnGpu(gpu, load_module)
    gpu.close()


@pytest.mark.gpu
@cases(300)
@given(case=pre.cases(side=200))
def test_random_frames(on_gpu: OnGpu, case: pre.Case) -> None:
    pre.assert_close(case, on_gpu.frame(case))


@pytest.mark.gpu
@cases(300)
@given(case=post.cases(side=200, most=9))
def test_random_masks_and_label_maps(on_gpu: OnGpu, case: post.Case) -> None:
    post.assert_clear_masks(case, *on_gpu.masks(case, labels=False))
    post.assert_clear_labels(case, *on_gpu.masks(case, labels=True))


@pytest.mark.gpu
@pytest.mark.parametrize("profile", sorted(pre.PREPROCESSING))
@pytest.mark.parametrize("element", ["uint8", "uint16", "int16", "float32"])
def test_frames_of_a_scanners_size(on_gpu: OnGpu, profile: str, element: str) -> None:
    random = np.random.default_rng(0)
    pixels = pre.noise(random, element, SCANNER, steps=8)
    window = None if element == "uint8" else pre.window_of(random, pixels)
    case = pre.Case(
        pixels=pixels, profile=profile, size=NETWORK, intensities=pre.Intensities(window=window)
    )
    pre.assert_close(case, on_gpu.frame(case))


@cases(15)
@given(frame=pre.cases(side=40), masks=post.cases(side=40), labels=st.booleans())
def test_what_runs_them_is_right(
    on_gpu: OnGpu, frame: pre.Case, masks: post.Case, labels: bool
) -> None:
    pre.assert_close(frame, on_gpu.frame(frame))
    assert_clear = post.assert_clear_labels if labels else post.assert_clear_masks
    assert_clear(masks, *on_gpu.masks(masks, labels=labels))
