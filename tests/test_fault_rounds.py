"""Kills, full disks, read-only folders and limits at random moments: whole bundles, whole outputs.

`fault_rounds.py` runs the rounds. Each checks that the bundle loads, that every output is the
earlier or the new one, that the error is one of the tree with its exit code, and that the next
command succeeds and leaves no temporary file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from command_line import copied
from test_sign import key_pair

SCRIPT = Path(__file__).with_name("fault_rounds.py")


@pytest.fixture
def source(bundle: Path, tmp_path: Path) -> Path:
    """What every round begins with: a bundle, images, a key, and earlier outputs."""
    folder = tmp_path / "source"
    for name in ("in", "out"):
        (folder / name).mkdir(parents=True)
    copied(bundle, folder).rename(folder / "a.medsa")
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96), np.uint8)
    for name in ("a.png", "in/a.png", "in/b.png"):
        PIL.Image.fromarray(pixels).save(folder / name)
    (folder / "out" / "a.png.mask.png").write_bytes(b"earlier")
    key_pair(folder, "k").rename(folder / "k.pem")
    return folder


def rounds(source: Path, seed: int, count: int, *commands: str) -> list[dict[str, Any]]:
    """The results of some rounds; none of them may have violated anything."""
    words = (SCRIPT, source, source.parent / "work", seed, count, *commands)
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == count
    assert [result for result in results if result["violations"]] == []
    return results


def outcomes(results: list[dict[str, Any]]) -> Counter[str]:
    return Counter("success" if result["code"] == 0 else "failure" for result in results)


def test_a_changed_bundle_is_the_earlier_or_the_new(source: Path) -> None:
    results = rounds(source, 1, 21, "change")
    assert outcomes(results)["failure"] > 5
    assert {result["fault"] for result in results if result["code"]} > {"kill", "read-only"}


def test_masks_are_whole_or_absent(source: Path) -> None:
    results = rounds(source, 2, 7, "run")
    assert outcomes(results)["failure"] > 2


@pytest.mark.slow
def test_two_hundred_rounds(source: Path) -> None:
    results = rounds(source, 3, 175, "run", "sign", "change", "folder", "verify")
    results += rounds(source, 4, 28, "quantize")
    assert outcomes(results)["failure"] > 60
    assert outcomes(results)["success"] > 30
