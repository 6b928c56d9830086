"""A network's files → what is measured of it: ours as the runtime offers it, and the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsa_deploy.bundle.manifest import Manifest, load_manifest
from medsa_deploy.errors import UsageError
from medsa_deploy.runtime.backends.registry import (
    BACKENDS,
    COMPUTED,
    check_options,
    files_precision,
)

from . import files
from .names import DEFAULT_NAME, OURS
from .networks import Network
from .reference import as_json

SWIN_SLUG = "swin-unetr"
FOR_GPUS = ("int8",)
"""Precisions that are made for GPUs only."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What runs in one process."""

    name: str
    spec: dict[str, Any]
    """What the worker is told."""
    files: tuple[Path, ...]
    """What a user would ship."""
    missing: str | None = None
    """Why it cannot be measured."""
    ops: tuple[str, ...] = ("encoder", "decoder")

    @property
    def ours(self) -> bool:
        """Whether it is this project's."""
        return self.spec["kind"] == "ours"


def candidates(network: Network, folder: Path, threads: int | None) -> list[Candidate]:
    """Everything that is measured of a network, the plain export in ONNX Runtime first."""
    place = folder / network.slug
    failed = files.failures(place)
    common = {"inputs": str(place / "inputs.npz"), "threads": threads}
    if not (place / "bundle.medsa").exists():
        return []
    ours = list(_ours(network, place, failed, common))
    if not network.peers:
        return [candidate for candidate in ours if candidate.name == DEFAULT_NAME]
    peers = [*_onnx("plain export", place, "plain", failed.get("plain export"), common), *ours]
    torch = {"checkpoint": str(place / "checkpoint.pth"), "overrides": as_json(network.overrides)}
    for kind, name in (("eager", "PyTorch eager"), ("compile", "torch.compile")):
        spec = {"kind": kind, **torch, **common}
        peers.append(Candidate(name=name, spec=spec, files=(place / "checkpoint.pth",)))
    if network.samexporter:
        more = {
            "image": "input_image",
            "more": {"has_mask_input": [0], "orig_im_size": [1024, 1024]},
            "mask_input": [1, 1, 256, 256],
        }
        missing = failed.get("samexporter")
        peers += _onnx("samexporter", place, "samexporter", missing, common | more)
    return peers


def swin_candidates(folder: Path, threads: int | None) -> list[Candidate]:
    """Swin-UNETR in the same runtimes: its time is of one patch."""
    place = folder / SWIN_SLUG
    common = {"inputs": str(place / "inputs.npz"), "threads": threads}
    missing = files.failures(place).get("plain export")
    graphs = list(_onnx("plain export", place, "plain", missing, common, parts=("encoder",)))
    eager = {"kind": "eager", **common}
    return [*graphs, Candidate(name="PyTorch eager", spec=eager, files=(), ops=("encoder",))]


def _onnx(
    name: str,
    place: Path,
    prefix: str,
    missing: str | None,
    common: dict[str, Any],
    parts: tuple[str, ...] = ("encoder", "decoder"),
) -> Iterator[Candidate]:
    """ONNX files in ONNX Runtime, and in OpenVINO in float32 and bfloat16."""
    paths = {part: str(place / f"{prefix}-{part}.onnx") for part in parts}
    runs: tuple[tuple[str, dict[str, str]], ...] = (
        ("onnxruntime", {"kind": "onnxruntime"}),
        ("openvino fp32", {"kind": "openvino", "precision": "f32"}),
        ("openvino bf16", {"kind": "openvino", "precision": "bf16"}),
    )
    for runtime, spec in runs:
        yield Candidate(
            name=f"{name}, {runtime}",
            spec={**paths, **common, **spec},
            files=tuple(map(Path, paths.values())),
            missing=missing,
            ops=parts,
        )


def _ours(
    network: Network, place: Path, failed: dict[str, str], common: dict[str, Any]
) -> Iterator[Candidate]:
    """The bundle in every backend and precision that the runtime takes."""
    bundle = place / "bundle.medsa"
    manifest = load_manifest(bundle)
    in_bundle = {f.precision for f in manifest.files if f.role == "encoder"} - set(FOR_GPUS)
    for backend in (spec.name for spec in BACKENDS.values() if not spec.gpu):
        for precision in sorted(in_bundle | {p for p, of in COMPUTED.items() if of in in_bundle}):
            try:
                check_options(backend, None, precision)
            except UsageError:
                continue  # bfloat16 is one backend's
            yield _of_bundle(bundle, manifest, backend, precision, common)
    for precision in network.precisions:
        if precision in failed:
            yield Candidate(
                name=f"{OURS}, {precision}",
                spec={"kind": "ours"},
                files=(),
                missing=failed[precision],
            )


def _of_bundle(
    bundle: Path, manifest: Manifest, backend: str, precision: str, common: dict[str, Any]
) -> Candidate:
    of_files = files_precision(precision)
    paths = {f.path for f in manifest.files if f.precision == of_files and f.role != "reference"}
    spec = {"kind": "ours", "bundle": str(bundle), "backend": backend, "precision": precision}
    return Candidate(
        name=f"{OURS}, {backend} {precision}",
        spec=spec | common,
        files=tuple(bundle / path for path in sorted(paths)),
        ops=("encoder", "decoder", "click"),
    )
