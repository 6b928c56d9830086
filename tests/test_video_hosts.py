"""The programs of docs/video.md in GStreamer and Holoscan: every result belongs to its frame.

A network that takes 100 ms a frame stands in, so that a live source of 30 Hz must drop frames.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "video.md"
DEBIAN = "/usr/lib/python3/dist-packages"
FRAMES = 150
NEAR = 4.0
"""Pixels: less than the ball moves in two frames, and a logit's size."""

BOOTSTRAP = """
import sys, time
sys.path[:0] = [{tests!r}]
sys.path.append({debian!r})
from dataclasses import replace
from pathlib import Path
import medsa_deploy
from blob_backend import BlobBackend
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.runtime import Session

class SlowBlobs(BlobBackend):
    def encode(self, image):
        time.sleep(0.1)
        return super().encode(image)

    def decode(self, embeddings, coords, labels, mask):
        return super().decode(embeddings, coords, 0 * labels, mask)  # wherever it is bright

def load(path):
    manifest = load_manifest(Path(path))
    conventions = replace(manifest.conventions, point_order="xy")
    manifest = replace(manifest, conventions=conventions)
    return Session(manifest, SlowBlobs(manifest))

medsa_deploy.load = load
"""
"""Python that makes `load` open the bundle with a slow network that finds what is bright."""

BALL = """
import gi, json
import numpy as np
gi.require_version("Gst", "1.0")
from gi.repository import Gst
Gst.init(None)
pipeline = Gst.parse_launch(
    "videotestsrc num-buffers=150 pattern=ball ! video/x-raw,format=GRAY8,width=320,height=240 ! "
    "appsink name=frames sync=false"
)
sink = pipeline.get_by_name("frames")
pipeline.set_state(Gst.State.PLAYING)
centres = []
while sample := sink.emit("pull-sample"):
    content = sample.get_buffer().extract_dup(0, 320 * 240)
    y, x = np.nonzero(np.frombuffer(content, np.uint8).reshape(240, 320) > 128)
    centres.append((float(x.mean()), float(y.mean())))
pipeline.set_state(Gst.State.NULL)
print(json.dumps(centres))
"""
"""Where the ball of GStreamer's test pattern is in each frame."""

GRAPH = """
import json, sys
import numpy as np
from holoscan.conditions import CountCondition, PeriodicCondition
from holoscan.core import Application
from holoscan.schedulers import EventBasedScheduler

def centre(index):
    return 60 + 1.5 * index, 120 + 60 * np.sin(index / 12)

class Camera(Operator):
    def __init__(self, fragment, *args, **options):
        self.count = 0
        super().__init__(fragment, *args, **options)

    def setup(self, spec):
        spec.output("frame").condition(ConditionType.NONE)

    def compute(self, op_input, op_output, context):
        frame = np.full((240, 320), 10, np.uint8)
        y, x = np.mgrid[:240, :320]
        x0, y0 = centre(self.count)
        frame[np.hypot(x - x0, y - y0) < 20] = 240
        message = {{"frame": frame, "frame_id": self.count, "timestamp": time.monotonic()}}
        op_output.emit(message, "frame")
        self.count += 1

class Report(Operator):
    def setup(self, spec):
        spec.input("result")

    def compute(self, op_input, op_output, context):
        result, age_ms = op_input.receive("result")
        results.append((result.frame_id, age_ms, result.lost, result.late, result.box))

class Follow(Application):
    def compose(self):
        count = CountCondition(self, {frames})
        clock = PeriodicCondition(self, recess_period=int(1e9 / 30))
        camera = Camera(self, count, clock, name="camera")
        follow = FollowOp(self, session=session, box=(35, 95, 85, 145), name="follow")
        report = Report(self, name="report")
        self.add_flow(camera, follow, {{("frame", "frame")}})
        self.add_flow(follow, report, {{("result", "result")}})

results = []
with medsa_deploy.load(sys.argv[1]) as session:
    app = Follow()
    app.scheduler(EventBasedScheduler(app, worker_thread_number=3))
    app.run()
print(json.dumps({{"results": results, "centres": [centre(k) for k in range({frames})]}}))
"""
"""An application around the operator of the page."""


def program(marker: str) -> str:
    """The block of the page that holds `marker`."""
    blocks = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if marker in block]
    return block


def output(python: str, source: str, *arguments: object, paths: str = "") -> Any:
    """The last line that Python prints, as JSON."""
    bootstrap = BOOTSTRAP.format(tests=str(Path(__file__).parent), debian=DEBIAN)
    environment = os.environ | {"LD_LIBRARY_PATH": paths}
    done = subprocess.run(
        [python, "-c", bootstrap + source, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(results: list[Any], centres: list[list[float]]) -> dict[str, float]:
    """Each result is of its own frame, none is of an earlier one; returns what is reported."""
    numbers = [number for number, *_ in results]
    assert numbers == sorted(set(numbers))
    assert 5 < len(numbers) < FRAMES, "a network of 10 Hz cannot take 30 frames a second"
    for number, _, _, late, box in results:
        assert late, number
        middle = np.add(box[:2], box[2:]) / 2 - 0.5
        assert np.hypot(*np.subtract(middle, centres[number])) < NEAR, number
    ages = np.array([age_ms for _, age_ms, *_ in results])
    assert ages.min() >= 100, "a result is as old as the network takes, at least"
    assert np.median(ages) < 3000, "nothing is queued"
    return {"results": len(ages), "median_ms": float(np.median(ages)), "max_ms": float(ages.max())}


@pytest.mark.slow
def test_gstreamer(bundle: Path) -> None:
    if not Path(DEBIAN, "gi").is_dir():
        pytest.skip("gi: apt-get install python3-gst-1.0 gstreamer1.0-plugins-base")
    centres = output(sys.executable, BALL)
    source = (
        f"videotestsrc is-live=true num-buffers={FRAMES} pattern=ball ! "
        "video/x-raw,format=GRAY8,width=320,height=240,framerate=30/1"
    )
    x, y = centres[0]
    box = f"{x - 30},{y - 30},{x + 30},{y + 30}"
    report = output(sys.executable, program("pull-sample"), bundle, box, source)
    figures = check(report["results"], centres)
    assert report["dropped"] >= FRAMES // 2
    assert report["dropped"] + len(report["results"]) == report["results"][-1][0] + 1
    assert report["age_ms"]["median"] == pytest.approx(figures["median_ms"])
    print(figures)


@pytest.mark.slow
def test_holoscan(bundle: Path) -> None:
    python = os.environ.get("MEDSA_HOLOSCAN_PYTHON", sys.executable)
    if python == sys.executable and importlib.util.find_spec("holoscan") is None:
        pytest.skip(
            "holoscan: pip install holoscan-cu12==4.6.0 nvidia-cuda-runtime-cu12, or name a Python "
            "that has them in MEDSA_HOLOSCAN_PYTHON"
        )
    query = "import nvidia.cuda_runtime as r; print(list(r.__path__)[0])"
    folder = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True)
    source = program("FollowOp") + GRAPH.format(frames=FRAMES)
    report = output(python, source, bundle, paths=f"{folder.stdout.strip()}/lib")
    figures = check(report["results"], report["centres"])
    print(figures)
