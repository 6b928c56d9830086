"""The page in a browser, driven as a person drives it, and what it shows."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from medsa_deploy import Structure, VolumeOptions, load, segment_volume
from medsa_deploy.images import Volume, holds_volume, read_image, read_volume
from medsa_deploy.images.picture import picture_volume
from medsa_deploy.stages.run.prompt_file import read_prompts

CHROMIUM = shutil.which("chromium")
MARKS = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt install chromium"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
"""Marks of modules that use a browser."""
SECONDS = 120.0
"""Patience on a loaded machine."""
LABELS = """([which, k]) => {
  const { stride } = viewer.image, all = viewer.labels[which];
  const part = k === null ? all : all.subarray(k * stride.k, (k + 1) * stride.k);
  let text = '';
  for (let i = 0; i < part.length; i += 32768)
    text += String.fromCharCode(...part.subarray(i, i + 32768));
  return btoa(text);
}"""
DRAWN = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
"""Ends when the page has drawn what changed."""
SHOWN = """(name) => {
  const canvas = document.querySelector(`#view-${name} canvas`), { height, width } = viewer.image;
  const ratio = canvas.width / canvas.clientWidth, context = canvas.getContext('2d');
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height), words = [];
  for (let r = 0; r < height; r++) for (let c = 0; c < width; c++) {
    const place = viewer.toScreen(name, [viewer.cross[0], r + 0.5, c + 0.5]);
    const [x, y] = place.map((v) => Math.floor(v * ratio)), i = 4 * (y * canvas.width + x);
    words.push(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
  }
  return words;
}"""
"""Colours on the screen at the middle of each pixel of the slice."""


class ViewerPage:
    """A tab with the page."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        """`context`: what else the browser should pretend, such as `has_touch`."""
        options = {"viewport": {"width": 1280, "height": 720}} | context
        self.page: Page = browser.new_page(**options)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = url
        self.page.goto(url)
        self.wait("document.body.dataset.ready === 'true'")

    def _note(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def close(self) -> None:
        """Close the tab, which asked for nothing elsewhere and complained of nothing."""
        elsewhere = [url for url in self.requests if not url.startswith((self.url, "blob:"))]
        self.page.close()
        assert elsewhere == []
        assert self.errors == []

    def wait(self, condition: str, seconds: float = SECONDS) -> None:
        """Poll: the page's policy forbids the functions that playwright would wait with."""
        limit = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < limit, f"{condition}: {self.status}"
            self.page.wait_for_timeout(50)

    @property
    def status(self) -> str:
        """The line of status."""
        return self.page.inner_text("#status")

    def state(self, name: str) -> Any:
        """A part of the page's state."""
        return self.page.evaluate(f"viewer.{name}")

    def open(self, *files: Path, selector: str = "#file-input") -> None:
        """Choose files, and wait until all pixels are there."""
        self.opening(lambda: self.page.set_input_files(selector, [str(file) for file in files]))

    def opening(self, action: Callable[[], Any]) -> None:
        """Do something that opens an image, and wait until all pixels are there."""
        before = self.state("loading")
        action()
        self.wait(f"viewer.loading > {before} && viewer.loaded.every((slice) => slice)")

    def drop(self, *paths: Path) -> None:
        """Drop files or folders on the page, as a file manager does."""
        session = self.page.context.new_cdp_session(self.page)
        x, y = self.screen(None)
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}

        def drag() -> None:
            for kind in ("dragEnter", "dragOver", "drop"):
                session.send(
                    "Input.dispatchDragEvent", {"type": kind, "x": x, "y": y, "data": data}
                )

        self.opening(drag)
        session.detach()

    def act(self, action: Callable[[], Any], end: str = "Done") -> None:
        """Do something that asks for masks, and wait for all of them."""
        self.page.evaluate("document.getElementById('status').textContent = ''")
        action()
        self.wait(f"document.getElementById('status').textContent.startsWith({json.dumps(end)})")

    def screen(self, place: Sequence[float] | None, view: str = "main") -> tuple[float, float]:
        """Where slice, row and column lie on the screen; without a place, the view's middle."""
        box = self.page.locator(f"#view-{view} canvas").bounding_box()
        assert box is not None
        if place is None:
            return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        x, y = self.page.evaluate(
            "([view, place]) => viewer.toScreen(view, place.map((v) => v + 0.5))",
            [view, list(place)],
        )
        return box["x"] + x, box["y"] + y

    def click(self, row: int, column: int, **options: Any) -> None:
        """Click on a pixel of the slice that is shown, and wait for the masks."""
        x, y = self.screen((self.state("cross[0]"), row, column))
        self.act(lambda: self.page.mouse.click(x, y, **options))

    def drag(self, start: Sequence[float], end: Sequence[float], button: str = "left") -> None:
        """Drag between two places of the screen."""
        mouse = self.page.mouse
        mouse.move(*start)
        mouse.down(button=button)  # type: ignore[arg-type]
        mouse.move(*end, steps=4)
        mouse.up(button=button)  # type: ignore[arg-type]

    def drag_box(self, low: tuple[int, int], high: tuple[int, int]) -> None:
        """Drag a box from a pixel (row, column) to another, and wait for the masks."""
        k = self.state("cross[0]")
        self.act(lambda: self.drag(self.screen((k, *low)), self.screen((k, *high))))

    def labels(self, number: int = 0, index: int | None = None) -> np.ndarray:
        """The labels of the first or second bundle, (slices, rows, columns), or of a slice."""
        content = base64.b64decode(self.page.evaluate(LABELS, [number, index]))
        size = self.page.evaluate("[viewer.image.slices, viewer.image.height, viewer.image.width]")
        return np.frombuffer(content, np.uint8).reshape(size if index is None else size[1:])

    def shown_mask(self, view: str = "main") -> np.ndarray:
        """Where the slice on the screen is coloured, (rows, columns)."""
        self.page.mouse.move(2, 2)
        self.page.evaluate("document.activeElement.blur()")
        boxes = ("#fill", "#outline", "#prompts-shown")
        before = {box: self.page.is_checked(box) for box in boxes}
        pictures = []
        for fill in (True, False):
            self.page.set_checked("#fill", fill)
            self.page.set_checked("#outline", fill)
            self.page.set_checked("#prompts-shown", False)
            self.page.evaluate(
                "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
            )
            pictures.append(np.array(self.page.evaluate(SHOWN, view)))
        for box, checked in before.items():
            self.page.set_checked(box, checked)
        size = self.page.evaluate("[viewer.image.height, viewer.image.width]")
        shown: np.ndarray = (pictures[0] != pictures[1]).reshape(size)
        return shown

    def save(self, kind: str, path: Path) -> Path:
        """Export in a format."""
        self.page.select_option("#format", kind)
        with self.page.expect_download(timeout=1000 * SECONDS) as download:
            self.page.click("#export")
        download.value.save_as(path)
        return path

    def structures(self, folder: Path) -> list[Structure]:
        """The prompts that the page exports."""
        return read_prompts(self.save("prompts", folder / "prompts.json"))


def volume_of(path: Path) -> Volume:
    """The volume or picture of a path."""
    if holds_volume(path, lone=True):
        return read_volume(path)
    return picture_volume(read_image(path))


def in_python(
    bundle: Path, path: Path, structures: Sequence[Structure], **options: Any
) -> np.ndarray:
    """The labels of `segment_volume`, (slices, rows, columns)."""
    volume = volume_of(path)
    with load(bundle) as session:
        labels = segment_volume(session, volume, structures, VolumeOptions(**options)).labels
    return labels.transpose(volume.axis, *volume.plane_axes)
