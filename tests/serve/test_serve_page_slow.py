"""The page with a volume of 512×512×100: clicks, following with progress, a stop, a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from page_driver import MARKS, ViewerPage, in_python

Visit = Callable[..., ViewerPage]
pytestmark = [*MARKS, pytest.mark.slow]
STATUS = "document.getElementById('status').textContent"


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tube of changing width in noise, int16."""
    rng = np.random.default_rng(1)
    x, y = np.mgrid[:512, :512]
    planes = []
    for k in range(100):
        inside = np.hypot(x - 250 - k, y - 260) < 60 + 0.3 * k
        planes.append(rng.normal(0, 50, (512, 512)) + 400 * inside)
    path = tmp_path_factory.mktemp("large") / "large.nii.gz"
    array = np.stack(planes, axis=2).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([0.7, 0.7, 3, 1])), path)
    return path


def test_a_large_volume(
    visit: Visit, serving, bundle: Path, large_file: Path, tmp_path: Path
) -> None:
    server = serving(bundle)
    tab = visit(server.url)
    page = tab.page
    tab.open(large_file)
    assert tab.state("image.shape") == [512, 512, 100]
    tab.click(300, 260)
    page.fill("#slice", "20")
    tab.click(270, 260)
    tab.click(100, 90, button="right")
    structures = tab.structures(tmp_path)
    clicked = in_python(bundle, large_file, structures)
    np.testing.assert_array_equal(tab.labels(), clicked)
    rows, columns = np.nonzero(tab.shown_mask() != (clicked[20] > 0))
    middles = (abs(rows - 256) < 20) | (abs(columns - 256) < 20)  # letters are drawn over the mask
    edges = (np.minimum(rows, 511 - rows) < 20) | (np.minimum(columns, 511 - columns) < 20)
    assert (middles & edges).all()
    page.focus("#view-main canvas")
    page.keyboard.press("f")
    tab.wait(f"{STATUS}.startsWith('Following: slice')")
    tab.wait("document.getElementById('progress').value > 0.05")
    page.click("#stop")
    tab.wait(f"{STATUS} === 'Done' || {STATUS}.startsWith('Stopped')")
    tab.wait(f"{STATUS} === 'Done'")
    np.testing.assert_array_equal(tab.labels(), clicked)
    followed = in_python(bundle, large_file, structures, propagate=True)
    assert len(np.flatnonzero(followed.any(axis=(1, 2)))) > 2
    page.click("#follow")
    tab.wait("document.getElementById('progress').value > 0.05")
    port = server.port
    server.__exit__()
    tab.wait("document.getElementById('banner').textContent.includes('again')")
    serving(bundle, port=port)
    tab.wait(f"{STATUS}.startsWith('Followed')", 600)
    np.testing.assert_array_equal(tab.labels(), followed)
    tab.errors.clear()  # the browser notes that the server did not answer
