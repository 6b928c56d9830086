"""A ViT-B at 1024×1024, as users have it: exported and proved. Minutes long."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from medsa_deploy import stages
from medsa_deploy.exporters.architecture import Overrides

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
    made = stages.export(
        path, output=None, base=None, images=None, overrides=Overrides(), force=False
    ).manifest
    assert made.network.image_size == 1024
    assert made.network.heads == (12,)
    assert made.network.rel_pos == ("real" if rel_pos_scale else "zero")
    for tensor in made.parity[0].tensors.values():
        assert tensor.relative_l2 <= 2e-5
