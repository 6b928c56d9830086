"""The C++ runtime beside Python's session and a plain ONNX Runtime program, and their cold starts.

    python -m benchmarks.cpp BUNDLE [--rounds 15] [--threads 1]     → benchmarks/results/cpp.json

The three take turns on one image, with a box and a click. The plain program runs the encoder and
the whole decoder on tensors that are prepared once: no preprocessing, no masks of the image's size.
A cold start is a process from its start to its first mask; its processor time is beside it, which
other processes on the machine change less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from medsa_deploy import load
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.stages import copy_cpp, diagnose

FOLDER = Path(__file__).parent
RESULT = FOLDER / "results" / "cpp.json"
SIDE = 512
CLICKS = 5
"""After each encoded image."""
COLD_PYTHON = """
import sys
from medsa_deploy import load, read_image
with load(sys.argv[1], threads=int(sys.argv[3])) as session:
    box = [float(x) for x in sys.argv[4].split(",")]
    print(session.segment(session.encode(read_image(sys.argv[2])), box=box).mask.sum())
"""
COLD_PLAIN = """
import sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
encoder, decoder = (
    ort.InferenceSession(f"{sys.argv[1]}/{n}.onnx", options, providers=["CPUExecutionProvider"])
    for n in ("encoder", "decoder")
)
side = encoder.get_inputs()[0].shape[-1]
grid = decoder.get_inputs()[0].shape[-1]
image = np.random.default_rng(0).random((1, 3, side, side), dtype=np.float32)
feeds = {
    "image_embeddings": encoder.run(None, {"image": image})[0],
    "point_coords": np.array([[[side / 4, side / 4], [side * 0.75, side * 0.75]]], np.float32),
    "point_labels": np.array([[2, 3]], np.float32),
    "mask_input": np.zeros((1, 1, 4 * grid, 4 * grid), np.float32),
    "has_mask_input": np.zeros(1, np.float32),
}
names = [i.name for i in decoder.get_inputs()]
feeds = {name: feeds[name] for name in names}
run = lambda: decoder.run(None, feeds)
run()
"""
PLAIN_LOOP = """
import time
for word in sys.stdin:
    start = time.perf_counter()
    encoder.run(None, {"image": image}) if word.strip() == "encode" else run()
    print(1e3 * (time.perf_counter() - start), flush=True)
"""


class Program:
    """A program that answers a word with milliseconds; a context manager."""

    def __init__(self, *command: object, data: bytes = b"", **variables: str) -> None:
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | variables,
        )
        self._write(data)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()

    def _write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def __call__(self, word: str) -> float:
        self._write(f"{word}\n".encode())
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())


def library() -> str:
    """ONNX Runtime's shared library in the installed wheel."""
    (path,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1.*")
    return str(path)


def build(folder: Path) -> tuple[Path, Path]:
    """The example `segment` and the program of this benchmark, compiled as hosts compile them."""
    copy_cpp(folder / "medsa", force=False)
    headers = folder / "medsa" / "include"
    sources = (folder / "medsa" / "examples" / "segment.cpp", FOLDER / "cpp_latency.cpp")
    for source in sources:
        command = ["g++", "-std=c++17", "-O3", "-ffp-contract=off", f"-I{headers}", source]
        output = folder / source.stem
        subprocess.run([*command, "-o", output, "-ldl", "-pthread"], check=True)
    return folder / "segment", folder / "cpp_latency"


def alternate(ask: dict[str, Callable[[str], float]], rounds: int) -> dict[str, Any]:
    """Candidate → samples of `encode` and `click`, taken in turns after a round that warms up."""
    samples: dict[str, dict[str, list[float]]] = {n: {"encode": [], "click": []} for n in ask}
    for turn in range(rounds + 1):
        for name, measure in ask.items():
            times = {
                "encode": [measure("encode")],
                "click": [measure("click") for _ in range(CLICKS)],
            }
            if turn > 0:
                for word, values in times.items():
                    samples[name][word] += values
    return samples


def cold_starts(commands: dict[str, tuple[object, ...]], rounds: int) -> dict[str, Any]:
    """Program → wall and processor milliseconds of whole runs, in turns."""
    samples: dict[str, dict[str, list[float]]] = {n: {"wall": [], "cpu": []} for n in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            used = _children_seconds()
            start = perf_counter()
            run = [str(word) for word in command]
            subprocess.run(run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if turn > 0:
                samples[name]["wall"].append(1e3 * (perf_counter() - start))
                samples[name]["cpu"].append(1e3 * (_children_seconds() - used))
    return samples


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def medians(samples: dict[str, Any]) -> dict[str, Any]:
    """The same tree with medians instead of samples."""
    return {
        name: medians(v) if isinstance(v, dict) else round(statistics.median(v), 3)
        for name, v in samples.items()
    }


def measure(bundle: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Build, then measure latencies and cold starts."""
    pixels = seeded_image(SIDE, 1)
    pixels = pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., 0])
    quarter = SIDE / 4
    box = (quarter, quarter, 3 * quarter, 3 * quarter)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        segment, latency = build(folder)
        for suffix in ("pgm", "png"):
            Image.fromarray(pixels).save(folder / f"image.{suffix}")
        os.environ["MEDSA_ONNXRUNTIME"] = library()
        words = ",".join(str(x) for x in box)
        tool = Path(sys.executable).with_name("medsa-deploy")
        pgm, png, mask = (folder / file for file in ("image.pgm", "image.png", "mask.png"))
        options = ("--box", words, "--threads", threads)
        commands = {
            "C++, example segment": (segment, bundle, pgm, "-o", folder / "c.pgm", *options),
            "Python, ten lines": (sys.executable, "-c", COLD_PYTHON, bundle, png, threads, words),
            "Python, medsa-deploy run": (tool, "run", bundle, png, "-o", mask, *options),
            "plain ONNX Runtime in Python": (sys.executable, "-c", COLD_PLAIN, bundle, threads),
        }
        cold = cold_starts(commands, max(rounds // 3, 3))
        plain = (sys.executable, "-c", COLD_PLAIN + PLAIN_LOOP, bundle, threads)
        with (
            load(bundle, threads=threads) as session,
            Program(latency, bundle, threads, SIDE, data=pixels.tobytes()) as cpp,
            Program(*plain) as plain_program,
        ):
            embeddings = [session.encode(pixels)]

            def python(word: str) -> float:
                start = perf_counter()
                if word == "encode":
                    embeddings[0] = session.encode(pixels)
                else:
                    session.segment(embeddings[0], points=[(SIDE / 2, SIDE / 2)], box=box)
                return 1e3 * (perf_counter() - start)

            candidates = {"C++": cpp, "Python": python, "plain ONNX Runtime": plain_program}
            warm = alternate(candidates, rounds)
    return {"latency_ms": warm, "cold_start_ms": cold}


def main() -> None:
    """Measure a bundle, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    samples = measure(options.bundle, options.rounds, options.threads)
    machine = diagnose()
    result = {
        "what": f"{options.bundle.stem}, {SIDE}² grey bytes, {options.threads} thread(s), "
        f"{options.rounds} rounds in turns",
        "load": f"{os.getloadavg()[1]:.1f} over five minutes, its own included",
        "median": medians(samples),
        "samples": samples,
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB",
        "versions": {name: version(name) for name in ("onnxruntime", "numpy")},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["median"], indent=1))


if __name__ == "__main__":
    main()
