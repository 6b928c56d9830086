"""stdout and stderr on a full disk: diagnostics get lost, results that get lost are an error."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO
from unittest.mock import patch

import numpy as np
import PIL.Image
import pytest
from command_line import command

from medsa_deploy import cli
from medsa_deploy.event_log import EventLog

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.fixture
def full() -> Iterator[TextIO]:
    """A stream that takes nothing."""
    stream = FULL.open("w", encoding="utf-8")
    yield stream
    with suppress(OSError):
        stream.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96), np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


def exit_code(*arguments: object, out: TextIO, err: TextIO) -> int:
    """The exit code of a command in this process, with streams of its own."""
    words = ["medsa-deploy", *map(str, arguments)]
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", words):
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)


def test_a_run_without_stderr_writes_its_mask(bundle: Path, picture: Path, tmp_path: Path) -> None:
    for number, redirection in enumerate(("2>/dev/full", "2>&-")):
        target = tmp_path / f"{number}.png"
        words = command("run", bundle, picture, "--point", "40,40", "-o", target, "--json")
        line = 'exec "$@" ' + redirection
        done = subprocess.run(
            ["sh", "-c", line, "sh", *words], stdout=subprocess.PIPE, text=True, check=False
        )
        assert done.returncode == 0
        assert json.loads(done.stdout)
        with PIL.Image.open(target) as mask:
            assert mask.size == (96, 96)


def test_other_commands_without_stderr_end_well(
    bundle: Path, tmp_path: Path, full: TextIO, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("verify", bundle, "--json", out=sys.stdout, err=full) == 0
    assert json.loads(capsys.readouterr().out)
    assert exit_code("profile", bundle, "--runs", "1", "--json", out=sys.stdout, err=full) == 0
    assert json.loads(capsys.readouterr().out)
    assert exit_code("verify", tmp_path / "none", out=sys.stdout, err=full) == 2


def test_results_that_cannot_be_written_are_an_error(
    bundle: Path, full: TextIO, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (("--version",), ("doctor",), ("doctor", "--json"), ("verify", bundle)):
        with FULL.open("w") as out:
            assert exit_code(*arguments, out=out, err=sys.stderr) == 2
        assert "stdout cannot be written to (No space left on device)" in capsys.readouterr().err
    with FULL.open("w") as out:
        assert exit_code("verify", "none", "--json", out=out, err=full) == 2


def test_a_process_says_so_by_its_exit_code() -> None:
    with FULL.open("wb") as out:
        done = subprocess.run(
            command("--version"), stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: stdout cannot be written to")
    assert len(done.stderr.splitlines()) == 1


def test_an_event_that_cannot_be_written_ends_no_service(full: TextIO) -> None:
    events = EventLog(full)
    for _ in range(1000):
        events.write("received", series=1, text="x" * 100)
    with events.of_logger("medsa_deploy.test_streams"):
        logging.getLogger("medsa_deploy.test_streams").warning("lost")
