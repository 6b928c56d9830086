"""Commands about this machine: doctor, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medsa_deploy import stages

from . import console
from .machine_tables import print_demonstration, print_diagnosis, print_litemedsam, print_tuning
from .options import Json


def doctor(
    tune: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="Measure its backends here, for --backend auto"),
    ] = None,
    json: Json = False,
) -> None:
    """Say what this machine has, and what is missing.

    medsa-deploy doctor

    medsa-deploy doctor --tune ckpt.medsa
    """
    if tune is not None:
        with console.steps() as on_step:
            tuned = stages.tune(tune, on_step=on_step)
        console.print_json(tuned) if json else print_tuning(tuned)
        return
    found = stages.diagnose()
    console.print_json(found) if json else print_diagnosis(found)
    if found.problems:
        raise typer.Exit(1)


def demo(
    model: Annotated[
        Literal["medsa", "litemedsam"],
        typer.Option(help="medsa: a small Med-SA, in 3D. litemedsam: its published weights, in 2D"),
    ] = "medsa",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write")] = Path("demo"),
    json: Json = False,
) -> None:
    """Export trained weights, segment a real MR volume, print Dice and timings.

    medsa-deploy demo

    medsa-deploy demo --model litemedsam
    """
    if model == "litemedsam":
        with console.steps() as on_step:
            lite = stages.demonstrate_litemedsam(output, on_step=on_step)
        console.print_json(lite) if json else print_litemedsam(lite)
        return
    with console.steps() as on_step:
        found = stages.demonstrate(output, on_step=on_step)
    console.print_json(found) if json else print_demonstration(found)
    if not found.verified:
        raise typer.Exit(1)
