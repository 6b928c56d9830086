"""A bundle, run again and again in this process → milliseconds of every stage of every run.

`python -m medsa_deploy.timing OPTIONS` does so in a process of its own, whose loading and memory
are those of a program that embeds the runtime and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from . import verify
from .errors import DeviceError, MedsaError
from .images import Image, read_image
from .images.files import one_line
from .manifest import Network
from .runtime import Session, load
from .runtime.backend import TimesLayers
from .transforms import Prompt

STAGES = ("preprocess", "encode", "decode", "postprocess", "first click", "next click")
"""`first click`: an image becomes a mask, all four stages. `next click`: another mask of the same
embedding, from two clicks."""
WARM_UP = 2
"""Runs that are not counted."""
LAYER_RUNS = 10
"""Runs with the backend's own profiler, at most."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    bundle: str
    backend: str
    precision: str
    threads: int | None
    runs: int
    image: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What is timed: clicks on an image, or on the first slice of a chunk."""

    name: str
    images: Sequence[Image]
    """One, or the slices of a chunk."""
    first: Prompt
    """One click."""
    next: Prompt
    """Two."""


def seeded_work(network: Network) -> Work:
    """Images of the network's own size, made of nothing but a seed."""
    case = verify.seeded_case(network.image_size, network.mask_prompt_size, 1, network.chunk)
    return _work(f"a seeded image, {network.image_size}×{network.image_size}", case.images)


def image_work(network: Network, path: Path) -> Work:
    """A user's image, or a chunk from the middle of a volume."""
    chunk = network.chunk
    images = [read_image(path)] if chunk == 1 else verify.middle_slices(path, chunk)
    height, width = images[0].pixels.shape[:2]
    return _work(f"{path.name}, {width}×{height}", images)


def _work(name: str, images: Sequence[Image]) -> Work:
    height, width = images[0].pixels.shape[:2]
    case = verify.image_case(name, images, None)
    clicks = case.prompts[1]
    assert len(clicks.points) > 1, (height, width)
    first, two = (
        Prompt(points=clicks.points[:n], labels=clicks.labels[:n], box=None, mask=None)
        for n in (1, 2)
    )
    return Work(name=name, images=images, first=first, next=two)


def run_once(session: Session, work: Work) -> dict[str, float]:
    """Milliseconds of each stage, of all the work's images together."""
    start = perf_counter()
    embeddings = session.encode_slices(work.images)
    first = session.segment_sets(embeddings[0], [work.first])
    middle = perf_counter()
    session.segment_sets(embeddings[0], [work.next])
    end = perf_counter()
    encoding = {name: ms * len(embeddings) for name, ms in embeddings[0].timings_ms.items()}
    clicks = {"first click": 1e3 * (middle - start), "next click": 1e3 * (end - middle)}
    return {**encoding, **first.timings_ms, **clicks}


def measure(options: Options, on_step: Callable[[str], None]) -> dict[str, Any]:
    """Everything that one process can measure, as JSON has it.

    Loading comes first, while nothing of the backend has been imported; layers come last, so that
    the profiler's memory and time touch nothing else.
    """
    opening = {"backend": options.backend, "precision": options.precision}
    on_step("load the bundle")
    start = perf_counter()
    session = load(options.bundle, **opening, threads=options.threads)
    found: dict[str, Any] = {"load_ms": 1e3 * (perf_counter() - start)}
    network = session.manifest.network
    found["loaded_mb"] = _memory_mb("VmRSS")
    with session:
        found["facts"] = session.backend.facts()
        path = options.image
        work = seeded_work(network) if path is None else image_work(network, Path(path))
        found |= {"work": work.name, "slices": len(work.images)}
        on_step(f"warm up, {WARM_UP} runs")
        for _ in range(WARM_UP):
            run_once(session, work)
        on_step(f"measure {options.runs} runs")
        samples: dict[str, list[float]] = {stage: [] for stage in STAGES}
        for _ in range(options.runs):
            for stage, milliseconds in run_once(session, work).items():
                samples[stage].append(milliseconds)
    found |= {"peak_mb": _memory_mb("VmHWM"), "samples_ms": samples}
    runs = min(options.runs, LAYER_RUNS)
    on_step(f"time the layers, {runs} runs")
    with load(options.bundle, **opening, threads=options.threads, time_layers=True) as session:
        found["layers"] = _layers(session, work, runs)
    return found


def _layers(session: Session, work: Work, runs: int) -> dict[str, list[dict[str, Any]]]:
    """Layers of both graphs, each run once for each embedding and each first click."""
    backend = session.backend
    if not isinstance(backend, TimesLayers):
        return {}
    for _ in range(1 + runs):
        embeddings = session.encode_slices(work.images)
        session.segment_sets(embeddings[0], [work.first])
    return {
        graph: [asdict(layer) | {"samples_ms": layer.samples_ms[-runs:]} for layer in layers]
        for graph, layers in backend.layers().items()
    }


def _memory_mb(name: str) -> float | None:
    """`VmRSS`, what the process has in memory now, or `VmHWM`, the most it had; Linux only."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def main() -> int:
    """Options as JSON in, one line of JSON for each step and for the result out."""

    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    try:
        options = Options(**json.loads(sys.argv[1]))
        say(result=measure(options, lambda step: say(step=step)))
    except KeyboardInterrupt:
        return 130
    except MedsaError as e:
        say(error=str(e), kind=type(e).__name__)
    except MemoryError:
        say(error="out of memory", kind=DeviceError.__name__)
    except OSError as e:
        say(error=f"{e.strerror or one_line(e)}: {e.filename}", kind="InputError")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
