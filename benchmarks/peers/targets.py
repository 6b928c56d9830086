"""What was aimed at, as ratios of figures of one run, and whether it was reached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .names import DEFAULT_NAME, OURS, PLAIN

Result = dict[str, Any]
"""peers.json."""
TABLES = ("zero", "real")
EVIDENCE = ("Demonstration, 2D", "Demonstration, 3D")
"""Networks with real weights that say what a recipe does to a Med-SA ViT's masks."""
LEAST_DICE = 0.99
FASTER = f"{OURS}, openvino fp32"
"""Another float32 encoder that stands beside the default's figures."""
CLICKED = "LiteMedSAM"
EAGER = "PyTorch eager"
IMAGE_SIZE = 1024
COUNTED = "operations are the reference's, some of which are folded away"
REASONS = {
    "Med-SA ViT-B, real tables: float32, over the plain export in ONNX Runtime": (
        "ONNX Runtime's fused attention takes relative positions only stored, so they are made for "
        "256 queries at a time"
    ),
    "Med-SA ViT-B, real tables: best precision, over the strongest peer": (
        "relative positions stay in bfloat16"
    ),
    "Med-SA ViT-B, real tables: a slice in 3D, over 2D": (
        "the depth pass attends with relative positions once more"
    ),
    "demonstration checkpoint: a slice in 3D, over 2D": (
        "its blocks are narrow, and the depth branch a larger share of them; the target is ViT-B's"
    ),
    "LiteMedSAM: the next click": (
        "15 ms were set where PyTorch eager takes 46 ms, and are 0.33 of that; what is left are "
        "products of 4096 tokens"
    ),
}
"""Target → why it is not met, where it is not."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target."""

    name: str
    limit: str
    """`≤ 0.80`, in words."""
    measured: float | None
    met: bool | None
    """None where it was not measured."""
    note: str = ""


def targets(result: Result, depth: Result | None) -> list[Target]:
    """Every target, those that were not measured too. `depth`: what benchmarks/depth.py wrote."""
    rows: list[Target] = []
    for tables in TABLES:
        network = f"Med-SA ViT-B, {tables} tables"
        rows += _vit_b(result, network)
    for name in TABLES:
        pair = f"Med-SA ViT-B, {name} tables", f"SAM ViT-B, {name} tables"
        rows.append(_pair(result, f"{pair[0]}: adapters, over SAM without", *pair))
    for name in TABLES:
        rows.append(_depth(depth, name))
    demonstration = "Demonstration, 3D", "Demonstration, 2D"
    rows.append(_pair(result, "demonstration checkpoint: a slice in 3D, over 2D", *demonstration))
    rows.append(_next_click(result))
    return rows


def best(result: Result, network: str) -> str | None:
    """Our fastest encoder whose recipe keeps the masks of real weights."""
    ratios = {
        name: entry["ratio"]["encoder"]
        for name, entry in _measured(result, network)
        if name.startswith(OURS) and keeps_masks(result, name)
    }
    return min(ratios, key=lambda name: ratios[name]) if ratios else None


def strongest_peer(result: Result, network: str) -> str | None:
    """The fastest encoder that is not ours."""
    ratios = {
        name: entry["ratio"]["encoder"]
        for name, entry in _measured(result, network)
        if not name.startswith(OURS)
    }
    return min(ratios, key=lambda name: ratios[name]) if ratios else None


def keeps_masks(result: Result, name: str) -> bool:
    """Whether the same backend and precision keeps masks on every network with real weights."""
    return all(value is not None and value >= LEAST_DICE for value in _evidence(result, name))


def gemm_share(result: Result, network: str, entry: dict[str, Any]) -> float | None:
    """The encoder's throughput over the fastest large product's of the same group."""
    network_result = result["networks"].get(network, {})
    gflop = network_result.get("gflop", {}).get("encoder")
    if not gflop or "median_ms" not in entry:
        return None
    throughput = max(network_result["groups"][entry["group"]]["gemm_gflops"].values())
    return float(gflop / (entry["median_ms"]["encoder"] / 1e3) / throughput)


def _evidence(result: Result, name: str) -> list[float | None]:
    """The mask Dice of a backend and precision on every network with real weights."""
    return [
        dict(_measured(result, network)).get(name, {}).get("agreement", {}).get("mask_dice_mean")
        for network in EVIDENCE
    ]


def _measured(result: Result, network: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Candidates that have figures."""
    candidates = result["networks"].get(network, {}).get("candidates", {})
    return ((name, entry) for name, entry in candidates.items() if "ratio" in entry)


def _vit_b(result: Result, network: str) -> Iterator[Target]:
    """The targets of one network at 1024²."""
    measured = dict(_measured(result, network))
    ours, plain = measured.get(DEFAULT_NAME), measured.get(PLAIN)
    comparable = ours is not None and plain is not None
    name = f"{network}: float32, over the plain export in ONNX Runtime"
    other = measured.get(FASTER)
    note = f"{_short(FASTER)}: {other['ratio']['encoder']:.2f}" if other else ""
    yield _at_most(name, 0.80, ours["ratio"]["encoder"] if comparable else None, note)
    name = f"{network}: its peak memory, over the same"
    note = (
        f"{_short(FASTER)}: {other['peak_mb'] / plain['peak_mb']:.2f}"
        if other and comparable
        else ""
    )
    yield _at_most(name, 0.30, ours["peak_mb"] / plain["peak_mb"] if comparable else None, note)
    chosen, peer = best(result, network), strongest_peer(result, network)
    name = f"{network}: best precision, over the strongest peer"
    value, note = None, ""
    if chosen is not None and peer is not None:
        value = measured[chosen]["ratio"]["encoder"] / measured[peer]["ratio"]["encoder"]
        least = min(value for value in _evidence(result, chosen) if value is not None)
        note = (
            f"{_short(chosen)}, over {peer}; mask Dice {least:.4f} or more on the demonstration "
            "checkpoint"
        )
    yield _at_most(name, 0.65, value, note)
    name = f"{network}: float32 throughput, over one large product's"
    shares = {
        candidate: share
        for candidate, figures in measured.items()
        if candidate.startswith(OURS) and candidate.endswith(" fp32")
        if (share := gemm_share(result, network, figures)) is not None
    }
    fastest = max(shares, key=lambda candidate: shares[candidate]) if shares else None
    share = shares[fastest] if fastest else None
    note = f"{_short(fastest)}; {COUNTED}" if fastest else ""
    yield _target(name, "≥ 0.85", share, share is not None and share >= 0.85, note)


def _pair(result: Result, name: str, first: str, second: str) -> Target:
    """What a network costs over another."""
    pair = result.get("pairs", {}).get(f"{first} / {second}", {})
    return _at_most(name, 1.10, pair.get("ratio"))


def _depth(depth: Result | None, tables: str) -> Target:
    """What a slice costs in 3D, by benchmarks/depth.py."""
    key = (f"exported, {tables} tables", IMAGE_SIZE)
    rows = depth["rows"] if depth else []
    ratios = {(row["graph"], row["image_size"]): row["ratio"] for row in rows}
    name = f"Med-SA ViT-B, {tables} tables: a slice in 3D, over 2D"
    return _at_most(name, 1.10, ratios.get(key))


def _next_click(result: Result) -> Target:
    """The time of a further click, the fastest of our backends."""
    times = {
        name: entry["median_ms"]["click"]
        for name, entry in _measured(result, CLICKED)
        if "click" in entry["median_ms"] and name.endswith(" fp32")
    }
    fastest = min(times, key=lambda name: times[name]) if times else None
    value = times[fastest] if fastest else None
    eager = dict(_measured(result, CLICKED)).get(EAGER)
    note = _short(fastest) if fastest else ""
    if value and eager:
        whole_ms = eager["median_ms"]["decoder"]
        note += f", {value / whole_ms:.2f} of {EAGER}'s whole decoder ({whole_ms:.0f} ms)"
    name = f"{CLICKED}: the next click"
    return _target(name, "≤ 15 ms", value, value is not None and value <= 15, note)


def _short(name: str) -> str:
    """A candidate of ours by backend and precision."""
    return name.removeprefix(f"{OURS}, ")


def _at_most(name: str, limit: float, measured: float | None, note: str = "") -> Target:
    met = measured is not None and measured <= limit
    return _target(name, f"≤ {limit:.2f}", measured, met, note)


def _target(name: str, limit: str, measured: float | None, met: bool, note: str) -> Target:
    notes = [note] if note else []
    if measured is not None and not met and name in REASONS:
        notes.append(REASONS[name])
    return Target(
        name=name,
        limit=limit,
        measured=measured,
        met=None if measured is None else met,
        note="; ".join(notes),
    )
