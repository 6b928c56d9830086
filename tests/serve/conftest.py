"""Servers for the tests of `serve`, in this process; a volume with a bright box in noise."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from page_driver import CHROMIUM, ViewerPage
from playwright.sync_api import Browser, sync_playwright

from medsa_deploy.event_log import EventLog
from medsa_deploy.serve.server import Server
from medsa_deploy.serve.service import ServeOptions

SHAPE = (48, 40, 12)


@pytest.fixture(scope="module")
def array() -> np.ndarray:
    """(12, 40, 48) int16: slices, rows, columns."""
    rng = np.random.default_rng(4)
    values = rng.normal(0, 40, SHAPE[::-1])
    values[2:10, 10:28, 12:36] += 300
    return values.astype(np.int16)


@pytest.fixture(scope="module")
def volume_file(array: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The array as an oblique, anisotropic NIfTI, its voxels (x, y, z)."""
    path = tmp_path_factory.mktemp("volume") / "Müller^Anna.nii.gz"
    turned = np.array([[0.8, -0.1, 0.3], [0.1, 0.9, 0.2], [-0.05, 0.05, 3.0]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turned, (-20, 5, 40)
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(array.T), affine), path)
    return path


@pytest.fixture(scope="module")
def serving() -> Iterator[Callable[..., Server]]:
    """Bundles and options → a server that runs until the module's tests are done."""
    with ExitStack() as opened:

        def start(*bundles: Path, **options: Any) -> Server:
            log = io.StringIO()
            options = {"port": 0} | options
            server = Server(ServeOptions(bundles=bundles, **options), EventLog(log))
            opened.enter_context(server)
            server.log = log  # type: ignore[attr-defined]
            return server

        yield start


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's chromium."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., ViewerPage]]:
    """A server's address → the page in a tab, whose errors and requests are checked at the end."""
    tabs = []

    def open_tab(url: str, **context: Any) -> ViewerPage:
        tabs.append(ViewerPage(browser, url, **context))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        if not tab.page.is_closed():
            tab.close()
