"""Time and peak memory of `medsa-deploy export` for a Med-SA ViT-B at 1024×1024, seeded weights.

    python benchmarks/export.py [--runs 3]     → benchmarks/results/export.json

Each run is a process of its own, proof included; zero and real relative-position tables alternate.
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
import time
from importlib.metadata import version
from pathlib import Path

import torch

from medsa_deploy.stages import diagnose

RESULT = Path(__file__).parent / "results" / "export.json"
WIDTH, DEPTH, HEAD, GRID, WINDOW, GLOBAL = 768, 12, 64, 64, 14, (2, 5, 8, 11)
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def vit_b_checkpoint(path: Path, *, rel_pos_scale: float, grid: int = GRID) -> None:
    """A Med-SA ViT-B state dict with seeded weights, from a golden case's keys."""
    sys.path.insert(0, str(GOLDEN))
    import seeded

    golden = json.loads((GOLDEN / "medsa_2d.json").read_text())
    keys = {}
    for name, shape in golden["keys"].items():
        if ".blocks.0." in name:
            for i in range(DEPTH):
                rows = 2 * (grid if i in GLOBAL else WINDOW) - 1
                scaled = [rows, HEAD] if "rel_" in name else [n * WIDTH // 96 for n in shape]
                keys[name.replace(".blocks.0.", f".blocks.{i}.")] = scaled
        elif ".blocks." not in name:
            encoder = name.startswith("image_encoder.")
            keys[name] = [WIDTH if encoder and n == 96 else n for n in shape]
    state = seeded.state_dict(keys, 5, rel_pos_scale=rel_pos_scale)
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)


def measure(checkpoint: Path) -> dict[str, float]:
    """Wall-clock seconds and peak memory (MB) of one export, in its own process."""
    command = [sys.executable, "-m", "medsa_deploy.cli", "export", str(checkpoint), "--force"]
    script = (
        "import resource, subprocess, sys\n"
        "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, *command], check=True, capture_output=True, text=True
    )
    return {"seconds": time.perf_counter() - start, "peak_mb": int(done.stdout) / 1024}


def main() -> None:
    """Alternate the two cases and write medians with raw samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    samples: dict[str, list[dict[str, float]]] = {"zero tables": [], "real tables": []}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{re.sub(' ', '-', name)}.pth" for name in samples}
        for name, path in paths.items():
            vit_b_checkpoint(path, rel_pos_scale=0.2 if name == "real tables" else 0.0)
        for _ in range(runs):
            for name, path in paths.items():
                samples[name].append(measure(path))
                print(name, samples[name][-1], file=sys.stderr)
    machine = diagnose()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(
        json.dumps(
            {
                "what": "medsa-deploy export, Med-SA ViT-B at 1024x1024, seeded weights, "
                "proof on two seeded images and ten prompt sets included",
                "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB",
                "system": platform.platform(),
                "versions": {n: version(n) for n in ("torch", "onnxruntime", "onnx", "numpy")},
                "median": {
                    name: {
                        key: round(statistics.median(run[key] for run in of_case), 1)
                        for key in ("seconds", "peak_mb")
                    }
                    for name, of_case in samples.items()
                },
                "samples": samples,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
