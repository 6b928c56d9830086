"""peers.json → Markdown: every candidate's figures, the targets, the cost of a volume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .names import OURS, SWIN, VOLUME_NETWORK
from .targets import Result, gemm_share, targets

MAIN = ("Med-SA ViT-B, zero tables", "Med-SA ViT-B, real tables")
"""Networks of the table in docs/performance.md; the others are in benchmarks/README.md."""
VOLUME = (197, 233, 189)
"""Voxels of the MNI template, sliced along the last axis."""
PATCH = 96
OVERLAPS = (0.25, 0.5)
"""Of neighbouring patches: MONAI's default, and what nnU-Net uses."""
ABSENT = "not measured"


def main_table(result: Result) -> str:
    """Candidates of the networks that the targets are about."""
    return _table(result, [name for name in result["networks"] if name in MAIN])


def others_table(result: Result) -> str:
    """Candidates of all other networks."""
    names = [name for name in result["networks"] if name not in MAIN]
    return f"{_table(result, names)}\n\n![encoders](results/peers.png)"


def _table(result: Result, networks: list[str]) -> str:
    head = "network | candidate | encoder | × plain export | decoder, first prompt | next prompt"
    more = "peak memory | files | mask Dice | relative L2 | share of a GEMM's GFLOP/s"
    columns = f"{head} | {more}".count("|") + 1
    rows = [f"| {head} | {more} |", "|---" * columns + "|"]
    for network in networks:
        for name, entry in result["networks"][network]["candidates"].items():
            cells = " | ".join(_cells(result, network, entry))
            rows.append(f"| {network} | {name} | {cells} |")
    return "\n".join([*rows, "", *_measured_on(result)])


def _cells(result: Result, network: str, entry: dict[str, Any]) -> Iterator[str]:
    """A candidate's figures, or why there are none."""
    if "median_ms" not in entry:
        yield f"{ABSENT}: {_plain(entry['not_measured'])}"
        yield from ["–"] * 8
        return
    times, agreement = entry["median_ms"], entry["agreement"]
    share = gemm_share(result, network, entry)
    yield f"{_ms(times['encoder'])}"
    yield f"{entry['ratio']['encoder']:.2f}"
    yield _ms(times.get("decoder"))
    yield _ms(times.get("click", times.get("decoder")))
    yield f"{entry['peak_mb']:.0f} MB"
    yield f"{entry['file_mb']:.0f} MB"
    dice = agreement["mask_dice_mean"]
    yield "–" if dice is None else f"{dice:.4f}"
    yield f"{agreement['embeddings_relative_l2']:.1e}"
    yield "–" if share is None else f"{share:.0%}"


def targets_table(result: Result, depth: Result | None) -> str:
    """What was aimed at, and what was measured."""
    rows = ["| target | aimed at | measured | met | |", "|---|---|---|---|---|"]
    for target in targets(result, depth):
        unit = " ms" if target.limit.endswith("ms") else ""
        measured = (
            ABSENT if target.measured is None else f"{_beside(target.measured, target.limit)}{unit}"
        )
        met = {True: "yes", False: "**no**", None: "–"}[target.met]
        rows.append(f"| {target.name} | {target.limit} | {measured} | {met} | {target.note} |")
    return "\n".join([*rows, "", *_measured_on(result)])


def _beside(measured: float, limit: str) -> str:
    """A figure with two decimals; with three where two would be the limit's own."""
    short = f"{measured:.2f}"
    return f"{measured:.3f}" if short in limit.split() else short


def volume_table(result: Result) -> str:
    """What the MNI template takes as a volume: patches of Swin-UNETR, chunks of ours."""
    rows = ["| network | candidate | runs for the volume | a run | the volume |", "|---" * 5 + "|"]
    size = "×".join(map(str, VOLUME))
    for name, entry in _measured(result, SWIN):
        for overlap in OVERLAPS:
            count, each = patches(VOLUME, overlap), entry["median_ms"]["encoder"]
            work = f"{count} patches, overlap {overlap:g}"
            rows.append(f"| {SWIN} | {name} | {work} | {_ms(each)} | {_s(count * each)} |")
    for name, entry in _measured(result, VOLUME_NETWORK):
        if name.startswith(OURS):
            times, slices = entry["median_ms"], VOLUME[-1]
            chunks = math.ceil(slices / 8)
            total = chunks * times["encoder"] + slices * times["decoder"]
            work = f"{chunks} chunks of 8, {slices} prompts"
            each = f"{_ms(times['encoder'])} + {_ms(times['decoder'])} a prompt"
            rows.append(f"| {VOLUME_NETWORK} | {name} | {work} | {each} | {_s(total)} |")
    note = (
        f"A volume of {size}, computed from the medians of single runs. Swin-UNETR (feature size "
        "48, four classes) finds what it was trained for without a prompt; here one prompt a slice "
        "is decoded."
    )
    return "\n".join([*rows, "", note, *_measured_on(result)])


def patches(shape: tuple[int, ...], overlap: float) -> int:
    """How many cubes a sliding window needs for a volume, as MONAI lays them."""
    step = int(PATCH * (1 - overlap))
    return math.prod(math.ceil(max(n - PATCH, 0) / step) + 1 for n in shape)


def _measured(result: Result, network: str) -> Iterator[tuple[str, dict[str, Any]]]:
    candidates = result["networks"].get(network, {}).get("candidates", {})
    return ((name, entry) for name, entry in candidates.items() if "median_ms" in entry)


def _measured_on(result: Result) -> list[str]:
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    return [f"Measured on: {result['machine']}, {threads}; {versions}."]


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def _s(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.1f} s"


def _plain(text: str) -> str:
    """Without what would end a cell."""
    return text.replace("|", "/").replace("\n", " ")
