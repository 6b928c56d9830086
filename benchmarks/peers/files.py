"""A network → every file its candidates run: bundle, plain exports, inputs; kept between runs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from medsa_deploy import stages
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.evaluation.parity import LIMITS, Limits
from medsa_deploy.exporters.architecture import infer
from medsa_deploy.exporters.checkpoint import load_checkpoint

from . import reference
from .networks import Network, calibration_images, images_of

SAMEXPORTER = "samexporter==0.5.0"
EXPORTERS = ("exporters", "medsa_deploy/graph")
"""Sources a bundle depends on: it is made again when they change."""
FAILED = "failed.json"
"""What could not be made, and why."""
ROOT = Path(__file__).parents[2]


def say(message: str) -> None:
    """To whoever waits."""
    print(message, file=sys.stderr, flush=True)


def prepare(network: Network, folder: Path, *, again: bool) -> None:
    """Make what is missing in the network's folder. What fails is written down, and the rest made.

    `again`: whether to try once more what failed before.
    """
    place = folder / network.slug
    place.mkdir(parents=True, exist_ok=True)
    if again:
        (place / FAILED).unlink(missing_ok=True)
    checkpoint = place / "checkpoint.pth"
    _make(place, "checkpoint", lambda: network.checkpoint(checkpoint), checkpoint)
    bundle = place / "bundle.medsa"
    stamp = place / f"bundle.{_digest()}"
    _make(place, "bundle", lambda: _export(network, place, stamp), stamp, bundle)
    for precision in network.precisions:
        if bundle.exists() and load_manifest(bundle).recipe(precision) is None:
            missing = place / "none"  # the manifest says whether it is there
            _make(place, precision, lambda p=precision: _quantize(network, place, p), missing)
    recorded = place / "inputs.npz", place / "costs.json"
    _make(place, "inputs", lambda: _record(network, place), *recorded)
    if network.peers:
        plain = [place / f"plain-{part}.onnx" for part in ("encoder", "decoder")]
        _make(place, "plain export", lambda: _plain(network, place), *plain)
    if network.samexporter:
        _make(place, "samexporter", lambda: _samexporter(folder, place), *sam_files(place))


def prepare_swin(place: Path, *, again: bool) -> None:
    """Swin-UNETR as ONNX, with an input and what it gives for it."""
    place.mkdir(parents=True, exist_ok=True)
    if again:
        (place / FAILED).unlink(missing_ok=True)
    path, inputs, costs = place / "plain-encoder.onnx", place / "inputs.npz", place / "costs.json"

    def make() -> None:
        network = reference.swin_unetr()
        side = reference.PATCH
        image = np.random.default_rng(0).random((1, 1, side, side, side), dtype=np.float32)
        with torch.inference_mode():
            logits = network(torch.from_numpy(image)).numpy()
        np.savez(inputs, image_0=image, embeddings_0=logits)
        costs.write_text(json.dumps({"encoder": reference.gflop(network, torch.from_numpy(image))}))
        reference.export_onnx(
            network,
            (torch.from_numpy(image),),
            path,
            inputs=["image"],
            outputs=["image_embeddings"],
        )

    _make(place, "plain export", make, path, inputs, costs)


def failures(place: Path) -> dict[str, str]:
    """What could not be made → why."""
    path = place / FAILED
    return json.loads(path.read_text()) if path.exists() else {}


def sam_files(place: Path) -> tuple[Path, Path]:
    """samexporter's encoder and decoder."""
    return place / "samexporter-encoder.onnx", place / "samexporter-decoder.onnx"


def _make(place: Path, label: str, make: Callable[[], None], *paths: Path) -> None:
    """Make files unless they are there, or could not be made before."""
    failed = failures(place)
    if label in failed or all(path.exists() for path in paths):
        return
    say(f"{place.name}: {label}")
    try:
        make()
    except Exception as e:
        failed[label] = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}"
        say(f"{place.name}: {label}: {failed[label]}")
    (place / FAILED).write_text(json.dumps(failed, indent=1))


def _digest() -> str:
    """Of the sources that decide what a bundle holds."""
    digest = hashlib.sha256()
    for folder in EXPORTERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _export(network: Network, place: Path, stamp: Path) -> None:
    stages.export_checkpoint(
        place / "checkpoint.pth",
        output=place / "bundle.medsa",
        base=None,
        images=None,
        overrides=network.overrides,
        force=True,
    )
    for older in place.glob("bundle.*"):
        if older.is_file():
            older.unlink()
    stamp.touch()


def _quantize(network: Network, place: Path, precision: str) -> None:
    bundle = place / "bundle.medsa"
    if precision == "fp16":
        stages.quantize_bundle(bundle, precision="fp16")
        return
    size = load_manifest(bundle).network.image_size
    calibration = calibration_images(network, place, size)
    with _unjudged(precision, not network.real_weights):
        stages.quantize_bundle(bundle, precision="int8", calibration=calibration, target="cpu")


@contextmanager
def _unjudged(precision: str, unjudged: bool) -> Iterator[None]:
    """Have every layer made INT8: the masks of seeded weights are noise, and say nothing of them.

    What INT8 does to masks is measured on networks with real weights.
    """
    before = LIMITS[precision]
    if unjudged:
        LIMITS[precision] = Limits()
    try:
        yield
    finally:
        LIMITS[precision] = before


def _record(network: Network, place: Path) -> None:
    manifest = load_manifest(place / "bundle.medsa")
    network_of = infer(load_checkpoint(place / "checkpoint.pth"), network.overrides).network
    assert network_of == manifest.network
    network_reference = reference.reference_of(place / "checkpoint.pth", network.overrides)
    work = images_of(network, manifest.network.image_size)
    np.savez(place / "inputs.npz", **reference.record(network_reference, manifest, work))
    costs = reference.costs(network_reference, manifest.network.chunk)
    (place / "costs.json").write_text(json.dumps(costs))


def _plain(network: Network, place: Path) -> None:
    network_reference = reference.reference_of(place / "checkpoint.pth", network.overrides)
    reference.plain_export(network_reference, place, network_reference.network.chunk)


def _samexporter(folder: Path, place: Path) -> None:
    """Run samexporter in an environment of its own, on the libraries that are installed here."""
    environment = folder / "samexporter"
    python = environment / "bin" / "python"
    if not (environment / "installed").exists():
        venv = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(environment)]
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
        for command in (venv, [*pip, SAMEXPORTER]):
            subprocess.run(command, check=True, stdout=sys.stderr)
        (environment / "installed").touch()
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    for part, path in zip(("encoder", "decoder"), sam_files(place), strict=True):
        partial = path.with_suffix(".partial.onnx")
        script = Path(__file__).with_name("run_samexporter.py")
        command = [python, script, f"samexporter.export_{part}", "--model-type", "vit_b"]
        command += ["--checkpoint", place / "checkpoint.pth", "--output", partial]
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(libraries)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise RuntimeError(lines[-1])
        partial.replace(path)
