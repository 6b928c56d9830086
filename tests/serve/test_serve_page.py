"""The page: clicks, boxes, structures, undo, following and exports, by mouse and by keyboard.

Masks are those of `segment_volume` with the same prompts, pixel by pixel.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from command_line import call
from page_driver import MARKS, ViewerPage, in_python

from medsa_deploy.images import read_volume
from medsa_deploy.images.measurements import voxel_millilitres
from medsa_deploy.serve.server import Server

Visit = Callable[..., ViewerPage]
pytestmark = MARKS


@pytest.fixture(scope="module")
def server(serving, bundle: Path, volume_file: Path) -> Server:
    return serving(bundle, images=volume_file.parent)


def test_by_mouse(visit: Visit, server: Server, bundle, volume_file: Path, tmp_path: Path) -> None:
    tab = visit(server.url)
    page = tab.page
    tab.open(volume_file)
    tab.click(24, 20)
    first = tab.labels()
    assert first.any()
    np.testing.assert_array_equal(tab.shown_mask(), first[6] > 0)
    tab.click(40, 30, button="right")
    tab.act(lambda: page.click("#undo"))
    np.testing.assert_array_equal(tab.labels(), first)
    tab.act(lambda: page.click("#redo"))
    page.keyboard.down("Shift")
    tab.click(6, 5)
    page.keyboard.up("Shift")
    page.click("#add-structure")
    page.click("[data-tool=box]")
    page.mouse.move(*tab.screen(None))
    page.mouse.wheel(0, 100)
    tab.wait("viewer.cross[0] === 7")
    tab.drag_box((9, 8), (33, 27))
    structures = tab.structures(tmp_path)
    assert structures[0].points == ((24, 20, 6), (40, 30, 6), (6, 5, 6))
    assert structures[0].labels == (1, 0, 0)
    assert structures[1].boxes == ((9, 8, 7, 34, 28, 8),)
    labels = in_python(bundle, volume_file, structures)
    np.testing.assert_array_equal(tab.labels(), labels)
    np.testing.assert_array_equal(tab.shown_mask(), labels[7] > 0)
    assert_sizes(tab, labels, volume_file)
    tab.act(lambda: page.click("#follow"), "Followed")
    followed = in_python(bundle, volume_file, structures, propagate=True)
    np.testing.assert_array_equal(tab.labels(), followed)
    assert_exports(tab, bundle, volume_file, followed, tmp_path)
    assert "Müller" not in server.log.getvalue()  # type: ignore[attr-defined]


def assert_sizes(tab: ViewerPage, labels: np.ndarray, volume_file: Path) -> None:
    """Millilitres of every structure, and the area of the active one in the slice."""
    volume = read_volume(volume_file)
    millilitres = voxel_millilitres(volume)
    assert millilitres is not None
    shown = tab.page.locator("#structures .size").all_inner_texts()
    for label, text in enumerate(shown, 1):
        assert float(text.removesuffix(" ml")) == pytest.approx(
            (labels == label).sum() * millilitres, rel=0.01
        )
    pixel = volume.spacing_mm[0] * volume.spacing_mm[1] / 100
    area = f"{(labels[7] == 2).sum() * pixel:.2f} cm²"
    assert area in tab.page.inner_text("#measure")


def assert_exports(
    tab: ViewerPage, bundle: Path, volume_file: Path, labels: np.ndarray, folder: Path
) -> None:
    """Files of the page, and of `run` with its prompts, hold the labels."""
    volume = read_volume(volume_file)
    names = ["structure 1", "structure 2"]
    saved = tab.save("nifti", folder / "page.nii.gz")
    prompts = tab.save("prompts", folder / "prompts.json")
    assert "--propagate" in tab.status
    assert [entry["name"] for entry in json.loads(prompts.read_text())["structures"]] == names
    written = folder / "run.nii.gz"
    done = call("run", bundle, volume_file, "--prompts", prompts, "--propagate", "-o", written)
    assert done.code == 0, done.err
    for path in (saved, written):
        image = nibabel.load(path)
        planes = np.asarray(image.dataobj).transpose(volume.axis, *volume.plane_axes)
        np.testing.assert_array_equal(planes, labels)
        np.testing.assert_allclose(image.affine, volume.affine, atol=1e-5)


def test_by_keyboard(visit: Visit, server: Server, bundle, volume_file, tmp_path: Path) -> None:
    """Every action without a mouse, from the list of files to a mask and its export."""
    tab = visit(server.url)
    page = tab.page
    press = page.keyboard.press
    page.focus("#open-server")
    press("Enter")
    tab.wait("document.querySelectorAll('#server-entries button').length > 0")
    page.focus("#server-entries button")
    tab.opening(lambda: press("Enter"))
    page.focus("#view-main canvas")
    for key in ("Shift+ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Shift+ArrowRight"):
        press(key)
    k, r, c = tab.state("cross")
    tab.act(lambda: press("Enter"))
    press("2")
    press(".")
    tab.act(lambda: press("Enter"), "Slice 7 has background clicks only")
    assert len(tab.state("structures[0].points")) == 1  # what is refused is taken back
    press(",")
    for _ in range(8):
        press("ArrowDown")
    tab.act(lambda: press("Enter"))
    assert page.is_hidden("#banner")
    press("n")
    press("3")
    press(",")
    press("Enter")
    press("Shift+ArrowRight")
    press("Shift+ArrowUp")
    tab.act(lambda: press("Enter"))
    assert [len(s["boxes"]) for s in tab.state("structures")] == [0, 1]
    assert tab.state("structures[0].points")[0][:3] == [r, c, k]
    tab.act(lambda: press("z"))
    assert tab.labels().max() == 1
    tab.act(lambda: press("Shift+Z"))
    labels = in_python(bundle, volume_file, tab.structures(tmp_path))
    np.testing.assert_array_equal(tab.labels(), labels)
    page.focus("#view-main canvas")
    tab.act(lambda: press("f"), "Followed")
    tab.act(lambda: press("Escape"))
    np.testing.assert_array_equal(tab.labels(), labels)
    assert_display_keys(tab)
    press("[")
    assert tab.state("active") == 0
    tab.act(lambda: press("Delete"))
    assert len(tab.state("structures")) == 1
    page.focus("#format")
    page.keyboard.type("NIfTI")
    page.focus("#view-main canvas")
    with page.expect_download() as download:
        press("e")
    assert download.value.suggested_filename == "segmentation.nii.gz"
    press("?")
    assert page.is_visible("#keys")
    press("Escape")
    assert not page.is_visible("#keys")


def assert_display_keys(tab: ViewerPage) -> None:
    """Zoom, pan, window and visibility."""
    press = tab.page.keyboard.press
    press("+")
    assert tab.state("zoom") > 1
    press("4")
    press("ArrowRight")
    assert tab.state("pan[0]") == 10
    press("0")
    assert (tab.state("zoom"), tab.state("pan")) == (1, [0, 0])
    before = tab.state("window")
    press("5")
    press("ArrowDown")
    assert sum(tab.state("window")) > sum(before)
    press("w")
    assert tab.state("preset") != "own"
    shown = tab.shown_mask().sum()
    tab.page.focus("#view-main canvas")
    press("v")
    assert tab.shown_mask().sum() < shown or not tab.state("structures[1].visible")
    tab.page.focus("#view-main canvas")
    press("v")
    press("PageDown")
    assert tab.state("cross[0]") == 11
    press("1")


def test_display_by_mouse(visit: Visit, server: Server, volume_file: Path) -> None:
    """Pan, zoom, window, presets, slices, linked planes: what is shown moves, prompts stay none."""
    tab = visit(server.url)
    page = tab.page
    tab.drop(volume_file)
    x, y = tab.screen(None)
    before = tab.screen((6, 24, 20))
    tab.drag((x, y), (x + 40, y + 20), button="middle")
    assert np.allclose(np.subtract(tab.screen((6, 24, 20)), before), (40, 20), atol=1)
    page.click("[data-tool=pan]")
    tab.drag((x, y), (x - 40, y - 20))
    assert np.allclose(tab.screen((6, 24, 20)), before, atol=1)
    page.keyboard.down("Control")
    page.mouse.move(*before)
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    tab.wait("viewer.zoom > 1.5")
    assert np.allclose(tab.screen((6, 24, 20)), before, atol=1)
    page.click("[data-tool=window]")
    low, high = tab.state("window")
    tab.drag((x, y), (x + 50, y))
    assert tab.state("window")[1] - tab.state("window")[0] > high - low
    page.select_option("#preset", "lung")
    assert tab.state("window") == [-1350, 150]
    page.mouse.move(x, y)
    page.mouse.wheel(0, 100)
    tab.wait("viewer.cross[0] === 7")
    page.fill("#slice", "3")
    assert tab.state("cross[0]") == 3
    page.mouse.click(*tab.screen((9, 24, 11), "rows"))
    assert tab.state("cross") == [9, 24, 11]
    page.mouse.click(*tab.screen((2, 30, 11), "columns"))
    assert tab.state("cross") == [2, 30, 11]
    page.mouse.move(*tab.screen((2, 30, 11), "rows"))
    page.mouse.wheel(0, 100)
    tab.wait("viewer.cross[1] === 31")
    assert tab.state("structures.every((s) => !s.points.length && !s.boxes.length)")


def test_structures(visit: Visit, server: Server, volume_file: Path, tmp_path: Path) -> None:
    """Names, colours, visibility, and that the list keeps the keyboard's focus."""
    tab = visit(server.url)
    page = tab.page
    tab.open(volume_file)
    tab.click(24, 20)
    name = page.locator("#structures input[type=text]")
    name.fill("leber")
    tab.act(lambda: name.press("Enter"))
    page.locator("#structures input[type=color]").fill("#12ab34")
    eye = page.locator("#structures button[aria-pressed]")
    eye.focus()
    page.keyboard.press("Enter")
    assert not tab.shown_mask().any()
    eye.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.title") == "Show or hide (V)"
    saved = json.loads(tab.save("prompts", tmp_path / "prompts.json").read_text())["structures"]
    assert [(s["name"], s["colour"]) for s in saved] == [("leber", "#12ab34")]
    page.uncheck("#fill")
    page.uncheck("#outline")
    assert tab.shown_mask().any()  # it checks them again, and then as they were
    assert not page.is_checked("#fill")


def test_two_tabs(visit: Visit, server: Server, bundle, array, volume_file, tmp_path) -> None:
    """Each has an image of its own."""
    flipped = tmp_path / "flipped.npy"
    np.save(flipped, np.ascontiguousarray(array[:, ::-1]))
    tabs = [visit(server.url) for _ in range(2)]
    for tab, path in zip(tabs, (volume_file, flipped), strict=True):
        tab.open(path)
    for _ in range(2):
        for tab in tabs:
            tab.click(24, 20)
    for tab, path in zip(tabs, (volume_file, flipped), strict=True):
        structures = tab.structures(tmp_path)
        np.testing.assert_array_equal(tab.labels(), in_python(bundle, path, structures))


def test_a_broken_file_and_a_server_that_was_restarted(
    visit: Visit, serving, bundle: Path, volume_file: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(volume_file.read_bytes()[:500])
    stopped = serving(bundle)
    tab = visit(stopped.url)
    page = tab.page
    tab.open(volume_file)
    page.set_input_files("#file-input", str(broken))
    tab.wait("!document.getElementById('banner').hidden")
    assert "cannot be read" in page.inner_text("#banner")
    assert "/tmp" not in page.inner_text("#banner")
    tab.click(24, 20)
    before = tab.labels()
    port = stopped.port
    stopped.__exit__()
    page.evaluate("document.getElementById('status').textContent = ''")
    page.mouse.click(*tab.screen((6, 34, 20)))
    tab.wait("document.getElementById('banner').textContent.includes('does not answer')")
    serving(bundle, port=port)
    tab.wait("document.getElementById('status').textContent === 'Done'")
    assert page.evaluate("document.getElementById('banner').hidden")
    structures = tab.structures(tmp_path)
    assert len(structures[0].points) == 2
    np.testing.assert_array_equal(tab.labels(), in_python(bundle, volume_file, structures))
    assert (tab.labels() != before).any()
    tab.errors.clear()  # the browser notes that the server did not answer
