"""A profile → one HTML page with its figures, every sample and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from math import ceil, floor, log10

from . import page
from .profiling import Profile

LONGEST = 20
"""Layers that are listed."""
BAR_SHARE = 0.86
"""Of the axis, for the longest bar; its value stands behind it."""


def profile_page(profile: Profile) -> str:
    """The whole page."""
    parts = [_verdict(profile), page.table((), list(facts(profile).items()))]
    parts += [f"<p>⚠ {escape(warning)}</p>" for warning in profile.warnings]
    parts += ["<h2>Latency</h2>", _latencies(profile)]
    if profile.slices > 1:
        text = f"Encoding is of {profile.slices} slices together; the last column is p50 a slice."
        parts.append(page.note(text))
    parts += ["<h2>Every sample</h2>", _samples(profile)]
    parts.append(page.note("Milliseconds on a logarithmic axis; the upright lines are medians."))
    parts += _compared(profile)
    for name, graph in profile.layers.items():
        if not graph.layers:
            continue
        parts += [f"<h2>Where the {escape(name)}’s time goes</h2>"]
        parts.append(_bars(graph.blocks, f"{name} by block, ms"))
        parts.append(_bars(graph.kinds, f"{name} by kind, ms"))
        longest = sorted(graph.layers, key=lambda layer: -layer.medianMs)[:LONGEST]
        rows = [
            (one.name, one.operator, f"{one.medianMs:.3f}", f"{one.percentage:.1f}")
            for one in longest
        ]
        parts.append(page.table(("layer", "operator", "median ms", "%"), rows, numbers=2))
        text = (
            f"Medians of {graph.count} runs with the backend’s own profiler, which costs time "
            f"itself; the {len(rows)} longest of {len(graph.layers)} layers."
        )
        parts.append(page.note(text))
    return page.page(f"Profile of {profile.bundle}", parts)


def facts(profile: Profile) -> dict[str, str]:
    """What was measured where, in words."""
    machine = profile.machine
    memory = "" if machine.get("memory_gb") is None else f", {machine['memory_gb']:g} GB"
    held = ""
    if profile.peak_mb is not None and profile.loaded_mb is not None:
        held = f"{profile.peak_mb:.0f} MB at most, {profile.loaded_mb:.0f} MB when loaded"
    return {
        "what": f"{profile.precision} in {profile.backend}, {profile.work}",
        "threads": "all cores" if profile.threads is None else str(profile.threads),
        "machine": f"{machine['processor']}, {machine['cores']} cores{memory}; {machine['system']}",
        "versions": ", ".join(f"{name} {number}" for name, number in profile.versions.items()),
        "loading": f"{profile.load_ms / 1e3:.2f} s in a new process, SHA-256 of the files included",
        **({"memory": held} if held else {}),
        "measured": f"{profile.measured}, after {profile.warm_up} runs to warm up",
    }


def _verdict(profile: Profile) -> str:
    if profile.comparison is None:
        return ""
    slower = profile.comparison.regressions
    if slower:
        return f'<p class="verdict bad">Slower than before: {escape(", ".join(slower))}</p>'
    return '<p class="verdict good">No slower than before</p>'


def _latencies(profile: Profile) -> str:
    headers = ["stage", "n", "mean ms", "p50", "p90", "p95", "p99", "max", "CV %"]
    volume = profile.slices > 1
    rows = []
    for name, one in profile.stages.items():
        values = (one.mean_ms, one.p50_ms, one.p90_ms, one.p95_ms, one.p99_ms, one.max_ms)
        each = "" if one.per_slice_ms is None else f"{one.per_slice_ms:.2f}"
        figures = [f"{value:.2f}" for value in values]
        rows.append([name, str(one.count), *figures, f"{100 * one.cv:.1f}", *([each] * volume)])
    return page.table([*headers, *(["a slice"] * volume)], rows, numbers=1)


def _samples(profile: Profile) -> str:
    """A row for each stage, a dot for each run; decades as grid."""
    shown = [ms for one in profile.stages.values() for ms in one.samples_ms if ms > 0] or [1.0]
    low, high = floor(log10(min(shown))), ceil(log10(max(shown)))
    high = max(high, low + 1)

    def at(milliseconds: float) -> float:
        return page.across((log10(max(milliseconds, 10.0**low)) - low) / (high - low))

    count = len(profile.stages)
    marks = [page.grid(at(10.0**k), f"{10.0**k:g} ms", count) for k in range(low, high + 1)]
    for row, (name, one) in enumerate(profile.stages.items()):
        y = page.down(row)
        marks.append(page.label(name, y))
        for k, ms in enumerate(one.samples_ms):
            marks.append(page.dot(at(ms), y + page.spread(k), f"{ms:.3f} ms", 3))
        marks.append(page.limit(at(one.p50_ms), y))
    return page.plot(marks, count, "Milliseconds of every run, by stage")


def _bars(values: Mapping[str, float], title: str) -> str:
    largest = max(values.values()) or 1.0
    total = sum(values.values()) or 1.0
    marks = []
    for row, (name, value) in enumerate(values.items()):
        y = page.down(row)
        x = page.across(BAR_SHARE * value / largest)
        marks.append(page.label(name, y))
        marks.append(page.bar(x, y, f"{value:.2f}  ({100 * value / total:.0f} %)"))
    return page.plot(marks, len(values), title)


def _compared(profile: Profile) -> list[str]:
    found = profile.comparison
    if found is None:
        return []
    rows = [
        (stage, f"{r.ratio:.3f}", f"{r.low:.3f}…{r.high:.3f}", "slower" if r.regression else "")
        for stage, r in found.ratios.items()
    ]
    return [
        f"<h2>Against {escape(found.other)}</h2>",
        page.table(("stage", "time, now / then", "95 % interval", ""), rows, numbers=1),
        *(f"<p>⚠ {escape(difference)}</p>" for difference in found.differences),
        page.note(
            "Ratios of p50 with bootstrap intervals. A click is slower above "
            f"{found.max_slowdown:g} with an interval above 1."
        ),
    ]
