"""Frames a second that a tracker follows on a made ultrasound clip, for each of several networks.

    python -m benchmarks.tracking LiteMedSAM=lite.medsa "SAM ViT-B=vit_b.medsa"

writes benchmarks/results/tracking.json. Every network has a session of its own, and they take the
frames in turn. Processor time is measured beside latency: other programs on the machine hardly
change it. It is that of a thread that computes, so measure it with --threads 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import ExitStack
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.speckle_clip import SpeckleClip, box_of
from medsa_deploy import TrackedFrame, Tracker, load
from medsa_deploy.evaluation.metrics import dice
from medsa_deploy.stages import diagnose

RESULT = Path(__file__).parent / "results" / "tracking.json"
WARM_UP = 2
"""Frames that are not counted."""


def measure(bundles: dict[str, Path], clip: SpeckleClip, threads: int | None) -> dict[str, Any]:
    """Name of a network → its latencies over the frames of a clip."""
    results: dict[str, list[TrackedFrame]] = {name: [] for name in bundles}
    overlaps: dict[str, list[float]] = {name: [] for name in bundles}
    processor_ms: dict[str, list[float]] = {name: [] for name in bundles}
    with ExitStack() as stack:
        trackers = {
            name: Tracker(stack.enter_context(load(path, threads=threads)))
            for name, path in bundles.items()
        }
        for index, (frame, mask) in enumerate(clip):
            for name, tracker in trackers.items():
                begun = time.process_time()
                if index == 0:
                    result = tracker.start(frame, box=box_of(mask))
                else:
                    result = tracker.update(frame)
                processor_ms[name].append(1e3 * (time.process_time() - begun))
                results[name].append(result)
                overlaps[name].append(dice(result.mask, mask))
                print(name, index, f"{result.latency_ms:.0f} ms", file=sys.stderr)
        sizes = {name: tracker.session.image_size for name, tracker in trackers.items()}
    return {
        name: _figures(results[name], processor_ms[name])
        | {"image_size": sizes[name], "dice": overlaps[name]}
        for name in bundles
    }


def _figures(results: list[TrackedFrame], processor_ms: list[float]) -> dict[str, Any]:
    """Medians of the frames after the warm-up, and every sample."""
    counted = list(islice(results, WARM_UP, None))
    samples = [result.latency_ms for result in counted]
    median_ms = {
        part: statistics.median(result.timings_ms[part] for result in counted)
        for part in counted[0].timings_ms
    }
    return {
        "frames_per_second": 1e3 / statistics.median(samples),
        "median_ms": {"frame": statistics.median(samples)} | median_ms,
        "median_processor_ms": statistics.median(processor_ms[WARM_UP:]),
        "lost": sum(result.lost for result in results),
        "samples_ms": samples,
        "samples_processor_ms": processor_ms[WARM_UP:],
    }


def main() -> None:
    """Measure the networks that are named, and write the result with the machine's facts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="+", metavar="NAME=BUNDLE")
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    bundles = {name: Path(path) for name, path in (b.split("=", 1) for b in arguments.bundle)}
    clip = SpeckleClip(count=arguments.frames)
    before = os.getloadavg()[0]
    networks = measure(bundles, clip, arguments.threads)
    machine = diagnose()
    height, width = clip.size
    result = {
        "what": f"{clip.count} frames of {width}×{height}, onnxruntime fp32, "
        + ("all cores" if arguments.threads is None else f"{arguments.threads} thread(s)"),
        "load": f"{before:.1f} before, {os.getloadavg()[0]:.1f} after",
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB, shared",
        "versions": {name: version(name) for name in ("medsa-deploy", "onnxruntime", "numpy")},
        "networks": networks,
    }
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
