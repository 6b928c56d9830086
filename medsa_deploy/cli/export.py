"""medsa-deploy export: a checkpoint → a bundle, and its parity in a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from medsa_deploy import stages

from . import console
from .network_facts import print_guesses, print_network
from .options import (
    Base,
    Checkpoint,
    Images,
    Json,
    MaxMemory,
    OverrideOptions,
    Prefix,
    Weights,
    overrides_of,
    with_options,
)
from .parity_table import print_parity


@with_options
def export(
    checkpoint: Checkpoint,
    overrides: OverrideOptions,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Bundle to write; default beside the checkpoint"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle")] = False,
    base: Base = None,
    weights: Weights = None,
    prefix: Prefix = None,
    images: Images = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="Labels of --images: find the code that trained the network by trying"),
    ] = None,
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """Export a checkpoint as a bundle, and check that its masks equal the checkpoint's.

    medsa-deploy export ckpt.pth

    medsa-deploy export adapters.pth --base sam_vit_b_01ec64.pth --images my-images/

    medsa-deploy export medsam_vit_b.pth --preprocess medsam

    medsa-deploy export ckpt.pth --images my-images/ --masks my-labels/

    medsa-deploy export volumes.pth --depth-chunk 8 --intensity-window -175,250
    """
    parsed = overrides_of(overrides)
    with console.steps() as (on_step, _):
        result = stages.export_checkpoint(
            checkpoint,
            output=output,
            base=base,
            images=images,
            overrides=parsed,
            force=force,
            masks=masks,
            weights=weights,
            prefix=prefix,
            on_step=on_step,
        )
    console.print_json(result) if json else _print_export(result)


def _print_export(result: stages.Export) -> None:
    manifest = result.manifest
    console.out.print(f"[bold green]{escape(str(result.bundle))}[/]  in {result.seconds:.0f} s")
    print_network(manifest.network, manifest.conventions)
    print_guesses(result.guesses)
    _print_readings(result.readings)
    console.print_files([(file.path, file.bytes) for file in manifest.files])
    for parity in manifest.parity:
        print_parity(parity, "the checkpoint's own network")


def _print_readings(readings: Sequence[stages.Reading]) -> None:
    """Each code whose conventions were tried, with its Dice; the first was taken."""
    if not readings:
        return
    console.out.print("\nTried on your images and labels; the first was taken:")
    table = console.plain_table("trained with", "prompts", "Dice", "images")
    for reading in readings:
        dice = escape(reading.error or "") if reading.dice is None else f"{reading.dice:.3f}"
        table.add_row(reading.trained_with, reading.prompt or "", dice, str(reading.images))
    console.out.print(table)
