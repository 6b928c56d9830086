"""The page for everybody: axe-core's rules, a keyboard's focus, fingers, small screens."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from page_driver import MARKS, ViewerPage, in_python

from medsa_deploy.serve.server import Server

Visit = Callable[..., ViewerPage]
pytestmark = MARKS
TABLET = {"viewport": {"width": 1024, "height": 768}, "has_touch": True, "is_mobile": True}
UPRIGHT = TABLET | {"viewport": {"width": 768, "height": 1024}}
LEAST_TARGET = 40
"""Pixels of what a finger should hit, either way."""


@pytest.fixture(scope="module")
def server(serving, bundle: Path) -> Server:
    return serving(bundle)


def violations(tab: ViewerPage) -> list[str]:
    """What axe-core complains of, of all its rules."""
    rules = "axe.run(document, {resultTypes: ['violations']})"
    found_rules = tab.page.evaluate(f"{rules}.then((result) => result.violations)")
    return [
        f"{rule['id']}: {rule['help']}: {node['html'][:120]}"
        for rule in found_rules
        for node in rule["nodes"]
    ]


def test_axe_finds_nothing(visit: Visit, server: Server, volume_file: Path) -> None:
    tab = visit(server.url)
    script = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    tab.page.evaluate(script)
    assert violations(tab) == []
    tab.open(volume_file)
    tab.click(24, 20)
    tab.page.keyboard.press("n")
    assert violations(tab) == []
    tab.page.click("#help")
    assert violations(tab) == []
    tab.page.keyboard.press("Escape")
    tab.page.evaluate("document.documentElement.lang = ''")
    assert violations(tab)  # it does look


def test_the_tab_key_reaches_every_control(visit: Visit, server: Server, volume_file: Path) -> None:
    tab = visit(server.url)
    tab.open(volume_file)
    tab.click(24, 20)
    tab.page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(60):
        tab.page.keyboard.press("Tab")
        reached.add(
            tab.page.evaluate(
                "(() => { const e = document.activeElement;"
                " return e.id || e.ariaLabel || e.dataset.tool || e.tagName; })()"
            )
        )
    assert reached >= {
        *("open", "open-folder", "undo", "help", "bundle", "add-structure", "follow", "preset"),
        *("network-window", "fill", "outline", "prompts-shown", "format", "export", "slice"),
        *("add", "Colour of structure 1", "Name 1", "Show structure 1", "Remove structure 1"),
    }
    name = tab.page.evaluate("document.querySelector('#view-main canvas').ariaLabel")
    assert name in reached


@pytest.mark.parametrize(
    "screen",
    [pytest.param(TABLET, marks=pytest.mark.slow), UPRIGHT],
    ids=["across", "upright"],
)
def test_fingers(visit: Visit, server: Server, bundle, volume_file, tmp_path: Path, screen) -> None:
    """Taps, a dragged box, a pinch; every control is large enough and on the screen."""
    tab = visit(server.url, **screen)
    page = tab.page
    tab.open(volume_file)
    tab.act(lambda: page.touchscreen.tap(*tab.screen((6, 24, 20))))
    page.tap("[data-tool=remove]")
    tab.act(lambda: page.touchscreen.tap(*tab.screen((6, 40, 30))))
    page.tap("#add-structure")
    page.tap("[data-tool=box]")
    tab.act(lambda: touch(tab, [tab.screen((6, 9, 8))], [tab.screen((6, 33, 27))]))
    structures = tab.structures(tmp_path)
    assert [structures[0].labels, len(structures[1].boxes)] == [(1, 0), 1]
    np.testing.assert_array_equal(tab.labels(), in_python(bundle, volume_file, structures))
    x, y = tab.screen(None)
    touch(tab, [(x - 30, y), (x + 30, y)], [(x - 90, y), (x + 90, y)])
    assert tab.state("zoom") == pytest.approx(3, rel=0.1)
    assert len(tab.structures(tmp_path)[1].boxes) == 1
    controls = "button:visible, select:visible, input[type=text]:visible, canvas:visible"
    for control in page.locator(controls).all():
        control.scroll_into_view_if_needed()
        box = control.bounding_box()
        assert box is not None
        text = control.evaluate("e => e.outerHTML.slice(0, 200)")
        assert min(box["width"], box["height"]) >= LEAST_TARGET, text
        assert box["x"] >= 0, text
        assert box["x"] + box["width"] <= screen["viewport"]["width"], text
    assert page.evaluate("innerWidth") == screen["viewport"]["width"]  # nothing made it wider


def touch(
    tab: ViewerPage, start: list[tuple[float, float]], end: list[tuple[float, float]]
) -> None:
    """Fingers go down, move to their ends in steps, and leave."""
    session = tab.page.context.new_cdp_session(tab.page)

    def send(kind: str, places: list[tuple[float, float]]) -> None:
        points = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(places)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    send("touchStart", start)
    for step in range(1, 5):
        between = [
            (x0 + (x1 - x0) * step / 4, y0 + (y1 - y0) * step / 4)
            for (x0, y0), (x1, y1) in zip(start, end, strict=True)
        ]
        send("touchMove", between)
    send("touchEnd", [])
    session.detach()


def test_small_screens_show_all(visit: Visit, server: Server, volume_file: Path) -> None:
    """At 1280×720 nothing lies outside, and no text is cut off."""
    tab = visit(server.url)
    tab.open(volume_file)
    for selector in ("header button:visible", "aside button:visible", "aside select:visible"):
        for control in tab.page.locator(selector).all():
            box = control.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 1280
            assert box["y"] + box["height"] <= 720
            assert control.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
