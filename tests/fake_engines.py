"""Engines that compute bright pixels (fake_network.py) on the GPU of fake_gpu."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fake_gpu import DEVICE, Machine
from fake_network import SIDE, BrightPixels, bright_pixels

from medsa_deploy.bundle.files import sha256
from medsa_deploy.bundle.manifest import File, Manifest, save_manifest
from medsa_deploy.evaluation.cases import seeded_case
from medsa_deploy.evaluation.parity import run_case
from medsa_deploy.evaluation.reference_file import save_reference
from medsa_deploy.nvidia.engines import (
    AxisRange,
    Engine,
    EngineFile,
    EngineOptions,
    optimization_profile,
    save_engines,
)


def describe(flavor: str = "tensorrt", **sizes: AxisRange) -> EngineOptions:
    """Options of engines for a batch of 1…2, 1…3 prompts and 1…4 points."""
    ranges = {
        "batch": AxisRange(min=1, opt=1, max=2),
        "points": AxisRange(min=1, opt=2, max=4),
        "prompts": AxisRange(min=1, opt=1, max=3),
        "embeddings": AxisRange(min=1, opt=1, max=1),
    }
    return EngineOptions(
        flavor=flavor,
        precision="fp32",
        targets=(DEVICE.capability,),
        tf32=False,
        fused_attention=True,
        workspace_gb=None,
        optimization_level=None,
        **ranges | sizes,
    )


def write(
    folder: Path, manifest: Manifest, options: EngineOptions, version: str = "10.13.0"
) -> Path:
    """A folder of engines that `Machine.functions` computes."""
    folder.mkdir(parents=True)
    files = []
    for role in ("encoder", "decoder"):
        path = folder / f"{role}.engine"
        profile = optimization_profile(manifest.graphs[role].inputs, options)
        path.write_text(json.dumps({"name": role, "profile": profile}))
        files.append(
            EngineFile(
                role=role,
                path=path.name,
                bytes=path.stat().st_size,
                sha256=sha256(path),
                sources={},
                profile=profile,
                attention="unknown",
                seconds=1.0,
            )
        )
    described = Engine(
        options=options, version=version, device=None, state="built", files=tuple(files)
    )
    save_engines(described, folder)
    return folder


def compute(machine: Machine, manifest: Manifest, network: BrightPixels) -> None:
    """Have the machine's engines compute a network of the manifest's contract."""

    def encoder(image: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "image_embeddings": np.concatenate([network.encode(plane[None]) for plane in image])
        }

    def decoder(image_embeddings: np.ndarray, **prompt: Any) -> dict[str, np.ndarray]:
        mask = prompt["mask_input"] if prompt["has_mask_input"][0] else None
        masks, scores = network.decode(
            image_embeddings, prompt["point_coords"].copy(), prompt["point_labels"].copy(), mask
        )
        if mask is not None:
            masks = masks + mask
        assert mask is not None or not prompt["mask_input"].any()
        return {"low_res_masks": masks, "iou_predictions": scores}

    for role, function in (("encoder", encoder), ("decoder", decoder)):
        graph = manifest.graphs[role]
        function.tensors = {t.name: t.shape for t in (*graph.inputs, *graph.outputs)}
        machine.functions[role] = function


def session_of(machine: Machine, **options: Any) -> Any:
    """A session on bright pixels themselves, whose network the machine's engines compute."""
    session = bright_pixels(**options)
    compute(machine, session.manifest, BrightPixels(session.manifest.network))
    return session


def bundle_of(machine: Machine, folder: Path) -> Path:
    """A bundle of bright pixels with TensorRT's engines. Its ONNX files are none."""
    plain = session_of(machine)
    folder.mkdir()
    case = seeded_case(SIDE, None, 1)
    save_reference(folder / "reference.npz", case, run_case(plain, case))
    files = []
    for role, name in (
        ("encoder", "encoder.onnx"),
        ("decoder", "decoder.onnx"),
        ("reference", "reference.npz"),
    ):
        path = folder / name
        if role != "reference":
            path.write_text(role)
        size, digest = path.stat().st_size, sha256(path)
        files.append(File(path=name, role=role, precision="fp32", bytes=size, sha256=digest))
    manifest = replace(plain.manifest, files=tuple(files))
    save_manifest(manifest, folder)
    write(folder / "engines" / "x", manifest, describe())
    return folder
