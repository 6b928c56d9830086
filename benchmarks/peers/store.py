"""Results ⇄ JSON: written whole with everything that is added, and taken up again."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from medsa_deploy import machine

LIBRARIES = ("torch", "onnxruntime", "openvino", "onnx", "monai", "numpy")


def environment(threads: int | None) -> dict[str, Any]:
    """What figures hold for."""
    return {
        "machine": f"{machine.processor()}, {machine.cores()} cores, {machine.memory_gb()} GB",
        "system": machine.system(),
        "threads": threads or machine.cores(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def resumed(path: Path, empty: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """What was measured here before, or nothing; SystemExit where it was measured elsewhere."""
    measured_in = environment(threads)
    if not path.exists():
        return measured_in | empty
    stored: dict[str, Any] = json.loads(path.read_text())
    if differing := [key for key, value in measured_in.items() if stored.get(key) != value]:
        raise SystemExit(
            f"{path} was measured with another {' and '.join(differing)}: move it away"
        )
    return stored


def save(result: dict[str, Any], path: Path) -> None:
    """Write it, in place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
