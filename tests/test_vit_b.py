"""A ViT-B at 1024×1024, as users have it: exported, proved, built. Minutes long."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import PIL.Image
import pytest

from medsa_deploy import stages
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.exporters.architecture import Overrides
from medsa_deploy.nvidia.cuda import Device
from medsa_deploy.nvidia.engines import check_loadable

ROOT = Path(__file__).parents[1]

MEMORY_GB = 8
"""Peak of quantizing ViT-B at 1024×1024, as a user's workstation should bear it."""


def vit_b(folder: Path, rel_pos_scale: float) -> stages.Export:
    """A seeded Med-SA ViT-B's bundle."""
    spec = importlib.util.spec_from_file_location("export_benchmark", ROOT / "benchmarks/export.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    path = folder / "vit_b.pth"
    benchmark.vit_b_checkpoint(path, rel_pos_scale=rel_pos_scale)
    return stages.export_checkpoint(
        path, output=None, base=None, images=None, overrides=Overrides(), force=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("rel_pos_scale", [0.0, 0.2])
def test_vit_b_exports_with_proof(tmp_path: Path, rel_pos_scale: float) -> None:
    exported = vit_b(tmp_path, rel_pos_scale)
    recorded = exported.manifest
    assert recorded.network.image_size == 1024
    assert recorded.network.heads == (12,)
    assert recorded.network.rel_pos == ("real" if rel_pos_scale else "zero")
    for tensor in recorded.parity[0].tensors.values():
        assert tensor.relative_l2 <= 2e-5
    for precision, size in (("fp32", 380e6), ("fp16", 190e6)):
        request = stages.EngineRequest(flavor="rtx", precision=precision)
        built = stages.build_engines(exported.bundle, request)
        assert built.engine is not None
        encoder = built.engine.file("encoder")
        assert encoder.profile["image"][2] == (4, 3, 1024, 1024)
        assert size < encoder.bytes < 1.2 * size
        assert encoder.attention == ("fused" if precision == "fp16" else "plain")
        there = Device(name="X", capability="sm86", driver_cuda="13.0")
        start = perf_counter()
        check_loadable(
            built.plan.folder,
            load_manifest(exported.bundle),
            library=built.plan.library,
            device=there,
        )
        assert perf_counter() - start < 1


@pytest.mark.slow
def test_vit_b_quantizes_in_limited_memory(tmp_path: Path) -> None:
    """Float16 and the ranges for INT8 of a few images; the search takes an hour, and no more."""
    bundle = vit_b(tmp_path, 0.2).bundle
    code = """
import resource, sys
from pathlib import Path
from medsa_deploy import stages
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.evaluation.cases import parity_cases
from medsa_deploy.graph.files import load_graph
from medsa_deploy.graph.qdq import linear_layers
from medsa_deploy.stages.quantize import calibration
from medsa_deploy.stages.quantize.candidates import CandidateRunner
bundle, folder = map(Path, sys.argv[1:])
stages.quantize_bundle(bundle, precision="fp16")
manifest = load_manifest(bundle)
runner = CandidateRunner(bundle, manifest, parity_cases(manifest, None)[:1], None)
inputs = {layer.input for layer in linear_layers(load_graph(runner.encoder))}
sources = [calibration.ImageSource(path=folder / "image.png")]
measured = calibration.measure(runner, folder, sources, inputs, lambda done, total: None)
assert set(measured.ranges(99.9)) == inputs
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    PIL.Image.fromarray(seeded_image(512, 7)).save(tmp_path / "image.png")
    command = [sys.executable, "-c", code, str(bundle), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < MEMORY_GB
    recorded = load_manifest(bundle)
    assert recorded.file("encoder", "fp16").bytes < 0.55 * recorded.file("encoder").bytes
