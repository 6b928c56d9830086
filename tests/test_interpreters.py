"""The runtime's tests on every Python that a device may have and this machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.10", "3.12", "3.13")
"""Beside the one that runs all tests."""
EXTRAS = "dicom,metrics,sign"
FOR_TESTS = ("pytest", "hypothesis", "filelock", "SimpleITK")
MODULES = (
    *("session/test_session_images.py", "session/test_session_prompts.py"),
    *("session/test_session_refusals.py", "test_atomic.py", "test_bundle.py", "test_child.py"),
    *("test_cli_run.py", "test_doctor.py", "test_errors.py", "test_images_dicom.py"),
    *("test_images_dicom_seg.py", "test_images_read.py", "test_images_write.py"),
    *("test_metrics.py", "test_transforms_prompts.py", "test_volumes_npy.py"),
)
"""Those that need neither torch nor onnx."""
OF_LIBRARIES = ("-W", "ignore:unclosed database:ResourceWarning")
"""Warnings of libraries that newer interpreters issue: highdicom leaves databases open."""


def interpreter(version: str) -> Path:
    """A Python of `version`: on the search path, or of pyenv; a skip if there is none."""
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    pythons = [
        *([Path(on_path)] if on_path else []),
        *sorted(pyenv.glob(f"{version}.*/bin/python")),
    ]
    if not pythons:
        pytest.skip(f"no Python {version} on this machine")
    return pythons[-1]


def bundles_in(folder: Path, bundle: Path, bundle_3d: Path, sam_bundle: Path) -> Path:
    """A folder with the bundles that `device_bundles.py` gives."""
    for path in (bundle, bundle_3d, sam_bundle):
        shutil.copytree(path, folder / path.name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_runtime(
    version: str, tmp_path: Path, bundle: Path, bundle_3d: Path, sam_bundle: Path
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([interpreter(version), "-m", "venv", tmp_path / "venv"], check=True)
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "*.egg-info"))
    install = [python, "-m", "pip", "install", "--quiet", f"{tree}[{EXTRAS}]", *FOR_TESTS]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("medsa_deploy", "exporters", "kernels", "build"):  # the installed ones are tested
        shutil.rmtree(tree / name, ignore_errors=True)
    bundles = bundles_in(tmp_path / "bundles", bundle, bundle_3d, sam_bundle)
    variables = {"MEDSA_DEVICE_BUNDLES": str(bundles), "PYTHONPATH": ""}
    done = subprocess.run(
        [
            python,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow",
            *OF_LIBRARIES,
            *(f"tests/{name}" for name in MODULES),
        ],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
    )
    print(sys.version, done.stdout[-300:])
    assert done.returncode == 0, done.stdout[-6000:]
