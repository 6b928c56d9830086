"""The page in Debian's chromium: what a person does, and masks compared with Python's session."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from medsa_deploy import Structure, VolumeOptions, load, segment_volume
from medsa_deploy.images import read_volume
from medsa_deploy.stages.run.prompt_file import read_prompts

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt install chromium"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


def wait(page: Page, condition: str, seconds: float = 60) -> None:
    """Poll: the page's policy forbids the functions that playwright would wait with."""
    limit = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < limit, f"{condition}: {page.inner_text('#status')}"
        page.wait_for_timeout(20)


def opened(browser: Browser, url: str, *files: Path) -> tuple[Page, dict[str, list[str]]]:
    """A page with an image, and what it asked for and complained of."""
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    noted: dict[str, list[str]] = {"errors": [], "requests": []}
    page.on("pageerror", lambda error: noted["errors"].append(str(error)))
    page.on("console", lambda m: noted["errors"].append(m.text) if m.type == "error" else None)
    page.on("request", lambda request: noted["requests"].append(request.url))
    page.goto(url)
    wait(page, "document.body.dataset.ready === 'true'")
    if files:
        page.set_input_files("#file-input", [str(file) for file in files])
        wait(page, "!!viewer.image && viewer.loaded.every((slice) => slice)")
    return page, noted


def act(page: Page, action: Callable[[], Any], end: str = "Done") -> None:
    """Do something that asks for masks, and wait for all of them."""
    page.evaluate("document.getElementById('status').textContent = ''")
    action()
    wait(page, f"document.getElementById('status').textContent.startsWith({json.dumps(end)})")


def labels_of(page: Page) -> np.ndarray:
    """The labels that the page shows, (slices, rows, columns)."""
    text = page.evaluate("Array.from(viewer.labels[0]).join('')")
    size = page.evaluate("[viewer.image.slices, viewer.image.height, viewer.image.width]")
    return np.array(list(text), np.uint8).reshape(size)


def in_python(bundle: Path, file: Path, structures: list[Structure], **options: bool) -> np.ndarray:
    """The same labels from `segment_volume`."""
    volume = read_volume(file)
    with load(bundle) as session:
        labels = segment_volume(session, volume, structures, VolumeOptions(**options)).labels
    return labels.transpose(volume.axis, *volume.plane_axes)


def prompts_of(page: Page, folder: Path) -> list[Structure]:
    """The prompts that the page exports."""
    page.select_option("#format", "prompts")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(folder / "prompts.json")
    return read_prompts(folder / "prompts.json")


def test_clicks_boxes_undo_follow_export(
    browser: Browser, serving, bundle: Path, volume_file: Path, tmp_path: Path
) -> None:
    server = serving(bundle)
    page, noted = opened(browser, server.url, volume_file)
    canvas = page.locator("#view-main canvas")
    box = canvas.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    act(page, lambda: page.mouse.click(x, y))
    first = labels_of(page)
    assert first.any()
    act(page, lambda: page.mouse.click(x + 60, y + 40, button="right"))
    act(page, lambda: page.keyboard.press("z"))
    np.testing.assert_array_equal(labels_of(page), first)
    act(page, lambda: page.keyboard.press("Z"))
    page.keyboard.press("n")
    page.keyboard.press("3")
    page.keyboard.press(".")
    page.mouse.move(x - 80, y - 60)
    page.mouse.down()
    page.mouse.move(x + 20, y + 30, steps=4)
    act(page, page.mouse.up)
    page.keyboard.press("1")
    page.keyboard.press("ArrowLeft")
    act(page, lambda: page.keyboard.press("Enter"))
    structures = prompts_of(page, tmp_path)
    assert [len(s.points) + len(s.boxes) for s in structures] == [2, 2]
    np.testing.assert_array_equal(labels_of(page), in_python(bundle, volume_file, structures))
    act(page, lambda: page.keyboard.press("f"), "Followed")
    followed = in_python(bundle, volume_file, structures, propagate=True)
    np.testing.assert_array_equal(labels_of(page), followed)
    page.select_option("#format", "nifti")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "seg.nii.gz")
    written = nibabel.load(tmp_path / "seg.nii.gz")
    volume = read_volume(volume_file)
    planes = np.asarray(written.dataobj).transpose(volume.axis, *volume.plane_axes)
    np.testing.assert_array_equal(planes, followed)
    np.testing.assert_allclose(written.affine, volume.affine, atol=1e-5)
    assert noted["errors"] == []
    assert {url for url in noted["requests"] if not url.startswith((server.url, "blob:"))} == set()
    assert "Müller" not in server.log.getvalue()
    page.close()


def test_a_broken_file_and_a_server_that_was_restarted(
    browser: Browser, serving, bundle: Path, volume_file: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(volume_file.read_bytes()[:500])
    server = serving(bundle)
    page, _ = opened(browser, server.url, volume_file)
    page.set_input_files("#file-input", str(broken))
    wait(page, "!document.getElementById('banner').hidden")
    assert "cannot be read" in page.inner_text("#banner")
    assert "/tmp" not in page.inner_text("#banner")
    box = page.locator("#view-main canvas").bounding_box()
    assert box is not None
    place = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    act(page, lambda: page.mouse.click(*place))
    before = labels_of(page)
    port = server.port
    server.__exit__()
    page.evaluate("document.getElementById('status').textContent = ''")
    page.mouse.click(place[0] + 30, place[1])
    wait(page, "document.getElementById('banner').textContent.includes('does not answer')")
    serving(bundle, port=port)
    wait(page, "document.getElementById('status').textContent === 'Done'")
    assert page.evaluate("document.getElementById('banner').hidden")
    assert (labels_of(page) != before).any()
    page.close()
