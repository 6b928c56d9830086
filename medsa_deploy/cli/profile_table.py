"""A profile → tables on the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from medsa_deploy.evaluation.latency import Profile
from medsa_deploy.reports.latency import HEADERS, facts, figures

from .console import err, out

LONGEST = 6
"""Blocks that are shown, of a graph."""


def print_profile(profile: Profile) -> None:
    """Latencies, where the time goes, the comparison, and what to be careful about."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts(profile).items():
        table.add_row(f"[dim]{name}[/]", escape(value))
    out.print(table)
    out.print()
    out.print(_latencies(profile))
    for name, graph in profile.layers.items():
        if graph.layers:
            out.print(f"[bold]{name}[/]  {_shares(graph.blocks)}")
            out.print(f"[dim]{' ' * len(name)}  {_shares(graph.kinds)}[/]")
    _print_comparison(profile)
    for warning in profile.warnings:
        err.print(f"[yellow]warning:[/] {escape(warning)}")


def _latencies(profile: Profile) -> Table:
    shown = len(HEADERS) if profile.slices > 1 else len(HEADERS) - 1
    table = Table(box=None, pad_edge=False, header_style="dim")
    for header in HEADERS[:shown]:
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    for name, one in profile.stages.items():
        table.add_row(*[name, *figures(one)][:shown])
    return table


def _shares(parts: dict[str, float]) -> str:
    """The largest parts of a graph's time."""
    total = sum(parts.values()) or 1.0
    largest = sorted(parts.items(), key=lambda item: -item[1])
    shown = [f"{escape(name)} {100 * ms / total:.0f} %" for name, ms in largest[:LONGEST]]
    return ", ".join(shown)


def _print_comparison(profile: Profile) -> None:
    found = profile.comparison
    if found is None:
        return
    for difference in found.differences:
        err.print(f"[yellow]warning:[/] {escape(f'{found.other} is of {difference}')}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for header in ("", f"now / {escape(found.other)}", "95 % interval"):
        table.add_column(header)
    for stage, one in found.ratios.items():
        table.add_row(stage, f"{one.ratio:.3f}", f"{one.low:.3f}…{one.high:.3f}")
    for what, ratio in found.once.items():
        table.add_row(what, f"{ratio:.3f}", "[dim]measured once[/]")
    out.print(table)
    for stage in found.regressions:
        ratio = found.ratios[stage].ratio
        err.print(
            f"[bold red]error:[/] {stage} takes {ratio:.2f} times as long as in "
            f"{escape(found.other)}, more than {found.max_slowdown:g}"
        )
