"""A ViT-B at 1024×1024, as users have it: exported, proved, built. Minutes long."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from time import perf_counter

import pytest

from medsa_deploy import stages
from medsa_deploy.cuda import Device
from medsa_deploy.engine import check_loadable
from medsa_deploy.exporters.architecture import Overrides
from medsa_deploy.manifest import load

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("rel_pos_scale", [0.0, 0.2])
def test_vit_b_exports_with_proof(tmp_path: Path, rel_pos_scale: float) -> None:
    spec = importlib.util.spec_from_file_location("export_benchmark", ROOT / "benchmarks/export.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    path = tmp_path / "vit_b.pth"
    benchmark.vit_b_checkpoint(path, rel_pos_scale=rel_pos_scale)
    exported = stages.export(
        path, output=None, base=None, images=None, overrides=Overrides(), force=False
    )
    made = exported.manifest
    assert made.network.image_size == 1024
    assert made.network.heads == (12,)
    assert made.network.rel_pos == ("real" if rel_pos_scale else "zero")
    for tensor in made.parity[0].tensors.values():
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
            built.plan.folder, load(exported.bundle), library=built.plan.library, device=there
        )
        assert perf_counter() - start < 1
