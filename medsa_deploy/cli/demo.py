"""medsa-deploy demo: trained weights and a public MR volume → masks, their Dice and timings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from medsa_deploy import stages

from . import console
from .console import out
from .options import Json
from .parity_table import print_parity


def demo(
    model: Annotated[
        Literal["medsa", "automatic", "litemedsam"],
        typer.Option(
            help="medsa: a small 3D Med-SA; automatic: a small SAMed, without a click; litemedsam: "
            "its published weights, in 2D"
        ),
    ] = "medsa",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write")] = Path("demo"),
    json: Json = False,
) -> None:
    """Export trained weights, segment a real MR volume, print Dice and timings.

    medsa-deploy demo

    medsa-deploy demo --model automatic

    medsa-deploy demo --model litemedsam
    """
    if model == "automatic":
        with console.steps() as (on_step, on_count):
            tissues = stages.demonstrate_automatic(output, on_step=on_step, on_slice=on_count)
        console.print_json(tissues) if json else _print_automatic(tissues)
        if not tissues.verified:
            raise typer.Exit(1)
        return
    if model == "litemedsam":
        with console.steps() as (on_step, _):
            slices = stages.demonstrate_litemedsam(output, on_step=on_step)
        console.print_json(slices) if json else _print_litemedsam(slices)
        return
    with console.steps() as (on_step, _):
        demonstration = stages.demonstrate(output, on_step=on_step)
    console.print_json(demonstration) if json else _print_medsa(demonstration)
    if not demonstration.verified:
        raise typer.Exit(1)


def _print_medsa(demonstration: stages.Demonstration) -> None:
    print_parity(demonstration.parity, "the checkpoint's own network")
    count = len(demonstration.clicks)
    clicks = ", ".join(f"({x:g}, {y:g}, {z:g})" for x, y, z in demonstration.clicks)
    out.print(
        "\nA small Med-SA (HyP-Adpt, SD-Trans) on slices of the MNI T1 template (an average of 152 "
        f"heads)\nthat it was not trained on, from {count} clicks at {clicks}:"
    )
    _print_results(demonstration)


def _print_results(
    demonstration: stages.Demonstration | stages.AutomaticDemonstration,
) -> None:
    """Dice, times and files."""
    table = console.plain_table("structure", "Dice")
    for name, dice in demonstration.dice.items():
        table.add_row(name, f"{dice:.3f}")
    out.print(table)
    times = ", ".join(f"{name} {ms:.0f} ms" for name, ms in demonstration.timings_ms.items())
    out.print(f"{times} a slice (medians, ONNX Runtime on this CPU)")
    out.print(f"bundle       {escape(str(demonstration.bundle))}")
    out.print(f"segmentation {escape(str(demonstration.segmentation))}")
    out.print(f"montage      {escape(str(demonstration.montage))}")


def _print_automatic(demonstration: stages.AutomaticDemonstration) -> None:
    print_parity(demonstration.parity, "the checkpoint's own network")
    out.print(
        f"\nA small SAMed on {demonstration.slices} slices of the MNI T1 template, without a click."
        "\nDice is that of 24 slices that it was not trained on:"
    )
    _print_results(demonstration)


def _print_litemedsam(demonstration: stages.LiteMedSAMDemonstration) -> None:
    print_parity(demonstration.parity, "LiteMedSAM's own network")
    table = console.plain_table("slice", "structure", "prompt", "Dice")
    for result in demonstration.results:
        table.add_row(str(result.slice), result.structure, result.prompt, f"{result.dice:.3f}")
    out.print(table)
    out.print(
        f"encode {demonstration.encode_ms:.0f} ms an image, then {demonstration.prompt_ms:.0f} ms "
        "a prompt (medians, ONNX Runtime on this CPU)"
    )
    out.print(f"bundle  {escape(str(demonstration.bundle))}")
    out.print(f"overlay {escape(str(demonstration.overlay))}")
