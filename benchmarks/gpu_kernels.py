"""Time of the CUDA kernels on this GPU, beside that of moving their bytes, and of other tools.

    python benchmarks/gpu_kernels.py     → one JSON document

A kernel's floor is the time in which a copy on the GPU moves as many bytes: what it has to read and
to write, each once. numpy and OpenCV do the same on the processor, torch where it can. Launches are
replayed as one CUDA graph, over buffers that together are larger than caches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from medsa_deploy import transforms
from medsa_deploy.errors import MedsaError
from medsa_deploy.kernels import cubins
from medsa_deploy.kernels.axes import BLOCK, Launch
from medsa_deploy.kernels.postprocess import postprocessing
from medsa_deploy.kernels.preprocess import (
    EXTREMES_BYTES,
    FrameFormat,
    Intensities,
    preprocessing,
    reference,
)
from medsa_deploy.nvidia import cuda
from medsa_deploy.nvidia.cuda import Gpu
from medsa_deploy.transforms import PREPROCESSING, Frame, MaskRule

WARM_UP, RUNS, REPEATS = 3, 20, 50
"""Samples that do not count, those that do, and launches in each."""
ROTATED = 256 << 20
"""Bytes of buffers that launches go round in."""
S = 1024
"""Side of the network's frame."""

Array = NDArray[Any]
SAM_MASKS = MaskRule(postprocess="sam")


@dataclass(frozen=True, kw_only=True)
class FrameCase:
    """A frame that becomes the encoder's input."""

    element: str
    shape: tuple[int, ...]
    profile: str
    window: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class MaskCase:
    """Logits that become masks, or one label map."""

    count: int
    image_size: tuple[int, int]
    labels: bool = False


FRAMES = (
    FrameCase(element="uint8", shape=(1024, 1024, 3), profile="sam"),
    FrameCase(element="uint8", shape=(480, 640, 3), profile="medsa"),
    FrameCase(element="int16", shape=(512, 512), profile="medsa", window=(-175, 250)),
    FrameCase(element="uint16", shape=(3000, 2500), profile="sam", window=(0, 4095)),
    FrameCase(element="float32", shape=(512, 512), profile="litemedsam"),
)
MASKS = (
    MaskCase(count=1, image_size=(1024, 1024)),
    MaskCase(count=4, image_size=(3000, 2500)),
    MaskCase(count=3, image_size=(512, 512), labels=True),
)


class TimedGpu(Gpu):
    """A `Gpu` with a clock of its own."""

    def milliseconds(self, queue: Callable[[int], None]) -> list[float]:
        """Of one `queue(i)`, sample by sample, by the GPU's events."""

        def repeated() -> None:
            for i in range(REPEATS):
                queue(i)

        queue(0)  # the driver loads a kernel when it is first launched, which no capture survives
        self.wait()
        graph, samples = self.capture(repeated), []
        for _ in range(WARM_UP + RUNS):
            start, end = self._driver.Event(), self._driver.Event()
            start.record(self._stream)
            graph.launch()
            end.record(self._stream)
            end.synchronize()
            samples.append(start.time_till(end) / REPEATS)
        graph.close()
        return samples[WARM_UP:]

    def buffers(self, size: int) -> list[int]:
        """Addresses of `size` zeroed bytes each, that together are larger than caches."""
        addresses = [self.allocate(size) for _ in range(min(64, max(2, ROTATED // size)))]
        for address in addresses:
            self.clear(address, size)
        return addresses

    def copied_bytes_per_ms(self) -> float:
        """Read and written by a copy of `ROTATED` bytes from the GPU to itself."""
        first, second = (self.allocate(ROTATED) for _ in range(2))

        def copy(i: int) -> None:
            self._driver.memcpy_dtod_async(second, first, ROTATED, self._stream)

        rate = 2 * ROTATED / median(self.milliseconds(copy))
        for address in (first, second):
            self.free(address)
        return rate


def main() -> None:
    """Measure everything that can be, and print it."""
    device = cuda.device()
    if device is None:
        raise SystemExit("gpu_kernels: no NVIDIA driver or GPU was found on this machine")
    try:
        results = measure(device)
    except MedsaError as e:
        raise SystemExit(f"gpu_kernels: {e}") from None
    print(json.dumps(results, indent=2))


def measure(device: cuda.Device) -> dict[str, Any]:
    """All cases on the GPU, and what other tools take for them."""
    gpu = TimedGpu()
    torch_on = "cuda" if torch.cuda.is_available() else "cpu"
    with gpu.current():
        rate = gpu.copied_bytes_per_ms()
        cuda_major = int(device.driver_cuda.partition(".")[0])
        modules = {
            source: cubins.load_kernels(
                source, device.capability, gpu.module, driver_cuda=cuda_major
            )
            for source in cubins.SOURCES
        }

        def launch(kernel: Launch) -> None:
            parameters = bytes(kernel.parameters)
            gpu.launch(modules[kernel.source], kernel.entry, kernel.grid, BLOCK, parameters)

        cases = [
            *(frame_on_gpu(gpu, launch, case) for case in FRAMES),
            *(masks_on_gpu(gpu, launch, case) for case in MASKS),
        ]
    gpu.close()
    for tool_case, case in zip((*FRAMES, *MASKS), cases, strict=True):
        case |= {f"{name}_ms": wall(run) for name, run in tools(tool_case, torch_on).items()}
        case["floor_ms"] = case["bytes"] / rate
        case["share_of_floor"] = case["floor_ms"] / median(case["ms"])
    return {
        "copy_gb_per_s": rate / 1e6,
        "torch": f"{torch.__version__} on {torch_on}",
        "opencv": cv2.__version__,
        "cases": cases,
    }


def frame_on_gpu(
    gpu: TimedGpu, launch: Callable[[Launch], None], case: FrameCase
) -> dict[str, Any]:
    """Milliseconds of the preprocessing kernels, and the bytes they cannot do without."""
    pixels = frame_of(case)
    form = FrameFormat(
        element=case.element,  # type: ignore[arg-type]
        height=case.shape[0],
        width=case.shape[1],
        channels=3 if len(case.shape) == 3 else 1,
        pitch=pixels.strides[0],
    )
    plan = preprocessing(form, case.profile, S, Intensities(window=case.window))  # type: ignore[arg-type]
    frames, outputs = gpu.buffers(pixels.nbytes), gpu.buffers(plan.output_bytes)
    for frame in frames:
        gpu.write(frame, pixels.tobytes())
    tables, scratch = gpu.allocate(len(plan.tables)), gpu.allocate(plan.scratch_bytes)
    gpu.write(tables, plan.tables)

    def queue(i: int) -> None:
        if plan.scratch_bytes:
            gpu.clear(scratch, EXTREMES_BYTES)
        for kernel in plan.launches(
            frame=frames[i % len(frames)],
            output=outputs[i % len(outputs)],
            tables=tables,
            scratch=scratch,
        ):
            launch(kernel)

    samples = gpu.milliseconds(queue)
    for address in (*frames, *outputs, tables, scratch):
        gpu.free(address)
    moved = pixels.nbytes + plan.output_bytes
    return {"case": asdict(case), "entries": plan.entries, "bytes": moved, "ms": samples}


def masks_on_gpu(gpu: TimedGpu, launch: Callable[[Launch], None], case: MaskCase) -> dict[str, Any]:
    """Milliseconds of a postprocessing kernel, and the bytes it cannot do without."""
    logits = logits_of(case)
    plan = postprocessing((S // 4, S // 4), case.count, placed(case), SAM_MASKS, labels=case.labels)
    output_bytes = int(np.prod(plan.shape)) * (1 if case.labels else 4)
    inputs, outputs = gpu.buffers(logits.nbytes), gpu.buffers(output_bytes)
    for address in inputs:
        gpu.write(address, logits.tobytes())
    figures = 4 * int(np.prod(plan.tally_shape))
    tables, tally = gpu.allocate(len(plan.tables)), gpu.allocate(figures)
    gpu.write(tables, plan.tables)

    def queue(i: int) -> None:
        gpu.clear(tally, figures)
        source, target = inputs[i % len(inputs)], outputs[i % len(outputs)]
        launch(plan.launch(logits=source, output=target, tally=tally, tables=tables))

    samples = gpu.milliseconds(queue)
    for address in (*inputs, *outputs, tables, tally):
        gpu.free(address)
    return {
        "case": asdict(case),
        "entries": [plan.entry],
        "bytes": logits.nbytes + output_bytes,
        "ms": samples,
    }


def tools(case: FrameCase | MaskCase, torch_on: str) -> dict[str, Callable[[], Any]]:
    """What does the same: numpy as the runtime does it, with Pillow, and OpenCV and torch.

    torch begins with what lies where it works, and its results stay there.
    """
    runs = (
        frame_tools(case, torch_on) if isinstance(case, FrameCase) else mask_tools(case, torch_on)
    )

    def waited() -> Any:
        result = run_torch()
        if torch_on == "cuda":
            torch.cuda.synchronize()
        return result

    if run_torch := runs.get("torch"):
        runs["torch"] = waited
    return runs


def frame_tools(case: FrameCase, torch_on: str) -> dict[str, Callable[[], Any]]:
    """Of all profiles numpy, of bilinear ones OpenCV and torch as well.

    torch is antialiased as the kernel is; OpenCV averages areas to reduce, and else interpolates.
    """
    pixels, row = frame_of(case), PREPROCESSING[case.profile]  # type: ignore[index]
    intensities = Intensities(window=case.window)
    runs = {"numpy": lambda: reference(pixels, case.profile, S, intensities)}  # type: ignore[arg-type]
    if row.mean is None or row.std is None:
        return runs
    low, high = case.window or (0, 255)
    scale = 255 / (high - low)
    h, w = transforms.frame_of(case.shape[:2], case.profile, S).content_size  # type: ignore[arg-type]
    mean, std = (np.array(values, np.float32) for values in (row.mean, row.std))

    def opencv() -> Array:
        values = (np.clip(pixels.astype(np.float32), low, high) - low) * scale
        smaller = h * w < values.shape[0] * values.shape[1]
        how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        values = cv2.resize(values, (w, h), interpolation=how)
        image = np.zeros((3, S, S), np.float32)
        planes = np.broadcast_to(values.reshape(h, w, -1), (h, w, 3))
        image[:, :h, :w] = np.moveaxis((planes - mean) / std, -1, 0)
        return image

    # torch has no arithmetic on uint16
    torch_pixels = torch.from_numpy(pixels.astype(np.int32) if case.element == "uint16" else pixels)
    frame = torch_pixels.to(torch_on)
    centre, spread = (
        torch.from_numpy(values)[:, None, None].to(torch_on) for values in (mean, std)
    )

    def in_torch() -> Any:
        values = (frame.float().clamp(low, high) - low) * scale
        planes = values.reshape(*case.shape[:2], -1).permute(2, 0, 1)[None]
        planes = functional.interpolate(planes, (h, w), mode="bilinear", antialias=True)[0]
        return functional.pad((planes.expand(3, h, w) - centre) / spread, (0, S - w, 0, S - h))

    return runs | {"opencv": opencv, "torch": in_torch}


def mask_tools(case: MaskCase, torch_on: str) -> dict[str, Callable[[], Any]]:
    """Masks as bool, or a label map; bilinear to the network's frame, cropped, to the image."""
    logits, frame = logits_of(case), placed(case)
    (h, w), (height, width) = frame.content_size, frame.image_size
    on_device = torch.from_numpy(logits)[None].to(torch_on)

    def chosen(pixels: Array) -> Array:
        return transforms.label_map(pixels, 0.0) if case.labels else pixels > 0

    def opencv() -> Array:
        network_sized = [cv2.resize(mask, (S, S))[:h, :w] for mask in logits]
        return chosen(np.stack([cv2.resize(mask, (width, height)) for mask in network_sized]))

    def in_torch() -> Any:
        network_sized = functional.interpolate(on_device, (S, S), mode="bilinear")[..., :h, :w]
        pixels = functional.interpolate(network_sized, (height, width), mode="bilinear")[0]
        if not case.labels:
            return pixels > 0
        highest, best = pixels.max(dim=0)
        return (best + 1) * (highest > 0)

    return {
        "numpy": lambda: chosen(transforms.pixel_values(logits, frame, "sam")),
        "opencv": opencv,
        "torch": in_torch,
    }


def wall(run: Callable[[], Any]) -> list[float]:
    """Milliseconds of a call, sample by sample."""
    samples = []
    for _ in range(WARM_UP + RUNS):
        start = perf_counter()
        run()
        samples.append(1e3 * (perf_counter() - start))
    return samples[WARM_UP:]


def frame_of(case: FrameCase) -> Array:
    """Seeded pixels."""
    random, shape = np.random.default_rng(0), case.shape
    if case.element == "float32":
        return random.normal(0, 1, shape).astype(np.float32)
    most = 255 if case.element == "uint8" else 4095
    return random.integers(0, most, shape, endpoint=True).astype(case.element)


def logits_of(case: MaskCase) -> NDArray[np.float32]:
    """Seeded logits (count, S/4, S/4)."""
    shape = (case.count, S // 4, S // 4)
    return np.random.default_rng(0).normal(0, 4, shape).astype(np.float32)


def placed(case: MaskCase) -> Frame:
    """How the case's image lies in the network's frame."""
    return transforms.frame_of(case.image_size, "sam", S)


if __name__ == "__main__":
    main()
