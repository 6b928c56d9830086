"""The cases of `orthanc_cases.py`, in a network and mounts of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dicom_tools import program

CASES = Path(__file__).with_name("orthanc_cases.py")


def namespace() -> list[str]:
    """The command that gives a program its own network and mounts; skipped where that is barred."""
    command = ["unshare", "--net", "--mount", "--map-root-user"]
    if os.geteuid() == 0:
        command.remove("--map-root-user")
    done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no namespaces here: {done.stderr.strip()}")
    return command


@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_cases_in_a_network_of_their_own(bundle: Path, tmp_path: Path, marks: str) -> None:
    for name in ("Orthanc", "dciodvfy"):
        program(name)
    tests = f"{sys.executable} -m pytest -q -p no:cacheprovider -m '{marks}' -s {CASES}"
    script = (
        f"PATH=$PATH:/usr/sbin:/sbin; ip link set lo up && exec {tests} --basetemp={tmp_path}/c"
    )
    done = subprocess.run(
        [*namespace(), "sh", "-c", script],
        env=os.environ | {"MEDSA_CASES_BUNDLE": str(bundle)},
        cwd=CASES.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout)
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
