"""The benchmark of load, for seconds: two users, whose masks are their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_users_for_two_seconds(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "serve_load.py", bundle, "-o", output),
            *("--users", "2", "--seconds", "2"),
        ],
        check=True,
        cwd=ROOT,
        timeout=600,
    )
    (case,) = json.loads(output.read_text())["cases"]
    assert case["users"] == 2
    assert case["clicks"] >= case["masks_compared"] >= 2
    assert case["latency_ms"]["p50"] <= case["latency_ms"]["p99"]
    assert case["memory_mb"]["most"] >= case["memory_mb"]["start"] > 0
