"""What SAM-Med2D's adapter costs: encoder time over SAM's of the same size, one process each.

    python benchmarks/sam_med2d.py [--runs 9]     → benchmarks/results/sam_med2d.json

ViT-B with seeded weights and real relative-position tables, float32, ONNX Runtime, at SAM-Med2D's
own 256×256. The two exported graphs run in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import torch
from depth import SINGLE, export, sample, worker
from export import DEPTH, GRID, WIDTH, vit_b_checkpoint

from medsa_deploy.stages import diagnose

RESULT = Path(__file__).parent / "results" / "sam_med2d.json"
SIDE = 256


def checkpoints(folder: Path) -> dict[str, Path]:
    """SAM's checkpoint, and the same with SAM-Med2D's adapters."""
    path = folder / "medsa.pth"
    vit_b_checkpoint(path, rel_pos_scale=0.2, grid=GRID * SIDE // 1024)
    state = torch.load(path, weights_only=True)
    meta = {
        key.replace(".mlp.layers.0.0.", ".mlp.lin1.").replace(".mlp.fc.", ".mlp.lin2."): value
        for key, value in state.items()
        if "_Adapter." not in key
    }
    generator = torch.Generator().manual_seed(5)

    def seeded(*shape: int) -> torch.Tensor:
        inner = shape[0] if len(shape) == 1 else shape[1] * 9
        return torch.randn(shape, generator=generator) * inner**-0.5

    adapters = {}
    for i in range(DEPTH):
        prefix = f"image_encoder.blocks.{i}.Adapter"
        adapters |= {
            f"{prefix}.norm.weight": 1 + 0.1 * seeded(WIDTH),
            f"{prefix}.norm.bias": 0.1 * seeded(WIDTH),
            f"{prefix}.channel.0.weight": seeded(WIDTH // 4, WIDTH),
            f"{prefix}.channel.2.weight": seeded(WIDTH, WIDTH // 4),
            f"{prefix}.spatial.0.weight": seeded(WIDTH, WIDTH, 3, 3),
            f"{prefix}.spatial.2.weight": seeded(WIDTH, WIDTH, 4, 4),
        }
    paths = {}
    for name, tensors in {"SAM": meta, "SAM-Med2D": meta | adapters}.items():
        paths[name] = folder / f"{name}.pth"
        torch.save(tensors, paths[name])
    return paths


def measure(runs: int, folder: Path) -> dict[str, object]:
    """Samples of both graphs, and the ratio of their times pair by pair."""
    samples: dict[str, list[float]] = {}
    with ExitStack() as stack:
        processes = {}
        for name, checkpoint in checkpoints(folder).items():
            path = export(checkpoint, folder / f"{name}.onnx", depth=False, folded=True)
            processes[name] = stack.enter_context(worker(path, depth=False, side=SIDE))
            samples[name] = []
        for _ in range(runs):
            for name, process in processes.items():
                samples[name].append(sample(process, SINGLE)["seconds"])
                print(name, samples[name][-1], file=sys.stderr)
    ratios = [b / a for a, b in zip(*samples.values(), strict=True)]
    return {
        "image_size": SIDE,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": ratios,
        "seconds": {name: round(statistics.median(each), 3) for name, each in samples.items()},
        "samples": samples,
    }


def main() -> None:
    """Measure both, and write them with the machine that they were measured on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.runs, Path(folder))
    machine = diagnose()
    about = {
        "what": "encoder seconds an image, ViT-B, float32, ONNX Runtime; ratio: median over pairs "
        "of runs in turn",
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB, shared",
        "system": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "onnx", "numpy")},
    }
    RESULT.write_text(json.dumps(about | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
