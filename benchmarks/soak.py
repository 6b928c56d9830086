"""Hours of encodes, prompts, bad inputs, sessions: does memory grow, do results change?

    python benchmarks/soak.py ckpt.medsa --minutes 60     → benchmarks/results/soak.json

Cases differ in image size, type, prompts and their number. Each case runs again and again in a
seeded order, and every result is compared with its first, bit for bit. Bad inputs come between. One
session stays open; others are opened, used beside it from a second thread, and closed.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import numpy as np

from medsa_deploy import Session, load, read_image
from medsa_deploy.errors import MedsaError
from medsa_deploy.runtime.health import resident_mb
from medsa_deploy.stages import diagnose

RESULT = Path(__file__).parent / "results" / "soak.json"
CASES = 48
SAMPLE_SECONDS = 10.0
SETTLING = 0.2
"""Share of the time that the slope of memory leaves out: caches fill at first."""
REOPEN = 25
"""A further session is opened, used and closed once in as many cases."""


@dataclass(frozen=True)
class SoakCase:
    """One image and its prompts, made anew from a seed."""

    number: int

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.number)

    def images(self, count: int) -> list[np.ndarray]:
        """`count` images of one size: (H, W) or (H, W, 3), uint8, int16 or float32."""
        rng = self.rng
        height, width = (int(side) for side in rng.integers(48, 700, 2))
        shape = (height, width, 3) if self.number % 5 == 0 else (height, width)
        kind = np.uint8 if len(shape) == 3 else (np.uint8, np.int16, np.float32)[self.number % 3]
        return [(rng.random(shape) * 250 + 3).astype(kind) for _ in range(count)]

    def prompts(self, height: int, width: int) -> list[dict[str, Any]]:
        """Prompts of one to four decoder runs, as arguments of `segment`."""
        rng = np.random.default_rng(self.number + 1000)
        size = np.array([width, height])
        prompts: list[dict[str, Any]] = []
        for kind in rng.integers(0, 3, 1 + self.number % 4):
            corner = rng.random(2) * size * 0.4
            box = [*corner, *(corner + size * (0.2 + 0.3 * rng.random()))]
            if kind == 0:
                points = rng.random((1 + int(rng.integers(6)), 2)) * (size - 1)
                prompts.append({"points": points})
            elif kind == 1:
                prompts.append({"box": box})
            else:
                prompts.append({"boxes": [box] * (1 + int(rng.integers(4)))})
        return prompts


def run_case(session: Session, case: SoakCase) -> tuple[str, list[float]]:
    """SHA-256 of every output of a case, and the milliseconds of its calls."""
    digest, times = hashlib.sha256(), []
    chunk = session.manifest.network.chunk
    images = case.images(chunk)
    start = time.perf_counter()
    if chunk > 1:
        embedding = session.encode_slices(images, intensity_window=(0, 255))[0]
    else:
        embedding = session.encode(images[0], intensity_window=(0, 255))
    times.append(1e3 * (time.perf_counter() - start))
    digest.update(np.asarray(embedding.values).tobytes())
    for prompt in case.prompts(*images[0].shape[:2]):
        start = time.perf_counter()
        prediction = session.segment(embedding, **prompt)
        times.append(1e3 * (time.perf_counter() - start))
        for output in (prediction.masks, prediction.scores, prediction.low_res_logits):
            digest.update(np.ascontiguousarray(output).tobytes())
    return digest.hexdigest(), times


def bad_calls(session: Session, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of bad inputs, and calls that must raise an error of this package."""
    good = SoakCase(1).images(session.manifest.network.chunk)
    flat, nan = np.full((80, 80), 7, np.uint8), np.full((80, 80), np.nan, np.float32)
    encode: Callable[[Any], Any] = lambda image: (  # noqa: E731
        session.encode(image) if len(good) == 1 else session.encode_slices([image] * len(good))
    )
    yield "NaN", lambda: encode(nan)
    if len(good) == 1:
        yield "constant", lambda: encode(flat)
    yield "no pixels", lambda: encode(np.zeros((0, 5), np.uint8))
    yield "text", lambda: encode(np.array([["a", "b"]]))
    yield "five dimensions", lambda: encode(np.zeros((1, 2, 3, 4, 5)))
    yield "missing file", lambda: read_image(folder / "nothing.png")
    yield "truncated file", lambda: read_image(folder / "half.png")
    embedding = session.encode_slices(good)[0] if len(good) > 1 else session.encode(good[0])
    yield "no prompt", lambda: session.segment(embedding, points=[])
    yield "outside", lambda: session.segment(embedding, points=[(1e6, 3)])
    yield "NaN prompt", lambda: session.segment(embedding, points=[(np.nan, 3)])
    yield "empty box", lambda: session.segment(embedding, box=(5, 5, 5, 9))
    yield "mask of another size", lambda: session.segment(embedding, mask=np.zeros((3, 3)))


@dataclass
class Tally:
    """What has been counted so far."""

    digests: dict[tuple[int, int], str] = field(default_factory=dict)
    """Bundle and case → SHA-256 of its first result."""
    results: int = 0
    differences: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    surprises: Counter[str] = field(default_factory=Counter)
    """Bad inputs that raised another error than this package's, or none."""
    sessions: int = 0
    samples: list[dict[str, float]] = field(default_factory=list)
    recent_ms: dict[str, list[float]] = field(default_factory=lambda: {"encode": [], "prompt": []})

    def add(self, bundle: int, case: SoakCase, digest: str, times: list[float]) -> None:
        """Count a result, and compare it with the case's first."""
        self.results += 1
        self.differences += self.digests.setdefault((bundle, case.number), digest) != digest
        self.recent_ms["encode"].append(times[0])
        self.recent_ms["prompt"] += times[1:]

    def sample(self, elapsed: float, session: Session) -> None:
        """Record memory, descriptors and latencies since the last sample."""
        gc.collect()
        start = time.perf_counter()
        session.health()
        health_us = 1e6 * (time.perf_counter() - start)
        self.samples.append(
            {
                "seconds": round(elapsed, 1),
                "rss_mb": round(resident_mb() or 0.0, 3),
                "descriptors": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
                "encode_ms": round(median(self.recent_ms["encode"]), 3),
                "prompt_ms": round(median(self.recent_ms["prompt"]), 3),
                "health_us": round(health_us, 1),
            }
        )
        self.recent_ms = {"encode": [], "prompt": []}


def try_bad_inputs(session: Session, folder: Path, tally: Tally) -> None:
    """Every bad input once."""
    for name, call in bad_calls(session, folder):
        try:
            call()
        except MedsaError:
            tally.refusals[name] += 1
        except Exception as e:
            tally.surprises[f"{name}: {type(e).__name__}: {e}"[:200]] += 1
        else:
            tally.surprises[f"{name}: accepted"] += 1


def use_further_session(bundle: Path, index: int, open_one: Session, tally: Tally) -> None:
    """Open another session, use both at once, and close it."""
    case, results = SoakCase(index % CASES), []
    with load(bundle, threads=1) as further:
        threads = [
            Thread(target=lambda session=session: results.append(run_case(session, case)))
            for session in (open_one, further)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    tally.sessions += 1
    for digest, times in results:
        tally.add(0, case, digest, times)
    if len(results) != len(threads):
        tally.surprises["a thread failed"] += 1


def soak(bundles: list[Path], minutes: float) -> Tally:
    """Run for `minutes`; the first bundle also gets the further sessions."""
    tally, rng, begun = Tally(), np.random.default_rng(0), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00")
        sessions = [load(bundle, threads=1) for bundle in bundles]
        try:
            next_sample, count = 0.0, 0
            while (elapsed := time.monotonic() - begun) < 60 * minutes:
                which_bundle = count % len(sessions)
                case = SoakCase(int(rng.integers(CASES)))
                tally.add(which_bundle, case, *run_case(sessions[which_bundle], case))
                if count % 10 == 0:
                    try_bad_inputs(sessions[which_bundle], folder, tally)
                if count % REOPEN == REOPEN - 1:
                    use_further_session(bundles[0], count, sessions[0], tally)
                if elapsed >= next_sample:
                    tally.sample(elapsed, sessions[0])
                    next_sample = elapsed + SAMPLE_SECONDS
                count += 1
        finally:
            for session in sessions:
                session.close()
    return tally


def figures(tally: Tally) -> dict[str, Any]:
    """The figures of a run: slope of memory, descriptors, latency drift, differences."""
    end = tally.samples[-1]["seconds"]
    settled = [s for s in tally.samples if s["seconds"] >= SETTLING * end] or tally.samples
    hours = [s["seconds"] / 3600 for s in settled]
    memory = [s["rss_mb"] for s in settled]
    slope = float(np.polyfit(hours, memory, 1)[0]) if len(settled) > 2 else None
    fifth = max(1, len(settled) // 5)

    def drift(key: str) -> float:
        first, last = (median(s[key] for s in part) for part in (settled[:fifth], settled[-fifth:]))
        return round(100 * (last / first - 1), 2)

    return {
        "seconds": end,
        "results": tally.results,
        "differences": tally.differences,
        "cases": len(tally.digests),
        "sessions_opened_and_closed": tally.sessions,
        "bad_inputs_refused": tally.refusals.total(),
        "surprises": dict(tally.surprises),
        "rss_slope_mb_per_hour": None if slope is None else round(slope, 3),
        "rss_mb": {"first": memory[0], "last": memory[-1], "highest": max(memory)},
        "descriptors": {
            key: choose(s["descriptors"] for s in settled)
            for key, choose in {"lowest": min, "highest": max}.items()
        },
        "latency_drift_percent": {"encode": drift("encode_ms"), "prompt": drift("prompt_ms")},
        "health_us_median": median(s["health_us"] for s in tally.samples),
    }


def main() -> None:
    """Soak bundles and write the figures; exit code 1 for a difference or a surprise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    logging.getLogger("medsa_deploy").setLevel(logging.ERROR)
    tally = soak(options.bundles, options.minutes)
    machine = diagnose()
    result = {
        "what": "encodes and prompts of changing sizes with bad inputs between, one and two "
        "sessions, load and close; every result compared with its case's first, bit for bit; "
        f"the slope of memory leaves out the first {SETTLING:.0%} of the time",
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB",
        "system": platform.platform(),
        "versions": {name: version(name) for name in ("onnxruntime", "numpy", "medsa-deploy")},
        "bundles": [bundle.name for bundle in options.bundles],
        **figures(tally),
        "samples": tally.samples,
    }
    options.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "samples"}, indent=2))
    sys.exit(1 if tally.differences or tally.surprises else 0)


if __name__ == "__main__":
    main()
