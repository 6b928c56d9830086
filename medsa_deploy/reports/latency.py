"""A latency profile → one HTML page with its figures, every sample and the longest layers."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from math import ceil, floor, log10

from medsa_deploy.evaluation.latency import Distribution, Profile

from . import html

HEADERS = ("", "n", "mean ms", "p50", "p90", "p95", "p99", "max", "CV", "a slice")
"""Headers of a table of latencies, the last one for volumes only. CV: coefficient of variation."""
LONGEST = 20
"""Number of layers in the table."""
BAR_SHARE = 0.86
"""Share of the axis that the longest bar takes; its value follows it."""


def profile_page(profile: Profile) -> str:
    """The page's HTML."""
    parts = [_verdict(profile), html.table((), list(facts(profile).items()))]
    parts += [f"<p>⚠ {escape(warning)}</p>" for warning in profile.warnings]
    parts += ["<h2>Latency</h2>", _latencies(profile)]
    if profile.slices > 1:
        text = (
            f"Preprocessing and encoding are of {profile.slices} slices together, as is the first "
            "click’s share of them; a slice: p50 over their number. Decoding is of one slice."
        )
        parts.append(html.note(text))
    parts += ["<h2>Every sample</h2>", _samples(profile)]
    parts.append(html.note("Milliseconds on a logarithmic axis; the upright lines are medians."))
    parts += _compared(profile)
    for name, graph in profile.layers.items():
        if not graph.layers:
            continue
        parts += [f"<h2>Where the {escape(name)}’s time goes</h2>"]
        for kind, times in (("block", graph.blocks), ("kind of layer", graph.kinds)):
            parts.append(html.note(f"Milliseconds by {kind}, a run:"))
            parts.append(_bars(times, f"Milliseconds of the {name} by {kind}"))
        longest_layers = sorted(graph.layers, key=lambda layer: -layer.medianMs)[:LONGEST]
        rows = [
            (layer.name, layer.operator, f"{layer.medianMs:.3f}", f"{layer.percentage:.1f}")
            for layer in longest_layers
        ]
        parts.append(html.table(("layer", "operator", "median ms", "%"), rows, numbers=2))
        text = (
            f"Medians of {graph.count} runs with the backend’s own profiler, which costs time "
            f"itself; the {len(rows)} longest of {len(graph.layers)} layers."
        )
        parts.append(html.note(text))
    return html.page(f"Profile of {profile.bundle}", parts)


def facts(profile: Profile) -> dict[str, str]:
    """The facts of a measurement, in words."""
    machine = profile.machine
    memory = "" if machine.get("memory_gb") is None else f", {machine['memory_gb']:g} GB"
    usage = "not measured on this system"
    if profile.peak_mb is not None and profile.loaded_mb is not None:
        usage = f"{profile.peak_mb:.0f} MB at most, {profile.loaded_mb:.0f} MB when loaded"
    if gpu := machine.get("gpu"):
        gpu, usage = f"; {gpu}", f"{usage}, without the GPU's"
    return {
        "bundle": profile.bundle,
        "what": f"{profile.precision} in {profile.backend}; image: {profile.work}",
        "threads": "all cores" if profile.threads is None else str(profile.threads),
        "machine": f"{machine['processor']}, {machine['cores']} cores{memory}; "
        f"{machine['system']}{gpu or ''}",
        "versions": ", ".join(f"{name} {number}" for name, number in profile.versions.items()),
        "cold load": f"{profile.load_ms / 1e3:.2f} s in a new process, checking of files included",
        "memory": usage,
        "measured": f"{profile.measured}, after {profile.warm_up} runs to warm up",
    }


def milliseconds(value: float) -> str:
    """Three to five digits."""
    return f"{value:.{2 if value < 100 else 1 if value < 1000 else 0}f}"


def figures(distribution: Distribution) -> list[str]:
    """A stage's row, from `count` on; the last is empty for a stage of one slice."""
    d = distribution
    times = (d.mean_ms, d.p50_ms, d.p90_ms, d.p95_ms, d.p99_ms, d.max_ms)
    per_slice = "" if d.per_slice_ms is None else milliseconds(d.per_slice_ms)
    return [str(d.count), *map(milliseconds, times), f"{100 * d.cv:.1f} %", per_slice]


def _verdict(profile: Profile) -> str:
    comparison = profile.comparison
    if comparison is None:
        return ""
    other, slower = escape(comparison.other), escape(", ".join(comparison.regressions))
    if slower:
        return f'<p class="verdict bad">Slower than {other}: {slower}</p>'
    return f'<p class="verdict good">No regression against {other}</p>'


def _latencies(profile: Profile) -> str:
    shown = len(HEADERS) if profile.slices > 1 else len(HEADERS) - 1
    rows = [[name, *figures(distribution)][:shown] for name, distribution in profile.stages.items()]
    return html.table(("stage", *HEADERS[1:shown]), rows, numbers=1)


def _samples(profile: Profile) -> str:
    """A row for each stage, a dot for each run; decades as grid."""
    shown = [ms for distribution in profile.stages.values() for ms in distribution.samples_ms]
    low, high = floor(log10(min(shown))), ceil(log10(max(shown)))
    high = max(high, low + 1)

    def at(value: float) -> float:
        return html.across((log10(value) - low) / (high - low))

    count = len(profile.stages)
    marks = [html.grid(at(10.0**k), f"{10.0**k:g}", count) for k in range(low, high + 1)]
    for row, (name, distribution) in enumerate(profile.stages.items()):
        y = html.down(row)
        marks.append(html.label(name, y))
        for k, ms in enumerate(distribution.samples_ms):
            marks.append(html.dot(at(ms), y + html.spread(k), f"{ms:.3f} ms", 3))
        marks.append(html.limit(at(distribution.p50_ms), y))
    return html.plot(marks, count, "Milliseconds of every run, by stage")


def _bars(values: Mapping[str, float], title: str) -> str:
    largest = max(values.values()) or 1.0
    total = sum(values.values()) or 1.0
    marks = []
    for row, (name, value) in enumerate(values.items()):
        y = html.down(row)
        x = html.across(BAR_SHARE * value / largest)
        marks.append(html.label(name, y))
        marks.append(html.bar(x, y, f"{value:.2f}  ({100 * value / total:.0f} %)"))
    return html.plot(marks, len(values), title)


def _compared(profile: Profile) -> list[str]:
    comparison = profile.comparison
    if comparison is None:
        return []
    rows = [
        (stage, f"{r.ratio:.3f}", f"{r.low:.3f}…{r.high:.3f}", "slower" if r.regression else "")
        for stage, r in comparison.ratios.items()
    ]
    rows += [(name, f"{ratio:.3f}", "measured once", "") for name, ratio in comparison.once.items()]
    return [
        f"<h2>Against {escape(comparison.other)}</h2>",
        html.table(("stage", "time, now / then", "95 % interval", ""), rows, numbers=1),
        *(f"<p>⚠ {escape(difference)}</p>" for difference in comparison.differences),
        html.note(
            "Ratios of p50 with bootstrap intervals. A click is slower beyond "
            f"{comparison.max_slowdown:g} with all of its interval above 1."
        ),
    ]
