"""medsa-deploy profile: a bundle → its latencies on this machine, in tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from medsa_deploy import stages
from medsa_deploy.errors import UsageError
from medsa_deploy.evaluation.latency import Profile
from medsa_deploy.reports.latency import HEADERS, facts, figures

from . import console
from .console import out
from .options import (
    Backend,
    Bundle,
    Json,
    MaxMemory,
    NoCudaGraphs,
    Precision,
    Threads,
    with_options,
)

MOST_PARTS = 6
"""Largest parts of a graph's time that are shown."""


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """The options of profile."""

    runs: Annotated[int, typer.Option(help="Measured runs")] = 20
    image: Annotated[
        Path | None, typer.Option(help="Your image or volume; default a seeded random one")
    ] = None
    compare: Annotated[
        Path | None,
        typer.Option(metavar="OTHER.json", help="Earlier profile to compare with, written by -o"),
    ] = None
    max_slowdown: Annotated[
        float | None,
        typer.Option(help="With --compare: exit with 1 beyond this ratio; default 1.1"),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write the profile with every sample: .json"),
    ] = None
    html: Annotated[Path | None, typer.Option(help="Write a page with plots: .html")] = None
    backend: Backend = "onnxruntime"
    precision: Precision = "fp32"
    threads: Threads = None
    max_memory: MaxMemory = None
    no_cuda_graphs: NoCudaGraphs = False

    def latency(self, bundle: Path) -> stages.LatencyOptions:
        """Options of the measurement."""
        return stages.LatencyOptions(
            bundle=str(bundle),
            backend=self.backend,
            precision=self.precision,
            threads=self.threads,
            runs=self.runs,
            image=None if self.image is None else str(self.image),
            cuda_graphs=not self.no_cuda_graphs,
        )

    def targets(self) -> stages.ProfileTargets:
        """Options of the output and the comparison."""
        if self.max_slowdown is not None and self.compare is None:
            raise UsageError("--max-slowdown goes with --compare OTHER.json")
        slowdown = {} if self.max_slowdown is None else {"max_slowdown": self.max_slowdown}
        return stages.ProfileTargets(
            other=self.compare, json=self.output, html=self.html, **slowdown
        )


@with_options
def profile(bundle: Bundle, options: ProfileOptions, json: Json = False) -> None:
    """Measure how long loading, encoding and clicks take here, and where the time goes.

    medsa-deploy profile ckpt.medsa -o profile.json --html profile.html

    medsa-deploy profile ckpt.medsa --backend openvino --threads 4 --runs 50

    medsa-deploy profile ckpt.medsa --compare profile.json --max-slowdown 1.05
    """
    latency, targets = options.latency(bundle), options.targets()
    with console.steps() as (on_step, on_run):
        result = stages.profile_bundle(bundle, latency, targets, on_step=on_step, on_run=on_run)
    console.print_json(result) if json else _print_profile(result)
    if result.comparison is not None and result.comparison.regressions:
        raise typer.Exit(1)


def _print_profile(profile: Profile) -> None:
    """Latencies, times of layers, the comparison, then warnings."""
    console.print_facts(facts(profile))
    out.print()
    out.print(_latency_table(profile))
    for name, graph in profile.layers.items():
        if graph.layers:
            out.print(f"[bold]{name}[/]  {_shares(graph.blocks)}")
            out.print(f"[dim]{' ' * len(name)}  {_shares(graph.kinds)}[/]")
    _print_comparison(profile)
    for warning in profile.warnings:
        console.print_warning(warning)


def _latency_table(profile: Profile) -> Table:
    columns = len(HEADERS) if profile.slices > 1 else len(HEADERS) - 1
    table = Table(box=None, pad_edge=False, header_style="dim")
    for header in HEADERS[:columns]:
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    for name, latencies in profile.stages.items():
        table.add_row(*[name, *figures(latencies)][:columns])
    return table


def _shares(milliseconds: dict[str, float]) -> str:
    """The largest parts of a graph's time, in percent."""
    total = sum(milliseconds.values()) or 1.0
    largest = sorted(milliseconds.items(), key=lambda item: -item[1])[:MOST_PARTS]
    return ", ".join(f"{escape(name)} {100 * ms / total:.0f} %" for name, ms in largest)


def _print_comparison(profile: Profile) -> None:
    comparison = profile.comparison
    if comparison is None:
        return
    for difference in comparison.differences:
        console.print_warning(f"{comparison.other} is of {difference}")
    table = console.plain_table("", f"now / {escape(comparison.other)}", "95 % interval")
    for stage, ratio in comparison.ratios.items():
        table.add_row(stage, f"{ratio.ratio:.3f}", f"{ratio.low:.3f}…{ratio.high:.3f}")
    for figure, quotient in comparison.once.items():
        table.add_row(figure, f"{quotient:.3f}", "[dim]measured once[/]")
    out.print(table)
    for stage in comparison.regressions:
        console.print_error(
            f"{stage} takes {comparison.ratios[stage].ratio:.2f} times as long as in "
            f"{comparison.other}, more than {comparison.max_slowdown:g}"
        )
