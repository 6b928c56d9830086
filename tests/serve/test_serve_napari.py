"""The unmodified napari plugin against the server, in a virtual display.

The environment names an interpreter that has it, NAPARI_PYTHON:
pip install 'napari[pyqt6]==0.9.2' napari-nninteractive==2.5.4 nninteractive-client==2.6.0
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from medsa_deploy import Structure, VolumeOptions, load, segment_volume
from medsa_deploy.serve.images import open_array

SCRIPT = Path(__file__).with_name("napari_clicks.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "NAPARI_PYTHON" not in os.environ or shutil.which("xvfb-run") is None,
        reason="needs NAPARI_PYTHON, an interpreter with napari, and xvfb",
    ),
]


def test_clicks_and_undo(serving, bundle: Path, array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", array)
    subprocess.run(
        [
            *("xvfb-run", "-a", os.environ["NAPARI_PYTHON"], SCRIPT, serving(bundle).url),
            *(tmp_path / "image.npy", tmp_path / "masks.npz"),
        ],
        check=True,
        timeout=900,
    )
    masks = np.load(tmp_path / "masks.npz")
    volume = open_array(array, (1, 1, 1), most_bytes=10**9).volume
    options = VolumeOptions(propagate=bool(masks["propagate"]))
    points = ((6, 18, 20), (6, 3, 40))
    with load(bundle) as session:
        for name, count in (("first", 1), ("second", 2), ("undone", 1)):
            structure = Structure(points=points[:count], labels=(1,) * count)
            labels = segment_volume(session, volume, [structure], options).labels
            np.testing.assert_array_equal(masks[name] != 0, labels != 0)
    assert (masks["first"] != masks["second"]).any()
