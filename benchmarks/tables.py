"""The README's tables from `benchmarks/results/*.json`: python benchmarks/tables.py

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; a test holds README and results equal.
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
    what = f"{result['what']}. Times are medians."
    return "\n".join([*rows, "", what, f"Measured on: {result['machine']}; {versions}."])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "export": export_table,
    "precisions": precisions_table,
}


def with_tables(readme: str) -> str:
    """The README's text with every table made anew from its result."""
    for name, table in TABLES.items():
        text = table(json.loads((RESULTS / f"{name}.json").read_text()))
        block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
        readme, count = re.subn(
            f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, readme, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"README.md has {count} places for the table {name!r}, expected 1")
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))
