"""From a click in the browser to the mask on its canvas; and a picture of the page.

    python benchmarks/page_latency.py demo/medsa_demo.medsa  → benchmarks/results/page_latency.json

The volume is the MNI T1 template. Its slice is encoded before the first click that counts. The page
measures, from the release of the button. Debian's chromium and the server share the machine.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Page, sync_playwright

from medsa_deploy.event_log import EventLog
from medsa_deploy.serve.server import Server
from medsa_deploy.serve.service import ServeOptions
from medsa_deploy.stages import diagnose
from medsa_deploy.stages.demo.mni_template import template

RESULT = Path(__file__).parent / "results" / "page_latency.json"
CLICKS = 60
SLICE = 92
SECONDS = 300.0
PICTURE_CLICKS = 3


def wait(page: Page, condition: str) -> None:
    """Poll: the page's policy forbids the functions that playwright would wait with."""
    limit = time.monotonic() + SECONDS
    while not page.evaluate(condition):
        if time.monotonic() > limit:
            raise SystemExit(f"never true: {condition}")
        page.wait_for_timeout(50)


def click(page: Page, rng: random.Random) -> None:
    """Click at a random place in the brain, and wait for all masks."""
    place = [SLICE, rng.randrange(60, 137), rng.randrange(70, 163)]
    x, y = page.evaluate("(place) => viewer.toScreen('main', place.map((v) => v + 0.5))", place)
    box = page.locator("#view-main canvas").bounding_box()
    assert box is not None
    page.evaluate("document.getElementById('status').textContent = ''")
    page.mouse.click(box["x"] + x, box["y"] + y)
    wait(page, "document.getElementById('status').textContent === 'Done'")


def measure(page: Page, clicks: int) -> list[float]:
    """Milliseconds of so many clicks, each with a structure to itself."""
    page.set_input_files("#file-input", str(template()))
    wait(page, "!!viewer.image && viewer.loaded.every((slice) => slice)")
    page.fill("#slice", str(SLICE))
    rng = random.Random(0)
    click(page, rng)
    page.evaluate("viewer.latencies.length = 0")
    for _ in range(clicks):
        page.focus("#view-main canvas")
        page.keyboard.press("z")
        wait(page, "document.getElementById('status').textContent === 'Click on a structure'")
        click(page, rng)
    return [float(ms) for ms in page.evaluate("viewer.latencies")]


def picture(page: Page, path: Path) -> None:
    """The page with two structures, without the latency of a machine that also runs a browser."""
    rng = random.Random(1)
    page.click("#add-structure")
    page.select_option("#structures li:last-child select", "grey matter")
    for _ in range(PICTURE_CLICKS):
        click(page, rng)
    page.mouse.move(640, 5)
    page.evaluate("viewer.latency = [null, null]")
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(500)
    page.screenshot(path=path)


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clicks", type=int, default=CLICKS)
    parser.add_argument("--picture", type=Path, help="PNG of the page to write")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    options = parser.parse_args()
    serve = ServeOptions(bundles=(options.bundle,), port=0)
    with Server(serve, EventLog(io.StringIO())) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.goto(server.url)
        wait(page, "document.body.dataset.ready === 'true'")
        latencies = measure(page, options.clicks)
        load = round(os.getloadavg()[0], 1)
        if options.picture is not None:
            picture(page, options.picture)
        browser.close()
    machine = diagnose()
    percentiles = {f"p{p}": round(float(np.percentile(latencies, p)), 1) for p in (50, 95, 99)}
    result: dict[str, Any] = {
        "what": "clicks on a slice of the MNI T1 template, whose chunk is encoded",
        "bundle": options.bundle.name,
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB",
        "versions": {name: version(name) for name in ("onnxruntime", "starlette", "playwright")},
        "load": load,
        "latency_ms": percentiles | {"least": round(min(latencies), 1)},
        "clicks": [round(ms, 1) for ms in latencies],
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["latency_ms"]))


if __name__ == "__main__":
    main()
