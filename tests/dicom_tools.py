"""Programs of Debian's packages that DICOM is tested with; a test says which one is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGES = {
    "dciodvfy": "dicom3tools",
    "storescu": "dcmtk",
    "storescp": "dcmtk",
    "echoscu": "dcmtk",
    "Orthanc": "orthanc orthanc-dicomweb",
}
"""Program → the Debian packages that hold it; `.ci/run` installs them."""


def program(name: str) -> str:
    """The path of a program; without it the test is skipped, and says what to install."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    path = shutil.which(name, path=places)
    if path is None:
        pytest.skip(f"{name} is not installed: apt-get install {PACKAGES[name]}")
    return path


def check_iod(path: Path) -> None:
    """dciodvfy's old and new way of checking find no error, and no attribute out of place."""
    for options in ([], ["-new"]):
        done = subprocess.run(
            [program("dciodvfy"), *options, path], capture_output=True, text=True, check=False
        )
        lines = (done.stdout + done.stderr).splitlines()
        assert lines, path
        assert not [line for line in lines if line.startswith("Error")], "\n".join(lines)
        assert not [line for line in lines if "not present in standard" in line], "\n".join(lines)
