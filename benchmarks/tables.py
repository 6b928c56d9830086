"""Tables of README and model card from `benchmarks/results/*.json`: python benchmarks/tables.py

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; a test holds them equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def export_table(result: dict[str, Any]) -> str:
    """Time and peak memory of export."""
    rows = ["| relative-position tables | time | peak memory |", "|---|---|---|"]
    for name, median in result["median"].items():
        runs = len(result["samples"][name])
        rows.append(
            f"| {name.removesuffix(' tables')} | {median['seconds']:.0f} s "
            f"| {median['peak_mb'] / 1024:.1f} GiB (medians of {runs}) |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join([*rows, "", f"Measured on: {result['machine']}; {versions}."])


def demo_checkpoint_table(result: dict[str, Any]) -> str:
    """Dice of the demonstration checkpoint by network, prompt and class; and how it was trained."""
    dice = result["dice"]["test"]
    classes = list(next(iter(dice["base"].values())))
    rows = [f"| network | prompt | {' | '.join(classes)} |", "|---|---|" + "---|" * len(classes)]
    for variant, kinds in dice.items():
        for kind, row in kinds.items():
            figures = " | ".join(f"{row[name]:.3f}" for name in classes)
            rows.append(f"| {variant} | {kind} | {figures} |")
    training = [
        f"{name}: {figures['steps']} steps in {figures['seconds'] / 60:.0f} minutes"
        for name, figures in result["training"].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(
        [
            *rows,
            "",
            f"Pixels the adapted network gives to classes that are not in the chunk: "
            f"{result['wrong']['test']:.2%}.",
            f"Training: {'; '.join(training)}, on {result['threads']} thread of a machine that "
            "others used at the same time.",
            f"Machine: {result['machine']}; {versions}.",
        ]
    )


def volume_memory_table(result: dict[str, Any]) -> str:
    """Memory of `run` on a volume, beyond what the network takes for a chunk of slices."""
    rows = [
        "| volume | image size | prompts | loaded | with a chunk | peak | beyond the network |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result["samples"]:
        prompts = "followed from one slice" if one["propagate"] else "boxes in every slice"
        measured = [one[f"{when}_mb"] for when in ("loaded", "working", "peak", "beyond_working")]
        rows.append(
            f"| {one['volume']} → {one['output']} | {one['image_size']} | {prompts} | "
            + " | ".join(f"{megabytes} MB" for megabytes in measured)
            + " |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(
        [
            *rows,
            "",
            f"{result['what'][0].upper()}{result['what'][1:]}.",
            f"Measured on: {result['machine']}; {versions}.",
        ]
    )


def precisions_table(result: dict[str, Any]) -> str:
    """What each precision costs and saves."""
    rows = [
        "| model | precision | INT8 layers | encoder | decoder | Dice to labels "
        "| Dice to float32, mean (worst) | encode | decode |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, precisions in result["models"].items():
        for precision, found in precisions.items():
            recipe = found["recipe"] or {"quantized": (), "left_out": ()}
            layers = len(recipe["quantized"]) + len(recipe["left_out"])
            count = f"{len(recipe['quantized'])} of {layers}" if layers else "none"
            mean, worst = found["dice_to_float32_mean"], found["dice_to_float32_worst"]
            rows.append(
                f"| {model} | {precision} | {count} | {found['encoder_mb']:.1f} MB "
                f"| {found['decoder_mb']:.1f} MB | {found['dice_to_labels_mean']:.3f} "
                f"| {mean:.4f} ({worst:.4f}) | {found['encode_ms']['median']:.0f} ms "
                f"| {found['decode_ms']['median']:.0f} ms |"
            )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    what = f"{result['what']}, medians."
    return "\n".join([*rows, "", what, f"Measured on: {result['machine']}; {versions}."])


Tables = dict[str, Callable[[dict[str, Any]], str]]
TABLES: Tables = {
    "export": export_table,
    "precisions": precisions_table,
    "volume_memory": volume_memory_table,
}
CARD_TABLES: Tables = {"demo_checkpoint": demo_checkpoint_table}
"""Those of the demonstration checkpoint's model card."""
CARD = ROOT / "medsa_deploy" / "assets" / "MODEL_CARD.md"


def with_tables(document: str, tables: Tables = TABLES) -> str:
    """The document's text with every table made anew from its result."""
    for name, table in tables.items():
        text = table(json.loads((RESULTS / f"{name}.json").read_text()))
        block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
        document, count = re.subn(
            f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, document, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"there are {count} places for the table {name!r}, expected 1")
    return document


if __name__ == "__main__":
    for path, tables in ((ROOT / "README.md", TABLES), (CARD, CARD_TABLES)):
        path.write_text(with_tables(path.read_text(), tables))
