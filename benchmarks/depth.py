"""What SD-Trans costs: encoder time of a slice in 3D (D = 8) over the same checkpoint's in 2D.

    python benchmarks/depth.py [--runs 5] [--only REGEX]     → benchmarks/results/depth.json

Med-SA ViT-B with seeded weights, float32, ONNX Runtime: the exported graphs at 1024×1024 with zero
and real relative-position tables, and at 512×512 beside the plain export of the reference network.
Each graph runs in a process of its own; the graphs of a row run in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from export import GRID, vit_b_checkpoint

from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.graphs import OPSET, contract, export_encoder
from medsa_deploy.exporters.networks import build_reference, fold
from medsa_deploy.graph.backend_encoders import write_backend_encoders
from medsa_deploy.stages import diagnose

RESULT = Path(__file__).parent / "results" / "depth.json"
SLICES = 8
SINGLE = 4
"""Slices of a sample in 2D."""
ROWS = (
    ("exported, zero tables", 1024, 0.0, True),
    ("exported, real tables", 1024, 0.2, True),
    ("exported, real tables", 512, 0.2, True),
    ("plain, real tables", 512, 0.2, False),
)
"""Name, image size, scale of the tables' entries, and whether the network is folded."""

WORKER = """
import sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.enable_mem_pattern = False  # as the runtime has it
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
batches, batch, side = map(int, sys.argv[2:])
image = np.random.default_rng(0).random((batch, 3, side, side), dtype=np.float32)
session.run(None, {"image": image})
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    for _ in range(batches):
        session.run(None, {"image": image})
    seconds = time.perf_counter() - start
    (peak,) = (x.split()[1] for x in open("/proc/self/status") if x.startswith("VmHWM"))
    print(seconds, peak, flush=True)  # ru_maxrss would count what this process was forked from
"""


def export(checkpoint: Path, path: Path, *, depth: bool, folded: bool) -> Path:
    """One encoder as ONNX, in 2D or 3D; the file that the runtime would run."""
    loaded = load_checkpoint(checkpoint)
    overrides = Overrides(depth_chunk=SLICES if depth else None)
    network = infer(loaded, overrides).network
    reference = build_reference(network, loaded.tensors)
    if folded:
        encoder = fold(reference).encoder
        files = export_encoder(encoder, contract(network)["encoder"], path, chunk=network.chunk)
        return write_backend_encoders(files).get("encoder-onnxruntime", path)
    side = network.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            reference.image_encoder,
            (torch.zeros(SLICES if depth else 1, 3, side, side),),
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            external_data=False,
            verbose=False,
        )
    return path


@contextmanager
def worker(path: Path, *, depth: bool, side: int) -> Iterator[subprocess.Popen[str]]:
    """A process that encodes a chunk, or single slices one by one, whenever it gets a line."""
    sizes = ("1", str(SLICES), str(side)) if depth else (str(SINGLE), "1", str(side))
    command = [sys.executable, "-c", WORKER, str(path), *sizes]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{path.name} cannot be run")
        yield process
        process.stdin.close()


def sample(process: subprocess.Popen[str], slices: int) -> dict[str, float]:
    """Seconds a slice, and the process's peak memory so far."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    seconds, peak = process.stdout.readline().split()
    return {"seconds": float(seconds) / slices, "peak_mb": int(peak) / 1024}


def measure(row: tuple[str, int, float, bool], runs: int, folder: Path) -> dict[str, object]:
    """Samples of one row's two graphs, and the ratio of their times pair by pair."""
    name, side, scale, folded = row
    checkpoint = folder / "checkpoint.pth"
    vit_b_checkpoint(checkpoint, rel_pos_scale=scale, grid=GRID * side // 1024)
    samples: dict[str, list[dict[str, float]]] = {"2D": [], "3D": []}
    with ExitStack() as stack:
        processes = {}
        for kind in samples:
            path = folder / f"{re.sub('[^a-z]+', '-', name)}-{side}-{kind}.onnx"
            path = export(checkpoint, path, depth=kind == "3D", folded=folded)
            processes[kind] = stack.enter_context(worker(path, depth=kind == "3D", side=side))
        for _ in range(runs):
            for kind, process in processes.items():
                samples[kind].append(sample(process, SLICES if kind == "3D" else SINGLE))
                print(name, side, kind, samples[kind][-1], file=sys.stderr)
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(*samples.values(), strict=True)]
    return {
        "graph": name,
        "image_size": side,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": ratios,
        "seconds": {
            kind: round(statistics.median(run["seconds"] for run in of_kind), 3)
            for kind, of_kind in samples.items()
        },
        "peak_mb": {kind: round(of_kind[-1]["peak_mb"]) for kind, of_kind in samples.items()},
        "samples": samples,
    }


def main() -> None:
    """Measure every row and write each, with its raw samples, as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", metavar="REGEX", default="", help="graphs to measure, again too")
    args = parser.parse_args()
    before = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    measured = {(row["graph"], row["image_size"]): row for row in before}
    for row in ROWS:
        name, side, *_ = row
        if (name, side) in measured and not re.search(args.only, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            measured[name, side] = measure(row, args.runs, Path(folder))
        write([measured[row[:2]] for row in ROWS if row[:2] in measured])


def write(rows: list[dict[str, object]]) -> None:
    """All rows, with the machine they were measured on."""
    machine = diagnose()
    RESULT.write_text(
        json.dumps(
            {
                "what": f"encoder seconds a slice, Med-SA ViT-B, D = {SLICES}, float32, ONNX "
                "Runtime; ratio: median over pairs of runs in turn",
                "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB",
                "system": platform.platform(),
                "versions": {n: version(n) for n in ("torch", "onnxruntime", "onnx", "numpy")},
                "rows": rows,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
