"""A network of a user's size in every backend of a GPU → latencies, and shares of its peak."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.gpu_commands import (
    PROVIDER,
    NotRun,
    build,
    export,
    installed_flavors,
    knows_this_gpu,
    onnxruntime_has_cuda,
    profile,
    rehearsing,
    run_medsa,
)
from medsa_deploy.nvidia import tensorrt_api

SIDE = 8192
"""Side of the matrices whose product is the peak."""


def models(folder: Path) -> dict[str, Any]:
    """A ViT-B by every backend of a GPU: latencies of every stage, and the encoder's share."""
    flavors = [f for f in installed_flavors() if knows_this_gpu(f) and find_spec("pycuda")]
    backends = [*flavors, *(["onnxruntime-cuda"] if onnxruntime_has_cuda() else [])]
    if not backends:
        raise NotRun("no backend of a GPU: pip install '.[cuda,tensorrt]', or '.[gpu]'")
    checkpoint, bundle = vit_b(folder)
    gflop = encoder_gflop(checkpoint, bundle)
    peak = matrix_peak(folder) if "onnxruntime-cuda" in backends else None
    runs = [
        profiled(bundle, backend, precision, gflop, peak)
        for backend in backends
        for precision in (("fp32",) if rehearsing() else ("fp32", "fp16"))
    ]
    failed = not all("profile" in run for run in runs)
    return {
        "outcome": "failed" if failed else "ok",
        "encoder_gflop": gflop,
        "float16_peak_tflop_per_s": peak,
        "runs": runs,
    }


def vit_b(folder: Path) -> tuple[Path, Path]:
    """A checkpoint with seeded weights, and its bundle in float32 and float16.

    A rehearsal takes the small network.
    """
    if rehearsing():
        bundle = export(folder)
        return folder / "a.pth", bundle
    from benchmarks.export import vit_b_checkpoint

    checkpoint, bundle = folder / "b.pth", folder / "b.medsa"
    vit_b_checkpoint(checkpoint, rel_pos_scale=0.0)
    run_medsa("export", checkpoint, check=True)
    run_medsa("quantize", bundle, "--fp16", check=True)
    return checkpoint, bundle


def profiled(
    bundle: Path, backend: str, precision: str, gflop: float, peak: float | None
) -> dict[str, Any]:
    """A backend's profile, with what it says where it cannot run; engines are built first."""
    result: dict[str, Any] = {"backend": backend, "precision": precision}
    if backend in tensorrt_api.FLAVORS:
        result["engine"] = build(bundle, backend, precision)  # type: ignore[arg-type]
        if not result["engine"]["built"]:
            return result
    result |= profile(bundle, backend, precision)
    if "profile" not in result:
        return result
    encode = result["profile"]["stages"]["encode"]["p50_ms"]
    result["encoder_tflop_per_s"] = gflop / encode
    if peak is not None:
        result["encoder_share_of_float16_peak"] = gflop / encode / peak
    return result


def encoder_gflop(checkpoint: Path, bundle: Path) -> float:
    """Billions of additions and multiplications of the encoder's products, for one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from medsa_deploy.bundle.manifest import load_manifest
    from medsa_deploy.exporters.checkpoint import load_checkpoint
    from medsa_deploy.exporters.networks import build_reference

    network = load_manifest(bundle).network
    reference = build_reference(network, load_checkpoint(checkpoint).tensors).to("meta")
    side = network.image_size
    with FlopCounterMode(display=False) as counter:
        reference.image_encoder(torch.empty(1, 3, side, side, device="meta"))
    return float(counter.get_total_flops() / 1e9)


def matrix_peak(folder: Path, provider: str = PROVIDER) -> float:
    """TFLOP/s of the best of ten float16 products by ONNX Runtime's CUDA provider."""
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper, save

    half, shape = TensorProto.FLOAT16, [SIDE, SIDE]
    device = "cuda" if provider == PROVIDER else "cpu"
    a, b, c = (helper.make_tensor_value_info(name, half, shape) for name in "abc")
    product = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph, path = helper.make_graph([product], "peak", [a, b], [c]), folder / "peak.onnx"
    opset = helper.make_opsetid("", 20)
    save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    session = ort.InferenceSession(path, providers=[provider])
    binding, random = session.io_binding(), np.random.default_rng(0)
    for name in "ab":
        values = random.normal(0, 0.01, shape).astype(np.float16)
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values, device))
    binding.bind_output("c", device)
    seconds = []
    for _ in range(12):
        start = perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        seconds.append(perf_counter() - start)
    return 2 * SIDE**3 / min(seconds[2:]) / 1e12
