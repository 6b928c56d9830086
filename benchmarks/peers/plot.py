"""peers.json → peers.png: what each candidate's encoder takes, network by network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .names import OURS

OURS_COLOUR, PEER_COLOUR = "#1f6f8b", "#b0b7bd"
ROW, HEAD = 0.24, 0.75
"""Inches of a candidate's row and of what a network has besides."""


def draw(result: dict[str, Any], path: Path) -> None:
    """One panel a network: a bar to the median, which its name tells, a dot for every sample."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        name: sorted(measured, key=lambda named: named[1]["median_ms"]["encoder"], reverse=True)
        for name, entry in result["networks"].items()
        if (measured := [named for named in entry["candidates"].items() if "median_ms" in named[1]])
    }
    if not panels:
        return
    heights = [HEAD + ROW * len(measured) for measured in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(9, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, measured) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(axis, name, measured)
    figure.suptitle(result["machine"], fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, name: str, measured: list[tuple[str, dict[str, Any]]]) -> None:
    """A network's candidates, the fastest on top."""
    for row, (candidate, figures) in enumerate(measured):
        middle = figures["median_ms"]["encoder"]
        colour = OURS_COLOUR if candidate.startswith(OURS) else PEER_COLOUR
        axis.barh(row, middle, color=colour, height=0.7)
        samples = [sample for round_ms in figures["samples_ms"]["encoder"] for sample in round_ms]
        axis.plot(samples, [row] * len(samples), ".", color="black", markersize=2)
    names = [f"{name}  {figures['median_ms']['encoder']:.0f}" for name, figures in measured]
    axis.set_yticks(range(len(measured)), names, fontsize=7)
    axis.set_title(f"{name}: encoder, milliseconds", fontsize=9, loc="left")
    axis.tick_params(axis="x", labelsize=7)
    axis.margins(x=0.08)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
