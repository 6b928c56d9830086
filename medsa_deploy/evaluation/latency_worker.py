"""A bundle, run many times in a process of its own → milliseconds of every stage of every run.

Load time and memory are therefore those of a program that embeds the runtime and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from medsa_deploy.bundle.manifest import Manifest, PromptNeed
from medsa_deploy.child import ChildError, OnNote, run_in_child
from medsa_deploy.errors import DeviceError, InputError, one_line
from medsa_deploy.images import Image, is_volume, read_image
from medsa_deploy.progress import OnCount, OnStep
from medsa_deploy.runtime import Session, load
from medsa_deploy.runtime.backends.interface import TimesLayers
from medsa_deploy.runtime.backends.registry import LoadOptions
from medsa_deploy.transforms import UNPROMPTED, Prompt

from .cases import middle_slices, seeded_case

logger = logging.getLogger(__name__)

STAGES = ("preprocess", "encode", "decode", "postprocess", "first click", "next click")
"""`first click`: all four stages, from an image to a mask. `next click`: another mask of the same
embedding, from two clicks."""
WARM_UP = 2
"""Runs that are not counted."""
LAYER_RUNS = 10
"""The most runs with the backend's own profiler."""


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """Which bundle is measured, and how."""

    bundle: str
    backend: str
    precision: str
    threads: int | None
    """None for all cores."""
    runs: int
    """Runs that count, after those that warm up."""
    image: str | None
    """An image or a volume; None for a seeded one."""
    cuda_graphs: bool = True
    """Whether engines may be replayed as CUDA graphs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What is timed: clicks on an image, or on the first slice of a chunk."""

    name: str
    images: Sequence[Image]
    """One image, or the slices of a chunk."""
    first: Prompt
    """One click; nothing for a network that needs no prompts."""
    next: Prompt
    """Two clicks, or again nothing."""


def seeded_work(manifest: Manifest) -> Work:
    """Images of the network's own size that depend on a seed alone."""
    network = manifest.network
    case = seeded_case(network.image_size, None, 1, network.chunk)
    return _work("seeded", case.images, manifest.conventions.prompts)


def image_work(manifest: Manifest, path: Path) -> Work:
    """A user's image, or a slice or chunk from the middle of a volume."""
    chunk = manifest.network.chunk
    is_single = chunk == 1 and not is_volume(path)
    images = [read_image(path)] if is_single else middle_slices(path, chunk)
    return _work(path.name, images, manifest.conventions.prompts)


def _work(source: str, images: Sequence[Image], need: PromptNeed) -> Work:
    """One click left of the middle, or a second beside it on the right, which is background.

    A network that needs no prompts gets none.
    """
    height, width = images[0].pixels.shape[:2]
    points = np.array([[0.4 * width, 0.5 * height], [0.6 * width, 0.5 * height]], np.float32)
    labels = np.array([1, 0], np.float32)
    click, clicks = (
        Prompt(points=points[:n], labels=labels[:n], box=None, mask=None) for n in (1, 2)
    )
    if need != "required":
        click = clicks = UNPROMPTED
    slices = "" if len(images) == 1 else f", {len(images)} slices"
    return Work(name=f"{source}, {width}×{height}{slices}", images=images, first=click, next=clicks)


def run_once(session: Session, work: Work) -> dict[str, float]:
    """Milliseconds of each stage, for all of the work's images together."""
    start = perf_counter()
    embeddings = session.encode_slices(work.images)
    first = session.segment_sets(embeddings[0], [work.first])
    middle = perf_counter()
    session.segment_sets(embeddings[0], [work.next])
    end = perf_counter()
    encoding = {name: ms * len(embeddings) for name, ms in embeddings[0].timings_ms.items()}
    clicks = {"first click": 1e3 * (middle - start), "next click": 1e3 * (end - middle)}
    return {**encoding, **first.timings_ms, **clicks}


def measure(options: LatencyOptions, on_step: OnStep, on_run: OnCount) -> dict[str, Any]:
    """Everything that one process can measure, as JSON has it.

    Loading comes first, before anything of the backend is imported. Layers come last, so that the
    profiler's memory and time do not count elsewhere.
    """
    opening: dict[str, Any] = {
        "backend": options.backend,
        "precision": options.precision,
        "threads": options.threads,
        "cuda_graphs": options.cuda_graphs,
    }
    on_step("load the bundle")
    start = perf_counter()
    session = load(options.bundle, **opening)
    result: dict[str, Any] = {"load_ms": 1e3 * (perf_counter() - start)}
    manifest = session.manifest
    result["loaded_mb"] = _memory_mb("VmRSS")
    with session:
        result["facts"] = session.backend.facts()
        path = options.image
        work = seeded_work(manifest) if path is None else image_work(manifest, Path(path))
        result |= {"work": work.name, "slices": len(work.images)}
        on_step(f"warm up, {WARM_UP} runs")
        for _ in range(WARM_UP):
            run_once(session, work)
        on_step(f"measure {options.runs} runs")
        result["samples_ms"] = _samples(session, work, options.runs, on_run)
        times_layers = isinstance(session.backend, TimesLayers)
    result |= {"peak_mb": _memory_mb("VmHWM"), "layers": {}}
    if times_layers:
        runs = min(options.runs, LAYER_RUNS)
        on_step(f"time the layers, {runs} runs")
        with load(options.bundle, **opening, options=LoadOptions(time_layers=True)) as session:
            result["layers"] = _layers(session, work, runs, on_run)
    return result


def _samples(session: Session, work: Work, runs: int, on_run: OnCount) -> dict[str, list[float]]:
    """Milliseconds of every run, by stage."""
    samples: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for run in range(runs):
        for stage, milliseconds in run_once(session, work).items():
            samples[stage].append(milliseconds)
        on_run(run + 1, runs)
    return samples


def _layers(
    session: Session, work: Work, runs: int, on_run: OnCount
) -> dict[str, list[dict[str, Any]]]:
    """Layers of both graphs over `runs` first clicks, after one to warm up."""
    backend = session.backend
    assert isinstance(backend, TimesLayers)
    for run in range(1 + runs):
        embeddings = session.encode_slices(work.images)
        session.segment_sets(embeddings[0], [work.first])
        on_run(run, runs)
    return {
        graph: [asdict(layer) | {"samples_ms": layer.samples_ms[-runs:]} for layer in layers]
        for graph, layers in backend.layers().items()
    }


def _memory_mb(name: str) -> float | None:
    """The process's memory in MiB: `VmRSS` is that of now, `VmHWM` the peak; None off Linux."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def measure_in_child(options: LatencyOptions, on_step: OnStep, on_run: OnCount) -> dict[str, Any]:
    """The result of `measure` in a child process; its warnings are logged here.

    InputError for files that cannot be read. DeviceError if the process ends early, or its memory
    is full.
    """

    def pass_on(note: Any) -> None:
        match note:
            case {"warning": text}:
                logger.warning(text)
            case {"done": done, "of": of}:
                on_run(done, of)
            case {"step": step}:
                on_step(step)

    try:
        result: dict[str, Any] = run_in_child(
            measure_job, asdict(options), on_note=pass_on, show_stderr=True
        )
    except OSError as e:
        raise InputError(f"{e.strerror or one_line(e)}: {e.filename}") from e
    except ChildError as e:
        if e.code is None:
            raise
        reason = f"ended early, with {e}"
        if e.killed:
            reason = "was killed, most often for lack of memory"
        raise DeviceError(f"the measuring process {reason}") from e
    return result


def measure_job(options: dict[str, Any], note: OnNote) -> dict[str, Any]:
    """The child's part of `measure_in_child`."""
    logging.getLogger("medsa_deploy").addHandler(_WarningHandler(note))
    try:
        return measure(
            LatencyOptions(**options),
            lambda step: note({"step": step}),
            lambda done, of: note({"done": done, "of": of}),
        )
    except MemoryError as e:
        raise DeviceError("out of memory: use a smaller network") from e


class _WarningHandler(logging.Handler):
    """Sends each distinct warning once."""

    def __init__(self, note: OnNote) -> None:
        super().__init__(logging.WARNING)
        self._note = note
        self._messages: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record's message."""
        message = record.getMessage()
        if message not in self._messages:
            self._messages.add(message)
            self._note({"warning": message})
