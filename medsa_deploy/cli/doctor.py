"""medsa-deploy doctor: what this machine or another device has and lacks, in tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from medsa_deploy import stages
from medsa_deploy.errors import UsageError

from . import console
from .console import out
from .options import Json

STYLES = {"ok": "green", "missing": "red", "unknown": "yellow"}


def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle: what it needs of the device, too")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="jetpack6, jetpack7, igx or x86; default this machine"),
    ] = None,
    tune: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE", help="Find this bundle's fastest backend here, for --backend auto"
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show what this machine has, and what is missing.

    medsa-deploy doctor

    medsa-deploy doctor --tune ckpt.medsa

    medsa-deploy doctor --device jetpack6 ckpt.medsa
    """
    if (bundle or device) and tune:
        raise UsageError("--tune measures this machine: give it without --device and BUNDLE")
    if bundle is not None or device is not None:
        report = stages.check_device(device, bundle)
        console.print_json(report) if json else _print_report(report)
        if report.missing:
            raise typer.Exit(1)
        return
    if tune is not None:
        with console.steps() as (on_step, _):
            tuning = stages.tune(tune, on_step=on_step)
        console.print_json(tuning) if json else _print_tuning(tuning)
        return
    diagnosis = stages.diagnose()
    console.print_json(diagnosis) if json else _print_diagnosis(diagnosis)
    if diagnosis.problems:
        raise typer.Exit(1)


def _print_diagnosis(diagnosis: stages.Diagnosis) -> None:
    memory = "" if diagnosis.memory_gb is None else f", {diagnosis.memory_gb:g} GB"
    console.print_facts(
        {
            "medsa-deploy": diagnosis.medsa_deploy,
            "Python": f"{diagnosis.python} on {diagnosis.system}",
            "processor": f"{diagnosis.processor}, {diagnosis.cores} cores{memory}",
            "ONNX Runtime": ", ".join(diagnosis.providers) or "not usable",
            "NVIDIA driver": "found" if diagnosis.nvidia_driver else "not found",
        }
    )
    for choice in diagnosis.tuning:
        out.print(
            f"[bold]auto[/] for {escape(choice.bundle)} is {choice.backend} with "
            f"{choice.threads or 'all'} thread(s): {choice.first_click_ms:.0f} ms "
            f"a first click on {choice.measured}"
        )
    for extra, libraries in diagnosis.libraries.items():
        missing = [name for name, version in libraries.items() if version is None]
        installed = [f"{name} {version}" for name, version in libraries.items() if version]
        hint = "" if extra == "runtime" else f": pip install 'medsa-deploy[{extra}]'"
        out.print(f"[bold]{extra}[/]  {', '.join(installed) or 'nothing installed'}")
        if missing:
            out.print(escape(f"    missing {', '.join(missing)}{hint}"), style="yellow")
    for problem in diagnosis.problems:
        console.print_error(problem)


def _print_report(report: stages.DeviceReport) -> None:
    of_bundle = "" if report.bundle is None else f", for {report.bundle}"
    out.print(f"[bold]{escape(report.device)}[/]  {escape(report.title + of_bundle)}")
    table = console.plain_table("", "needs", "has", "")
    for check in report.checks:
        style = STYLES[check.state]
        table.add_row(
            check.item, escape(check.needs), escape(check.has), f"[{style}]{check.state}[/]"
        )
    out.print(table)
    for check in report.checks:
        if check.remedy:
            out.print(escape(f"{check.item}: {check.remedy}"), style=STYLES[check.state])
    for check in report.missing:
        console.print_error(f"{check.item}: found {check.has}, expected {check.needs}")


def _print_tuning(tuning: stages.Tuning) -> None:
    chosen = (tuning.choice.backend, tuning.choice.threads)
    table = console.plain_table("backend", "threads", "first click")
    for candidate in tuning.candidates:
        auto = (candidate.backend, candidate.threads) == chosen
        table.add_row(
            candidate.backend,
            str(candidate.threads or "all"),
            f"{candidate.first_click_ms:.1f} ms{'  [bold green]auto[/]' if auto else ''}",
        )
    out.print(table)
    out.print(
        "medians, ONNX Runtime with all cores unless another is clearly faster; "
        f"stored in {escape(str(tuning.stored_in))}"
    )
