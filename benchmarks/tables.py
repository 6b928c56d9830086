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
        f"{name}: {figures['steps']} steps in {figures['seconds'] / 60:.0f} minutes, "
        f"{figures['cpu_seconds'] / 60:.0f} of one processor"
        for name, figures in result["training"].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(
        [
            *rows,
            "",
            f"Pixels the adapted network gives to classes that are not in the chunk: "
            f"{result['wrong']['test']:.2%}.",
            f"Training, on a machine that others used at the same time: {'; '.join(training)}.",
            f"Machine: {result['machine']}; {versions}.",
        ]
    )


Tables = dict[str, Callable[[dict[str, Any]], str]]
TABLES: Tables = {"export": export_table}
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
