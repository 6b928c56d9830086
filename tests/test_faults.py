"""Commands that are killed, and commands that meet: a bundle is as before, or as it was to be."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_manifest import full

from medsa_deploy.bundle import atomic, durable
from medsa_deploy.bundle.additions import work_folder
from medsa_deploy.bundle.atomic import write_bytes
from medsa_deploy.bundle.files import check_files, describe_file
from medsa_deploy.bundle.folder import new_bundle
from medsa_deploy.bundle.leftovers import is_temporary
from medsa_deploy.bundle.lock import changing
from medsa_deploy.bundle.manifest import load_manifest, save_manifest
from medsa_deploy.bundle.recovery import tidy
from medsa_deploy.errors import UsageError

CHANGE = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from medsa_deploy.bundle import additions, atomic, recovery
from medsa_deploy.bundle.files import describe_file
from medsa_deploy.bundle.manifest import load_manifest

bundle, step = Path(sys.argv[1]), int(sys.argv[2])
modules, lines = {m.__file__ for m in (additions, atomic, recovery)}, 0

def trace(frame, event, _):
    global lines
    if frame.f_code.co_filename not in modules:
        return None
    lines += event == "line"
    if event == "line" and lines == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace

with additions.work_folder(bundle) as work:
    for name in ("encoder.onnx", "new.onnx"):
        (work / name).write_bytes(b"new " + name.encode())
    files = sorted(work.iterdir())
    roles = ("encoder", "decoder")
    entries = tuple(
        describe_file(file, work, role=role, precision="fp32")
        for file, role in zip(files, roles)
    )
    sys.settrace(trace)
    additions.add_files(bundle, files, replace(load_manifest(bundle), files=entries))
"""
"""Replaces a file, adds one and removes one; killed before line `step` of the modules."""


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A bundle of two files."""
    folder = tmp_path / "a.medsa"
    folder.mkdir()
    entries = []
    for name, role in (("encoder.onnx", "encoder"), ("old.onnx", "decoder")):
        (folder / name).write_bytes(f"old {name}".encode())
        entries.append(describe_file(folder / name, folder, role=role, precision="fp32"))
    save_manifest(dataclasses.replace(full(), files=tuple(entries)), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def killed_change(bundle: Path, step: int) -> bool:
    """Whether a change was killed at a step; False once the change has fewer steps."""
    command = [sys.executable, "-c", CHANGE, str(bundle), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def check_killed_changes(earlier: Path, steps: range) -> int:
    """Kill a change at each step; how many times it was killed."""
    before, kills, outcomes = contents(earlier), 0, set()
    for step in steps:
        copy = Path(shutil.copytree(earlier, earlier.parent / f"{step}.medsa"))
        if not killed_change(copy, step):
            break
        kills += 1
        tidy(copy)
        check_files(load_manifest(copy), copy)
        after = contents(copy)
        assert not [path for path in copy.iterdir() if is_temporary(path.name)]
        if after == before:
            outcomes.add("before")
        else:
            outcomes.add("after")
            assert after["new.onnx"] == b"new new.onnx"
            assert after["encoder.onnx"] == b"new encoder.onnx"
            assert sorted(after) == ["encoder.onnx", "manifest.json", "new.onnx"]
        shutil.rmtree(copy)
    assert outcomes == {"before", "after"} or kills < 20
    return kills


def test_a_change_killed_at_some_lines_is_undone_or_finished(earlier: Path) -> None:
    assert check_killed_changes(earlier, range(30, 90, 6)) > 2


@pytest.mark.slow
def test_a_change_killed_at_any_line_is_undone_or_finished(earlier: Path) -> None:
    assert check_killed_changes(earlier, range(1, 1000)) > 60


def test_a_bundle_is_changed_by_one_command_at_a_time(earlier: Path) -> None:
    with work_folder(earlier):
        for change in (work_folder, new_bundle):
            with (
                pytest.raises(UsageError, match="is being changed by another command: try again"),
                change(earlier),
            ):
                pytest.fail("the block must not run")
    with changing(earlier):
        pass


def test_a_live_writers_file_stays_and_a_dead_ones_goes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from medsa_deploy.bundle.leftovers import *\n"
        "(Path(sys.argv[1]) / temporary_name('.png')).touch()\nprint(flush=True)\ninput()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    assert tidy(tmp_path) == []
    (temporary,) = tmp_path.iterdir()
    process.communicate(b"\n")
    assert tidy(tmp_path) == [temporary]


def test_content_is_flushed_before_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace, sync = os.replace, os.fsync

    def record_sync(descriptor: int) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}") if sys.platform == "linux" else ""
        events.append("folder" if target == str(tmp_path) else "file")
        sync(descriptor)

    def record_replace(*paths: object) -> None:
        events.append("rename")
        replace(*paths)

    monkeypatch.setattr(durable.os, "fsync", record_sync)
    monkeypatch.setattr(atomic.os, "replace", record_replace)
    write_bytes(tmp_path / "mask.png", b"mask")
    assert events == ["file", "rename", "folder"]
