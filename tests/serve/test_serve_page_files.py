"""Every kind of file in the page: chosen, dropped, or of the server's folder; and exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest
from command_line import call
from dicom_series import back, save, slices
from page_driver import MARKS, ViewerPage, in_python, volume_of
from pydicom.uid import generate_uid

from medsa_deploy.images import read_image, read_volume
from medsa_deploy.serve.server import Server

Visit = Callable[..., ViewerPage]
pytestmark = MARKS


@pytest.fixture(scope="module")
def server(serving, bundle: Path, bundle_3d: Path, array, tmp_path_factory) -> Server:
    folder = tmp_path_factory.mktemp("server")
    (folder / "inner").mkdir()
    np.save(folder / "inner" / "scan.npy", array)
    return serving(bundle, bundle_3d, images=folder)


@pytest.fixture
def pictures(array: np.ndarray, tmp_path: Path) -> list[Path]:
    """A PNG, a JPEG in colour and a TIFF of 16 bits."""
    plane = array[6].astype(np.int32) + 200
    grey = np.clip(plane // 3, 0, 255).astype(np.uint8)
    paths = [tmp_path / name for name in ("Grau.png", "colour.jpg", "deep.tif")]
    PIL.Image.fromarray(grey).save(paths[0])
    PIL.Image.fromarray(np.stack([grey, grey // 2, 255 - grey], axis=-1)).save(paths[1])
    PIL.Image.fromarray(np.clip(plane, 0, 65535).astype(np.uint16)).save(paths[2])
    return paths


def series(array: np.ndarray, folder: Path) -> Path:
    """The array's middle as a DICOM series."""
    datasets = slices(6)
    uid = generate_uid()
    for dataset, plane in zip(datasets, array[3:9], strict=True):
        dataset.Rows, dataset.Columns = plane.shape
        dataset.PixelData = np.ascontiguousarray(plane).tobytes()
        dataset.PixelRepresentation = 1
        dataset.SeriesInstanceUID = uid
    return save(datasets, folder)


def test_pictures(visit: Visit, server: Server, bundle, pictures, tmp_path: Path) -> None:
    """Their masks are those of `run --prompts`, as PNG."""
    tab = visit(server.url)
    for number, path in enumerate(pictures):
        if number:
            tab.drop(path)
        else:
            tab.open(path)
        assert tab.page.inner_text("#image-name") == path.name
        tab.click(20, 24)
        if number == 2:
            tab.click(4, 4, button="right")
        if number == 1:
            tab.page.keyboard.press("n")
            tab.page.keyboard.press("3")
            tab.drag_box((8, 9), (27, 33))
            tab.page.keyboard.press("1")
        structures = tab.structures(tmp_path)
        labels = in_python(bundle, path, structures)[0]
        assert labels.any()
        np.testing.assert_array_equal(tab.labels()[0], labels)
        np.testing.assert_array_equal(tab.shown_mask(), labels > 0)
        assert f"{(labels == 1).sum()} px" in tab.page.inner_text("#structures")
        written = tmp_path / "run.png"
        done = call("run", bundle, path, "--prompts", tmp_path / "prompts.json", "-o", written)
        assert done.code == 0, done.err
        saved = tab.save("png", tmp_path / "page.png")
        for mask in (saved, written):
            pixels = read_image(mask).pixels
            np.testing.assert_array_equal(pixels, labels if number == 1 else 255 * labels)


def test_arrays_and_dicom(visit: Visit, server: Server, bundle, array, tmp_path: Path) -> None:
    """NPY of the server's folder, a DICOM folder chosen and dropped, DICOM files; SEG and NRRD."""
    tab = visit(server.url)
    page = tab.page
    page.click("#open-server")
    page.click("#server-entries button:has-text('inner/')")
    page.locator("#server-entries button:has-text('scan.npy')").wait_for()
    tab.opening(lambda: page.click("#server-entries button:has-text('scan.npy')"))
    tab.click(20, 24)
    source = tmp_path / "scan.npy"
    np.save(source, array)
    labels = in_python(bundle, source, tab.structures(tmp_path))
    np.testing.assert_array_equal(tab.labels(), labels)
    assert page.locator("#format option[value=dicom-seg]").is_disabled()
    folder = series(array, tmp_path / "series")
    tab.open(folder, selector="#folder-input")
    tab.drop(folder)
    tab.open(*sorted(folder.iterdir()))
    assert page.inner_text("#image-name") == "6 files"
    tab.click(20, 24)
    page.click("#add-structure")
    tab.click(24, 12)
    structures = tab.structures(tmp_path)
    volume = read_volume(folder)
    labels = in_python(bundle, folder, structures)
    assert set(np.unique(labels)) == {0, 1, 2}
    np.testing.assert_array_equal(tab.labels(), labels)
    saved = tab.save("dicom-seg", tmp_path / "seg.dcm")
    stored = labels.transpose(np.argsort((volume.axis, *volume.plane_axes)))
    np.testing.assert_array_equal(back(saved, volume), stored)
    saved = tab.save("nrrd", tmp_path / "seg.seg.nrrd")
    assert b"structure 2" in saved.read_bytes()[:4000]
    plane = read_image(tab.save("png", tmp_path / "slice.png")).pixels
    np.testing.assert_array_equal(plane, labels[3])


def test_bundles_compared(
    visit: Visit, server: Server, bundle, bundle_3d, volume_file, tmp_path: Path
) -> None:
    """Two bundles' masks side by side, with their latencies and volumes; then the other alone."""
    tab = visit(server.url)
    page = tab.page
    tab.open(volume_file)
    tab.click(24, 20)
    tab.act(lambda: page.select_option("#compare", bundle_3d.stem))
    structures = tab.structures(tmp_path)
    for number, (path, view) in enumerate(((bundle, "main"), (bundle_3d, "other"))):
        nameless = [replace(structure, name=None) for structure in structures]
        labels = in_python(path, volume_file, nameless if number else structures)
        np.testing.assert_array_equal(tab.labels(number), labels)
        np.testing.assert_array_equal(tab.shown_mask(view), labels[6] > 0)
        caption = page.inner_text(f"#view-{view} figcaption")
        assert path.stem in caption
        assert " ms" in caption
        assert " ml" in caption
    assert "Dice" in page.inner_text("#view-other figcaption")
    tab.act(lambda: page.select_option("#compare", ""))
    assert not page.is_visible("#view-other")
    tab.act(lambda: page.select_option("#bundle", bundle_3d.stem))
    tab.act(lambda: page.select_option("#structures select", "class 2"))
    structures = tab.structures(tmp_path)
    assert [s.class_name for s in structures] == ["class 2"]
    labels = in_python(bundle_3d, volume_file, structures)
    np.testing.assert_array_equal(tab.labels(), labels)
    document = json.loads((tmp_path / "prompts.json").read_text())
    assert document["structures"][0]["class"] == "class 2"
    done = call(
        *("run", bundle_3d, volume_file, "--prompts", tmp_path / "prompts.json"),
        *("-o", tmp_path / "run.nii.gz"),
    )
    assert done.code == 0, done.err
    volume = volume_of(volume_file)
    written = np.asarray(nibabel.load(tmp_path / "run.nii.gz").dataobj)
    np.testing.assert_array_equal(written.transpose(volume.axis, *volume.plane_axes), labels)
