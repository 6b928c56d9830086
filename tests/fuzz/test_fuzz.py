"""Damaged files of every format, the same in every run: each is refused in one line, or read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fuzz_judge
import pytest
from fuzz_readers import FORMATS, Format

RUNNER = Path(__file__).with_name("fuzz_run.py")
INPUTS = 3000
"""Files in CI; `make fuzz` reads more."""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUNNER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    done = run("--inputs", INPUTS, "--failures", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert set(result["counts"]) == set(FORMATS)
    assert INPUTS <= result["inputs"] <= INPUTS + len(FORMATS)
    assert 0.4 < result["refused"] / result["inputs"] < 0.95  # neither all nor none are damaged


def test_a_file_follows_from_its_seed_and_number(tmp_path: Path) -> None:
    judges = [fuzz_judge.Judge(tmp_path) for _ in range(2)]
    for name in ("png", "dicom", "prompts", "signature"):
        first, second = ([judge.content(name, 3, k) for k in range(20, 25)] for judge in judges)
        assert first == second
        assert len(set(first)) == 5


def read_badly(path: Path) -> None:
    content = path.read_bytes()
    if content.startswith(b"raise"):
        raise KeyError("a")
    if content.startswith(b"spend"):
        bytearray(b"1") * (fuzz_judge.LIMITS.memory + 2 * fuzz_judge.SLACK_BYTES)


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"raise", "KeyError at tests/fuzz/test_fuzz.py"), (b"spend", "bad: memory"), (b"fine", None)],
)
def test_what_is_no_error_of_the_tree_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, kind: str | None
) -> None:
    bad = Format(
        suffix="",
        seeds=lambda: [b""],
        mutation=lambda random, seeds: b"",
        read=read_badly,
        weight=1,
    )
    monkeypatch.setitem(FORMATS, "bad", bad)
    failure = fuzz_judge.Judge(tmp_path).judge("bad", content)
    assert (failure is None) == (kind is None)
    assert failure is None or failure.kind.startswith(kind or "")


def test_a_kept_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts-0-7.bin"
    path.write_text('{"structures": 3}')
    done = run("--reproduce", path)
    assert (done.returncode, done.stdout.strip()) == (0, "refused")
